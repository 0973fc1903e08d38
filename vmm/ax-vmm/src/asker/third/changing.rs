//! The way from one arbiter to the next, gone a few steps at a time (rule 27, `ax_arbiter::change`).

use std::time::Instant;

use ax_arbiter::AskError;
use ax_arbiter::change::{self, Old, Step, View};
use ax_wire::record::{Arbiter, Change, Record, Request};

use super::super::{AGAIN, Heard, Tell};
use super::{AtThird, GLANCE, STEPS, witness_of};
use crate::error::Error;

impl AtThird {
    /// Has a client of the one that is to decide, if there is one.
    pub(super) fn look_ahead(&mut self) -> Result<(), Error> {
        let next = self.course.next().map(|(place, _)| place.clone());
        if self.next.as_ref().map(|(place, _)| place) != next.as_ref() {
            self.next = match next {
                Some(place) => {
                    let client = (self.connect)(&place, None)?;
                    Some((place, client))
                }
                None => None,
            };
        }
        Ok(())
    }

    /// What the present one has of the pair now.
    pub(super) fn glance(&mut self) -> Old {
        let found = match self.client.is_near() {
            true => self.client.look(self.pair, Instant::now() + GLANCE),
            false => Err(AskError::Unreachable {
                last: "no connection".into(),
            }),
        };
        self.answered(!matches!(found, Err(AskError::Unreachable { .. })));
        match found {
            Ok(Some(record)) => Old::Knows(record),
            Err(_) if self.is_lost() => Old::Lost,
            Ok(None) | Err(_) => Old::Nothing,
        }
    }

    /// Goes as far as it can now on the way to the next arbiter; the record by which that one decides,
    /// if it does at the end. `asking`: a question stands.
    pub(super) fn round(&mut self, asking: bool, tell: &Tell) -> Option<Record> {
        match self.try_round(asking, tell) {
            Ok(settled) => settled,
            Err(why) => {
                tracing::debug!(why, "the next arbiter");
                None
            }
        }
    }

    pub(super) fn try_round(
        &mut self,
        asking: bool,
        tell: &Tell,
    ) -> Result<Option<Record>, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let Some(aim) = self.course.next().map(|(_, aim)| aim) else {
            return Ok(None);
        };
        let mut view = match &mut self.next {
            Some((_, next)) if next.is_near() => {
                let id = next
                    .identify(Instant::now() + GLANCE)
                    .map_err(|e| text(&e))?;
                let mine = self.mine();
                let holds = mine.holder() == Some(self.me) && mine.shadow().is_some();
                View {
                    mine,
                    void: self.course.is_void(),
                    to: Arbiter::Witness(id),
                    aim,
                    protected: holds && !asking,
                    old: None,
                    new: None,
                }
            }
            _ => return Ok(None),
        };
        for _ in 0..STEPS {
            let step = change::next(&view);
            match step {
                Step::Rest => return Ok(None),
                Step::Look => view.old = Some(self.glance()),
                Step::Tell(standing) => {
                    let registration = self.registration();
                    let Some((_, next)) = &mut self.next else {
                        return Ok(None);
                    };
                    let said = next.stand(&registration, standing, Instant::now() + GLANCE);
                    view.new = Some(said.map_err(|e| text(&e))?);
                }
                Step::AskMove => {
                    let change = Change::MoveArbiter { to: view.to };
                    let request = self.request(view.mine.generation, change);
                    let asked = self.client.ask(&request, Instant::now() + GLANCE);
                    let moved = asked.map_err(|e| text(&e))?.granted();
                    let moved = moved.map_err(|e| text(&e))?;
                    self.course.learned(moved).map_err(|e| text(&e))?;
                    self.shifts(&view.mine, &moved);
                    (view.mine, view.new) = (moved, None);
                }
                Step::Void => {
                    let Some((place, _)) = &self.next else {
                        return Ok(None);
                    };
                    self.course.void(place.clone()).map_err(|e| text(&e))?;
                    (view.void, view.new) = (true, None);
                }
                Step::Adopt(record) => {
                    self.course.learned(record).map_err(|e| text(&e))?;
                    if record.arbiter == view.to {
                        self.shifts(&view.mine, &record);
                    }
                    view.mine = record;
                    (view.old, view.new) = (None, None);
                }
                Step::Settle(record) => {
                    self.settle(record, tell).map_err(|e| text(&e))?;
                    return Ok(Some(record));
                }
            }
        }
        Ok(None)
    }

    /// The next one decides from now on.
    pub(super) fn settle(&mut self, record: Record, tell: &Tell) -> Result<(), Error> {
        let Some((place, mut client)) = self.next.take() else {
            return Ok(());
        };
        let before = self.mine();
        let wrote = self.course.settle(place.clone(), record);
        if let Err(error) = wrote {
            self.next = Some((place, client));
            return Err(Error::Arbiter(error.to_string()));
        }
        if let Some(id) = witness_of(Some(record)) {
            client.expect(id);
        }
        self.shifts(&before, &record);
        self.client = client;
        self.silent_since = None;
        self.changed = true;
        self.look_ahead()?;
        tell(Heard::Note(format!(
            "{place} decides from now on: {record}"
        )));
        self.name(tell);
        Ok(())
    }

    /// The record `before` has become `after` by a change of arbiter alone.
    pub(super) fn shifts(&mut self, before: &Record, after: &Record) {
        if before.state == after.state && before.generation != after.generation {
            let from = match self.shift {
                Some((first, last)) if last == before.generation => first,
                _ => before.generation,
            };
            self.shift = Some((from, after.generation));
        }
    }

    /// A question from before a change of arbiter means the same after it.
    pub(super) fn translated(&self, request: &Request) -> Request {
        match self.shift {
            Some((before, after)) if before == request.from => Request {
                from: after,
                ..*request
            },
            _ => *request,
        }
    }

    /// Nobody can be asked before the next one knows the pair.
    pub(super) fn wait_for_next(&mut self, tell: &Tell) -> Option<Record> {
        let settled = self.round(true, tell);
        if settled.is_none() {
            let to = self.next.as_ref().map(|(place, _)| place.to_string());
            let to = to.unwrap_or_else(|| "another arbiter".into());
            tell(Heard::Silent(format!(
                "{} is given up for {to}, which waits for the other host to do the same",
                self.course.now()
            )));
            std::thread::sleep(AGAIN);
        }
        settled
    }

    /// The record at the present arbiter names another one.
    pub(super) fn moved_away(&mut self, record: &Record, tell: &Tell) -> Option<Record> {
        let settled = self.round(true, tell);
        if settled.is_none() {
            tell(Heard::Silent(format!(
                "{} has handed the VM over to another arbiter ({record}), which this host does not \
                 reach or is not configured with",
                self.course.now()
            )));
            std::thread::sleep(AGAIN);
        }
        settled
    }
}
