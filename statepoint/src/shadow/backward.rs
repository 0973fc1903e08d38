//! The backward connection: acknowledgements, and their end (rule 21).

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ax_sync::Mutex;
use ax_wire::stream::{FrameKind, Nonce, Progress, Refusal, Resume};
use ax_wire::{EpochId, Session, Version};
use io_barrier::Clock;
use zerocopy::IntoBytes;

use crate::link::{FrameWriter, LinkError};

/// Writes to the primary, one whole frame at a time; frozen for good by [`Backward::freeze`].
pub(super) struct Backward {
    writer: Mutex<Option<FrameWriter>>,
    frozen: AtomicBool,
    clock: Arc<dyn Clock>,
    /// When the last frame was begun that permits a release, nanoseconds of the clock.
    permitted_ns: AtomicU64,
}

impl Backward {
    pub fn new(clock: Arc<dyn Clock>) -> Backward {
        Backward {
            writer: Mutex::new(None),
            frozen: AtomicBool::new(false),
            clock,
            permitted_ns: AtomicU64::new(0),
        }
    }

    /// When this side last permitted a release, nanoseconds of its clock; 0 when it never has. What the primary
    /// was permitted counts from a moment before (rule 24): it was stamped before this side had what it
    /// answers. Final once [`Backward::freeze`] has returned.
    pub fn permitted_ns(&self) -> u64 {
        self.permitted_ns.load(Ordering::Acquire)
    }

    pub fn connect(
        &self,
        out: Box<dyn Write + Send>,
        version: Version,
        me: Session,
        resume: Resume,
    ) -> Result<(), LinkError> {
        *self.writer.lock() = Some(FrameWriter::new(out, me, version));
        // "Staged whole" is as good as an acknowledgement: not after freezing.
        self.permitting(me, FrameKind::Resume, EpochId(0), resume.as_bytes())
    }

    pub fn disconnect(&self) {
        *self.writer.lock() = None;
    }

    /// No frame that permits a release is written after this has returned. A write that hangs is ended
    /// by `close`.
    pub fn freeze(&self, close: impl Fn()) {
        self.frozen.store(true, Ordering::SeqCst);
        let locked = self.writer.try_lock_for(Duration::from_millis(2));
        if locked.is_none() {
            close();
            drop(self.writer.lock());
        }
    }

    /// Writes a frame the primary may take for permission to release.
    fn permitting(
        &self,
        me: Session,
        kind: FrameKind,
        epoch: EpochId,
        body: &[u8],
    ) -> Result<(), LinkError> {
        let mut writer = self.writer.lock();
        if self.frozen.load(Ordering::SeqCst) {
            return Err(LinkError::Closed);
        }
        let writer = writer.as_mut().ok_or(LinkError::Closed)?;
        // A write that fails may have arrived.
        let now = self.clock.now_ns();
        self.permitted_ns.store(now, Ordering::Release);
        write(writer, me, kind, epoch, body)
    }

    pub fn ack(&self, me: Session, epoch: EpochId, progress: Progress) -> Result<(), LinkError> {
        self.permitting(me, FrameKind::Ack, epoch, progress.as_bytes())
    }

    pub fn answer(&self, me: Session, epoch: EpochId, nonce: Nonce) -> Result<(), LinkError> {
        self.permitting(me, FrameKind::Answer, epoch, nonce.as_bytes())
    }

    /// Says what is on the disks: permits nothing.
    pub fn of_disks(&self, me: Session, kind: FrameKind, answer: &[u8]) -> Result<(), LinkError> {
        let mut writer = self.writer.lock();
        let writer = writer.as_mut().ok_or(LinkError::Closed)?;
        write(writer, me, kind, EpochId(0), answer)
    }

    /// Says how far this side has applied; not worth an error.
    pub fn applied(&self, me: Session, epoch: EpochId, progress: Progress) {
        if let Some(writer) = self.writer.lock().as_mut() {
            let _ = write(writer, me, FrameKind::Applied, epoch, progress.as_bytes());
        }
    }

    /// Says why the connection ends; not worth an error.
    pub fn refuse(&self, me: Session, refusal: Refusal) {
        if let Some(writer) = self.writer.lock().as_mut() {
            let body = refusal.as_bytes();
            let _ = write(writer, me, FrameKind::Refuse, EpochId(0), body);
        }
    }
}

fn write(
    writer: &mut FrameWriter,
    me: Session,
    kind: FrameKind,
    epoch: EpochId,
    body: &[u8],
) -> Result<(), LinkError> {
    writer.set_session(me);
    writer.frame(kind, epoch, |out| out.extend_from_slice(body))?;
    writer.flush()
}

#[cfg(test)]
mod tests {
    use ax_wire::{Generation, Incarnation, PairId};

    use super::*;

    struct At(AtomicU64);

    impl Clock for At {
        fn now_ns(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn the_last_permission_is_the_last_frame_that_may_be_taken_for_one() {
        let clock = Arc::new(At(AtomicU64::new(3)));
        let backward = Backward::new(Arc::clone(&clock) as Arc<dyn Clock>);
        let me = Session {
            pair: PairId([7; 16]),
            generation: Generation(1),
            incarnation: Incarnation(9),
        };
        let progress = || Progress {
            applied: 0.into(),
            durable: 0.into(),
        };
        assert!(backward.ack(me, EpochId(1), progress()).is_err());
        assert_eq!(backward.permitted_ns(), 0, "nobody listens");
        let writer = FrameWriter::new(Box::new(std::io::sink()), me, Version::FIRST);
        *backward.writer.lock() = Some(writer);
        backward.ack(me, EpochId(1), progress()).unwrap();
        assert_eq!(backward.permitted_ns(), 3);
        clock.0.store(5, Ordering::Relaxed);
        backward.applied(me, EpochId(1), progress());
        assert_eq!(backward.permitted_ns(), 3);
        let nonce = Nonce { nonce: 1.into() };
        backward.answer(me, EpochId(1), nonce).unwrap();
        assert_eq!(backward.permitted_ns(), 5);
        clock.0.store(8, Ordering::Relaxed);
        backward.freeze(|| ());
        assert!(backward.ack(me, EpochId(2), progress()).is_err());
        assert_eq!(backward.permitted_ns(), 5);
    }
}
