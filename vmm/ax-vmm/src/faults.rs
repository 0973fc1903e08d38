//! Disks of this host that fail, and what becomes of the guest's requests meanwhile (rule 19).
//!
//! A request that its image can't do is not shown to the guest: its disk's thread stays with it and asks
//! here what to do, while epochs go on without it (rule 13). With a shadow in sync it waits until the
//! guest has gone on there, by the conductor's doing. Without one it is tried again, or reported:
//!
//! | | shadow in sync | no other copy |
//! |---|---|---|
//! | read, write | waits; tried again | `on_error`; a full disk is always waited for |
//! | FLUSH | waits | reported: what is lost is not known, so no second try can be believed |
//! | the guest is elsewhere, or this process ends | given back | given back |

mod watch;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ax_api::vm::OnError;
use parking_lot::{Condvar, Mutex};

pub use watch::Watch;

/// Between two tries of a request that failed.
const AGAIN: Duration = Duration::from_secs(1);

/// What a disk could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// Be read.
    Read,
    /// Be written.
    Write,
    /// Be made durable.
    Flush,
    /// Answer at all.
    Answer,
    /// Be where it should: its file is gone, or another one is in its place.
    Stay,
}

/// What this process is to the guest, as far as its disks are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It runs the guest, and there is no other copy.
    Alone,
    /// It runs the guest, and a shadow in sync has a copy.
    Mirrored,
    /// It is being made a shadow.
    Copying,
    /// It is a shadow in sync.
    Follows,
    /// The guest may be elsewhere: nothing here is completed.
    Elsewhere,
}

/// What to do with a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Again,
    Report,
    GiveBack,
}

/// What becomes of a request that failed like this; none: it waits on. `waited` when it has waited since
/// the last try.
fn next(
    standing: Standing,
    failed: Failed,
    full: bool,
    on_error: OnError,
    waited: bool,
) -> Option<Next> {
    let again = waited.then_some(Next::Again);
    match (standing, failed) {
        (Standing::Copying | Standing::Follows | Standing::Elsewhere, _) => Some(Next::GiveBack),
        (Standing::Mirrored, Failed::Flush) => None,
        (Standing::Mirrored, _) => again,
        (Standing::Alone, Failed::Flush) => Some(Next::Report),
        (Standing::Alone, _) if full || on_error == OnError::Hold => again,
        (Standing::Alone, _) => Some(Next::Report),
    }
}

/// A disk that fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it could not do last.
    pub failed: Failed,
    /// Which it is, and what happened, in words.
    pub why: String,
    /// The image.
    pub disk: PathBuf,
}

struct Inner {
    standing: Standing,
    /// Requests that wait.
    waiting: usize,
    troubles: Vec<Option<Trouble>>,
}

/// The disks of one VM on this host.
pub struct Faults {
    disks: Vec<(PathBuf, OnError)>,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Some disk fails.
    any: AtomicBool,
    /// Tells the conductor that something has changed.
    tell: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faults({:?})", self.inner.lock().troubles)
    }
}

impl Faults {
    /// Of these images, none of which has failed; the guest is not here yet.
    pub fn new(
        disks: Vec<(PathBuf, OnError)>,
        tell: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Faults> {
        Arc::new(Faults {
            inner: Mutex::new(Inner {
                standing: Standing::Elsewhere,
                waiting: 0,
                troubles: vec![None; disks.len()],
            }),
            disks,
            changed: Condvar::new(),
            any: AtomicBool::new(false),
            tell: Box::new(tell),
        })
    }

    /// What this process is to the guest from now on. Requests that wait look again; with the guest
    /// elsewhere it is no more known what fails.
    pub fn stand(&self, standing: Standing) {
        let mut inner = self.inner.lock();
        if inner.standing != standing {
            inner.standing = standing;
            if standing == Standing::Elsewhere {
                inner.troubles.fill(None);
                self.any.store(false, Ordering::Release);
            }
            self.changed.notify_all();
        }
    }

    /// What this process is to the guest.
    pub fn standing(&self) -> Standing {
        self.inner.lock().standing
    }

    /// The first disk that fails, if one does.
    pub fn trouble(&self) -> Option<Trouble> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.inner.lock().troubles.iter().flatten().next().cloned()
    }

