//! No witness: this host's own record of each pair, changed only by somebody's word.
//!
//! Two hosts alone cannot tell a dead peer from a cut cable, so neither ever decides by itself: a
//! change needs the connected peer's agreement, or an operator. A host that lost its peer is held
//! until then. When the hosts meet again the one that knows less [adopts](Manual::adopt) the
//! other's record.

use std::path::Path;

use ax_wire::PairId;
use ax_wire::record::{Arbiter, Decision, Record, Request};

use crate::rules::{self, Word};
use crate::store::{Entry, Store, StoreError};

/// Two hosts changed the same generation differently: two operators gave their word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "both hosts were told to change generation {}: this one has {}, the other {}; stop the one whose \
     work may be lost, then start the other by an operator's word", .mine.generation.0, .mine, .theirs
)]
pub struct Conflict {
    /// What this host knows.
    pub mine: Record,
    /// What the other host knows.
    pub theirs: Record,
}

/// This host's records, decided on by word.
#[derive(Debug)]
pub struct Manual {
    store: Store,
}

impl Manual {
    /// Opens the records in `data_dir`, or makes them.
    ///
    /// # Errors
    /// The store cannot be used.
    pub fn open(data_dir: &Path) -> Result<Manual, StoreError> {
        Ok(Manual {
            store: Store::open(data_dir)?,
        })
    }

    /// Defines a pair: both hosts were told of it by the same command.
    ///
    /// # Errors
    /// The store's.
    pub fn define(&self, pair: PairId, record: Record) -> Result<Record, StoreError> {
        self.store.batch(|batch| match batch.get(pair)? {
            Some(known) => Ok(known.record),
            None => {
                let record = Record {
                    arbiter: Arbiter::Operator,
                    ..record
                };
                batch.put(pair, &Entry::new(record))?;
                Ok(record)
            }
        })
    }

    /// Decides by that word; durable when this returns. With [`Word::Peer`] the side that will not
    /// hold records the change first, so that a crash in between leaves nobody free to act.
    ///
    /// # Errors
    /// The store's.
    pub fn ask(&self, word: Word, request: &Request) -> Result<Decision, StoreError> {
        self.store.batch(|batch| {
            let entry = batch.get(request.pair)?;
            let decision =
                rules::decide_by_word(word, entry.as_ref().map(|entry| &entry.record), request);
            if let (Decision::Granted(record), Some(mut entry)) = (decision, entry) {
                entry.record = record;
                batch.put(request.pair, &entry)?;
            }
            Ok(decision)
        })
    }

    /// What this host knows of a pair.
    ///
    /// # Errors
    /// The store's.
    pub fn look(&self, pair: PairId) -> Result<Option<Record>, StoreError> {
        self.store
            .batch(|batch| Ok(batch.get(pair)?.map(|entry| entry.record)))
    }

    /// Takes over what the connected peer knows, if it is later. A holder that learns of a later
    /// record which does not name it must stop.
    ///
    /// # Errors
    /// The store's; inside, a [`Conflict`] when both hosts changed the same generation.
    pub fn adopt(
        &self,
        pair: PairId,
        theirs: Record,
    ) -> Result<Result<Record, Conflict>, StoreError> {
        self.store.batch(|batch| {
            let known = batch.get(pair)?;
            match known {
                Some(Entry { record: mine, .. }) if mine.generation > theirs.generation => {
                    Ok(Ok(mine))
                }
                Some(Entry { record: mine, .. }) if mine.generation == theirs.generation => {
                    let agree = mine.agrees_with(&theirs);
                    Ok(if agree {
                        Ok(mine)
                    } else {
                        Err(Conflict { mine, theirs })
                    })
                }
                _ => {
                    let theirs = Record {
                        arbiter: Arbiter::Operator,
                        ..theirs
                    };
                    batch.put(pair, &Entry::new(theirs))?;
                    Ok(Ok(theirs))
                }
            }
        })
    }
}
