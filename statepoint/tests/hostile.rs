//! A shadow fed torn, reordered, truncated, corrupt, replayed and oversized streams. Frames are sealed
//! anew where a clever enemy would: only the meaning is wrong then.

#![allow(clippy::unwrap_used)]

mod sim;

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ax_wire::resync::MAX_ANSWER;
use ax_wire::runs::{Content, Runs, push_patch, run_header};
use ax_wire::stream::{FrameError, FrameKind, HEADER, Header, MAX_PAYLOAD};
use ax_wire::{EpochId, Generation, PAGE_SIZE, Version, WIRE_VERSION};
use sim::cable::{Fault, Meter, Tape, cable};
use sim::{Pair, Rng, session, until};
use statepoint::link::{LinkError, PrimaryLink, ShadowLink};
use statepoint::primary::PrimaryError;
use statepoint::shadow::ShadowError;

#[derive(Clone)]
struct Frame {
    header: Header,
    payload: Vec<u8>,
}

fn frames(bytes: &[u8]) -> Vec<Frame> {
    frames_of(WIRE_VERSION, bytes)
}

fn frames_of(version: Version, mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = vec![];
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
        let header = Header::parse(header, version).unwrap();
        let Some((payload, rest)) = rest.split_at_checked(header.len) else {
            break;
        };
        header.check(payload).unwrap();
        let payload = payload.to_vec();
        frames.push(Frame { header, payload });
        bytes = rest;
    }
    frames
}

/// Numbers and checksums made right again.
fn sealed(frames: &[Frame]) -> Vec<u8> {
    let mut bytes = vec![];
    for (number, frame) in frames.iter().enumerate() {
        let header = Header {
            number: number as u32,
            len: frame.payload.len(),
            payload_crc: crc32fast::hash(&frame.payload),
            ..frame.header
        };
        bytes.extend_from_slice(&header.to_bytes());
        bytes.extend_from_slice(&frame.payload);
    }
    bytes
}

/// A recorded run, and the pair whose guest made it.
fn record() -> (Pair, Vec<u8>) {
    record_in(WIRE_VERSION)
}

/// One in which the guest did something of everything in each epoch: on a busy machine it may not have had its turn.
fn record_in(version: Version) -> (Pair, Vec<u8>) {
    loop {
        let (pair, bytes) = try_record(version);
        let frames = frames_of(version, &bytes);
        let has = |kind, epoch| {
            let mut of = frames.iter().filter(|f| f.header.kind == kind);
            of.any(|f| f.header.epoch == EpochId(epoch))
        };
        let kinds = [FrameKind::Pages, FrameKind::Disk, FrameKind::Outputs];
        if (2..=7).all(|epoch| kinds.iter().all(|kind| has(*kind, epoch))) {
            return (pair, bytes);
        }
    }
}

fn try_record(version: Version) -> (Pair, Vec<u8>) {
    let mut pair = Pair::new(77);
    let workload = pair.workload();
    let meter = Meter {
        copy: Some(Arc::default()),
        ..Meter::default()
    };
    let handle = pair.primary_handle.clone();
    let (mut a, mut b) = cable(Fault::None, Fault::None, &meter);
    (a.version, b.version) = (version, version);
    std::thread::scope(|scope| {
        let primary = scope.spawn(|| pair.primary.run(a));
        let shadow = scope.spawn(|| pair.shadow.run(b));
        until("epochs", || handle.progress().acked.0 >= 12);
        handle.stop();
        primary.join().unwrap().unwrap();
        shadow.join().unwrap();
    });
    pair.stop.store(true, Ordering::SeqCst);
    workload.join().unwrap();
    let bytes = meter.copy.unwrap().lock().clone();
    let mut whole = frames_of(version, &bytes);
    let last = whole
        .iter()
        .rposition(|f| f.header.kind == FrameKind::EpochEnd);
    whole.truncate(last.unwrap() + 1);
    (pair, sealed(&whole))
}

/// What a fresh shadow makes of `bytes`: whatever it is, its memory is one of the guest's true pasts.
fn play(guest: &Pair, bytes: Vec<u8>) -> (ShadowError, Option<EpochId>) {
    play_in(WIRE_VERSION, guest, bytes)
}

