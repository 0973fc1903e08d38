//! A dedicated link through user space, frame by frame: delay, jitter, loss, reordering,
//! repetition and a filter of the test's own, per direction (there is no netem here).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::{Host, Toward, addr, netlink};
use crate::{Error, Result};

/// Most frames on their way in one direction; more are lost, as in a switch.
const QUEUE: usize = 10_000;

/// What decides over single frames: true lets it pass.
pub type Filter = Box<dyn FnMut(&[u8]) -> bool + Send>;

/// What befalls the frames of one direction. The default passes everything at once.
#[derive(Default)]
pub struct Shape {
    /// Every frame is so much later.
    pub delay: Duration,
    /// And up to so much more, each by its own luck: frames overtake each other.
    pub jitter: Duration,
    /// How many of a thousand frames are lost.
    pub loss_per_mille: u16,
    /// How many of a thousand frames come twice.
    pub repeat_per_mille: u16,
    /// Asked first, for every frame.
    pub filter: Option<Filter>,
}

impl Shape {
    /// Every frame is so much later, and up to `jitter` more, so that frames overtake each other.
    pub fn late(delay: Duration, jitter: Duration) -> Shape {
        Shape {
            delay,
            jitter,
            ..Shape::default()
        }
    }

    /// Nothing passes.
    pub fn silent() -> Shape {
        Shape {
            filter: Some(Box::new(|_| false)),
            ..Shape::default()
        }
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shape")
            .field("delay", &self.delay)
            .field("jitter", &self.jitter)
            .field("loss_per_mille", &self.loss_per_mille)
            .field("repeat_per_mille", &self.repeat_per_mille)
            .field("filter", &self.filter.is_some())
            .finish()
    }
}

/// A dedicated link between hosts a (first) and b (second) whose frames pass through this
/// process. Dropping it takes the link away.
#[derive(Debug)]
pub struct FrameCable {
    shapes: Arc<[Mutex<Shape>; 2]>,
    /// Closing it ends the thread.
    lifeline: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl FrameCable {
    /// Lays dedicated link `n`: interface `link<n>` on both hosts with the addresses
    /// [`addr::link_a`] and [`addr::link_b`]. `seed` decides all luck.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn lay(a: &Host, b: &Host, n: u8, seed: u64) -> Result<FrameCable> {
        let dev = format!("link{n}");
        let mut ends = Vec::new();
        for (host, ip) in [(a, addr::link_a(n)), (b, addr::link_b(n))] {
            let tap = netlink::open_tap(host.net(), &dev)?;
            netlink::add_address(host.net(), &dev, ip, addr::LINK_PREFIX)?;
            netlink::set_up(host.net(), &dev, true)?;
            ends.push(tap);
        }
        let (Some(second), Some(first)) = (ends.pop(), ends.pop()) else {
            return Err(Error::Product("a cable has two ends".into()));
        };
        let (end, lifeline) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|e| Error::os("make a pipe")(e.into()))?;
        let shapes = Arc::new([Mutex::default(), Mutex::default()]);
        let mut carrier = Carrier {
            // Frames toward the first end come out of the second.
            ways: [
                Way::new(second.try_clone(), first.try_clone())?,
                Way::new(Ok(first), Ok(second))?,
            ],
            shapes: shapes.clone(),
            luck: Luck(seed | 1),
        };
        let thread = thread::Builder::new()
            .name(format!("frames-{dev}"))
            .spawn(move || carrier.carry(&end))
            .map_err(Error::os(format!("start the cable {dev}")))?;
        Ok(FrameCable {
            shapes,
            lifeline: Some(lifeline),
            thread: Some(thread),
        })
    }

    /// From now on `shape` befalls the frames in this direction; those on their way stay so.
    pub fn set(&self, direction: Toward, shape: Shape) {
        *lock(&self.shapes[direction as usize]) = shape;
    }
}

impl Drop for FrameCable {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

fn lock(shape: &Mutex<Shape>) -> MutexGuard<'_, Shape> {
    shape.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A frame on its way: when it is due, its number, its bytes.
type Due = Reverse<(Instant, u64, Vec<u8>)>;

struct Way {
    from: File,
    to: File,
    queue: BinaryHeap<Due>,
    taken: u64,
}

impl Way {
    fn new(from: io::Result<File>, to: io::Result<File>) -> Result<Way> {
        let fail = || Error::os("share a tap");
        let (from, to) = (from.map_err(fail())?, to.map_err(fail())?);
        Ok(Way {
            from,
            to,
            queue: BinaryHeap::new(),
            taken: 0,
        })
    }

    /// Takes every frame that waits at the near end.
    fn take(&mut self, shape: &Mutex<Shape>, luck: &mut Luck) {
        let mut frame = [0; 65_536];
        while let Ok(len) = self.from.read(&mut frame) {
            let frame = &frame[..len];
            let mut shape = lock(shape);
            if shape.filter.as_mut().is_some_and(|f| !f(frame)) || luck.hits(shape.loss_per_mille) {
                continue;
            }
            let copies = 1 + usize::from(luck.hits(shape.repeat_per_mille));
            for _ in 0..copies {
                if self.queue.len() >= QUEUE {
                    break;
                }
                let due = Instant::now() + shape.delay + luck.up_to(shape.jitter);
                self.taken += 1;
                self.queue.push(Reverse((due, self.taken, frame.to_vec())));
            }
        }
    }

    /// Hands over what is due; says when the next frame will be.
    fn give(&mut self) -> Option<Instant> {
        while let Some(Reverse((due, _, _))) = self.queue.peek() {
            if *due > Instant::now() {
                return Some(*due);
            }
            if let Some(Reverse((_, _, frame))) = self.queue.pop() {
                // The far end is down: the frame is lost.
                let _ = self.to.write_all(&frame);
            }
        }
        None
    }
}

struct Carrier {
    ways: [Way; 2],
    shapes: Arc<[Mutex<Shape>; 2]>,
    luck: Luck,
}

impl Carrier {
    fn carry(&mut self, end: &OwnedFd) {
        loop {
            let next = self.ways.iter_mut().filter_map(Way::give).min();
            let wait = next.map(|t| TimeSpec::from(t.saturating_duration_since(Instant::now())));
            let mut polls = [
                PollFd::new(end.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.ways[0].from.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.ways[1].from.as_fd(), PollFlags::POLLIN),
            ];
            match ppoll(&mut polls, wait, None) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return tracing::error!("frame cable: {e}"),
            }
            if polls[0].any() == Some(true) {
                return;
            }
            for (way, shape) in self.ways.iter_mut().zip(self.shapes.iter()) {
                way.take(shape, &mut self.luck);
            }
        }
    }
}

/// xorshift64* (Vigna, 2016): repeatable luck.
struct Luck(u64);

impl Luck {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn hits(&mut self, per_mille: u16) -> bool {
        per_mille > 0 && self.next() % 1000 < u64::from(per_mille)
    }

    fn up_to(&mut self, most: Duration) -> Duration {
        let most = most.as_nanos() as u64;
        Duration::from_nanos(if most == 0 { 0 } else { self.next() % most })
    }
}
