//! Reading the forward connection: every check of an epoch is here.

use std::convert::Infallible;
use std::sync::atomic::Ordering;

use ax_failpoint::Point;
use ax_sync::Mutex;
use ax_wire::offload::carried;
use ax_wire::records::{RecordKind, Records};
use ax_wire::resync::Ask;
use ax_wire::runs::{Content, Patches, Runs};
use ax_wire::stream::{self, EpochBegin, EpochEnd, FrameError, FrameKind, Header, Nonce};
use ax_wire::{EpochId, Generation, PAGE_SIZE, Version};
use io_barrier::MAX_NICS;

use super::apply::write_runs;
use super::stage::Stage;
use super::{ShadowError, ShadowSink, Shared};
use crate::guest::{RamRegion, ShadowGuest};
use crate::link::{FrameReader, LinkError};

pub(super) struct Receiver<'a, 'g, G, S> {
    shared: &'a Shared,
    reader: FrameReader,
    guest: &'a Mutex<&'g mut G>,
    sink: &'a Mutex<&'g mut S>,
    ram: Vec<RamRegion>,
    stage: Option<Stage>,
    /// The machine's state of the last epoch that was whole on this connection; empty before the first.
    last_state: Vec<u8>,
    /// Payload of frames that are not staged.
    scratch: Vec<u8>,
    /// A piece of the disks' initial copy, while it arrives.
    disk: Vec<u8>,
    copying: bool,
    copied: u64,
    first: bool,
}

fn bad(epoch: EpochId, what: &'static str) -> ShadowError {
    ShadowError::Epoch {
        epoch: epoch.0,
        what,
    }
}

/// True when every page of the run is RAM.
fn in_ram(ram: &[RamRegion], first: u64, pages: u64) -> bool {
    let Some(end) = first.checked_add(pages) else {
        return false;
    };
    ram.iter()
        .any(|r| first >= r.start && end <= r.start.saturating_add(r.pages))
}

/// True when `bytes` are whole records of kinds for which `allowed` holds.
fn are_records(bytes: &[u8], allowed: impl Fn(RecordKind, u8) -> bool) -> bool {
    Records::new(bytes).all(|r| r.is_ok_and(|r| allowed(r.kind, r.unit)))
}

impl<'a, 'g, G: ShadowGuest, S: ShadowSink> Receiver<'a, 'g, G, S> {
    pub fn new(
        shared: &'a Shared,
        reader: FrameReader,
        guest: &'a Mutex<&'g mut G>,
        sink: &'a Mutex<&'g mut S>,
    ) -> Self {
        let ram = guest.lock().ram().to_vec();
        Receiver {
            shared,
            reader,
            guest,
            sink,
            ram,
            stage: None,
            last_state: Vec::with_capacity(shared.config.state_bytes),
            scratch: Vec::new(),
            disk: Vec::new(),
            copying: false,
            copied: 0,
            first: false,
        }
    }

    /// Until something is wrong or the connection ends.
    pub fn run(&mut self) -> Result<Infallible, ShadowError> {
        let result = loop {
            if let Err(error) = self.frame() {
                break error;
            }
        };
        // I2: a partial epoch is discarded.
        if let Some(stage) = self.stage.take() {
            self.shared.give_stage(stage);
        }
        Err(result)
    }

    fn staged(&self) -> EpochId {
        EpochId(self.shared.staged.load(Ordering::Acquire))
    }

    fn frame(&mut self) -> Result<(), ShadowError> {
        let header = self.reader.header()?;
        self.check_session(&header)?;
        match header.kind {
            FrameKind::BulkPages | FrameKind::BulkDisk | FrameKind::BulkDiskEnd => {
                self.bulk(&header)
            }
            FrameKind::DiskBasis | FrameKind::DiskAsk => self.asked(&header),
            FrameKind::SyncDone => self.sync_done(&header),
            FrameKind::EpochBegin => self.begin(&header),
            FrameKind::State
            | FrameKind::StatePatch
            | FrameKind::Pages
            | FrameKind::Disk
            | FrameKind::Outputs => self.part(&header),
            FrameKind::EpochEnd => self.end(&header),
            FrameKind::Received | FrameKind::Question | FrameKind::Granted => self.between(&header),
            kind => Err(body_error(kind, "not a forward frame")),
        }
    }