fn play_in(version: Version, guest: &Pair, bytes: Vec<u8>) -> (ShadowError, Option<EpochId>) {
    let mut fresh = Pair::new(0);
    fresh.sim = guest.sim.clone();
    let link = ShadowLink {
        forward: Box::new(Tape(Cursor::new(bytes))),
        backward: Box::new(std::io::sink()),
        version,
        close: Arc::new(|| {}),
    };
    let error = fresh.shadow.run(link);
    let committed = fresh.shadow_handle.committed();
    if let Some(committed) = &committed {
        fresh.check_copy(committed);
    }
    assert!(!fresh.shadow_handle.is_spoiled(), "spoiled by {error}");
    (error, committed.map(|c| c.epoch))
}

fn find(frames: &[Frame], kind: FrameKind, epoch: u64) -> usize {
    frames
        .iter()
        .position(|f| f.header.kind == kind && f.header.epoch == EpochId(epoch))
        .unwrap()
}

#[test]
fn no_hostile_stream_is_taken_for_an_epoch() {
    let (guest, bytes) = record();
    let good = frames(&bytes);
    let (error, committed) = play(&guest, bytes.clone());
    assert!(
        matches!(error, ShadowError::Link(LinkError::Closed)),
        "{error}"
    );
    assert!(
        committed >= Some(EpochId(12)),
        "the record itself is right: {committed:?}"
    );

    // Truncated and torn anywhere.
    let mut rng = Rng(1);
    for _ in 0..60 {
        let at = rng.below(bytes.len() as u64) as usize;
        play(&guest, bytes[..at].to_vec());
        let mut torn = bytes.clone();
        torn[at] ^= 1 << rng.below(8);
        let (error, _) = play(&guest, torn);
        let found = !matches!(error, ShadowError::Link(LinkError::Closed));
        // A flipped length may just leave the stream too short.
        assert!(
            found || at > bytes.len() - 2 * MAX_PAYLOAD,
            "byte {at}: {error}"
        );
    }

    // A frame dropped, doubled or moved, everything sealed anew.
    for at in 0..good.len() {
        let kind = good[at].header.kind;
        let harmless = matches!(
            kind,
            FrameKind::BulkPages | FrameKind::BulkDisk | FrameKind::BulkDiskEnd
        ) || matches!(
            kind,
            FrameKind::Question | FrameKind::Received | FrameKind::DiskAsk
        );
        if harmless || rng.below(4) != 0 {
            continue;
        }
        let mut dropped = good.clone();
        dropped.remove(at);
        let (error, committed) = play(&guest, sealed(&dropped));
        let last = good[at].header.epoch;
        let refused = matches!(
            error,
            ShadowError::Epoch { .. } | ShadowError::Link(LinkError::Frame(_))
        );
        if kind != FrameKind::Granted && at + 1 < good.len() {
            assert!(refused, "{kind:?} of {last:?} dropped: {error}");
            assert!(committed < Some(last), "{kind:?} of {last:?} dropped");
        }
        let mut doubled = good.clone();
        doubled.insert(at, good[at].clone());
        let (error, _) = play(&guest, sealed(&doubled));
        let refused = matches!(
            error,
            ShadowError::Epoch { .. } | ShadowError::Link(LinkError::Frame(_))
        );
        let granted = matches!(kind, FrameKind::Granted | FrameKind::SyncDone);
        assert!(refused || granted, "{kind:?} of {last:?} doubled: {error}");
    }

    // A whole epoch left out, two exchanged, one sent again later.
    let of =
        |epoch| find(&good, FrameKind::EpochBegin, epoch)..=find(&good, FrameKind::EpochEnd, epoch);
    let mut skipped = good.clone();
    skipped.drain(of(5));
    let (error, committed) = play(&guest, sealed(&skipped));
    assert!(
        matches!(error, ShadowError::Epoch { epoch: 6, .. }),
        "{error}"
    );
    assert_eq!(committed, Some(EpochId(4)));
    let mut replayed = good[..=*of(7).end()].to_vec();
    replayed.extend_from_slice(&good[of(6)]);
    let (error, committed) = play(&guest, sealed(&replayed));
    assert!(
        matches!(error, ShadowError::Epoch { epoch: 6, .. }),
        "I5: {error}"
    );
    assert_eq!(committed, Some(EpochId(7)));
}

