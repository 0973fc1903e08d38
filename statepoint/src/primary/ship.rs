//! Writing one captured epoch, and what goes between epochs, to the forward connection.

use std::sync::atomic::Ordering;

use ax_failpoint::Point;
use ax_wire::PAGE_SIZE;
use ax_wire::runs::{Patches, RUN_HEADER, run_header};
use ax_wire::stream::{EpochBegin, EpochEnd, FrameKind, MAX_PAYLOAD, Nonce};
use zerocopy::IntoBytes;

use super::capture::{Slot, runs};
use super::handle::Flight;
use super::sent::Sent;
use super::{CaptureError, EpochSource, PrimaryEngine, PrimaryError};
use crate::guest::{Guest, Page};
use crate::link::{FrameWriter, LinkError};
use crate::trace::Moment;

/// Pages put in one frame.
const CHUNK: usize = 64;

/// Bytes of a chunk of pages.
pub(super) const CHUNK_BYTES: usize = CHUNK * PAGE_SIZE;

/// Most bytes of state or records put in one frame.
const PIECE: usize = 256 << 10;

const _: () = assert!(CHUNK * (PAGE_SIZE + RUN_HEADER) <= MAX_PAYLOAD && PIECE <= MAX_PAYLOAD);

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// What an epoch's end must say.
#[derive(Default)]
struct Count {
    frames: u64,
    bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes as u64;
    }
}

/// Appends `content`, the pages `first`.., as runs with and without content, and as patches where those pay.
fn encode(first: Page, content: &[u8], mut sent: Option<&mut Sent>, out: &mut Vec<u8>) {
    // The run that the next page may belong to: its header, its first page, its length, and whether it has content.
    let mut open: Option<(usize, Page, u32, bool)> = None;
    for (page, at) in content.chunks_exact(PAGE_SIZE).zip(first..) {
        let data = page != ZERO_PAGE.as_slice();
        if let Some(sent) = &mut sent {
            if !data {
                sent.forget(at);
            } else if sent.patch(at, page, out) {
                open = None;
                continue;
            }
        }
        let (header, first, count) = match open {
            Some((header, first, count, same)) if same == data => (header, first, count + 1),
            _ => {
                let header = out.len();
                out.extend_from_slice(&[0; RUN_HEADER]);
                (header, at, 1)
            }
        };
        if let Some(place) = out.get_mut(header..header + RUN_HEADER) {
            place.copy_from_slice(&run_header(first, count, data));
        }
        if data {
            out.extend_from_slice(page);
        }
        open = Some((header, first, count, data));
    }
}

/// Writes consecutive pages as frames of `kind`.
pub(super) fn write_pages(
    writer: &mut FrameWriter,
    kind: FrameKind,
    epoch: ax_wire::EpochId,
    first: Page,
    content: &[u8],
    mut wrote: impl FnMut(usize),
) -> Result<(), LinkError> {
    for (content, first) in content.chunks(CHUNK_BYTES).zip((first..).step_by(CHUNK)) {
        wrote(writer.frame(kind, epoch, |out| {
            encode(first, content, None, out);
        })?);
    }
    Ok(())
}

impl<G: Guest, S: EpochSource> PrimaryEngine<G, S> {
    /// Ships `slot` and puts it among the epochs in flight. A slot that could not be shipped whole is
    /// kept there too: it is sent again after a reconnection.
    ///
    /// An epoch larger than its slot: the rest of its pages is read from the guest, which must be
    /// paused still, and stays so until the acknowledgement.
    pub(super) fn ship(
        &mut self,
        writer: &mut FrameWriter,
        slot: Slot,
    ) -> Result<(), PrimaryError> {
        self.shared.flow.lock().flying.push_back(Flight {
            epoch: slot.epoch,
            stamp_ns: 0,
            resumed_ns: slot.resumed_ns,
            record: slot.record,
            slot: None,
        });
        self.send(writer, slot)
    }

    /// Sends again what a lost connection left unacknowledged.
    pub(super) fn resend(&mut self, writer: &mut FrameWriter) -> Result<(), PrimaryError> {
        loop {
            let mut flow = self.shared.flow.lock();
            let next = flow.flying.iter_mut().find_map(|f| {
                let again = f.stamp_ns == 0;
                if again { f.slot.take() } else { None }
            });
            drop(flow);
            match next {
                Some(slot) => self.send(writer, slot)?,
                None => return Ok(()),
            }
        }
    }

    fn send(&mut self, writer: &mut FrameWriter, slot: Slot) -> Result<(), PrimaryError> {
        let began = self.shared.clock.now_ns();
        let before = writer.written;
        let sent = self.write_epoch(writer, &slot);
        let (ended, shipped) = (self.shared.clock.now_ns(), writer.written - before);
        let counters = &self.shared.counters;
        counters.bytes.fetch_add(shipped, Ordering::Relaxed);
        counters.ship.record(ended.saturating_sub(began));
        if sent.is_ok() {
            self.trace_shipped(&slot, [began, ended], shipped);
        }
        let mut flow = self.shared.flow.lock();
        match flow.flying.iter_mut().find(|f| f.epoch == slot.epoch) {
            Some(flight) => flight.slot = Some(slot),
            None => flow.free.push(slot),
        }
        drop(flow);
        sent
    }