    /// Does `act` until it works, as long as it is to be tried. May block for as long as the disk fails.
    ///
    /// # Errors
    /// The last failure, for the guest; or [`io::ErrorKind::Interrupted`], which is none of its business.
    pub fn persist(
        &self,
        unit: usize,
        failed: Failed,
        mut act: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            match act() {
                Ok(()) => {
                    self.works(unit, failed);
                    return Ok(());
                }
                // The guest asked for what there is not: no disk can do it.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error),
                Err(error) => match self.wait(unit, failed, &error) {
                    Next::Again => {}
                    Next::Report => return Err(error),
                    Next::GiveBack => return Err(io::ErrorKind::Interrupted.into()),
                },
            }
        }
    }

    /// True while a request of the guest waits for a disk that fails.
    pub fn holds(&self) -> bool {
        self.inner.lock().waiting > 0
    }

    fn wait(&self, unit: usize, failed: Failed, error: &io::Error) -> Next {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        self.inner.lock().waiting += 1;
        self.note(unit, failed, &error.to_string());
        let full = matches!(error.kind(), StorageFull | QuotaExceeded);
        let on_error = self.disks.get(unit).map(|(_, e)| *e).unwrap_or_default();
        let until = Instant::now() + AGAIN;
        let mut inner = self.inner.lock();
        loop {
            let waited = Instant::now() >= until;
            if let Some(next) = next(inner.standing, failed, full, on_error, waited) {
                inner.waiting -= 1;
                return next;
            }
            match waited {
                true => self.changed.wait(&mut inner),
                false => drop(self.changed.wait_until(&mut inner, until)),
            }
        }
    }

    /// A disk fails like this.
    fn note(&self, unit: usize, failed: Failed, why: &str) {
        let Some((disk, _)) = self.disks.get(unit) else {
            return;
        };
        let trouble = Trouble {
            failed,
            why: format!("{}: {why}", disk.display()),
            disk: disk.clone(),
        };
        let mut inner = self.inner.lock();
        let Some(slot) = inner.troubles.get_mut(unit) else {
            return;
        };
        // What can't be mended is not hidden by what can.
        let worse = |old: &Trouble| old.failed == Failed::Flush && failed != Failed::Flush;
        if slot.as_ref() == Some(&trouble) || slot.as_ref().is_some_and(worse) {
            return;
        }
        *slot = Some(trouble);
        self.any.store(true, Ordering::Release);
        drop(inner);
        (self.tell)();
    }

    /// A disk can do this.
    fn works(&self, unit: usize, did: Failed) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut inner = self.inner.lock();
        let Some(slot) = inner.troubles.get_mut(unit) else {
            return;
        };
        if !slot.as_ref().is_some_and(|trouble| trouble.failed == did) {
            return;
        }
        *slot = None;
        let any = inner.troubles.iter().any(Option::is_some);
        self.any.store(any, Ordering::Release);
        drop(inner);
        (self.tell)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_request_waits_for_the_shadow_for_the_disk_or_not_at_all() {
        use Failed::{Flush, Read, Write};
        use OnError::{Hold, Report};
        use Standing::{Alone, Copying, Elsewhere, Follows, Mirrored};
        for (failed, full, on_error) in [
            (Read, false, Hold),
            (Write, true, Report),
            (Write, false, Hold),
        ] {
            for standing in [Alone, Mirrored] {
                assert_eq!(next(standing, failed, full, on_error, false), None);
                let again = next(standing, failed, full, on_error, true);
                assert_eq!(again, Some(Next::Again), "{standing:?} {failed:?}");
            }
        }
        for waited in [false, true] {
            assert_eq!(next(Mirrored, Flush, false, Report, waited), None);
            // A second fsync would say that it had worked.
            let told = next(Alone, Flush, true, Hold, waited);
            assert_eq!(told, Some(Next::Report));
            let told = next(Alone, Read, false, Report, waited);
            assert_eq!(told, Some(Next::Report));
            for standing in [Copying, Follows, Elsewhere] {
                let back = next(standing, Flush, true, Hold, waited);
                assert_eq!(back, Some(Next::GiveBack));
            }
        }
        assert_eq!(
            next(Mirrored, Write, false, Report, true),
            Some(Next::Again)
        );
    }

    fn faults(on_error: OnError) -> (Arc<Faults>, mpsc::Receiver<()>) {
        let (tell, told) = mpsc::channel();
        let faults = Faults::new(vec![("/d/disk".into(), on_error)], move || {
            let _ = tell.send(());
        });
        (faults, told)
    }

    fn full() -> io::Error {
        io::ErrorKind::StorageFull.into()
    }

    #[test]
    fn a_full_disk_is_waited_for_and_said_to_be_until_it_is_not() {
        let (faults, told) = faults(OnError::Report);
        faults.stand(Standing::Alone);
        let mut tries = 0;
        let done = faults.persist(0, Failed::Write, || {
            tries += 1;
            match tries {
                1 | 2 => Err(full()),
                _ => Ok(()),
            }
        });
        done.unwrap();
        assert_eq!(tries, 3);
        assert_eq!(
            told.try_iter().count(),
            2,
            "that it fails, once, and that it works"
        );
        assert_eq!(faults.trouble(), None);
    }

    #[test]
    fn a_flush_waits_for_the_guest_to_go_on_elsewhere_and_is_then_nobodys() {
        let (faults, told) = faults(OnError::Report);
        faults.stand(Standing::Mirrored);
        let waiting = std::thread::spawn({
            let faults = Arc::clone(&faults);
            move || faults.persist(0, Failed::Flush, || Err(io::Error::other("gone")))
        });
        told.recv().unwrap();
        let why = faults.trouble().unwrap().why;
        assert!(why.contains("/d/disk") && why.contains("gone"), "{why}");
        // A read that works does not make good what was not made durable.
        faults.persist(0, Failed::Read, || Ok(())).unwrap();
        assert!(faults.trouble().is_some());
        std::thread::sleep(AGAIN + Duration::from_millis(200));
        assert!(!waiting.is_finished(), "no second try");
        faults.stand(Standing::Elsewhere);
        let back = waiting.join().unwrap().unwrap_err();
        assert_eq!(back.kind(), io::ErrorKind::Interrupted);
        assert!(faults.trouble().is_none() && !faults.holds());
    }

    #[test]
    fn with_the_shadow_lost_on_the_way_the_guest_is_told_of_what_nobody_can_mend() {
        let (faults, told) = faults(OnError::Hold);
        faults.stand(Standing::Mirrored);
        let waiting = std::thread::spawn({
            let faults = Arc::clone(&faults);
            move || faults.persist(0, Failed::Flush, || Err(io::Error::other("gone")))
        });
        told.recv().unwrap();
        faults.stand(Standing::Alone);
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
    }
}
