//! Cut cables with both sides alive (I1, I3; rules 20–24).

use std::time::Duration;

use testkit::net::{Cable, Toward};
use testkit::site::{Side, Site, SiteSpec};
use testkit::{require_kvm, require_lab};

use crate::common::alone;
use crate::scene::{ANSWERS, SETTLE, Scene};

/// Time enough between a cut and its discovery to see that nothing leaves meanwhile.
const SLOW: &str = "detect_ms = 1200\nstall_ms = 4000";
/// Less than the rest of that time.
const UNDETECTED: Duration = Duration::from_millis(600);
/// Longer than the detection takes.
const DETECTED: Duration = Duration::from_millis(2500);

fn site() -> Site {
    let extra = SLOW.into();
    let spec = SiteSpec {
        extra,
        ..SiteSpec::default()
    };
    Site::new(spec.without_reprotection()).unwrap()
}

type Cut = fn(&Cable);

/// With acknowledgements or epochs cut off nothing leaves until one side has been granted to run;
/// exactly one is, and nobody outside can tell.
#[test]
fn a_cut_link_silences_both_sides_until_exactly_one_is_granted_to_go_on() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    let cuts: [(&str, Cut); 4] = [
        ("cut-both", |link| link.silence_both().unwrap()),
        ("cut-forward", |link| link.silence(Toward::Second).unwrap()),
        ("cut-backward", |link| link.silence(Toward::First).unwrap()),
        ("unplugged", |link| link.unplug().unwrap()),
    ];
    for (name, cut) in cuts {
        let scene = Scene::new(&mut site, name);
        let clients = scene.with_clients(&[]);
        cut(&scene.site.lab.links[0]);
        std::thread::sleep(SETTLE);
        scene.is_silent(&clients, UNDETECTED);
        clients.go_on(ANSWERS);
        scene.one_is_left(None);
        clients.are_content();
        scene.site.lab.links[0].mend().unwrap();
        scene.end();
    }
}

/// I3: with the witness out of reach of both, a cut link leaves two live sides and no permission.
#[test]
fn a_cut_link_without_the_witness_silences_both_sides_until_it_is_back() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    let scene = Scene::new(&mut site, "vm");
    let clients = scene.with_clients(&[]);
    scene.site.lab.uplinks.witness.silence_both().unwrap();
    scene.site.lab.links[0].silence_both().unwrap();
    std::thread::sleep(SETTLE);
    scene.is_silent(&clients, DETECTED);
    assert_eq!(scene.report(Side::A, "state"), "held");
    scene.site.lab.uplinks.witness.mend().unwrap();
    clients.go_on(ANSWERS);
    scene.one_is_left(None);
    clients.are_content();
}

/// A host that nobody can reach does not run the guest, though it lives and sees no reason to stop;
/// when its cables are mended it finds itself fenced.
#[test]
fn a_host_cut_off_from_everybody_loses_to_the_one_that_reaches_the_witness() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    for side in [Side::A, Side::B] {
        let scene = Scene::new(&mut site, format!("cut-off-{}", side.name()));
        let clients = scene.with_clients(&[]);
        let uplink = match side {
            Side::A => &scene.site.lab.uplinks.a,
            Side::B => &scene.site.lab.uplinks.b,
        };
        uplink.silence_both().unwrap();
        scene.site.lab.links[0].silence_both().unwrap();
        clients.go_on(ANSWERS);
        assert_eq!(
            scene.processes(side),
            1,
            "the host that is cut off lives on"
        );
        uplink.mend().unwrap();
        scene.site.lab.links[0].mend().unwrap();
        clients.go_on(ANSWERS);
        scene.one_is_left(Some(side.other()));
        clients.are_content();
        scene.end();
    }
}

/// Without the business network the primary keeps its shadow and its guest: there is nobody to show
/// outputs to, but nothing to decide either.
#[test]
fn a_primary_without_its_business_network_stays_protected_and_goes_on_when_it_is_back() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = site();
    let scene = Scene::new(&mut site, "vm");
    let clients = scene.with_clients(&[]);
    scene.site.lab.uplinks.a.silence_both().unwrap();
    std::thread::sleep(SETTLE);
    scene.is_silent(&clients, DETECTED);
    assert_eq!(scene.report(Side::A, "state"), "protected");
    scene.site.lab.uplinks.a.mend().unwrap();
    clients.go_on(ANSWERS);
    assert_eq!(scene.report(Side::A, "primary"), "a");
    clients.are_content();
}
