//! What a test may order, and how that is written down.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

macro_rules! points {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)+) => {
        /// A moment at which something can be made to go wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])* $name,)+
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Point] = &[$(Point::$name,)+];

            /// Its name in an order.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Point::$name => $text,)+
                }
            }
        }
    };
}

points! {
    /// Primary: the guest is parked, its outputs so far are held, nothing is captured yet.
    Parked = "parked",
    /// Primary: the machine's state is about to be saved. Can fail.
    Saving = "saving",
    /// Primary: the machine's state is saved. Can fail.
    Saved = "saved",
    /// Primary: the dirty pages are harvested, so counted clean. Can fail.
    Harvested = "harvested",
    /// Primary: the pages are copied, the outputs not closed yet. Can fail.
    Copied = "copied",
    /// Primary: the epoch is captured and closed, the guest still parked.
    Captured = "captured",
    /// Primary: the guest runs again, nothing of the epoch is shipped.
    Resumed = "resumed",
    /// Primary: the epoch is written to the link whole.
    Shipped = "shipped",
    /// Primary: an acknowledgement is read, nothing committed by it yet.
    AckRead = "ack-read",
    /// Primary: the epoch is committed, its outputs not released yet.
    Committed = "committed",
    /// Primary: the outputs were handed to the tap, as far as permitted.
    Released = "released",
    /// Shadow: an epoch begins to arrive.
    Staging = "staging",
    /// Shadow: the epoch is whole and checked; nothing of it is remembered yet.
    Staged = "staged",
    /// Shadow: the epoch is remembered, its acknowledgement not sent. Can fail: it is lost.
    Acking = "acking",
    /// Shadow: the acknowledgement is sent; but for the first epoch, its pages are not queued to be applied.
    Acked = "acked",
    /// Shadow: a committed epoch is to be applied.
    Applying = "applying",
    /// Shadow: its pages are written to memory. Can fail: a bit of the last page is flipped.
    Written = "written",
    /// Either side: the arbiter is about to be asked for a change.
    Asking = "asking",
    /// Either side: the arbiter's grant is durable here; nobody has acted on it.
    Granted = "granted",
    /// Primary: the arbiter was found within reach before a planned failover, which has not begun.
    Found = "found",
    /// Primary: the guest is parked for good, its disks are about to be made durable. Can fail: they
    /// can't be.
    Draining = "draining",
    /// Old shadow of a planned failover: the guest is about to run here.
    TakingOver = "taking-over",
    /// New primary of a planned failover: the guest runs, nobody was told.
    Running = "running",
    /// New primary: the old one, now the shadow, is about to be dialled.
    Dialling = "dialling",
    /// Old primary of a planned failover: the guest runs on the other side, this one is about to follow.
    Following = "following",
    /// Primary: a device raises its interrupt. Can fail: the interrupt comes too late for ever.
    Interrupt = "interrupt",
    /// Either side: a disk image is about to be read. Can fail: EIO.
    ImageRead = "image-read",
    /// Either side: a disk image is about to be written. Can fail: EIO.
    ImageWrite = "image-write",
    /// Either side: a disk image is about to be written. Can fail: ENOSPC.
    ImageFull = "image-full",
    /// Either side: a disk image is about to be made durable. Can fail: EIO.
    ImageSync = "image-sync",
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process gets SIGKILL.
    Kill,
    /// What is being done there fails.
    Fail,
    /// The thread waits so long, or until the order is withdrawn.
    Hold(Duration),
}

/// What is to happen where, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Where.
    pub point: Point,
    /// How often the point is passed unharmed first.
    pub skip: u64,
    /// How often it happens then.
    pub times: u64,
    /// What.
    pub action: Action,
}

impl Order {
    /// `action` the first time `point` is reached.
    pub const fn new(point: Point, action: Action) -> Order {
        Order {
            point,
            skip: 0,
            times: 1,
            action,
        }
    }

    /// The same, but only after the point was passed `skip` times.
    #[must_use]
    pub const fn after(self, skip: u64) -> Order {
        Order { skip, ..self }
    }

    /// The same, each time from then on.
    #[must_use]
    pub const fn always(self) -> Order {
        Order {
            times: u64::MAX,
            ..self
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} skip={} times={} ", self.point, self.skip, self.times)?;
        match self.action {
            Action::Kill => f.write_str("kill"),
            Action::Fail => f.write_str("fail"),
            Action::Hold(long) => write!(f, "hold={}", long.as_millis()),
        }
    }
}

/// A line that is no order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no order for a fail point: write POINT [skip=N] [times=N] kill|fail|hold=MILLISECONDS"
)]
pub struct BadOrder(String);

impl FromStr for Order {
    type Err = BadOrder;

    fn from_str(line: &str) -> Result<Order, BadOrder> {
        let bad = || BadOrder(line.into());
        let mut words = line.split_ascii_whitespace();
        let name = words.next().ok_or_else(bad)?;
        let point = Point::ALL.iter().find(|p| p.name() == name);
        let (mut skip, mut times, mut action) = (0, 1, None);
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<u64>().map_err(|_| bad());
            match key {
                "skip" => skip = number()?,
                "times" => times = number()?,
                "kill" => action = Some(Action::Kill),
                "fail" => action = Some(Action::Fail),
                "hold" => action = Some(Action::Hold(Duration::from_millis(number()?))),
                _ => return Err(bad()),
            }
        }
        match (point, action) {
            (Some(point), Some(action)) => Ok(Order {
                point: *point,
                skip,
                times,
                action,
            }),
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_read_back() {
        for point in Point::ALL {
            for action in [
                Action::Kill,
                Action::Fail,
                Action::Hold(Duration::from_millis(70)),
            ] {
                let order = Order::new(*point, action).after(3).always();
                assert_eq!(order.to_string().parse(), Ok(order));
            }
        }
        assert_eq!(
            "parked kill".parse(),
            Ok(Order::new(Point::Parked, Action::Kill))
        );
    }

    #[test]
    fn what_is_no_order_is_refused() {
        for line in [
            "",
            "parked",
            "nowhere kill",
            "parked explode",
            "parked skip=x kill",
            "parked hold",
        ] {
            assert_eq!(line.parse::<Order>(), Err(BadOrder(line.into())), "{line}");
        }
    }
}
