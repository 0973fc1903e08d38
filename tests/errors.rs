//! Everything that can be missing, wrong or taken when a VM is started: its documented exit code
//! (docs/cli.md), a message that names the host, the cause and what to do, and nothing left behind.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::talk::{SIDES, axvm, image, vm_processes};
use common::{alone, eventually, patient};
use serde_json::Value;
use testkit::product::Product;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

/// What a start could leave on a host, but for logs and the host's own history.
fn leavings(site: &Site) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for side in SIDES {
        collect(&site.data_dir(side), &mut found);
        found.extend(vm_processes(site, side).into_iter().map(|(_, l)| l.into()));
    }
    found
}

fn collect(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    // A folder may go away while it is looked at.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            collect(&path, found);
        } else if !["log", "vm.toml"].contains(&name.as_str()) && !name.starts_with("events") {
            found.insert(path);
        }
    }
}

/// Orders that must fail, on one site, each with a look at what is left.
struct Refusals<'a> {
    site: &'a Site,
    before: BTreeSet<PathBuf>,
}

impl<'a> Refusals<'a> {
    fn on(site: &'a Site) -> Refusals<'a> {
        let before = leavings(site);
        Refusals { site, before }
    }

    /// `axvm start bad …` on host a fails like that, for people and for programs.
    fn start(&self, options: &[&str], exit: i32, words: &[&str]) {
        let mut args = vec!["start", "bad"];
        args.extend(options);
        self.axvm(&args, exit, words);
    }

    fn axvm(&self, args: &[&str], exit: i32, words: &[&str]) {
        let (code, told, why) = axvm(self.site, Side::A, args);
        assert_eq!(code, exit, "{args:?}: {told}{why}");
        assert!(told.is_empty(), "{args:?}: {told}");
        for word in words {
            assert!(why.contains(word), "{args:?}: {word:?} is not in {why}");
        }
        self.nothing_is_left(args);
        self.json(args, exit, words);
    }

    fn json(&self, args: &[&str], exit: i32, words: &[&str]) {
        let mut args = args.to_vec();
        args.extend(["-o", "json"]);
        let (code, told, why) = axvm(self.site, Side::A, &args);
        assert_eq!(code, exit, "{args:?}: {told}{why}");
        let document: Value = serde_json::from_str(&told).unwrap_or_else(|e| {
            panic!("{args:?}: no JSON document ({e}) in {told:?} {why}");
        });
        assert_eq!(document["ok"], false, "{told}");
        assert_eq!(document["exit"], exit, "{told}");
        let error = document["error"].as_str().unwrap();
        for word in words {
            assert!(error.contains(word), "{args:?}: {word:?} is not in {told}");
        }
        self.nothing_is_left(&args);
    }

    fn nothing_is_left(&self, args: &[&str]) {
        eventually("nothing is left", || leavings(self.site) == self.before);
        for side in SIDES {
            let (code, told, _) = axvm(self.site, side, &["show", "bad"]);
            assert!(code == 5 || code == 6, "{args:?} left a definition: {told}");
        }
    }
}

const FT: &[&str] = &["--probe", "--memory", "64M"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [FT, more].concat()
}

#[test]
fn what_a_start_lacks_is_named_and_nothing_is_left() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = Site::new(patient()).unwrap();
    for side in SIDES {
        std::fs::create_dir_all(site.data_dir(side).join("images")).unwrap();
    }
    let make = |side, name: &str, size| {
        let file = File::create(image(&site, side, name)).unwrap();
        file.set_len(size).unwrap();
        file
    };
    for name in ["held.img", "there.img"] {
        make(Side::A, name, 1 << 20);
    }
    let there = make(Side::B, "there.img", 1 << 20);
    make(Side::A, "odd.img", 4 << 20);
    make(Side::B, "odd.img", 3 << 20);
    site.lab.a.add_tap("onlya").unwrap();
    site.lab.b.add_tap("onlyb").unwrap();
    // A VM of mode none that runs beside, and shall go on.
    let beside = [
        "start", "beside", "--mode", "none", "--probe", "--memory", "64M",
    ];
    let disk = ["--disk", "held.img"];
    site.run_axvm(Side::A, &[&beside[..], &disk].concat())
        .unwrap();
    let refused = Refusals::on(&site);

