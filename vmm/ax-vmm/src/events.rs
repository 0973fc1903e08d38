//! What happened, numbered, remembered for whoever asks later (axd may have been away).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ax_api::process::{Event, What};
use parking_lot::{Condvar, Mutex};

/// Events remembered.
const REMEMBERED: usize = 1024;

#[derive(Default)]
struct Inner {
    events: VecDeque<Event>,
    last: u64,
}

/// The events of one process.
#[derive(Default)]
pub struct Events {
    inner: Mutex<Inner>,
    more: Condvar,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Events({})", self.inner.lock().last)
    }
}

impl Events {
    /// No events yet.
    pub fn new() -> Arc<Events> {
        Arc::new(Events::default())
    }

    /// Something happened now.
    pub fn tell(&self, what: What) {
        tracing::info!(?what, "event");
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let mut inner = self.inner.lock();
        inner.last += 1;
        let seq = inner.last;
        inner.events.push_back(Event { seq, at_ms, what });
        if inner.events.len() > REMEMBERED {
            inner.events.pop_front();
        }
        self.more.notify_all();
    }

    /// A line for the operator.
    pub fn note(&self, text: impl Into<String>) {
        self.tell(What::Note { text: text.into() });
    }

    /// The events from number `since` on, waiting at most `patience` for the first.
    pub fn since(&self, since: u64, patience: Duration) -> Vec<Event> {
        let mut inner = self.inner.lock();
        if inner.last < since {
            self.more.wait_for(&mut inner, patience);
        }
        inner
            .events
            .iter()
            .filter(|e| e.seq >= since)
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_listener_hears_what_is_remembered_and_then_what_is_new() {
        let events = Events::new();
        (0..REMEMBERED + 5).for_each(|n| events.note(n.to_string()));
        let all = events.since(0, Duration::ZERO);
        assert_eq!(all.len(), REMEMBERED);
        assert_eq!(all[0].seq, 6);
        let next = all[all.len() - 1].seq + 1;
        assert!(events.since(next, Duration::from_millis(1)).is_empty());
        events.note("new");
        assert_eq!(events.since(next, Duration::ZERO).len(), 1);
    }
}
