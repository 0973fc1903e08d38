//! The one thread of a witness that decides: everything it answers is durable first.
//!
//! Questions that arrive while a commit is under way are taken together in the next one: when a
//! host dies, all its guests ask at the same time.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use ax_wire::PairId;
use ax_wire::record::{Arbiter, Change, Decision, State};

use crate::message::{Ask, Fault, Said};
use crate::rules::{self, Registered, Registration, Standing, Told};
use crate::store::{Batch, Entry, Store, StoreError};

/// Most questions decided in one commit.
const BATCH: usize = 256;
/// How long one side's registration waits for the other's. Registering *together* means both
/// speak of now: a record told long ago may have been passed by an operator's word since.
const TOGETHER: Duration = Duration::from_secs(10);
/// Most registrations waiting.
const MAX_WAITING: usize = 4096;

/// What the clerk's thread is sent.
pub enum Job {
    /// Decide and answer.
    Decide {
        /// The question; never hello or ping.
        ask: Ask,
        /// The authenticated name of the asking host, if the link has one.
        host: Option<String>,
        /// Where the answer goes; whoever waited may have gone.
        reply: SyncSender<Said>,
    },
    /// Close the store and end.
    Stop,
}

/// One side's registration that waits for the other side's.
struct Waiting {
    told: Told,
    since: Instant,
}

/// Decides on the questions of one witness.
pub struct Clerk {
    store: Store,
    me: Arbiter,
    waiting: HashMap<PairId, [Option<Waiting>; 2]>,
}

impl Clerk {
    /// A clerk of this store.
    pub fn new(store: Store) -> Clerk {
        Clerk {
            me: Arbiter::Witness(store.id()),
            store,
            waiting: HashMap::new(),
        }
    }

    /// Decides until told to stop or nobody can ask any more.
    ///
    /// # Errors
    /// The store failed. What the last batch decided is in doubt, so nobody was told.
    pub fn run(mut self, jobs: &Receiver<Job>) -> Result<(), StoreError> {
        let mut batch = Vec::with_capacity(BATCH);
        while let Ok(first) = jobs.recv() {
            let mut stop = false;
            for job in std::iter::once(first).chain(jobs.try_iter()) {
                match job {
                    Job::Decide { ask, host, reply } => batch.push((ask, host, reply)),
                    Job::Stop => stop = true,
                }
                if stop || batch.len() == BATCH {
                    break;
                }
            }
            let (store, me, waiting) = (&self.store, self.me, &mut self.waiting);
            let now = Instant::now();
            let said = store.batch(|records| {
                batch
                    .iter()
                    .map(|(ask, host, _)| answer(me, records, waiting, ask, host.as_deref(), now))
                    .collect::<Result<Vec<_>, _>>()
            })?;
            for ((_, _, reply), said) in batch.drain(..).zip(said) {
                let _ = reply.send(said);
            }
            if stop {
                break;
            }
        }
        Ok(())
    }
}

fn answer(
    me: Arbiter,
    records: &mut Batch<'_>,
    waiting: &mut HashMap<PairId, [Option<Waiting>; 2]>,
    ask: &Ask,
    host: Option<&str>,
    now: Instant,
) -> Result<Said, StoreError> {
    Ok(match ask {
        Ask::Hello(_) => Said::Fault(Fault::Order),
        Ask::Ping => Said::Pong,
        Ask::Look(pair) => Said::Record(records.get(*pair)?.map(|entry| entry.record)),
        Ask::Change(request) => {
            let mut entry = records.get(request.pair)?;
            if let Some(entry) = &mut entry
                && !entry.admit(request.caller.side, host)
            {
                return Ok(Said::Fault(Fault::WrongHost));
            }
            let decision = rules::decide(me, entry.as_ref().map(|e| &e.record), request);
            if let (Decision::Granted(record), Some(entry)) = (decision, &mut entry) {
                entry.record = record;
                if matches!(request.change, Change::Replace { .. }) {
                    // The new machine may have another name; the old one is refused by its identity.
                    entry.forget_host(request.caller.side.other());
                }
                records.put(request.pair, entry)?;
            }
            tracing::debug!(pair = %request.pair, caller = %request.caller, ?decision, "decided");
            Said::Decision(decision)
        }
        Ask::Register {
            registration,
            by_operator,
        } => {
            let new = (registration, Standing::Registers);
            return register(me, records, waiting, new, *by_operator, host, now);
        }
        Ask::Stand {
            registration,
            standing,
        } => {
            let new = (registration, *standing);
            return register(me, records, waiting, new, false, host, now);
        }
        Ask::Forget { pair, from } => match records.get(*pair)? {
            None => Said::Forgotten(true),
            Some(Entry { record, .. })
                if record.generation == *from && matches!(record.state, State::Stopped { .. }) =>
            {
                records.remove(*pair)?;
                Said::Forgotten(true)
            }
            Some(_) => Said::Forgotten(false),
        },
    })
}

