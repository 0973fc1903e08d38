//! The reading thread: acknowledgements commit epochs and release their outputs.

use std::sync::atomic::Ordering;

use ax_failpoint::Point;
use ax_wire::resync::MAX_ANSWER;
use ax_wire::stream::{self, FrameError, FrameKind, Header, Nonce, Progress, Refusal, Resume};
use ax_wire::{EpochId, Generation};

use super::PrimaryEvents;
use super::handle::{Failure, Shared};
use crate::link::{FrameReader, LinkError};

/// Longest payload a shadow sends but for its answers about disks, bytes.
const MAX: usize = 64;

/// The header of a frame of the backward connection, checked against the session (rule 5).
fn read_header(shared: &Shared, reader: &mut FrameReader) -> Result<Header, LinkError> {
    let header = reader.header()?;
    let expected = shared.current_session();
    // The shadow learns of a new generation in the stream: until then its frames carry the old one.
    let known = shared.session.generation..=expected.generation;
    if header.session.pair != expected.pair
        || header.session.incarnation != shared.shadow
        || !known.contains(&Generation(header.session.generation.0))
    {
        return Err(FrameError::Session {
            expected: ax_wire::Session {
                incarnation: shared.shadow,
                ..expected
            },
            got: header.session,
        }
        .into());
    }
    Ok(header)
}

fn too_long(header: &Header) -> LinkError {
    FrameError::TooLong {
        kind: header.kind,
        len: header.len,
    }
    .into()
}

/// The payload of an ordinary frame.
fn read<'a>(
    header: &Header,
    reader: &mut FrameReader,
    buf: &'a mut [u8; MAX],
) -> Result<&'a [u8], LinkError> {
    let payload = buf.get_mut(..header.len).ok_or_else(|| too_long(header))?;
    reader.payload(header, payload)?;
    Ok(payload)
}

/// Keeps what the shadow says of its disks for the epoch thread: only what was asked for, so that there
/// is never more than was asked for.
fn keep_answer(
    shared: &Shared,
    header: &Header,
    reader: &mut FrameReader,
) -> Result<(), LinkError> {
    if shared.answers.lock().due.front() != Some(&header.kind) {
        return Err(unexpected(header.kind));
    }
    if header.len > MAX_ANSWER {
        return Err(too_long(header));
    }
    let mut payload = Vec::with_capacity(header.len);
    reader.append(header, &mut payload)?;
    let mut answers = shared.answers.lock();
    answers.due.pop_front();
    answers.come.push_back(payload);
    drop(answers);
    shared.trigger.ring();
    Ok(())
}

fn unexpected(kind: FrameKind) -> LinkError {
    FrameError::Body {
        kind,
        what: "not due on this connection now",
    }
    .into()
}

/// The shadow's first word: the last epoch it has staged whole, if any.
pub(super) fn read_resume(
    shared: &Shared,
    reader: &mut FrameReader,
) -> Result<Option<EpochId>, LinkError> {
    let mut buf = [0; MAX];
    let header = read_header(shared, reader)?;
    if header.kind != FrameKind::Resume {
        return Err(unexpected(header.kind));
    }
    let payload = read(&header, reader, &mut buf)?;
    let resume: Resume = stream::body(header.kind, payload)?;
    Ok((resume.has_epoch.get() != 0).then_some(EpochId(resume.staged.get())))
}

/// Reads until the connection ends; leaves the reason in the flow and wakes the epoch thread.
pub(super) fn run(shared: &Shared, events: &dyn PrimaryEvents, mut reader: FrameReader) {
    let failure = loop {
        match step(shared, events, &mut reader) {
            Ok(None) => {}
            Ok(Some(refusal)) => break Failure::Refused(refusal),
            Err(error) => break Failure::Link(error),
        }
    };
    shared.flow.lock().failure = Some(failure);
    shared.trigger.ring();
}

fn step(
    shared: &Shared,
    events: &dyn PrimaryEvents,
    reader: &mut FrameReader,
) -> Result<Option<Refusal>, LinkError> {
    let mut buf = [0; MAX];
    let header = read_header(shared, reader)?;
    if matches!(header.kind, FrameKind::DiskMap | FrameKind::DiskSums) {
        keep_answer(shared, &header, reader)?;
        return Ok(None);
    }
    let payload = read(&header, reader, &mut buf)?;
    match header.kind {
        FrameKind::Ack => {
            let progress: Progress = stream::body(header.kind, payload)?;
            ax_failpoint::reached(Point::AckRead);
            let stamp = shared.commit(header.epoch).map_err(|()| FrameError::Body {
                kind: header.kind,
                what: "acknowledges an epoch that was not sent",
            })?;
            if let Some(stamp) = stamp {
                if !shared.confirmed.swap(true, Ordering::AcqRel) {
                    events.confirmed(header.epoch);
                }
                ax_failpoint::reached(Point::Committed);
                shared.release(stamp);
                ax_failpoint::reached(Point::Released);
                events.committed(header.epoch);
            }
            note(shared, events, &progress);
        }
        FrameKind::Applied => note(shared, events, &stream::body(header.kind, payload)?),
        FrameKind::Answer => {
            let answer: Nonce = stream::body(header.kind, payload)?;
            let mut question = shared.question.lock();
            let stamp = if question.nonce == answer.nonce.get() {
                question.stamp_ns.take()
            } else {
                None
            };
            drop(question);
            if let Some(stamp) = stamp {
                shared.release(stamp);
            }
        }
        FrameKind::Refuse => return Ok(Some(stream::body(header.kind, payload)?)),
        kind => return Err(unexpected(kind)),
    }
    Ok(None)
}

fn note(shared: &Shared, events: &dyn PrimaryEvents, progress: &Progress) {
    let acked = shared.acked.load(Ordering::Acquire);
    let applied = progress.applied.get().min(acked);
    if shared.applied.fetch_max(applied, Ordering::AcqRel) < applied {
        events.applied(EpochId(applied));
    }
    let durable = progress.durable.get().min(acked);
    if shared.durable.fetch_max(durable, Ordering::AcqRel) < durable {
        events.durable(EpochId(durable));
    }
}