    refused.start(&with(&["--disk", "no.img"]), 9, &["a:", "no.img", "size="]);
    refused.start(
        &with(&["--disk", "held.img"]),
        9,
        &["a:", "held.img", "in use"],
    );
    there.lock().unwrap();
    refused.start(
        &with(&["--disk", "there.img"]),
        9,
        &["b:", "there.img", "in use"],
    );
    there.unlock().unwrap();
    refused.start(
        &with(&["--disk", "odd.img,size=4M"]),
        9,
        &["b:", "odd.img", "3145728", "4194304"],
    );
    refused.start(
        &with(&["--disk", "odd.img,size=5M", "--disk", "new.img,size=1M"]),
        9,
        &["a:", "odd.img", "4194304", "5242880"],
    );
    refused.start(
        &["--kernel", "/no/such/vmlinuz", "--disk", "new.img,size=1M"],
        2,
        &["a:", "/no/such/vmlinuz"],
    );
    let no_kernel = site.dir().join("no-kernel");
    let path = no_kernel.to_str().unwrap();
    for content in [
        "",
        "neither ELF nor bzImage, and long enough to be looked at",
    ] {
        std::fs::write(&no_kernel, content).unwrap();
        refused.start(
            &["--kernel", path, "--disk", "new.img,size=1M"],
            2,
            &["a:", path, "bzImage"],
        );
    }
    refused.start(
        &["--probe", "--memory", "900G", "--disk", "new.img,size=1M"],
        11,
        &["a:", "memory", "921600"],
    );
    for (tap, host) in [("none0", ": "), ("onlyb", "a: "), ("onlya", "b: ")] {
        let net = format!("tap={tap}");
        let net = with(&["--net", &net, "--disk", "new.img,size=1M"]);
        refused.start(&net, 10, &[host, tap, "ip tuntap add"]);
    }
    let (code, told, _) = axvm(&site, Side::B, &["-o", "json", "show", "beside"]);
    assert_eq!(code, 0, "{told}");
    assert!(told.contains("\"unprotected\""), "{told}");
    // None of it stands in the way of a start that lacks nothing.
    let good = [
        "start",
        "good",
        "--disk",
        "there.img",
        "--net",
        "tap=axtap0",
    ];
    site.run_axvm(Side::A, &[&good[..], FT].concat()).unwrap();
}

#[test]
fn what_is_said_wrong_is_named_with_its_place() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = Site::new(patient()).unwrap();
    let refused = Refusals::on(&site);
    let file = site.dir().join("vm.toml");
    let path = file.to_str().unwrap();
    let good =
        "mode = \"ft\"\nmemory = \"64M\"\ncpus = 1\nboot = { kind = \"probe\", cmdline = \"\" }\n";
    let cases = [
        (format!("{good}colour = 1\n"), ["line 5", "colour"]),
        (good.replace("\"64M\"", "\"much\""), ["line 2", "much"]),
        (good.replace("\"ft\"", "\"turbo\""), ["line 1", "turbo"]),
        (
            good.replace("cpus = 1", "cpus = \"two\""),
            ["line 3", "two"],
        ),
        (good.replace("probe", "floppy"), ["line 4", "floppy"]),
        (
            format!("{good}[[disks]]\nsize = \"1M\"\n"),
            ["line 5", "path"],
        ),
    ];
    for (text, words) in &cases {
        std::fs::write(&file, text).unwrap();
        refused.start(&["--config", path], 2, &[words[0], words[1], path]);
    }
    refused.start(&["--config", "/no/such/vm.toml"], 2, &["/no/such/vm.toml"]);
    refused.start(&with(&["--cpus", "9"]), 2, &["9", "1 to 8"]);
    refused.start(&["--probe", "--memory", "1M"], 2, &["memory", "16M"]);
    refused.start(&with(&["--disk", "x.img,size=1000"]), 2, &["x.img", "512"]);
    refused.start(&[], 5, &["bad", "--probe"]);
    // Words that are no option are refused before axd is asked; usage goes to standard error.
    for (words, word) in [
        (&["start", "bad", "--probe", "--mode", "turbo"][..], "turbo"),
        (&["start", "bad", "--probe", "--memory", "much"], "much"),
        (&["start", "bad", "--colour"], "--colour"),
        (&["begin", "bad"], "begin"),
        (&[], "Usage"),
    ] {
        let (code, told, why) = axvm(&site, Side::A, words);
        assert_eq!((code, told.as_str()), (2, ""), "{words:?}: {why}");
        assert!(why.contains(word), "{words:?}: {why}");
    }
    for order in [
        &["stop", "bad"][..],
        &["stop", "bad", "--force"],
        &["reboot", "bad"],
        &["pause", "bad"],
        &["resume", "bad"],
        &["failover", "bad"],
        &["kill", "bad"],
        &["show", "bad"],
        &["undefine", "bad"],
        &["autostart", "bad", "on"],
    ] {
        refused.axvm(order, 5, &["bad"]);
    }
    refused.axvm(&["define", "BAD!", "--probe"], 2, &["BAD!", "a-z"]);
}

