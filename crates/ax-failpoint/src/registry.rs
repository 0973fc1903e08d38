//! The orders in force in this process.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::order::{Action, Order, Point};

/// Between two looks at the file.
const LOOK: Duration = Duration::from_millis(2);

/// True while any order may be due.
static ARMED: AtomicBool = AtomicBool::new(false);
/// Counts changes of [`ORDERS`].
static VERSION: AtomicU64 = AtomicU64::new(0);
static ORDERS: Mutex<Vec<Armed>> = Mutex::new(Vec::new());

struct Armed {
    order: Order,
    /// What happens each time is told once.
    told: bool,
}

/// Reads orders from `file` now and whenever it changes.
pub(crate) fn listen(file: PathBuf) {
    tracing::warn!(?file, "this build has fail points and listens for orders");
    let mut known = take_up(&file, String::new());
    let watch = move || {
        loop {
            std::thread::sleep(LOOK);
            known = take_up(&file, std::mem::take(&mut known));
        }
    };
    let watcher = std::thread::Builder::new().name("fail-points".into());
    if let Err(error) = watcher.spawn(watch) {
        tracing::error!(%error, "later orders will not be seen");
    }
}

/// The file's text now, its orders in force if it is not what was `known`.
fn take_up(file: &Path, known: String) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    if text != known {
        let orders: Result<Vec<Order>, _> = text.lines().map(str::parse).collect();
        match orders {
            Ok(orders) => arm(&orders),
            Err(error) => tracing::error!(%error, ?file, "no order of this file is taken"),
        }
    }
    text
}

pub(crate) fn arm(orders: &[Order]) {
    let mut armed = ORDERS.lock();
    *armed = orders
        .iter()
        .map(|order| Armed {
            order: *order,
            told: false,
        })
        .collect();
    VERSION.fetch_add(1, Ordering::AcqRel);
    ARMED.store(!armed.is_empty(), Ordering::Release);
}

/// Dies or waits if that is due at `point`; true if what is done there is to fail.
#[inline]
pub(crate) fn due(point: Point) -> bool {
    ARMED.load(Ordering::Relaxed) && due_now(point)
}

#[cold]
fn due_now(point: Point) -> bool {
    let mut armed = ORDERS.lock();
    let version = VERSION.load(Ordering::Acquire);
    let here = |armed: &&mut Armed| armed.order.point == point && armed.order.times > 0;
    let Some(Armed { order, told }) = armed.iter_mut().find(here) else {
        return false;
    };
    if order.skip > 0 {
        order.skip -= 1;
        return false;
    }
    order.times -= 1;
    let (action, first) = (order.action, !std::mem::replace(told, true));
    drop(armed);
    if first {
        tracing::warn!("fail point {point} has come due: {action:?}");
    }
    match action {
        Action::Kill => {
            let _ = kill(Pid::this(), Signal::SIGKILL);
            loop {
                std::thread::park();
            }
        }
        Action::Fail => true,
        Action::Hold(long) => {
            let until = Instant::now() + long;
            while Instant::now() < until && VERSION.load(Ordering::Acquire) == version {
                std::thread::sleep(Duration::from_millis(1));
            }
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because the orders are the process's.
    #[test]
    fn orders_are_counted_and_withdrawn() {
        assert!(!due(Point::Parked), "nothing is ordered");
        arm(&[
            Order {
                times: 2,
                ..Order::new(Point::Parked, Action::Fail).after(3)
            },
            Order::new(Point::Saved, Action::Fail).always(),
        ]);
        let parked: Vec<bool> = (0..7).map(|_| due(Point::Parked)).collect();
        assert_eq!(parked, [false, false, false, true, true, false, false]);
        assert!((0..100).all(|_| due(Point::Saved)));
        assert!(!due(Point::Copied));

        let long = Duration::from_secs(600);
        arm(&[Order::new(Point::Copied, Action::Hold(long))]);
        let held = std::thread::spawn(|| due(Point::Copied));
        while !ORDERS.lock().iter().all(|armed| armed.order.times == 0) {
            std::thread::yield_now();
        }
        arm(&[]);
        assert!(!held.join().unwrap());

        let dir = std::env::temp_dir().join(format!("failpoint-{}", std::process::id()));
        let known = take_up(&dir, String::new());
        assert_eq!(known, "", "no file, no order");
        std::fs::write(&dir, "parked fail\n").unwrap();
        let known = take_up(&dir, known);
        assert!(due(Point::Parked));
        let known = take_up(&dir, known);
        assert!(!due(Point::Parked), "the same text is no new order");
        std::fs::write(&dir, "parked fail\nnonsense\n").unwrap();
        take_up(&dir, known);
        assert!(!due(Point::Parked), "a broken file orders nothing");
        std::fs::remove_file(&dir).unwrap();
    }
}