    /// Rule 5: exactly this stream's session; only [`FrameKind::Granted`] may bring a later generation.
    fn check_session(&self, header: &Header) -> Result<(), LinkError> {
        let expected = self.shared.primary();
        let mut session = header.session;
        if header.kind == FrameKind::Granted && session.generation > expected.generation {
            session.generation = expected.generation;
        }
        if session != expected {
            header.of_session(expected)?;
        }
        Ok(())
    }

    fn read_scratch(&mut self, header: &Header) -> Result<(), LinkError> {
        self.scratch.clear();
        self.reader.append(header, &mut self.scratch)
    }

    /// A frame of the initial copy: the first one begins it.
    fn begin_copy(&mut self, header: &Header) -> Result<(), ShadowError> {
        if self.staged() != EpochId(0) || self.stage.is_some() {
            return Err(bad(header.epoch, "an initial copy to a shadow in sync"));
        }
        if !self.copying {
            self.copying = true;
            let begun = self.sink.lock().begin_sync();
            begun.map_err(|source| ShadowError::Apply { epoch: 0, source })?;
        }
        Ok(())
    }

    /// Answers what the primary asks of the disks, with one frame.
    fn asked(&mut self, header: &Header) -> Result<(), ShadowError> {
        self.begin_copy(header)?;
        self.read_scratch(header)?;
        let ask = match header.kind {
            FrameKind::DiskBasis => stream::body(header.kind, &self.scratch).map(Ask::Basis),
            _ => stream::body(header.kind, &self.scratch).map(Ask::Sums),
        };
        let ask = ask.map_err(LinkError::from)?;
        let there = self.sink.lock().asked(&ask, &mut self.scratch);
        if !there.map_err(|source| ShadowError::Apply { epoch: 0, source })? {
            return Err(body_error(header.kind, "asks for what no disk here has"));
        }
        let shared = self.shared;
        let answered = (shared.backward).of_disks(shared.me(), ask.answer(), &self.scratch);
        Ok(answered?)
    }

    fn bulk(&mut self, header: &Header) -> Result<(), ShadowError> {
        let failed = |source| ShadowError::Apply { epoch: 0, source };
        self.begin_copy(header)?;
        if header.kind == FrameKind::BulkPages {
            self.read_scratch(header)?;
            // Nothing is known to be there yet that a patch could be for.
            check_runs(&self.ram, header, false, &self.scratch)?;
            let mut guest = self.guest.lock();
            write_runs(&mut **guest, &self.scratch).map_err(failed)?;
        } else if header.kind == FrameKind::BulkDisk {
            if self.disk.len() + header.len > self.shared.config.disk_bytes {
                return Err(bad(header.epoch, "too large a piece of disk"));
            }
            self.reader.append(header, &mut self.disk)?;
        } else {
            self.read_scratch(header)?;
            if !are_records(&self.disk, is_copied) {
                return Err(bad(
                    header.epoch,
                    "the initial copy has broken disk records",
                ));
            }
            self.sink.lock().bulk(&self.disk).map_err(failed)?;
            self.disk.clear();
        }
        self.copied += header.len as u64;
        self.shared.events.copying(self.copied);
        Ok(())
    }

    fn sync_done(&mut self, header: &Header) -> Result<(), ShadowError> {
        self.read_scratch(header)?;
        if !self.copying || !self.disk.is_empty() {
            return Err(bad(
                header.epoch,
                "the initial copy ends without having begun",
            ));
        }
        (self.copying, self.first) = (false, true);
        Ok(())
    }

