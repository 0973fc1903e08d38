//! The simulation itself: nothing is violated, a seed repeats exactly, and a broken rule is noticed.

#![allow(clippy::unwrap_used)]

use std::process::Command;

/// What `ax-sim` prints with these arguments, and whether it found nothing wrong.
fn simulate(args: &[&str]) -> (String, bool) {
    let done = Command::new(env!("CARGO_BIN_EXE_ax-sim"))
        .args(args)
        .output()
        .unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    (said, done.status.success())
}

#[test]
fn five_hundred_lives_of_a_pair_violate_nothing() {
    let seeds = std::env::var("AX_SEEDS").unwrap_or_else(|_| "500".into());
    let (said, held) = simulate(&["--seeds", &seeds]);
    assert!(held, "{said}");
    assert!(
        said.contains(&format!("{seeds} seeds: 0 violations")),
        "{said}"
    );
}

#[test]
fn a_seed_repeats_exactly() {
    let once = || simulate(&["--seeds", "6", "--first", "40", "--story", "--jobs", "1"]).0;
    let (one, other) = (once(), once());
    assert!(one.contains("trace"), "{one}");
    assert_eq!(one, other);
}

/// What breaks is noticed: the judge can say no.
fn notices(rule: &str, fault: &str, says: &str) {
    let (said, held) = simulate(&["--seeds", "60", "--broken", rule, "--only", fault]);
    assert!(!held, "{said}");
    assert!(said.contains(says), "{said}");
}

#[test]
fn a_permission_that_does_not_expire_is_noticed() {
    notices("permission", "stands-still", "I3");
}

#[test]
fn a_flush_that_makes_nothing_durable_is_noticed() {
    notices("flush", "power-both", "I4");
}

#[test]
fn a_start_from_a_copy_that_is_not_current_is_noticed() {
    notices("cold-start", "power-primary", "I4");
}

#[test]
fn outputs_that_are_not_sent_again_are_noticed() {
    notices("resend", "kill-primary", "lost in between");
}