    fn write_epoch(&mut self, writer: &mut FrameWriter, slot: &Slot) -> Result<(), PrimaryError> {
        let epoch = slot.epoch;
        let mut count = Count::default();
        let begin = EpochBegin {
            released: self.shared.barrier.released().0.into(),
            rx_given: slot.rx_given.map(Into::into),
            state: (slot.state.len() as u64).into(),
            disk: (slot.disk.len() as u64).into(),
            outputs: (slot.outputs.len() as u64).into(),
            pages: (slot.pages.len() as u64).into(),
        };
        let fixed = |bytes: &[u8], out: &mut Vec<u8>| out.extend_from_slice(bytes);
        count.add(writer.frame(FrameKind::EpochBegin, epoch, |out| {
            fixed(begin.as_bytes(), out);
        })?);
        self.write_state(writer, slot, &mut count)?;
        self.write_dirty(writer, slot, &mut count)?;
        for (kind, bytes) in [
            (FrameKind::Disk, &slot.disk),
            (FrameKind::Outputs, &slot.outputs),
        ] {
            for piece in bytes.chunks(PIECE) {
                count.add(writer.frame(kind, epoch, |out| fixed(piece, out))?);
            }
        }
        let end = EpochEnd {
            frames: count.frames.into(),
            bytes: count.bytes.into(),
            pages: (slot.pages.len() as u64).into(),
            digest: slot.digest.unwrap_or(0).into(),
            has_digest: u64::from(slot.digest.is_some()).into(),
        };
        writer.frame(FrameKind::EpochEnd, epoch, |out| fixed(end.as_bytes(), out))?;
        // The acknowledgement follows the receipt of the last byte, which is written after this: so
        // long the shadow had not asked to take over (rule 24).
        let stamp = self.shared.clock.now_ns();
        self.shared.trace.mark(slot.record, Moment::Encoded, stamp);
        let mut flow = self.shared.flow.lock();
        if let Some(flight) = flow.flying.iter_mut().find(|f| f.epoch == epoch) {
            flight.stamp_ns = stamp;
        }
        self.shared.shipped.fetch_max(epoch.0, Ordering::AcqRel);
        drop(flow);
        writer.flush()?;
        ax_failpoint::reached(Point::Shipped);
        Ok(())
    }

    /// The machine's state, as patches where those pay.
    fn write_state(
        &mut self,
        writer: &mut FrameWriter,
        slot: &Slot,
        count: &mut Count,
    ) -> Result<(), PrimaryError> {
        if slot.state.len() <= PIECE && writer.version().has(&Patches).is_ok() {
            let sent = &mut self.sent_state;
            let patch = |out: &mut Vec<u8>| sent.patch(&slot.state, out);
            if let Some(bytes) = writer.frame_if(FrameKind::StatePatch, slot.epoch, patch)? {
                count.add(bytes);
                return Ok(());
            }
        }
        for piece in slot.state.chunks(PIECE) {
            let fixed = |out: &mut Vec<u8>| out.extend_from_slice(piece);
            count.add(writer.frame(FrameKind::State, slot.epoch, fixed)?);
        }
        Ok(())
    }

    /// The epoch's pages as frames of at most [`CHUNK`] pages, packed: short runs share a frame.
    fn write_dirty(
        &mut self,
        writer: &mut FrameWriter,
        slot: &Slot,
        count: &mut Count,
    ) -> Result<(), PrimaryError> {
        let (kept, rest) = slot.pages.split_at(slot.captured());
        let contents = slot.content.as_slice().chunks(CHUNK_BYTES);
        let mut sent = writer
            .version()
            .has(&Patches)
            .is_ok()
            .then_some(&mut self.sent);
        for (pages, content) in kept.chunks(CHUNK).zip(contents) {
            count.add(writer.frame(FrameKind::Pages, slot.epoch, |out| {
                let mut at = 0;
                for (first, n) in runs(pages) {
                    let end = at + n * PAGE_SIZE;
                    let content = content.get(at..end).unwrap_or_default();
                    encode(first, content, sent.as_deref_mut(), out);
                    at = end;
                }
            })?);
        }
        for pages in rest.chunks(CHUNK) {
            pages.iter().for_each(|page| self.sent.forget(*page));
            for (first, n) in runs(pages) {
                self.scratch.resize(n * PAGE_SIZE, 0);
                self.guest
                    .read_pages(first, &mut self.scratch)
                    .map_err(CaptureError::Guest)?;
                let wrote = |bytes| count.add(bytes);
                write_pages(
                    writer,
                    FrameKind::Pages,
                    slot.epoch,
                    first,
                    &self.scratch,
                    wrote,
                )?;
            }
        }
        Ok(())
    }

    /// What goes between epochs: a new generation, received frames, a question.
    pub(super) fn write_between(&mut self, writer: &mut FrameWriter) -> Result<(), LinkError> {
        let last = ax_wire::EpochId(self.next.0.saturating_sub(1));
        let mut any = false;
        let session = self.shared.current_session();
        if writer.session() != session {
            writer.set_session(session);
            writer.frame(FrameKind::Granted, last, |_| {})?;
            any = true;
        }
        {
            let mut received = self.shared.received.lock();
            std::mem::swap(&mut *received, &mut self.received);
        }
        if !self.received.is_empty() {
            let received = &self.received;
            writer.frame(FrameKind::Received, last, |out| {
                out.extend_from_slice(received);
            })?;
            self.received.clear();
            any = true;
        }
        let mut question = self.shared.question.lock();
        let nonce = if question.wanted && question.stamp_ns.is_none() {
            question.wanted = false;
            question.nonce = question.nonce.wrapping_add(1);
            question.stamp_ns = Some(self.shared.clock.now_ns());
            Some(question.nonce)
        } else {
            None
        };
        drop(question);
        if let Some(nonce) = nonce {
            let nonce = Nonce {
                nonce: nonce.into(),
            };
            writer.frame(FrameKind::Question, last, |out| {
                out.extend_from_slice(nonce.as_bytes());
            })?;
            any = true;
        }
        if any {
            writer.flush()?;
        }
        Ok(())
    }
}
