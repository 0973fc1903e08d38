//! Epochs as Chrome trace events, a JSON array that <https://ui.perfetto.dev> opens ("Trace Event Format").
//! Timestamps are microseconds of the host's CLOCK_BOOTTIME; each host is a process.

use ax_api::trace::EpochRecord;
use serde_json::{Value, json};

use super::Told;

/// Tracks of a host, as threads of its process.
const PAUSE: u32 = 1;
const SHIP: u32 = 2;
const RELEASE: u32 = 3;

fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

struct Track<'a> {
    pid: usize,
    record: &'a EpochRecord,
    events: &'a mut Vec<Value>,
}

impl Track<'_> {
    fn at(&self, ns: u64) -> f64 {
        micros(self.record.began_ns.saturating_add(ns))
    }

    /// Something that took so long on a track, where both moments are known.
    fn slice(&mut self, tid: u32, name: &str, from: Option<u64>, to: Option<u64>, args: Value) {
        let (Some(from), Some(to)) = (from, to) else {
            return;
        };
        let event = json!({
            "ph": "X", "pid": self.pid, "tid": tid, "cat": "epoch", "name": name,
            "ts": self.at(from), "dur": micros(to.saturating_sub(from)), "args": args,
        });
        self.events.push(event);
    }

    /// Something of which several go on at a time.
    fn flight(&mut self, name: &str, from: Option<f64>, to: Option<u64>) {
        let (Some(from), Some(to)) = (from, to) else {
            return;
        };
        let to = self.at(to);
        for (phase, ts) in [("b", from), ("e", to)] {
            let event = json!({
                "ph": phase, "pid": self.pid, "tid": 0, "cat": name, "name": name, "ts": ts,
                "id": format!("{}-{}", self.pid, self.record.number),
                "args": {"epoch": self.record.epoch},
            });
            self.events.push(event);
        }
    }

    fn epoch(&mut self) {
        let r = *self.record;
        let last = [
            r.closed_ns,
            r.copied_ns,
            r.harvested_ns,
            r.saved_ns,
            r.quiet_ns,
        ];
        let ended = r.pause_end_ns().or(last.into_iter().flatten().next());
        let name = match r.failed {
            true => format!("failed capture ({})", r.reason),
            false => format!("epoch {} ({})", r.epoch, r.reason),
        };
        let sizes = json!({
            "epoch": r.epoch, "reason": r.reason, "pages": r.pages, "state_bytes": r.state_bytes,
            "disk_bytes": r.disk_bytes, "outputs": r.outputs, "output_bytes": r.output_bytes,
            "shipped_bytes": r.shipped_bytes,
        });
        self.slice(PAUSE, &name, Some(0), ended, sizes);
        let parts = [
            ("park", Some(0), r.parked_ns),
            ("quiesce", r.parked_ns, r.quiet_ns),
            ("save", r.quiet_ns, r.saved_ns),
            ("harvest", r.saved_ns, r.harvested_ns),
            ("copy", r.harvested_ns, r.copied_ns),
            ("close", r.copied_ns, r.closed_ns),
            ("resume", r.closed_ns, r.pause_end_ns()),
        ];
        for (name, from, to) in parts {
            self.slice(PAUSE, name, from, to, json!({}));
        }
        let shipped = json!({"epoch": r.epoch, "bytes": r.shipped_bytes});
        self.slice(SHIP, "encode", r.encoding_ns, r.encoded_ns, shipped);
        self.slice(
            SHIP,
            "send",
            r.encoded_ns,
            r.sent_ns,
            json!({"epoch": r.epoch}),
        );
        let outputs = json!({"epoch": r.epoch, "outputs": r.outputs});
        self.slice(RELEASE, "release", r.acked_ns, r.released_ns, outputs);
        self.flight(
            "unacknowledged",
            r.sent_ns.map(|ns| self.at(ns)),
            r.acked_ns,
        );
        let held = r
            .held_ns
            .map(|ns| micros(r.began_ns.saturating_add_signed(ns)));
        self.flight("output held", held, r.released_ns);
        let counters = json!({"pages": r.pages});
        self.events.push(json!({
            "ph": "C", "pid": self.pid, "name": "dirty pages", "ts": self.at(0), "args": counters,
        }));
    }
}