    fn begin(&mut self, header: &Header) -> Result<(), ShadowError> {
        let epoch = header.epoch;
        ax_failpoint::reached(Point::Staging);
        if self.stage.is_some() || self.copying {
            return Err(bad(epoch, "begins before the one before it is whole"));
        }
        let staged = self.staged();
        let due = if self.first {
            epoch > EpochId(0)
        } else {
            staged != EpochId(0) && epoch == staged.next()
        };
        if !due {
            return Err(bad(epoch, "is not the one after the last committed"));
        }
        self.read_scratch(header)?;
        let begin: EpochBegin =
            stream::body(header.kind, &self.scratch).map_err(LinkError::from)?;
        let config = &self.shared.config;
        let ram: u64 = self.ram.iter().map(|r| r.pages).sum();
        if begin.state.get() > config.state_bytes as u64
            || begin.disk.get() > config.disk_bytes as u64
            || begin.outputs.get() > config.output_bytes as u64
            || begin.pages.get() > ram
        {
            return Err(bad(epoch, "is larger than any may be"));
        }
        if begin.released.get() >= epoch.0 {
            return Err(bad(epoch, "has released outputs that are not committed"));
        }
        let Some(mut stage) = self.shared.take_stage() else {
            return Err(LinkError::Closed.into());
        };
        stage.clear();
        stage.epoch = epoch;
        stage.begin = Some(begin);
        stage.rx_given = begin.rx_given.map(|n| n.get());
        stage.first = self.first;
        stage.frames = 1;
        stage.bytes = header.len as u64;
        self.stage = Some(stage);
        Ok(())
    }

    fn part(&mut self, header: &Header) -> Result<(), ShadowError> {
        let epoch = header.epoch;
        let Some(stage) = self.stage.as_mut().filter(|s| s.epoch == epoch) else {
            return Err(bad(epoch, "has a part outside its begin and end"));
        };
        let begin = stage.begin.ok_or_else(|| bad(epoch, "has no begin"))?;
        stage.frames += 1;
        stage.bytes += header.len as u64;
        let (part, bound) = match header.kind {
            FrameKind::State => (&mut stage.state, begin.state.get()),
            FrameKind::Disk => (&mut stage.disk, begin.disk.get()),
            FrameKind::Outputs => (&mut stage.outputs, begin.outputs.get()),
            FrameKind::StatePatch => return self.patch_state(header, begin),
            _ => return self.pages(header),
        };
        if (part.len() + header.len) as u64 > bound {
            return Err(bad(epoch, "has more than its begin says"));
        }
        Ok(self.reader.append(header, part)?)
    }

    /// The state of the epoch before, patched.
    fn patch_state(&mut self, header: &Header, begin: EpochBegin) -> Result<(), ShadowError> {
        if self.reader.version().has(&Patches).is_err() {
            return Err(body_error(header.kind, "not known to this wire version"));
        }
        self.read_scratch(header)?;
        let Some(stage) = self.stage.as_mut() else {
            return Err(bad(header.epoch, "has state outside its begin and end"));
        };
        let length = self.last_state.len();
        if length == 0 || begin.state.get() != length as u64 || !stage.state.is_empty() {
            return Err(bad(header.epoch, "patches a state that is not there"));
        }
        stage.state.extend_from_slice(&self.last_state);
        stage.state.resize(length.next_multiple_of(PAGE_SIZE), 0);
        for run in Runs::new(&self.scratch) {
            let run = run.map_err(LinkError::from)?;
            let at = usize::try_from(run.first)
                .ok()
                .and_then(|n| n.checked_mul(PAGE_SIZE));
            let piece = at.and_then(|at| stage.state.get_mut(at..at.checked_add(PAGE_SIZE)?));
            match (run.content, piece) {
                (Content::Patch(patch), Some(piece)) => patch.apply(piece),
                _ => return Err(bad(header.epoch, "patches what is not its state")),
            }
        }
        stage.state.truncate(length);
        Ok(())
    }

    fn pages(&mut self, header: &Header) -> Result<(), ShadowError> {
        let epoch = header.epoch;
        let Some(stage) = self.stage.as_mut() else {
            return Err(bad(epoch, "has pages outside its begin and end"));
        };
        let patches = self.reader.version().has(&Patches).is_ok();
        let pages = if let Some(place) = stage.runs.grab(header.len) {
            self.reader.payload(header, place)?;
            check_runs(&self.ram, header, patches, place)?
        } else {
            self.scratch.clear();
            self.reader.append(header, &mut self.scratch)?;
            let pages = check_runs(&self.ram, header, patches, &self.scratch)?;
            stage
                .spill(&self.shared.config.spill_dir, &self.scratch)
                .map_err(|source| {
                    // Nothing was acknowledged: this shadow is as good as before.
                    tracing::error!(error = %source, "an epoch does not fit its stage");
                    ShadowError::Link(LinkError::Io(source))
                })?;
            pages
        };
        stage.pages += pages;
        if stage.pages > stage.begin.map_or(0, |b| b.pages.get()) {
            return Err(bad(epoch, "has more pages than its begin says"));
        }
        Ok(())
    }

