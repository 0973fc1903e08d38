//! How long a disk has been at what it was asked for: one that does not answer says nothing by itself.

use std::time::{Duration, Instant};

use ax_sync::Mutex;

/// Who waits for a request to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// The guest, or an epoch.
    Somebody,
    /// Nobody in particular: the map's upkeep, a copy's end.
    Nobody,
}

/// How long the oldest requests to a disk have been under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Busy {
    /// Of those that the guest or an epoch waits for.
    pub awaited: Duration,
    /// Of all.
    pub any: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    /// Under way now: a handful at most.
    begun: Vec<(u64, Waits, Instant)>,
    count: u64,
}

/// The requests to one disk that are under way.
#[derive(Debug, Default)]
pub(crate) struct UnderWay(Mutex<Inner>);

impl UnderWay {
    /// A request begins; it is over when what comes back is dropped.
    pub fn begin(&self, waits: Waits) -> impl Drop + '_ {
        let mut inner = self.0.lock();
        inner.count += 1;
        let number = inner.count;
        inner.begun.push((number, waits, Instant::now()));
        Begun(self, number)
    }

    /// How long the oldest have been under way.
    pub fn busy(&self) -> Busy {
        let inner = self.0.lock();
        let mut busy = Busy::default();
        for (_, waits, since) in &inner.begun {
            let long = since.elapsed();
            busy.any = busy.any.max(long);
            if *waits == Waits::Somebody {
                busy.awaited = busy.awaited.max(long);
            }
        }
        busy
    }
}

struct Begun<'a>(&'a UnderWay, u64);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.0.lock().begun.retain(|(n, _, _)| *n != self.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_request_counts_and_only_while_it_is_under_way() {
        let requests = UnderWay::default();
        assert_eq!(requests.busy(), Busy::default());
        let idle = requests.begin(Waits::Nobody);
        std::thread::sleep(Duration::from_millis(5));
        let awaited = requests.begin(Waits::Somebody);
        let busy = requests.busy();
        assert!(busy.any >= Duration::from_millis(5) && busy.awaited < busy.any);
        drop(idle);
        assert!(requests.busy().awaited > Duration::ZERO);
        drop(awaited);
        assert_eq!(requests.busy(), Busy::default());
    }
}