#[test]
fn who_does_not_answer_is_named_and_nothing_is_left() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let mut site = Site::new(patient()).unwrap();
    let new = with(&["--disk", "new.img,size=1M"]);
    let start = [&["start", "bad"][..], &new].concat();
    let before = leavings(&site);

    site.witness().unwrap().kill().unwrap();
    // One turn only: it is waited for a while.
    let refused = Refusals {
        site: &site,
        before,
    };
    refused.json(&start, 12, &["a:", "bad", "witness"]);
    let before = refused.before;
    site.start_witness().unwrap();

    site.axd(Side::B).unwrap().kill().unwrap();
    let refused = Refusals {
        site: &site,
        before,
    };
    refused.start(&new, 8, &["host b", "--alone-ok"]);
    let before = refused.before;
    site.axd(Side::A).unwrap().kill().unwrap();
    // Its process ends a moment after the one that stands for it here.
    eventually("axd is gone", || {
        axvm(&site, Side::A, &["list"]).2.contains("refused")
    });
    let refused = Refusals {
        site: &site,
        before,
    };
    refused.start(&new, 6, &["axd", "is it running", "a.sock"]);

    site.start_axd(Side::B).unwrap();
    site.start_axd(Side::A).unwrap();
    site.run_axvm(Side::A, &start).unwrap();
}

/// A second axd on a host that has one.
#[test]
fn a_second_axd_stays_out_and_leaves_the_first_as_it_is() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = Site::new(patient()).unwrap();
    let start = ["start", "vm", "--disk", "vm.img,size=1M"];
    site.run_axvm(Side::A, &[&start[..], FT].concat()).unwrap();
    let before = leavings(&site);
    let own = std::fs::read_to_string(site.config(Side::A)).unwrap();
    let elsewhere = site.dir().join("c");
    std::fs::create_dir_all(&elsewhere).unwrap();
    let moved = |key: &str, text: &str| {
        let line = own.lines().find(|l| l.starts_with(key)).unwrap();
        text.replace(line, &format!("{key} = {:?}", elsewhere.join(key)))
    };
    let cases = [
        // The same data folder, whatever else differs.
        (
            moved("socket", &own).replace(":7430", ":7999"),
            7,
            "another axd uses",
        ),
        // Another data folder and the same port.
        (
            moved("data_dir", &moved("socket", &own)),
            10,
            "0.0.0.0:7430",
        ),
        (
            moved("data_dir", &own).replace(":7430", ":7999"),
            10,
            "a.sock",
        ),
    ];
    for (text, exit, word) in cases {
        let text = text.replace("\"mtls\"", "\"plain\"");
        let config = site.dir().join("c.toml");
        std::fs::write(&config, text).unwrap();
        let mut axd = site.lab.a.command(&Product::get().unwrap().axd);
        axd.arg("--config").arg(&config).stdin(Stdio::null());
        let output = axd.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{said}");
        assert!(said.contains(word), "{word:?} is not in {said}");
        let (code, told, _) = axvm(&site, Side::A, &["list", "--check"]);
        assert_eq!(code, 0, "the first axd or its VM was disturbed: {told}");
    }
    assert_eq!(leavings(&site), before);
}