    fn end(&mut self, header: &Header) -> Result<(), ShadowError> {
        let epoch = header.epoch;
        self.read_scratch(header)?;
        let end: EpochEnd = stream::body(header.kind, &self.scratch).map_err(LinkError::from)?;
        let Some(stage) = self.stage.as_mut().filter(|s| s.epoch == epoch) else {
            return Err(bad(epoch, "ends without having begun"));
        };
        let begin = stage.begin.ok_or_else(|| bad(epoch, "has no begin"))?;
        let counted = (stage.frames, stage.bytes, stage.pages);
        if counted != (end.frames.get(), end.bytes.get(), end.pages.get()) {
            return Err(bad(epoch, "is not what its end counts"));
        }
        let lengths = (stage.state.len(), stage.disk.len(), stage.outputs.len());
        let said = (begin.state.get(), begin.disk.get(), begin.outputs.get());
        if (lengths.0 as u64, lengths.1 as u64, lengths.2 as u64) != said
            || stage.pages != begin.pages.get()
        {
            return Err(bad(epoch, "is not what its begin says"));
        }
        if !are_records(&stage.disk, is_disk) {
            return Err(bad(epoch, "has broken disk records"));
        }
        let version = header.version;
        if !are_records(&stage.outputs, |kind, unit| is_output(kind, unit, version)) {
            return Err(bad(epoch, "has broken output records"));
        }
        stage.digest = (end.has_digest.get() != 0).then_some(end.digest.get());
        self.commit(begin)
    }

    /// The epoch is whole: from here on it is what a promotion goes on from, so it is remembered
    /// before it is acknowledged.
    fn commit(&mut self, begin: EpochBegin) -> Result<(), ShadowError> {
        let Some(mut stage) = self.stage.take() else {
            return Ok(());
        };
        let shared = self.shared;
        let (epoch, first, now) = (stage.epoch, stage.first, shared.clock.now_ns());
        stage.arrived_ns = now;
        self.last_state.clone_from(&stage.state);
        ax_failpoint::reached(Point::Staged);
        {
            let mut memory = shared.memory.lock();
            memory.outputs.released(EpochId(begin.released.get()));
            if memory.outputs.push(epoch, &stage.outputs).is_err() {
                drop(memory);
                shared.give_stage(stage);
                return Err(bad(epoch, "brings more unreleased outputs than may be"));
            }
            memory.received.committed(&stage.rx_given, now);
        }
        let later = if first {
            // Memory and disks are in sync before this is said (rule 22, step 2).
            shared.ready(stage);
            if !shared.wait_applied(epoch) {
                return Err(LinkError::Closed.into());
            }
            self.first = false;
            None
        } else {
            Some(stage)
        };
        shared.staged.store(epoch.0, Ordering::Release);
        let acked = if ax_failpoint::fails(Point::Acking) {
            Ok(())
        } else {
            shared.backward.ack(shared.me(), epoch, shared.progress())
        };
        ax_failpoint::reached(Point::Acked);
        // The primary waits for the acknowledgement, nobody for the pages: they are applied before a
        // promotion, whatever became of it.
        if let Some(stage) = later {
            shared.ready(stage);
        }
        acked?;
        if first {
            let generation = shared.primary().generation;
            shared.events.confirmed(epoch, generation);
        }
        Ok(())
    }

    fn between(&mut self, header: &Header) -> Result<(), ShadowError> {
        if self.stage.is_some() {
            return Err(body_error(header.kind, "inside an epoch"));
        }
        self.read_scratch(header)?;
        match header.kind {
            FrameKind::Received => {
                let known = |kind, unit| is_received(kind, unit, header.version);
                if !are_records(&self.scratch, known) {
                    return Err(body_error(header.kind, "not received frames"));
                }
                let now = self.shared.clock.now_ns();
                let mut memory = self.shared.memory.lock();
                for record in Records::new(&self.scratch).map_while(Result::ok) {
                    if let Some((packet, frame)) = carried(&record) {
                        memory
                            .received
                            .push(record.unit, record.at, now, &packet, frame);
                    }
                }
            }
            FrameKind::Question => {
                let nonce: Nonce =
                    stream::body(header.kind, &self.scratch).map_err(LinkError::from)?;
                if self.copying {
                    let done = self.sink.lock().nearly_in_sync();
                    done.map_err(|source| ShadowError::Apply { epoch: 0, source })?;
                }
                let shared = self.shared;
                shared.backward.answer(shared.me(), self.staged(), nonce)?;
            }
            _ => {
                let generation = header.session.generation;
                let before = self
                    .shared
                    .generation
                    .fetch_max(generation.0, Ordering::AcqRel);
                if Generation(before) < generation {
                    self.shared.events.granted(generation);
                }
            }
        }
        Ok(())
    }
}

