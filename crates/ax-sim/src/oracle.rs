//! What the outside has seen, and what it must never see.
//!
//! The guest appends numbered records to a ledger on its disk, each with a nonce drawn at that moment, and answers
//! for a record once a FLUSH has made it durable. So an answer seen twice with two nonces comes of two
//! pasts, and a number left out is a lost answer.

use std::collections::HashMap;

use parking_lot::Mutex;

/// Who shows an output: under which grant, on which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// The generation that lets it.
    pub generation: u64,
    /// 0 or 1.
    pub side: usize,
}

#[derive(Default)]
struct Seen {
    nonces: HashMap<u64, u64>,
    last: u64,
    sender: Option<Sender>,
    /// Numbers up to here may never be answered for: a guest that booted found them on its disk.
    recovered: u64,
    answers: u64,
}

/// Judges.
#[derive(Default)]
pub struct Oracle(Mutex<Seen>);

impl Oracle {
    /// An answer reached the outside.
    ///
    /// # Errors
    /// What must never be.
    pub fn answer(&self, sender: Sender, number: u64, nonce: u64) -> Result<(), String> {
        let mut seen = self.0.lock();
        seen.answers += 1;
        if let Some(before) = seen.sender
            && (sender.generation < before.generation
                || (sender.generation == before.generation && sender.side != before.side))
        {
            return Err(format!("I3: {sender:?} shows an output after {before:?}"));
        }
        seen.sender = Some(sender);
        if let Some(known) = seen.nonces.get(&number) {
            return match *known == nonce {
                true => Ok(()),
                false => Err(format!("I1: answer {number} comes of two pasts")),
            };
        }
        if number > seen.last + 1 && number > seen.recovered + 1 {
            let last = seen.last;
            return Err(format!("answer {number} follows {last}: lost in between"));
        }
        if number < seen.last {
            return Err(format!("answer {number} comes late, after {}", seen.last));
        }
        seen.last = number;
        seen.nonces.insert(number, nonce);
        Ok(())
    }

    /// A guest booted and found these records on its disk: the last number, and the nonces still there.
    /// `answered` is the last number that was answered for when it began to.
    ///
    /// # Errors
    /// An acknowledged record is missing, or another one is in its place.
    pub fn booted(
        &self,
        answered: u64,
        last: u64,
        nonces: &HashMap<u64, u64>,
    ) -> Result<(), String> {
        let mut seen = self.0.lock();
        if last < answered {
            return Err(format!(
                "I4: the disk ends with record {last}, {answered} was answered for"
            ));
        }
        if last < seen.last {
            // It stood still while it booted, and the guest has gone on elsewhere since.
            return Ok(());
        }
        for (number, nonce) in nonces {
            if seen.nonces.get(number).is_some_and(|n| n != nonce) {
                return Err(format!(
                    "I4: record {number} is another than was answered for"
                ));
            }
        }
        seen.recovered = last;
        Ok(())
    }

    /// Answers so far, and the last number.
    pub fn answers(&self) -> (u64, u64) {
        let seen = self.0.lock();
        (seen.answers, seen.last)
    }
}
