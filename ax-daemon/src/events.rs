//! What happened on this host, kept across restarts: `events.jsonl`, bounded, with one older file.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ax_api::host::{HostEvent, HostWhat};
use ax_wire::Incarnation;
use parking_lot::Mutex;
use tokio::sync::broadcast;

/// Bytes after which the file is turned over.
const TURN_OVER: u64 = 4 << 20;
/// Events remembered for those who ask.
const REMEMBERED: usize = 4096;

/// This host's events.
pub struct Events {
    host: String,
    path: PathBuf,
    inner: Mutex<Inner>,
    live: broadcast::Sender<HostEvent>,
}

struct Inner {
    file: Option<File>,
    size: u64,
    recent: VecDeque<HostEvent>,
    /// Last event number recorded of each run of a process, so that none is recorded twice.
    last: HashMap<Incarnation, u64>,
}

impl Events {
    /// Reads what earlier runs left. What cannot be read is skipped: events are for people.
    pub fn open(host: &str, data_dir: &Path) -> Events {
        let path = data_dir.join("events.jsonl");
        let mut recent = VecDeque::new();
        let mut last = HashMap::new();
        for file in [older(&path), path.clone()] {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            for event in text.lines().filter_map(|l| serde_json::from_str(l).ok()) {
                note_last(&mut last, &event);
                recent.push_back(event);
                if recent.len() > REMEMBERED {
                    recent.pop_front();
                }
            }
        }
        let (file, size) = append_to(&path);
        Events {
            host: host.to_owned(),
            path,
            inner: Mutex::new(Inner {
                file,
                size,
                recent,
                last,
            }),
            live: broadcast::channel(1024).0,
        }
    }

    /// Records what axd itself has to tell.
    pub fn note(&self, vm: Option<&str>, text: impl Into<String>) {
        let text = text.into();
        tracing::info!(vm, "{text}");
        self.record(vm, now_ms(), HostWhat::Note { text });
    }

    /// Records an event. One of a process that is recorded already is dropped; whether it was new.
    pub fn record(&self, vm: Option<&str>, at_ms: u64, what: HostWhat) -> bool {
        let event = HostEvent {
            at_ms,
            host: self.host.clone(),
            vm: vm.map(str::to_owned),
            what,
        };
        let mut inner = self.inner.lock();
        if let HostWhat::Process {
            incarnation, seq, ..
        } = &event.what
            && inner.last.get(incarnation).is_some_and(|last| seq <= last)
        {
            return false;
        }
        note_last(&mut inner.last, &event);
        self.write(&mut inner, &event);
        inner.recent.push_back(event.clone());
        if inner.recent.len() > REMEMBERED {
            inner.recent.pop_front();
        }
        // Nobody listening is no error.
        let _ = self.live.send(event);
        true
    }

    fn write(&self, inner: &mut Inner, event: &HostEvent) {
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        if inner.size >= TURN_OVER {
            // A failed rename only lets the file grow on.
            if std::fs::rename(&self.path, older(&self.path)).is_ok() {
                (inner.file, inner.size) = append_to(&self.path);
            }
        }
        if let Some(file) = &mut inner.file {
            match file.write_all(&line) {
                Ok(()) => inner.size += line.len() as u64,
                Err(e) => tracing::warn!("cannot write {}: {e}", self.path.display()),
            }
        }
    }

    /// Last event number recorded of a run; 0 with none.
    pub fn last_of(&self, incarnation: Incarnation) -> u64 {
        let inner = self.inner.lock();
        inner.last.get(&incarnation).copied().unwrap_or(0)
    }

    /// Everything remembered, and a receiver of all that follows, without gap or overlap.
    pub fn subscribe(&self) -> (Vec<HostEvent>, broadcast::Receiver<HostEvent>) {
        let inner = self.inner.lock();
        (
            inner.recent.iter().cloned().collect(),
            self.live.subscribe(),
        )
    }
}

fn note_last(last: &mut HashMap<Incarnation, u64>, event: &HostEvent) {
    match &event.what {
        HostWhat::Process {
            incarnation, seq, ..
        } => {
            let entry = last.entry(*incarnation).or_insert(0);
            *entry = (*entry).max(*seq);
        }
        HostWhat::Exited { incarnation, .. } => {
            last.remove(incarnation);
        }
        HostWhat::Note { .. } | HostWhat::Other => {}
    }
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("1.jsonl")
}

fn append_to(path: &Path) -> (Option<File>, u64) {
    match OpenOptions::new().create(true).append(true).open(path) {
        Ok(file) => {
            let size = file.metadata().map_or(0, |m| m.len());
            (Some(file), size)
        }
        Err(e) => {
            tracing::warn!("events are not kept: {}: {e}", path.display());
            (None, 0)
        }
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_api::process::What;

    fn note(text: &str) -> HostWhat {
        HostWhat::Note { text: text.into() }
    }

    fn told(seq: u64) -> HostWhat {
        HostWhat::Process {
            incarnation: Incarnation(5),
            seq,
            event: What::Note { text: "x".into() },
        }
    }

    #[test]
    fn events_survive_and_are_recorded_once() {
        let dir = tempfile::tempdir().unwrap();
        let events = Events::open("a", dir.path());
        assert!(events.record(Some("web"), 1, told(1)));
        assert!(events.record(Some("web"), 2, told(2)));
        drop(events);
        let events = Events::open("a", dir.path());
        assert_eq!(events.last_of(Incarnation(5)), 2);
        assert!(!events.record(Some("web"), 2, told(2)));
        let (before, mut live) = events.subscribe();
        assert_eq!(before.len(), 2);
        assert!(events.record(Some("web"), 3, told(3)));
        assert_eq!(live.try_recv().unwrap().at_ms, 3);
    }

    #[test]
    fn the_file_is_bounded_and_what_is_torn_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let events = Events::open("a", dir.path());
        let long = "x".repeat(1 << 16);
        for _ in 0..200 {
            events.record(None, 1, note(&long));
        }
        let size = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size("events.jsonl") + size("events.1.jsonl") < 3 * TURN_OVER);
        drop(events);
        let path = dir.path().join("events.jsonl");
        let mut text = std::fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"at_ms\": 1, \"ho");
        std::fs::write(&path, text).unwrap();
        assert!(!Events::open("a", dir.path()).subscribe().0.is_empty());
    }
}