/// The whole document.
pub fn events(vm: &str, told: &[Told]) -> String {
    let mut hosts: Vec<&str> = told.iter().map(|t| t.host.as_str()).collect();
    hosts.dedup();
    hosts.sort_unstable();
    hosts.dedup();
    let mut events = Vec::new();
    for (host, pid) in hosts.iter().zip(1..) {
        let meta = |tid: u32, what: &str, name: &str| json!({"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}});
        events.push(meta(0, "process_name", &format!("{vm} on {host}")));
        for (tid, name) in [(PAUSE, "pause"), (SHIP, "ship"), (RELEASE, "release")] {
            events.push(meta(tid, "thread_name", name));
        }
        for told in told.iter().filter(|t| t.host == *host) {
            let mut track = Track {
                pid,
                record: &told.record,
                events: &mut events,
            };
            track.epoch();
        }
    }
    let lines: Vec<String> = events.iter().map(Value::to_string).collect();
    format!("[{}]\n", lines.join(",\n"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::epoch;
    use super::*;

    fn parsed(told: &[Told]) -> Vec<Value> {
        serde_json::from_str(&events("web", told)).unwrap()
    }

    #[test]
    fn slices_lie_within_their_pause_and_do_not_overlap() {
        let told = [epoch(1, 1_000_000), epoch(2, 2_000_000)];
        let events = parsed(&told);
        let of = |tid: u32| {
            let slices = events
                .iter()
                .filter(move |e| e["ph"] == "X" && e["tid"] == tid);
            slices.map(|e| {
                let (ts, dur) = (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap());
                (e["name"].as_str().unwrap().to_owned(), ts, ts + dur)
            })
        };
        let pauses: Vec<_> = of(PAUSE).collect();
        assert_eq!(pauses.len(), 2 * 8);
        for pause in pauses.chunks(8) {
            let (whole, parts) = pause.split_first().unwrap();
            assert!(whole.0.starts_with("epoch "), "{whole:?}");
            assert!((whole.2 - whole.1 - 150.0).abs() < 1e-6, "{whole:?}");
            let mut at = whole.1;
            for part in parts {
                assert!((part.1 - at).abs() < 1e-6, "{part:?} after {at}");
                at = part.2;
            }
            assert!((at - whole.2).abs() < 1e-6);
        }
        let names: Vec<String> = of(SHIP).map(|s| s.0).collect();
        assert_eq!(names, ["encode", "send", "encode", "send"]);
        let flights = |phase: &str| events.iter().filter(|e| e["ph"] == phase).count();
        assert_eq!((flights("b"), flights("e")), (4, 4));
    }

    #[test]
    fn each_host_has_its_tracks_and_what_has_not_happened_is_left_out() {
        let mut cut = epoch(3, 3_000_000);
        cut.host = "beta".into();
        cut.record.failed = true;
        let r = &mut cut.record;
        (r.harvested_ns, r.copied_ns, r.closed_ns, r.resumed_ns) = (None, None, None, None);
        (r.running_ns, r.encoding_ns, r.encoded_ns, r.sent_ns) = (None, None, None, None);
        (r.acked_ns, r.released_ns) = (None, None);
        let events = parsed(&[epoch(2, 2_000_000), cut]);
        let names: Vec<&str> = events
            .iter()
            .filter(|e| e["name"] == "process_name")
            .map(|e| e["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["web on alpha", "web on beta"]);
        let of_beta: Vec<&str> = events
            .iter()
            .filter(|e| e["pid"] == 2 && e["ph"] == "X")
            .map(|e| e["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            of_beta,
            ["failed capture (output)", "park", "quiesce", "save"]
        );
        assert_eq!(parsed(&[]), Vec::<Value>::new());
    }
}