#[test]
fn another_session_is_refused_whole() {
    let (guest, bytes) = record();
    let good = frames(&bytes);
    for change in [
        |s: &mut ax_wire::Session| s.generation = Generation(9),
        |s: &mut ax_wire::Session| s.generation = Generation(0),
        |s: &mut ax_wire::Session| s.incarnation.0 += 1,
        |s: &mut ax_wire::Session| s.pair.0[0] ^= 1,
    ] {
        let mut other = good.clone();
        other.retain(|f| f.header.kind != FrameKind::Granted);
        other.iter_mut().for_each(|f| change(&mut f.header.session));
        let (error, committed) = play(&guest, sealed(&other));
        let session = matches!(
            error,
            ShadowError::Link(LinkError::Frame(FrameError::Session { .. }))
        );
        assert!(session, "{error}");
        assert_eq!(committed, None);
    }
    // And one recorded at g, played when the stream has moved on to g + 1.
    let granted = good
        .iter()
        .position(|f| f.header.kind == FrameKind::Granted);
    let mut late = good[..=granted.unwrap()].to_vec();
    let mut stale = late.last().unwrap().clone();
    stale.header.session = session(sim::A.incarnation, 1);
    stale.header.kind = FrameKind::Question;
    stale.payload = vec![0; 8];
    late.push(stale);
    let (error, _) = play(&guest, sealed(&late));
    let refused = matches!(
        error,
        ShadowError::Link(LinkError::Frame(FrameError::Session { .. }))
    );
    assert!(refused, "{error}");
}

