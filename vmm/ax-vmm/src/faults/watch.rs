//! Looks after disks that say nothing: that do not answer, or whose file is gone.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ax_disk::{Busy, Image};

use super::{Failed, Faults, Standing};

/// How often it is looked whether disks answer.
const LOOK: Duration = Duration::from_millis(100);

/// How often it is looked where images are.
const WHERE: Duration = Duration::from_secs(1);

/// How much longer than `stall_time` a disk may take for what no epoch waits for: a copy's end makes
/// gigabytes durable.
const PATIENCE: u32 = 30;

/// How long a disk that is busy like this has not answered, if that counts as failed (rule 9). A shadow in sync holds up the guest's FLUSH and,
/// with a full backlog, its epochs: `stall` is the limit there. A side that takes over waits for its disk
/// as long as it takes: there is nobody else.
fn silent(standing: Standing, busy: Busy, stall: Duration) -> Option<Duration> {
    let long = (busy.any >= stall * PATIENCE).then_some(stall * PATIENCE);
    match standing {
        Standing::Follows if busy.awaited >= stall => Some(stall),
        Standing::Follows | Standing::Alone | Standing::Mirrored | Standing::Copying => long,
        Standing::Elsewhere => None,
    }
}

/// What is looked after.
pub struct Watch {
    /// The images; the watch ends with them.
    pub images: Vec<Weak<Image>>,
    /// Who is told of a guest's disk.
    pub faults: Arc<Faults>,
    /// No progress for so long is a failure.
    pub stall: Duration,
    /// Ends this process, a shadow, whose disk fails like this.
    pub end_shadow: Box<dyn Fn(String) + Send + Sync>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch({} disks)", self.images.len())
    }
}

impl Watch {
    /// Starts the threads. One looks at paths, and may hang with the disk; the other never does.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(self) -> io::Result<()> {
        let watch = Arc::new(self);
        let places = Arc::clone(&watch);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into());
            thread.spawn(run).map(drop)
        };
        spawn(
            "disk-watch",
            Box::new(move || while watch.each(LOOK, Watch::answers) {}),
        )?;
        spawn(
            "disk-places",
            Box::new(move || while places.each(WHERE, Watch::is_in_place) {}),
        )
    }

    /// Looks at every image after a pause; false when they are gone.
    fn each(&self, pause: Duration, look: impl Fn(&Watch, usize, &Image)) -> bool {
        std::thread::sleep(pause);
        let mut any = false;
        for (unit, image) in self.images.iter().enumerate() {
            let Some(image) = image.upgrade() else {
                continue;
            };
            any = true;
            look(self, unit, &image);
        }
        any
    }

    fn answers(&self, unit: usize, image: &Image) {
        match silent(self.faults.standing(), image.busy(), self.stall) {
            None => self.faults.works(unit, Failed::Answer),
            Some(long) => {
                let why = format!("no answer for {long:?}");
                self.fails(unit, image, Failed::Answer, &why);
            }
        }
    }

    fn is_in_place(&self, unit: usize, image: &Image) {
        match image.is_in_place() {
            Ok(true) => self.faults.works(unit, Failed::Stay),
            Ok(false) => {
                let why = "the file is gone, or another one is in its place";
                self.fails(unit, image, Failed::Stay, why);
            }
            // Whoever reads or writes it finds out.
            Err(_) => {}
        }
    }

    fn fails(&self, unit: usize, image: &Image, failed: Failed, why: &str) {
        match self.faults.standing() {
            Standing::Alone | Standing::Mirrored => self.faults.note(unit, failed, why),
            Standing::Copying | Standing::Follows => {
                (self.end_shadow)(format!("{}: {why}", image.path().display()));
            }
            Standing::Elsewhere => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shadow_in_sync_has_stall_time_and_who_takes_over_all_the_time_there_is() {
        let second = Duration::from_secs(1);
        let busy = |awaited: u32, any: u32| Busy {
            awaited: second * awaited,
            any: second * any,
        };
        let hangs = |standing, busy| silent(standing, busy, second).is_some();
        assert!(hangs(Standing::Follows, busy(1, 1)));
        assert!(!hangs(Standing::Follows, busy(0, 29)));
        assert!(hangs(Standing::Follows, busy(0, 30)));
        for standing in [Standing::Alone, Standing::Mirrored, Standing::Copying] {
            assert!(!hangs(standing, busy(29, 29)));
            assert!(hangs(standing, busy(30, 30)));
        }
        assert!(!hangs(Standing::Elsewhere, busy(99, 99)));
    }
}
