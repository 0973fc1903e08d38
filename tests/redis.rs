//! Redis's own clients (Debian's redis-tools), which nobody here wrote, across a failover.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{GUEST, alone, patient, protected};
use probe_guest::port;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab, require_program};

fn client(site: &Site, program: &str) -> Command {
    let mut command = site.lab.client.command(program);
    command.args(["-h", &GUEST.to_string(), "-p", &port::RESP.to_string()]);
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// One connection, one command after the other, each answer as if nothing had happened.
#[test]
fn redis_cli_is_answered_as_if_nothing_had_happened() {
    require_kvm!();
    require_program!("redis-cli", "redis-tools");
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let mut cli = client(&site, "redis-cli")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut typed = cli.stdin.take().unwrap();
    let mut expected = String::new();
    const TURNS: u32 = 300;
    for n in 0..TURNS {
        let commands = format!("SET k{n} v{n}\nGET k{n}\nINCR n\nLPUSH list {n}\n");
        typed.write_all(commands.as_bytes()).unwrap();
        expected += &format!("OK\nv{n}\n{}\n{}\n", n + 1, n + 1);
        std::thread::sleep(Duration::from_millis(5));
        if n == TURNS / 3 {
            site.host(Side::A).kill_all().unwrap();
        }
    }
    drop(typed);
    let output = cli.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complaints}");
    assert_eq!(complaints, "");
    assert_eq!(said, expected);
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));

    let after = |words: &[&str]| {
        let output = client(&site, "redis-cli").args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(after(&["GET", "n"]), format!("{TURNS}\n"));
    let list: String = (0..TURNS).rev().map(|n| format!("{n}\n")).collect();
    assert_eq!(after(&["LRANGE", "list", "0", "-1"]), list);
}

#[test]
fn redis_benchmark_runs_across_a_failover_without_an_error() {
    require_kvm!();
    require_program!("redis-benchmark", "redis-tools");
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    let mut benchmark = client(&site, "redis-benchmark");
    benchmark.args(["-c", "20", "-n", "200000", "-q", "-t", "set,get,incr"]);
    let mut running = benchmark.spawn().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(
        running.try_wait().unwrap().is_none(),
        "it ended before the failover"
    );
    site.host(Side::A).kill_all().unwrap();
    assert!(
        running.try_wait().unwrap().is_none(),
        "it ended before the failover"
    );
    let done = running.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    assert!(!said.to_lowercase().contains("error"), "{said}");
    for test in ["SET", "GET", "INCR"] {
        assert!(said.contains(&format!("{test}: ")), "{said}");
    }
    assert_eq!(site.primary(Side::B, "vm").unwrap(), Some(Side::B));
}