#[test]
fn lengths_and_pages_out_of_bounds_are_refused_before_they_cost_anything() {
    let (guest, bytes) = record();
    let good = frames(&bytes);
    let pages = find(&good, FrameKind::Pages, 3);
    let begin = find(&good, FrameKind::EpochBegin, 3);

    let mut oversized = sealed(&good[..pages]);
    let header = Header {
        number: pages as u32,
        len: MAX_PAYLOAD + 1,
        ..good[pages].header
    };
    oversized.extend_from_slice(&header.to_bytes());
    let (error, _) = play(&guest, oversized);
    let refused = matches!(
        error,
        ShadowError::Link(LinkError::Frame(FrameError::TooLong { .. }))
    );
    assert!(refused, "{error}");

    // An epoch that announces more than any may have, in each of its lengths.
    for field in [72, 80, 88, 96] {
        let mut greedy = good.clone();
        greedy[begin].payload[field..field + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        let (error, committed) = play(&guest, sealed(&greedy));
        assert!(
            matches!(error, ShadowError::Epoch { epoch: 3, .. }),
            "{error}"
        );
        assert_eq!(committed, Some(EpochId(2)));
    }

    // Pages that are not RAM: in the hole, at the end, wrapping, without end.
    for (first, count) in [(200, 1), (350, 4), (u64::MAX, 2), (0, u32::MAX)] {
        let mut outside = good.clone();
        outside[pages].payload = run_header(first, count, false).to_vec();
        let (error, committed) = play(&guest, sealed(&outside));
        let refused = matches!(
            error,
            ShadowError::Epoch { .. } | ShadowError::Link(LinkError::Frame(_))
        );
        assert!(refused, "{error}");
        assert_eq!(committed, Some(EpochId(2)));
    }
    let mut cut = good.clone();
    cut[pages].payload.truncate(PAGE_SIZE);
    let (error, _) = play(&guest, sealed(&cut));
    assert!(
        matches!(error, ShadowError::Link(LinkError::Frame(_))),
        "{error}"
    );

    // Patches of pages that are not RAM.
    for page in [200, u64::MAX - 1] {
        let mut outside = good.clone();
        outside[pages].payload.clear();
        let (old, new) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
        let most = 2 * PAGE_SIZE;
        assert!(push_patch(
            page,
            &old,
            &new,
            most,
            &mut outside[pages].payload
        ));
        let (error, committed) = play(&guest, sealed(&outside));
        assert!(matches!(error, ShadowError::Epoch { .. }), "{error}");
        assert_eq!(committed, Some(EpochId(2)));
    }

    // Rubbish where records should be.
    let disk = find(&good, FrameKind::Disk, 3);
    let mut rubbish = good.clone();
    rubbish[disk].payload.fill(0xff);
    let (error, committed) = play(&guest, sealed(&rubbish));
    assert!(
        matches!(error, ShadowError::Epoch { epoch: 3, .. }),
        "{error}"
    );
    assert_eq!(committed, Some(EpochId(2)));
}

#[test]
fn questions_about_disks_that_are_not_there_or_not_due_are_refused() {
    let (guest, bytes) = record();
    let good = frames(&bytes);
    let ask = find(&good, FrameKind::DiskAsk, 0);
    let with = |change: &dyn Fn(&mut Frame)| {
        let mut bad = good.clone();
        change(&mut bad[ask]);
        let (error, committed) = play(&guest, sealed(&bad));
        let refused = matches!(error, ShadowError::Link(LinkError::Frame(_)));
        assert!(refused, "{error}");
        assert_eq!(committed, None);
    };
    with(&|frame| frame.payload[8..16].copy_from_slice(&(1u64 << 40).to_le_bytes()));
    with(&|frame| frame.payload[24] ^= 1);
    with(&|frame| frame.payload.truncate(20));
    with(&|frame| frame.payload.push(0));
    with(&|frame| frame.header.kind = FrameKind::DiskBasis);
    with(&|frame| frame.header.kind = FrameKind::DiskSums);
    // In sync already, and within an epoch.
    let outside = [
        find(&good, FrameKind::EpochEnd, 2) + 1,
        find(&good, FrameKind::EpochEnd, 2),
    ];
    for (at, last) in outside.into_iter().zip([2, 1]) {
        let mut late = good.clone();
        let mut again = good[ask].clone();
        again.header.session = good[at - 1].header.session;
        late.insert(at, again);
        let (error, committed) = play(&guest, sealed(&late));
        assert!(matches!(error, ShadowError::Epoch { .. }), "{error}");
        assert_eq!(committed, Some(EpochId(last)));
    }
    // Records that have no place there: a mark of the maps in the copy, zeros in an epoch.
    let in_an_epoch = good.iter().position(|f| f.header.kind == FrameKind::Disk);
    let misplaced = [
        (find(&good, FrameKind::BulkDisk, 0), 10),
        (in_an_epoch.unwrap(), 9),
    ];
    for (at, kind) in misplaced {
        let mut bad = good.clone();
        bad[at].payload[0] = kind;
        let (error, _) = play(&guest, sealed(&bad));
        assert!(matches!(error, ShadowError::Epoch { .. }), "{error}");
    }
}

/// Pages of the record that are sent as patches.
fn patches(frames: &[Frame]) -> usize {
    let pages = frames.iter().filter(|f| f.header.kind == FrameKind::Pages);
    let runs = pages.flat_map(|f| Runs::new(&f.payload));
    runs.filter(|run| matches!(run.unwrap().content, Content::Patch(_)))
        .count()
}

#[test]
fn pages_are_patched_only_where_the_wire_version_has_it_and_the_shadow_has_the_page() {
    let (guest, bytes) = record();
    let good = frames(&bytes);
    assert!(patches(&good) > 0);
    let mut patch = vec![];
    let (old, new) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
    assert!(push_patch(1, &old, &new, 2 * PAGE_SIZE, &mut patch));
    let is_refused = |error: &ShadowError| {
        let text = error.to_string();
        text.contains("patches a page where none may be patched")
    };

    // In the initial copy nothing is known to be there.
    let mut early = good.clone();
    let bulk = early
        .iter_mut()
        .find(|f| f.header.kind == FrameKind::BulkPages);
    bulk.unwrap().payload.clone_from(&patch);
    let (error, committed) = play(&guest, sealed(&early));
    assert!(is_refused(&error), "{error}");
    assert_eq!(committed, None);

    let (guest, bytes) = record_in(Version::FIRST);
    let mut old = frames_of(Version::FIRST, &bytes);
    assert_eq!(patches(&old), 0, "an older build would not know them");
    let at = old.iter().rposition(|f| f.header.kind == FrameKind::Pages);
    let last = &mut old[at.unwrap()];
    last.payload = patch;
    let before = EpochId(last.header.epoch.0 - 1);
    let (error, committed) = play_in(Version::FIRST, &guest, sealed(&old));
    assert!(is_refused(&error), "{error}");
    assert_eq!(committed, Some(before));
}

#[test]
fn a_state_is_patched_only_where_there_is_one() {
    let (guest, bytes) = record();
    let good = frames(&bytes);
    let state = |f: &Frame| matches!(f.header.kind, FrameKind::State | FrameKind::StatePatch);
    let of = |epoch| {
        let epoch = EpochId(epoch);
        let at = good
            .iter()
            .position(|f| state(f) && f.header.epoch == epoch);
        at.unwrap()
    };
    let kind = |epoch: u64| good[of(epoch)].header.kind;
    assert_eq!(
        (kind(1), kind(5)),
        (FrameKind::State, FrameKind::StatePatch)
    );
    let refused = |frames: &[Frame], version, last: Option<u64>| {
        let (error, committed) = play_in(version, &guest, sealed(frames));
        let told = matches!(
            error,
            ShadowError::Epoch { .. } | ShadowError::Link(LinkError::Frame(_))
        );
        assert!(told, "{error}");
        assert_eq!(committed, last.map(EpochId));
    };
    let with = |epoch: u64, payload: Vec<u8>| {
        let mut bad = good.clone();
        bad[of(epoch)].header.kind = FrameKind::StatePatch;
        bad[of(epoch)].payload = payload;
        bad
    };
    refused(&with(1, vec![]), WIRE_VERSION, None);
    let mut patch = vec![];
    let (old, new) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
    for piece in [1000, u64::MAX / 2, u64::MAX - 1] {
        patch.clear();
        assert!(push_patch(piece, &old, &new, 2 * PAGE_SIZE, &mut patch));
        refused(&with(5, patch.clone()), WIRE_VERSION, Some(4));
    }
    refused(
        &with(5, run_header(0, 1, false).to_vec()),
        WIRE_VERSION,
        Some(4),
    );
    refused(&with(5, vec![7; 9]), WIRE_VERSION, Some(4));
    let mut twice = good.clone();
    twice.insert(of(5), good[of(5)].clone());
    refused(&twice, WIRE_VERSION, Some(4));

    let (guest, bytes) = record_in(Version::FIRST);
    let mut old = frames_of(Version::FIRST, &bytes);
    assert!(old.iter().all(|f| f.header.kind != FrameKind::StatePatch));
    let at = old.iter().rposition(|f| f.header.kind == FrameKind::State);
    old[at.unwrap()].header.kind = FrameKind::StatePatch;
    let before = old[at.unwrap()].header.epoch.0 - 1;
    let (error, committed) = play_in(Version::FIRST, &guest, sealed(&old));
    assert!(error.to_string().contains("wire version"), "{error}");
    assert_eq!(committed, Some(EpochId(before)));
}

#[test]
fn answers_about_disks_that_nobody_asked_for_are_refused() {
    let frame = |kind, payload: Vec<u8>| Frame {
        header: Header {
            version: WIRE_VERSION,
            kind,
            session: session(sim::B.incarnation, 1),
            epoch: EpochId(0),
            len: payload.len(),
            payload_crc: 0,
            number: 0,
        },
        payload,
    };
    let bad = [
        frame(FrameKind::DiskMap, vec![0; 32]),
        frame(FrameKind::DiskSums, vec![0xff; 8]),
        frame(FrameKind::DiskSums, vec![]),
        frame(FrameKind::DiskSums, vec![0; MAX_ANSWER + 1]),
        frame(FrameKind::DiskAsk, vec![0; 56]),
    ];
    for bad in bad {
        let kind = bad.header.kind;
        let mut pair = Pair::new(4);
        let (hold, held) = std::os::unix::net::UnixStream::pair().unwrap();
        let resume = frame(FrameKind::Resume, vec![0; 16]);
        let bytes = std::io::Cursor::new(sealed(&[resume, bad]));
        // The connection stays open behind the last byte.
        let backward = std::io::Read::chain(Tape(bytes), held);
        let error = pair.primary.run(PrimaryLink {
            forward: Box::new(std::io::sink()),
            backward: Box::new(backward),
            version: WIRE_VERSION,
            close: Arc::new(move || {
                let _ = hold.shutdown(std::net::Shutdown::Both);
            }),
        });
        let refused = matches!(error, Err(PrimaryError::Link(LinkError::Frame(_))));
        assert!(refused, "{kind:?}: {error:?}");
    }
}
