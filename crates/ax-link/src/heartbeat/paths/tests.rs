//! Paths on a fake clock: milliseconds in, events out.

use super::*;

const MS: u64 = 1_000_000;

struct Rig {
    paths: Paths,
    now: u64,
    seen: Vec<PathEvent>,
}

impl Rig {
    /// So many paths, all of them heard.
    fn of(open: usize) -> Rig {
        let mut rig = Rig {
            paths: Paths::new(&Timing::default()),
            now: 1_000_000 * MS,
            seen: Vec::new(),
        };
        (0..open).for_each(|path| rig.paths.opened(path, rig.now));
        rig.run(50, &(0..open).collect::<Vec<_>>(), &[]);
        assert_eq!(rig.seen, []);
        rig
    }

    /// Lets time pass with a heartbeat every 10 ms on these paths; on `deaf` ones the peer says so.
    fn run(&mut self, ms: u64, heard: &[usize], deaf: &[usize]) {
        for _ in 0..ms / 10 {
            self.now += 10 * MS;
            for path in heard {
                let event = self.paths.heard(*path, self.now, deaf.contains(path));
                self.seen.extend(event);
            }
            while let Some(event) = self.paths.tick(self.now) {
                self.seen.push(event);
            }
        }
    }
}

use PathEvent::{Back, Lost};

#[test]
fn a_path_that_falls_silent_beside_another_is_lost_within_half_the_detection_time_and_comes_back() {
    let mut rig = Rig::of(2);
    rig.run(20, &[1], &[]);
    assert_eq!(rig.seen, []);
    rig.run(30, &[1], &[]);
    assert_eq!(rig.seen, [Lost(0, PathLoss::Silent)]);
    assert!(rig.paths.is_deaf(0) && !rig.paths.is_deaf(1));
    rig.run(1000, &[1], &[]);
    assert_eq!(rig.seen.len(), 1, "it is said once");
    rig.run(10, &[0, 1], &[]);
    assert_eq!(rig.seen[1..], [Back(0)]);
    assert!(!rig.paths.is_deaf(0));
}

#[test]
fn a_peer_that_stands_still_loses_no_path() {
    let mut rig = Rig::of(3);
    rig.run(5000, &[], &[]);
    rig.run(50, &[0, 1, 2], &[]);
    assert_eq!(rig.seen, []);
}

#[test]
fn a_single_path_is_never_lost_by_silence() {
    let mut rig = Rig::of(1);
    rig.run(5000, &[], &[]);
    assert_eq!(rig.seen, []);
    assert!(!rig.paths.is_deaf(0));
}

#[test]
fn what_the_peer_does_not_hear_is_lost_though_it_is_heard() {
    let mut rig = Rig::of(2);
    rig.run(50, &[0, 1], &[1]);
    assert_eq!(rig.seen, [Lost(1, PathLoss::OneWay)]);
    rig.run(10, &[0, 1], &[]);
    assert_eq!(rig.seen[1..], [Back(1)]);
}

#[test]
fn a_path_that_carries_one_way_only_makes_no_other_path_late() {
    let mut rig = Rig::of(2);
    // Nothing goes out on 1: it is no measure for 0, on which the peer stands still for a moment.
    rig.run(50, &[0, 1], &[1]);
    rig.seen.clear();
    rig.run(60, &[1], &[1]);
    assert_eq!(rig.seen, []);
}

#[test]
fn a_connection_that_ends_is_a_lost_path_and_a_new_one_has_its_time_to_be_heard() {
    let mut rig = Rig::of(2);
    rig.seen.extend(rig.paths.closed(1));
    assert_eq!(rig.seen, [Lost(1, PathLoss::Broken)]);
    assert!(rig.paths.wants_dialling(1, rig.now));
    assert!(rig.paths.another_works(1, rig.now) && !rig.paths.another_works(0, rig.now));
    rig.paths.opened(1, rig.now);
    assert!(!rig.paths.wants_dialling(1, rig.now));
    rig.run(20, &[0], &[]);
    assert!(!rig.paths.is_deaf(1));
    rig.run(100, &[0], &[]);
    assert!(rig.paths.is_deaf(1));
    assert!(
        rig.paths.wants_dialling(1, rig.now),
        "nothing comes by it: another may"
    );
    rig.run(10, &[0, 1], &[]);
    assert_eq!(rig.seen[1..], [Back(1)]);
}

#[test]
fn an_error_beside_a_path_that_is_silent_itself_is_not_explained_by_it() {
    let mut rig = Rig::of(2);
    rig.run(100, &[0], &[]);
    assert!(!rig.paths.another_works(0, rig.now));
    assert!(rig.paths.another_works(1, rig.now));
}
