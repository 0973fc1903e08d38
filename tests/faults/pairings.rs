//! A failover with each kind of link, dirty source and number of vCPUs, with and without digests of
//! the whole RAM: every two of these meet.

use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

use crate::common::{alone, patient};
use crate::scene::{ANSWERS, Scene};

fn fails_over(mtls: bool, pairings: [[&str; 3]; 3]) {
    let spec = SiteSpec { mtls, ..patient() };
    let mut site = Site::new(spec.without_reprotection()).unwrap();
    for [dirty, cpus, verify] in pairings {
        let mut scene = Scene::new(&mut site, format!("{dirty}-{cpus}-{verify}"));
        let mut options = vec!["--dirty", dirty, "--cpus", cpus];
        if verify != "never" {
            options.extend(["--verify-every", verify]);
        }
        let clients = scene.with_clients(&options);
        scene.site.host(Side::A).kill_all().unwrap();
        clients.go_on(ANSWERS);
        scene.one_is_left(Some(Side::B));
        let log = scene.site.vm_log(Side::B, &scene.vm);
        assert!(!log.contains("DIVERGED"), "{log}");
        clients.are_content();
        scene.power_cycle(Side::A);
        scene.end();
    }
}

#[test]
fn with_mutual_tls_a_host_dies_whatever_the_dirty_source_and_number_of_vcpus() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let pairings = [
        ["ring", "1", "7"],
        ["bitmap", "2", "never"],
        ["ring", "4", "never"],
    ];
    fails_over(true, pairings);
}

#[test]
fn on_a_plain_link_a_host_dies_whatever_the_dirty_source_and_number_of_vcpus() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let pairings = [
        ["bitmap", "1", "never"],
        ["ring", "2", "7"],
        ["bitmap", "4", "7"],
    ];
    fails_over(false, pairings);
}