fn body_error(kind: FrameKind, what: &'static str) -> ShadowError {
    LinkError::from(FrameError::Body { kind, what }).into()
}

/// What an epoch has of disks.
fn is_disk(kind: RecordKind, _unit: u8) -> bool {
    matches!(
        kind,
        RecordKind::DiskWrite | RecordKind::DiskFlush | RecordKind::DiskMark
    )
}

/// What the initial copy has of disks.
fn is_copied(kind: RecordKind, _unit: u8) -> bool {
    matches!(
        kind,
        RecordKind::DiskWrite | RecordKind::DiskFlush | RecordKind::DiskZero
    )
}

fn is_output(kind: RecordKind, unit: u8, spoken: Version) -> bool {
    let output = match kind {
        RecordKind::Frame | RecordKind::FrameWithHeader => usize::from(unit) < MAX_NICS,
        RecordKind::Console | RecordKind::PowerOff | RecordKind::Reset | RecordKind::Crash => true,
        _ => false,
    };
    output && spoken.has(&kind).is_ok()
}

fn is_received(kind: RecordKind, unit: u8, spoken: Version) -> bool {
    let received = matches!(kind, RecordKind::Received | RecordKind::ReceivedWithHeader);
    received && usize::from(unit) < MAX_NICS && spoken.has(&kind).is_ok()
}

/// Pages of a payload's runs, each of them RAM, and patched only where `patches` may be.
fn check_runs(
    ram: &[RamRegion],
    header: &Header,
    patches: bool,
    payload: &[u8],
) -> Result<u64, ShadowError> {
    let mut pages = 0u64;
    for run in Runs::new(payload) {
        let run = run.map_err(LinkError::from)?;
        if !in_ram(ram, run.first, run.pages) {
            return Err(bad(header.epoch, "has pages outside the guest's memory"));
        }
        if matches!(run.content, Content::Patch(_)) && !patches {
            return Err(body_error(
                header.kind,
                "patches a page where none may be patched",
            ));
        }
        pages = pages.saturating_add(run.pages);
    }
    Ok(pages)
}

impl Shared {
    /// Waits until `epoch` is applied; false when applying failed.
    fn wait_applied(&self, epoch: EpochId) -> bool {
        let mut stages = self.stages.lock();
        while self.applied.load(Ordering::Acquire) < epoch.0 {
            if stages.failed.is_some() {
                return false;
            }
            self.changed.wait(&mut stages);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_only_where_the_wire_version_has_one() {
        let (old, new) = (Version::FIRST, Version::SECOND);
        for version in [old, new] {
            assert!(is_output(RecordKind::Frame, 0, version));
            assert!(is_received(RecordKind::Received, 0, version));
            assert!(!is_output(RecordKind::Received, 0, version));
            assert!(!is_received(RecordKind::Frame, 0, version));
        }
        for (version, known) in [(old, false), (new, true)] {
            assert_eq!(is_output(RecordKind::FrameWithHeader, 0, version), known);
            let received = is_received(RecordKind::ReceivedWithHeader, 0, version);
            assert_eq!(received, known);
        }
        assert!(!is_output(RecordKind::FrameWithHeader, MAX_NICS as u8, new));
    }

    #[test]
    fn only_runs_wholly_in_one_region_are_ram() {
        let ram = [
            RamRegion { start: 0, pages: 8 },
            RamRegion {
                start: 16,
                pages: 8,
            },
        ];
        assert!(in_ram(&ram, 0, 8));
        assert!(in_ram(&ram, 20, 4));
        assert!(!in_ram(&ram, 7, 2));
        assert!(!in_ram(&ram, 8, 1));
        assert!(!in_ram(&ram, 23, 2));
        assert!(!in_ram(&ram, u64::MAX, 2));
    }
}
