//! What this process tells of its epochs. Read from the engine's own counters and trace while it works on:
//! no lock is held that a device, a vCPU or the engine may want.

use ax_api::process::{Reply, Request};
use ax_api::trace::{Buckets, EpochRecord, MOST_RECORDS, Origin, Reason, StatsReport, TraceReport};
use ax_wire::Incarnation;
use statepoint::policy;
use statepoint::primary::PrimaryHandle;
use statepoint::stats::Counts;
use statepoint::trace::{Moment, Record, Size};
use std::sync::atomic::{AtomicU64, Ordering};

fn reason(of: policy::Reason) -> Reason {
    match of {
        policy::Reason::Idle => Reason::Idle,
        policy::Reason::Output => Reason::Output,
        policy::Reason::Asked => Reason::Asked,
        policy::Reason::RingFull => Reason::RingFull,
        policy::Reason::Full => Reason::Full,
        policy::Reason::Backpressure => Reason::Backpressure,
        policy::Reason::Final => Reason::Final,
    }
}

fn told(record: &Record) -> EpochRecord {
    let began_ns = record.at(Moment::Began).unwrap_or(0);
    let at = |moment| Some(record.at(moment)?.saturating_sub(began_ns));
    EpochRecord {
        number: record.number,
        epoch: record.epoch.0,
        reason: reason(record.reason),
        failed: record.failed,
        began_ns,
        held_ns: record
            .at(Moment::Held)
            .map(|ns| ns as i64 - began_ns as i64),
        parked_ns: at(Moment::Parked),
        quiet_ns: at(Moment::Quiet),
        saved_ns: at(Moment::Saved),
        harvested_ns: at(Moment::Harvested),
        copied_ns: at(Moment::Copied),
        closed_ns: at(Moment::Closed),
        resumed_ns: at(Moment::Resumed),
        running_ns: at(Moment::Running),
        encoding_ns: at(Moment::Encoding),
        encoded_ns: at(Moment::Encoded),
        sent_ns: at(Moment::Sent),
        acked_ns: at(Moment::Acked),
        released_ns: at(Moment::Released),
        pages: record.size(Size::Pages),
        state_bytes: record.size(Size::State),
        disk_bytes: record.size(Size::Disk),
        outputs: record.size(Size::Outputs),
        output_bytes: record.size(Size::OutputBytes),
        shipped_bytes: record.size(Size::Shipped),
    }
}

fn buckets(counts: &Counts) -> Buckets {
    Buckets {
        max: counts.max(),
        buckets: counts.buckets().collect(),
    }
}

fn trace(engine: &PrimaryHandle, of: Origin, since: u64, most: u32) -> TraceReport {
    let trace = engine.trace();
    let (records, next) = trace.since(since, most.min(MOST_RECORDS) as usize);
    TraceReport {
        of,
        records: records.iter().map(told).collect(),
        next,
        end: trace.next(),
    }
}

fn stats(engine: &PrimaryHandle, of: Origin) -> StatsReport {
    let (counters, progress) = (engine.counters(), engine.progress());
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let reasons = policy::Reason::ALL
        .into_iter()
        .map(|why| (reason(why), counters.captured_for(why)));
    let counts = [
        ("failed_captures", get(&counters.failed_captures)),
        ("permissions_expired", get(&counters.expired)),
        ("larger_than_a_slot", get(&counters.spilled)),
        ("received_dropped", get(&counters.received_dropped)),
        ("shipped_bytes", get(&counters.bytes)),
    ];
    let histograms = counters
        .histograms()
        .map(|(name, histogram)| (name.to_owned(), buckets(&histogram.counts())));
    StatsReport {
        of,
        now_ns: engine.now_ns(),
        oldest_held_ns: progress.oldest_held_ns,
        reasons: reasons.filter(|(_, count)| *count > 0).collect(),
        counts: counts.map(|(name, n)| (name.to_owned(), n)).into(),
        histograms: histograms.into(),
    }
}

/// The answer of `engine`, in the process `incarnation`, to [`Request::Trace`] or [`Request::Stats`].
pub fn answer(engine: &PrimaryHandle, incarnation: Incarnation, request: &Request) -> Reply {
    let of = Origin {
        host: String::new(),
        incarnation,
        engine_ns: engine.made_ns(),
    };
    match request {
        Request::Trace { since, most } => Reply::Trace(Box::new(trace(engine, of, *since, *most))),
        _ => Reply::Stats(Box::new(stats(engine, of))),
    }
}
