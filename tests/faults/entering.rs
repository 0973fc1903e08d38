//! The steps into FT, raced and cut (rule 22; I3): the VM comes up, or the start is refused in words,
//! and nothing is left half-started.

use std::process::Output;
use std::time::Duration;

use testkit::fault::{Action, Order, Point};
use testkit::site::{Side, Site};
use testkit::{require_fail_points, require_kvm, require_lab};

use crate::common::{Clients, PATIENCE, alone, eventually, patient};
use crate::scene::{Chance, Scene, rounds, watcher};

/// What befalls a start.
type Blow = fn(&mut Scene<'_>, &mut Chance);

/// Undoes every blow.
fn repair(site: &mut Site) {
    site.lab.links[0].mend().unwrap();
    for side in [Side::A, Side::B] {
        site.order(side, &[]).unwrap();
        site.host(side).power_on().unwrap();
        if !matches!(site.axd(side).map(|axd| axd.exit_status()), Some(Ok(None))) {
            site.start_axd(side).unwrap();
        }
    }
    if !matches!(site.witness().map(|w| w.exit_status()), Some(Ok(None))) {
        site.start_witness().unwrap();
    }
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout);
    (text + String::from_utf8_lossy(&output.stderr)).into_owned()
}

/// Begins a start, strikes, repairs, and looks at what has become of the VM: never two that are seen;
/// up, or refused in words with nothing left; and in any case it can be had in the end.
fn struck(site: &mut Site, name: String, chance: &mut Chance, blow: Blow) {
    let watched = watcher(site);
    let mut scene = Scene::new(site, name);
    let start = scene.starting(&["--cpus", "2"]);
    blow(&mut scene, chance);
    std::thread::sleep(Duration::from_millis(chance.within(100..1000)));
    repair(scene.site);
    let output = start.wait_with_output().unwrap();
    println!("{}: {}", output.status, said(&output).trim_end());
    let violations = watched.stop().unwrap().violations;
    assert!(violations.is_empty(), "I1, I3: {violations:?}");

    // An axvm that was on the host that died has no last word.
    if output.status.code().is_some_and(|code| code != 0) {
        assert!(
            said(&output).contains("axvm: "),
            "no word of why: {output:?}"
        );
    }
    eventually("the VM runs, or nothing of it", || {
        scene.processes(Side::A) + scene.processes(Side::B) == 0 || scene.runs()
    });
    if !scene.runs() {
        scene.restarts();
    }
    scene.forget_addresses();
    Clients::start(scene.site).are_content();
    scene.end();
}

impl Scene<'_> {
    /// Some side says that it runs the guest and may show its outputs.
    fn runs(&self) -> bool {
        let report = self.site.show(Side::A, &self.vm);
        report.is_ok_and(|r| ["degraded", "protected"].contains(&r["state"].as_str().unwrap_or("")))
    }

    /// The VM is started by whichever side may; what the failed start left decides.
    fn restarts(&mut self) {
        eventually("it can be started again", || {
            let again = [Side::A, Side::B].into_iter().any(|side| {
                let known = self
                    .site
                    .axvm(side)
                    .args(["start", &self.vm])
                    .output()
                    .unwrap();
                println!("again on {}: {}", side.name(), said(&known).trim_end());
                known.status.success()
            });
            again || {
                let anew = self.starting(&["--cpus", "2"]).wait_with_output().unwrap();
                println!("anew: {}", said(&anew).trim_end());
                anew.status.success()
            }
        });
    }
}

/// A side's process dies when it reaches `point` for the n-th time.
fn dies(scene: &Scene<'_>, side: Side, point: Point, n: u64) {
    scene.order(side, Order::new(point, Action::Kill).after(n - 1));
    let happened = scene.site.wait_for_fault(side, &scene.vm, point, PATIENCE);
    happened.unwrap();
}

#[test]
fn a_start_whose_process_dies_at_the_question_for_ft_leaves_no_riddle() {
    require_kvm!();
    require_lab!();
    require_fail_points!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    // The first question of a primary is the one for the start itself.
    let blows: [(&str, Blow); 4] = [
        ("a-at-asking", |scene, _| {
            dies(scene, Side::A, Point::Asking, 2)
        }),
        ("a-at-granted", |scene, _| {
            dies(scene, Side::A, Point::Granted, 2)
        }),
        ("b-at-staged", |scene, _| {
            dies(scene, Side::B, Point::Staged, 1)
        }),
        ("b-at-acked", |scene, _| {
            dies(scene, Side::B, Point::Acked, 1)
        }),
    ];
    rounds(41, |chance| {
        for (name, blow) in blows {
            let name = format!("{name}-{}", chance.within(0..1 << 32));
            struck(&mut site, name, chance, blow);
        }
    });
}

/// A start takes about so long.
fn some_time(chance: &mut Chance) {
    std::thread::sleep(Duration::from_millis(chance.within(0..800)));
}

#[test]
fn a_start_struck_at_any_moment_comes_up_or_leaves_nothing() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = Site::new(patient().without_reprotection()).unwrap();
    let blows: [(&str, Blow); 5] = [
        ("host-a", |scene, chance| {
            some_time(chance);
            scene.site.host(Side::A).kill_all().unwrap();
        }),
        ("host-b", |scene, chance| {
            some_time(chance);
            scene.site.host(Side::B).kill_all().unwrap();
        }),
        ("witness", |scene, chance| {
            some_time(chance);
            scene.site.witness().unwrap().kill().unwrap();
        }),
        ("link", |scene, chance| {
            some_time(chance);
            scene.site.lab.links[0].silence_both().unwrap();
        }),
        ("axd-b", |scene, chance| {
            some_time(chance);
            scene.site.axd(Side::B).unwrap().kill().unwrap();
        }),
    ];
    rounds(42, |chance| {
        for (name, blow) in blows {
            let name = format!("{name}-{}", chance.within(0..1 << 32));
            struck(&mut site, name, chance, blow);
        }
    });
}
