//! The backward connection: acknowledgements, and their end (rule 21).

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ax_sync::Mutex;
use ax_wire::stream::{FrameKind, Nonce, Progress, Refusal, Resume};
use ax_wire::{EpochId, Session, Version};
use zerocopy::IntoBytes;

use crate::link::{FrameWriter, LinkError};

/// Writes to the primary, one whole frame at a time; frozen for good by [`Backward::freeze`].
#[derive(Default)]
pub(super) struct Backward {
    writer: Mutex<Option<FrameWriter>>,
    frozen: AtomicBool,
}

impl Backward {
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
