//! The `axd` program from outside: configuration errors, exit codes, the witness, the self-check.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

mod common;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Output, Stdio};

use common::{Host, Pair, axd_program, exchange_keys, free_port, stand_in};

fn run(args: &[&str]) -> (i32, String) {
    told(axd_program().args(args).output().unwrap())
}

fn told(output: Output) -> (i32, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8(text).unwrap(),
    )
}

#[test]
fn a_bad_configuration_is_exit_2_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("axd.toml");
    let path = file.to_str().unwrap();
    let cases: &[(&str, &str)] = &[
        (
            "name = \"a\"\ndata_dir = \"/d\"\nheart_beat = 1\n",
            "line 3",
        ),
        ("name = \"a\"\ndata_dir = \"/d\"\ndetect_ms = 3\n", ":3:"),
        ("name = \"a\"\n", "data_dir"),
        ("name = \"a\n", "line 1"),
    ];
    for (text, word) in cases {
        std::fs::write(&file, text).unwrap();
        for args in [&["--config", path][..], &["selfcheck", "--config", path]] {
            let (code, said) = run(args);
            assert_eq!(code, 2, "{text:?}: {said}");
            assert!(
                said.contains(word) && said.contains(path),
                "{text:?}: {said}"
            );
        }
    }
    let (code, said) = run(&["--config", "/no/such/axd.toml"]);
    assert_eq!(code, 2);
    assert!(said.contains("/no/such/axd.toml"), "{said}");
    for args in [
        &["--colour"][..],
        &["frobnicate"],
        &["witness"],
        &["witness", "--data-dir", "/d", "--name", "A B"],
        &["pair", "--config", path, "--token", "junk"],
    ] {
        std::fs::write(&file, "name = \"a\"\ndata_dir = \"/tmp/ax-never\"\n").unwrap();
        let (code, said) = run(args);
        assert_eq!(code, 2, "{args:?}: {said}");
    }
}

#[test]
fn what_is_taken_is_named_and_a_second_axd_stays_out() {
    let mut pair = Pair::new();
    pair.a.start();
    let config = pair.a.config();
    let (code, said) = run(&["--config", config.to_str().unwrap()]);
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("another axd uses"), "{said}");

    // Its port is taken by something else.
    let text = std::fs::read_to_string(pair.b.config()).unwrap();
    let port: u16 = text
        .lines()
        .find_map(|l| l.strip_prefix("listen = \"127.0.0.2:"))
        .and_then(|rest| rest.trim_end_matches('"').parse().ok())
        .unwrap();
    let squatter = TcpListener::bind(("127.0.0.2", port)).unwrap();
    let (code, said) = run(&["--config", pair.b.config().to_str().unwrap()]);
    assert_eq!(code, 10, "{said}");
    assert!(said.contains(&format!("127.0.0.2:{port}")), "{said}");
    drop(squatter);

    // A socket that another axd answers on is not taken from it.
    let other = Host {
        name: "c".into(),
        dir: pair.path().join("c"),
        axd: None,
    };
    std::fs::create_dir_all(&other.dir).unwrap();
    let text = format!(
        "name = \"c\"\ndata_dir = {:?}\nsocket = {:?}\nlisten = \"127.0.0.3:{}\"\nsecurity = \"plain\"\n",
        other.dir,
        pair.a.socket(),
        free_port()
    );
    std::fs::write(other.config(), text).unwrap();
    let (code, said) = run(&["--config", other.config().to_str().unwrap()]);
    assert_eq!(code, 10, "{said}");
    assert!(said.contains("another axd answers there"), "{said}");
    assert!(pair.a.list().is_empty(), "the first one is as it was");
}

#[test]
fn the_self_check_names_what_is_wrong() {
    let mut pair = Pair::new();
    let dir = pair.path().join("w");
    std::fs::create_dir_all(&dir).unwrap();
    let witness_config = dir.join("witness.toml");
    let port = free_port();
    let text = format!("name = \"w\"\ndata_dir = {dir:?}\nlisten = \"127.0.0.3:{port}\"\n");
    std::fs::write(&witness_config, text).unwrap();
    let mut text = std::fs::read_to_string(pair.a.config()).unwrap();
    text.push_str(&format!(
        "\n[witness]\nname = \"w\"\naddresses = [\"127.0.0.3:{port}\"]\n"
    ));
    std::fs::write(pair.a.config(), text).unwrap();

    let check = |host: &Host| {
        let mut command = axd_program();
        command.args(["selfcheck", "-o", "json", "--config"]);
        let output = command
            .arg(host.config())
            .env("AX_VMM", stand_in())
            .output();
        let (code, text) = told(output.unwrap());
        let checks: Vec<serde_json::Value> = text
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .collect();
        (code, checks)
    };
    let found = |checks: &[serde_json::Value], name: &str| {
        let check = checks.iter().find(|c| c["check"] == name);
        check.unwrap_or_else(|| panic!("no {name}: {checks:?}"))["ok"] == true
    };
    // Neither peer nor witness is there yet.
    let (code, checks) = check(&pair.a);
    assert_ne!(code, 0);
    assert!(!found(&checks, "peer b") && !found(&checks, "witness w"));

    exchange_keys(&witness_config, &pair.a.config());
    let mut witness = axd_program()
        .args(["witness", "--config"])
        .arg(&witness_config)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(witness.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    assert!(line.contains("ready"), "{line}");
    pair.b.start();
    let (code, checks) = check(&pair.a);
    assert!(
        found(&checks, "peer b") && found(&checks, "witness w"),
        "{checks:?}"
    );
    assert!(found(&checks, "link 127.0.0.1"));
    // The stand-in finds fault with dirty tracking wherever /dev/kvm can be opened.
    assert_ne!(code, 0);
    assert!(checks.iter().any(|c| c["ok"] == false));
    // Orderly end.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(witness.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(witness.wait().unwrap().success());
}

#[test]
fn help_manual_and_completions_are_there() {
    for args in [
        &["--help"][..],
        &["pair", "--help"],
        &["man"],
        &["completions", "bash"],
        &["--version"],
    ] {
        let (code, said) = run(args);
        assert_eq!(code, 0, "{args:?}: {said}");
        assert!(said.contains("axd"), "{args:?}: {said}");
    }
    let (_, help) = run(&["--help"]);
    for word in [
        "Examples:",
        "Exit codes:",
        "axd pair",
        "axd witness",
        "selfcheck",
    ] {
        assert!(help.contains(word), "{word:?} is not in the help");
    }
}