fn register(
    me: Arbiter,
    records: &mut Batch<'_>,
    waiting: &mut HashMap<PairId, [Option<Waiting>; 2]>,
    (new, standing): (&Registration, Standing),
    by_operator: bool,
    host: Option<&str>,
    now: Instant,
) -> Result<Said, StoreError> {
    let Registration {
        pair, side, record, ..
    } = *new;
    let mine = Told { record, standing };
    let known = records.get(pair)?;
    let present = known.as_ref().map(|entry| &entry.record);
    if new.is_replaced(present) {
        let known = present.copied().unwrap_or(record);
        return Ok(Said::Registered(Registered::Replaced { known }));
    }
    waiting.retain(|_, sides| {
        for slot in sides.iter_mut() {
            slot.take_if(|w| now.duration_since(w.since) > TOGETHER);
        }
        sides.iter().any(Option::is_some)
    });
    let other = waiting
        .get(&pair)
        .and_then(|sides| sides[side.other() as usize].as_ref())
        .map(|w| w.told);
    let said = rules::register(
        me,
        known.as_ref().map(|entry| &entry.record),
        other.as_ref(),
        &mine,
        by_operator,
    );
    match said {
        Registered::Known(record) => {
            let before = known.clone();
            let mut entry = known.unwrap_or_else(|| Entry::new(record));
            entry.record = record;
            if !entry.admit(side, host) {
                return Ok(Said::Fault(Fault::WrongHost));
            }
            if before.is_none() && records.is_full()? {
                return Ok(Said::Registered(Registered::Full));
            }
            if before.as_ref() != Some(&entry) {
                tracing::info!(%pair, %record, by_operator, "pair registered");
                records.put(pair, &entry)?;
            }
            waiting.remove(&pair);
        }
        Registered::Waiting | Registered::Disagrees { .. } | Registered::Agreed { .. } => {
            if waiting.len() >= MAX_WAITING && !waiting.contains_key(&pair) {
                return Ok(Said::Registered(Registered::Full));
            }
            let sides = waiting.entry(pair).or_default();
            sides[side as usize] = Some(Waiting {
                told: mine,
                since: now,
            });
        }
        Registered::Behind { .. } | Registered::Full | Registered::Replaced { .. } => {}
    }
    Ok(Said::Registered(said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_wire::Side;
    use ax_wire::record::{Copies, Record};

    const PAIR: PairId = PairId([4; 16]);

    /// What the clerk says to registrations at these times, in order.
    fn registered(asks: &[(Side, Duration)]) -> Vec<Said> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let me = Arbiter::Witness(store.id());
        let record = Record::defined(Copies::Both, Arbiter::Operator);
        let (start, mut waiting) = (Instant::now(), HashMap::new());
        asks.iter()
            .map(|(side, after)| {
                let registration = Registration {
                    pair: PAIR,
                    side: *side,
                    machine: None,
                    record,
                };
                let ask = Ask::Register {
                    registration,
                    by_operator: false,
                };
                store
                    .batch(|b| answer(me, b, &mut waiting, &ask, None, start + *after))
                    .unwrap()
            })
            .collect()
    }

    /// Rule 27: both sides register together, not one today and the other tomorrow.
    #[test]
    fn a_registration_waits_only_a_short_time_for_the_other() {
        let known =
            |said: &[Said]| matches!(said.last(), Some(Said::Registered(Registered::Known(_))));
        let soon = Duration::from_millis(1);
        assert!(known(&registered(&[(Side::A, soon), (Side::B, TOGETHER)])));
        let late = TOGETHER + 2 * soon;
        assert!(!known(&registered(&[(Side::A, soon), (Side::B, late)])));
        // Registering again keeps it waiting.
        assert!(known(&registered(&[
            (Side::A, soon),
            (Side::A, TOGETHER),
            (Side::B, late)
        ])));
    }

    #[test]
    fn one_side_twice_is_not_both_sides() {
        let twice = registered(&[(Side::A, Duration::ZERO), (Side::A, Duration::ZERO)]);
        assert_eq!(twice, [Said::Registered(Registered::Waiting); 2]);
    }
}
