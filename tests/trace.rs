//! What a protected VM tells of its epochs: `axvm trace` and `axvm stats`, on either host.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;

use common::talk::{SIDES, axvm};
use common::{Clients, alone, eventually, patient, protected};
use serde_json::Value;
use testkit::site::{Side, Site};
use testkit::{require_kvm, require_lab};

fn json(site: &Site, ask: Side, args: &[&str]) -> Value {
    let told = site.run_axvm(ask, &[args, &["-o", "json"]].concat());
    serde_json::from_str(&told.unwrap()).unwrap()
}

fn records(site: &Site, ask: Side, more: &[&str]) -> Vec<Value> {
    let whole = json(site, ask, &[&["trace", "vm"], more].concat());
    assert_eq!(whole["missed"], 0);
    whole["records"].as_array().unwrap().clone()
}

fn number(of: &Value, name: &str) -> u64 {
    of[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name} in {of}"))
}

/// The moments that come one after the other, of a record that is complete.
const LINE: [&str; 12] = [
    "parked_ns",
    "quiet_ns",
    "saved_ns",
    "harvested_ns",
    "copied_ns",
    "closed_ns",
    "resumed_ns",
    "encoding_ns",
    "encoded_ns",
    "sent_ns",
    "acked_ns",
    "released_ns",
];

fn assert_right(record: &Value) {
    let times = LINE.map(|name| number(record, name));
    assert!(times.is_sorted(), "{times:?} in {record}");
    assert!(times[0] > 0, "parked before it was kicked: {record}");
    assert!(
        number(record, "running_ns") >= number(record, "closed_ns"),
        "{record}"
    );
    assert!(
        number(record, "pages") > 0 && number(record, "state_bytes") > 0,
        "{record}"
    );
    assert!(number(record, "shipped_bytes") > 0, "{record}");
    let outputs = number(record, "outputs");
    assert_eq!(outputs > 0, record["held_ns"].is_i64(), "{record}");
    assert_eq!(
        (&record["host"], &record["failed"]),
        (&"a".into(), &false.into())
    );
}

fn assert_consecutive(records: &[Value]) {
    for pair in records.windows(2) {
        for of in ["number", "epoch"] {
            assert_eq!(number(&pair[0], of) + 1, number(&pair[1], of));
        }
        assert!(number(&pair[0], "began_ns") < number(&pair[1], "began_ns"));
    }
}

/// While clients ask, and when they have left.
fn of_each_epoch(site: &Site) {
    let clients = Clients::start(site);
    let busy = records(site, Side::A, &["--seconds", "1"]);
    clients.are_content();
    assert!(busy.len() > 20, "{} epochs", busy.len());
    assert_consecutive(&busy);
    // Of the last ones not all has happened yet.
    busy[..busy.len() - 10].iter().for_each(assert_right);
    let for_output = busy.iter().filter(|r| r["reason"] == "output");
    let with_output = busy.iter().filter(|r| number(r, "outputs") > 0);
    assert!(for_output.count() * 2 > busy.len());
    assert!(with_output.count() * 2 > busy.len());

    eventually("nobody asks for anything", || {
        let idle = records(site, Side::A, &["-n", "5"]);
        idle.iter()
            .all(|r| r["reason"] == "idle" && r["outputs"] == 0)
    });
}

/// Both hosts tell the same of the same epochs, in each form.
fn on_either_host(site: &Site) {
    let [here, there] = SIDES.map(|side| records(site, side, &["-n", "300"]));
    assert_consecutive(&here);
    let here: HashMap<u64, &Value> = here.iter().map(|r| (number(r, "number"), r)).collect();
    let both = there.iter().filter(|r| r["running_ns"].is_u64());
    let both: Vec<_> = both
        .filter(|r| here.contains_key(&number(r, "number")))
        .collect();
    assert!(both.len() > 100, "{} epochs", both.len());
    for record in both {
        let same = here[&number(record, "number")];
        // Asked earlier, not all of it may have happened yet.
        let over = same["running_ns"].is_u64() && same["released_ns"].is_u64();
        assert!(!over || same == record, "{same} {record}");
    }

    let table = site.run_axvm(Side::B, &["trace", "vm"]).unwrap();
    assert_eq!(table.lines().count(), 21, "{table}");
    let events = site
        .run_axvm(Side::B, &["trace", "vm", "-n", "100", "-o", "perfetto"])
        .unwrap();
    let events: Vec<Value> = serde_json::from_str(&events).unwrap();
    let named = |name: &str| events.iter().filter(|e| e["name"] == name).count();
    assert_eq!((named("copy"), named("dirty pages")), (100, 100));
    let process = events.iter().find(|e| e["name"] == "process_name").unwrap();
    assert_eq!(process["args"]["name"], "vm on a");
    for event in events.iter().filter(|e| e["ph"] == "X") {
        assert!(event["ts"].as_f64().unwrap() > 0.0 && event["dur"].as_f64().unwrap() >= 0.0);
    }
}

/// What is counted are the epochs there were.
fn in_figures(site: &Site) {
    let last = |ask| number(&records(site, ask, &["-n", "1"])[0], "number");
    for side in SIDES {
        let from = last(Side::A);
        let stats = json(site, side, &["stats", "vm"]);
        let to = last(Side::A);
        let epochs = from..=to;
        assert!(
            epochs.contains(&number(&stats, "epochs")),
            "{epochs:?} {stats}"
        );
        let histograms = &stats["histograms"];
        for name in [
            "pages",
            "shipped_bytes",
            "ack_ns",
            "release_ns",
            "pause_ns",
            "length_ns",
        ] {
            let of = &histograms[name];
            // The last of them are on their way, or not over yet.
            let count = number(of, "count");
            assert!(
                (from - 2..=to).contains(&count),
                "{name}: {from}..{to} {of}"
            );
            let quantiles = ["p50", "p90", "p99", "p999", "max"].map(|q| number(of, q));
            assert!(quantiles.is_sorted() && quantiles[0] > 0, "{name}: {of}");
            let buckets = of["buckets"].as_array().unwrap().iter();
            let sum: u64 = buckets.map(|bucket| bucket[1].as_u64().unwrap()).sum();
            assert_eq!(sum, count);
        }
        assert!(number(&stats["reasons"], "output") > 20);
        assert!(number(&stats["reasons"], "idle") > 5);
        assert_eq!(stats["host"], "a");
    }
    let second = json(site, Side::B, &["stats", "vm", "--seconds", "1"]);
    assert!((1..100).contains(&number(&second, "epochs")), "{second}");
    let table = site.run_axvm(Side::A, &["stats", "vm"]).unwrap();
    assert!(table.contains("pause: first kick"), "{table}");
}

#[test]
fn every_epoch_can_be_read_on_either_host_and_none_without_protection() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(patient(), &[]);
    of_each_epoch(&site);
    on_either_host(&site);
    in_figures(&site);
    let (code, _, why) = axvm(&site, Side::A, &["top", "vm"]);
    assert_eq!(code, 2, "{why}");
    assert!(why.contains("axvm stats vm"), "{why}");

    site.run_axvm(Side::A, &["set-mode", "vm", "none"]).unwrap();
    for side in SIDES {
        for command in ["trace", "stats"] {
            let (code, out, why) = axvm(&site, side, &[command, "vm"]);
            assert_eq!((code, out.as_str()), (7, ""), "{why}");
            assert!(why.contains("set-mode vm ft"), "{why}");
        }
    }
    let (code, _, why) = axvm(&site, Side::B, &["trace", "other"]);
    assert_eq!(code, 5, "{why}");
}
