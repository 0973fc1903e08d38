//! Reading on in a VM's records.

use ax_api::host::{Code, Reply, Request};
use ax_api::trace::{EpochRecord, MOST_RECORDS, Origin, TraceReport};

use super::Told;
use crate::client::{Client, Failure};
use crate::show::Show;

/// A record with so many newer ones is told as it is, whatever is still to happen to it.
const SETTLED: u64 = 16;

/// Whether nothing more will happen to a record, of which the newest will have the number `end`.
fn settled(record: &EpochRecord, end: u64) -> bool {
    let over = record.released_ns.is_some() && record.running_ns.is_some();
    over || record.failed || record.number + SETTLED < end
}

/// The records of one VM, from one on.
pub struct Reader<'a> {
    client: &'a Client,
    show: &'a Show,
    name: &'a str,
    of: Origin,
    /// Number of the next record to be told.
    next: u64,
    /// Records that were overwritten before they could be read.
    pub missed: u64,
    /// Why there are none now.
    waits_for: Option<Failure>,
}

impl<'a> Reader<'a> {
    /// From the last `back` records on, or as many as there are.
    ///
    /// # Errors
    /// There is no such VM, nothing protects it, or it can't be asked.
    pub fn new(
        client: &'a Client,
        show: &'a Show,
        name: &'a str,
        back: u64,
    ) -> Result<Reader<'a>, Failure> {
        let now = ask(client, show, name, u64::MAX, 0)?;
        let first = now.end.saturating_sub(back).max(1);
        // Of these nobody expects more than there are.
        let oldest = ask(client, show, name, first, 1)?;
        let next = oldest.records.first().map_or(oldest.next, |r| r.number);
        Ok(Reader {
            client,
            show,
            name,
            of: now.of,
            next,
            missed: 0,
            waits_for: None,
        })
    }

    /// The records since, up to the first one that is not settled; with `all` those too.
    ///
    /// # Errors
    /// The VM is undefined, or axd is gone. While it has no shadow or doesn't run there are none, which is
    /// said once.
    pub fn more(&mut self, all: bool) -> Result<Vec<Told>, Failure> {
        match self.read(all) {
            Err(failure) if matches!(failure.code, Code::State | Code::Peer) => {
                if self.waits_for.as_ref() != Some(&failure) {
                    eprintln!("waiting: {failure}");
                    self.waits_for = Some(failure);
                }
                Ok(Vec::new())
            }
            read => {
                self.waits_for = None;
                read
            }
        }
    }

    fn read(&mut self, all: bool) -> Result<Vec<Told>, Failure> {
        let mut told = Vec::new();
        loop {
            let report = ask(self.client, self.show, self.name, self.next, MOST_RECORDS)?;
            if report.of != self.of {
                (self.of, self.next) = (report.of, 1);
                continue;
            }
            for record in report.records {
                if !all && !settled(&record, report.end) {
                    return Ok(told);
                }
                self.missed += record.number.saturating_sub(self.next);
                self.next = record.number + 1;
                told.push(Told {
                    host: self.of.host.clone(),
                    record,
                });
            }
            if report.next >= report.end {
                return Ok(told);
            }
            // Those that went while they were read.
            self.missed += report.next.saturating_sub(self.next);
            self.next = report.next;
        }
    }
}

fn ask(
    client: &Client,
    show: &Show,
    name: &str,
    since: u64,
    most: u32,
) -> Result<TraceReport, Failure> {
    let request = Request::Trace {
        name: name.to_owned(),
        since,
        most,
    };
    match client.ask(&request, show)? {
        Reply::Trace { trace } => Ok(*trace),
        other => Err(Failure::unexpected(&other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_settled_once_its_outputs_have_left_and_its_guest_runs_or_it_is_old() {
        let record = EpochRecord {
            number: 5,
            released_ns: Some(9),
            ..EpochRecord::default()
        };
        assert!(!settled(&record, 6) && !settled(&record, 21));
        assert!(settled(&record, 22));
        let running = EpochRecord {
            running_ns: Some(3),
            ..record
        };
        assert!(settled(&running, 6));
        let failed = EpochRecord {
            failed: true,
            ..EpochRecord::default()
        };
        assert!(settled(&failed, 1));
    }
}
