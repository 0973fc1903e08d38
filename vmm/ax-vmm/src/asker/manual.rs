//! No third party: the other host agrees, or an operator gives the word (decisions/0009).
//!
//! The [`Desk`] is what this host knows of the pair and who may speak of it: the asking thread, the
//! other host's letters, the operator. [`AtDesk`] asks there.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::process::Arbiter as Place;
use ax_arbiter::Manual;
use ax_arbiter::manual::{Change as Changed, ManualError};
use ax_arbiter::message;
use ax_arbiter::rules::{self, Word};
use ax_arbiter::word::{self, Stance};
use ax_failpoint::Point;
use ax_link::{Connector, Incoming};
use ax_wire::frame::FrameKind;
use ax_wire::record::{
    Arbiter, Change, Copies, Decision, Member, Record, Refusal, Request, State, Why,
};
use ax_wire::word::{Answer, Known, Letter, Said, Unwilling};
use ax_wire::{Generation, MachineId, PairId, Side};
use parking_lot::{Condvar, Mutex};

use super::mail::{Mail, Unanswered};
use super::{AGAIN, Heard, Keeper, TRY, Tell};
use crate::error::Error;

/// How long the daemon, answering for a process before this one, may keep what is known.
const OPENING: Duration = Duration::from_secs(3);

/// How the process stands, for whoever writes to it or speaks to it.
#[derive(Debug, Default)]
struct Standing {
    /// It has seen no primary yet.
    fresh: bool,
    /// A question to the arbiter stands.
    questioned: bool,
    /// It is whether the guest may be booted here.
    starting: bool,
    /// A letter with a request is on its way.
    asking: bool,
    /// The other host is out of reach and only an operator can answer.
    held: bool,
    /// An operator said that the other host is dead.
    word: bool,
}

/// What this host knows of the pair, and who may change it.
pub struct Desk {
    name: String,
    pair: PairId,
    me: Member,
    machine: Option<MachineId>,
    accept_loss: bool,
    peer: Mutex<String>,
    first: Known,
    manual: Manual,
    mail: Mail,
    standing: Mutex<Standing>,
    changed: Condvar,
    tell: Tell,
}

/// What came of writing to the other host.
enum Consulted {
    /// It agreed or told what it knows; what follows from that is known here.
    Met,
    Refused(Refusal),
    NotNow(String),
    Away,
    Conflict(Box<word::Conflict>),
}

/// Which VM and process a desk is for.
pub struct Owner<'a> {
    /// The VM's name.
    pub name: &'a str,
    /// Its identity.
    pub pair: PairId,
    /// This process.
    pub me: Member,
    /// Where it runs.
    pub machine: Option<MachineId>,
    /// An operator starts the VM from an older copy, the current one being lost.
    pub accept_loss: bool,
    /// The other host's name.
    pub peer: &'a str,
    /// Whose disks are current if the pair was never started.
    pub current: Copies,
    /// The process waits for a primary.
    pub fresh: bool,
}

impl Desk {
    /// Takes over what this host knows of the pair, in `state_dir`; `axd` leads to the other host's
    /// daemon.
    ///
    /// # Errors
    /// It can't be read, or another process of the VM lives.
    pub fn open(
        owner: &Owner<'_>,
        state_dir: &Path,
        axd: Connector,
        tell: Tell,
    ) -> Result<Arc<Desk>, Error> {
        let until = Instant::now() + OPENING;
        let manual = loop {
            match Manual::open(state_dir) {
                Err(ManualError::InUse(_)) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                opened => break opened.map_err(|e| Error::Arbiter(e.to_string()))?,
            }
        };
        Ok(Arc::new(Desk {
            name: owner.name.to_owned(),
            pair: owner.pair,
            me: owner.me,
            machine: owner.machine,
            accept_loss: owner.accept_loss,
            peer: Mutex::new(owner.peer.to_owned()),
            first: Known::shared(Record::defined(owner.current, Arbiter::Operator)),
            manual,
            mail: Mail::new(owner.name, axd),
            standing: Mutex::new(Standing {
                fresh: owner.fresh,
                ..Standing::default()
            }),
            changed: Condvar::new(),
            tell,
        }))
    }

    /// The other process can be reached so.
    pub fn peer_at(&self, connector: Connector) {
        self.mail.process_at(connector);
    }

    /// The other host is this one from now on. If another machine has taken its place while the guest runs
    /// alone here, the record names that one: nothing else changes.
    ///
    /// # Errors
    /// It could not be written.
    pub fn peer_is(
        &self,
        name: &str,
        axd: Connector,
        machine: Option<MachineId>,
    ) -> Result<(), String> {
        let known = self.known();
        let alone = matches!(known.record.state, State::Alone { holder } if holder == self.me);
        let named = machine.is_some_and(|m| known.record.machines.name(self.me.side.other(), m));
        let is_another = alone && !named;
        if let (Some(machine), true) = (machine, is_another) {
            let word = false;
            let request = Request {
                pair: self.pair,
                caller: self.me,
                machine: self.machine,
                from: known.record.generation,
                change: Change::Replace { machine, word },
            };
            let changed = self.manual.alone(&self.first, Word::Operator, &request);
            changed
                .map_err(|e| e.to_string())?
                .map_err(|refusal| refusal.to_string())?;
        }
        *self.peer.lock() = name.to_owned();
        self.mail.axd_at(axd);
        Ok(())
    }

    /// Whether this process waits for a primary and has seen none.
    pub fn set_fresh(&self, fresh: bool) {
        self.standing.lock().fresh = fresh;
    }

    /// True when this host has exactly this record, durable.
    pub fn has(&self, record: &Record) -> bool {
        self.manual
            .known()
            .is_some_and(|known| known.record.agrees_with(record))
    }

    /// The operator's word that the other host is dead.
    ///
    /// # Errors
    /// Nothing here waits for it.
    pub fn told(&self) -> Result<(), String> {
        let mut standing = self.standing.lock();
        if !standing.held {
            return Err(format!(
                "{} does not wait for an operator's word here: it is held only where the other host, {}, \
                 can't be reached",
                self.name,
                self.peer.lock()
            ));
        }
        standing.word = true;
        self.changed.notify_all();
        Ok(())
    }

    /// Answers a letter of the other host; what it changes is durable here before.
    pub fn answer(&self, letter: &Letter) -> Answer {
        let unable = Answer {
            known: None,
            said: Said::NotNow(Unwilling::Unable),
        };
        if letter.pair != self.pair {
            return unable;
        }
        let stance = || {
            let standing = self.standing.lock();
            Stance::Process {
                me: self.me,
                fresh: standing.fresh || (standing.starting && word::yields(self.me.side)),
                asking: standing.asking,
            }
        };
        match self.manual.answer(self.me.side, stance, letter) {
            Ok((answer, changed)) => {
                self.look_at(&changed);
                answer
            }
            Err(error) => {
                tracing::error!(%error, "a letter of the other host can't be answered");
                unable
            }
        }
    }

    /// Answers the letter that comes on this connection.
    pub fn serve(&self, incoming: Incoming) {
        // The TLS handshake proved the name; a plain cable is trusted.
        let named = incoming.stream().peer_name().map(|name| name.as_str());
        if named.is_some_and(|name| name != self.peer.lock().as_str()) {
            incoming.refuse("this process speaks with its pair's other host only");
            return;
        }
        let serve = || -> Result<(), Box<dyn std::error::Error>> {
            let mut stream = incoming.accept()?;
            stream.set_read_timeout(Some(TRY))?;
            stream.set_write_timeout(Some(TRY))?;
            let letter: Letter = message::read(&mut stream, FrameKind::ArbiterCall)?;
            message::write(&mut stream, FrameKind::ArbiterAnswer, &self.answer(&letter))?;
            stream.finish();
            Ok(())
        };
        if let Err(error) = serve() {
            tracing::debug!(error, "a letter of the other host");
        }
    }

    fn known(&self) -> Known {
        self.manual.known().unwrap_or(self.first)
    }

    /// Wakes who waits, and tells of a record that took the guest away while nothing was asked.
    fn look_at(&self, changed: &Changed) {
        if changed.before == changed.now {
            return;
        }
        let questioned = self.standing.lock().questioned;
        self.changed.notify_all();
        if let Some(now) = &changed.now {
            tracing::info!(record = %now.record, alone = now.alone_since.is_some(), "known of the pair");
            if !questioned && word::supersedes(changed.before.as_ref(), now, self.me) {
                (self.tell)(Heard::Superseded(now.record));
            }
        }
    }

    /// Writes to the other host, and takes in what it answers.
    fn consult(&self, request: Option<&Request>) -> Consulted {
        self.standing.lock().asking = request.is_some();
        // Read after that: a letter answered before is in it, one that comes later changes nothing.
        let told = self.known();
        let letter = Letter {
            pair: self.pair,
            known: told,
            request: request.copied(),
        };
        let consulted = match self.mail.send(&letter) {
            Err(Unanswered::Away(why)) => {
                tracing::debug!(why, "the other host is out of reach");
                Consulted::Away
            }
            Err(Unanswered::Unable(why)) => Consulted::NotNow(why),
            Ok(answer) => match self.manual.heard(&told, request, &answer) {
                Err(error) => Consulted::NotNow(error.to_string()),
                Ok(Err(conflict)) => Consulted::Conflict(conflict),
                Ok(Ok(changed)) => {
                    self.look_at(&changed);
                    match answer.said {
                        Said::Agreed | Said::Met => Consulted::Met,
                        Said::Refused(refusal) => Consulted::Refused(refusal),
                        Said::NotNow(why) => Consulted::NotNow(why.to_string()),
                        Said::Conflict => Consulted::NotNow("both hosts were told to go on".into()),
                    }
                }
            },
        };
        let mut standing = self.standing.lock();
        standing.asking = false;
        standing.held =
            standing.questioned && matches!(consulted, Consulted::Away | Consulted::Conflict(_));
        consulted
    }

    /// Whether the operator has spoken.
    fn has_word(&self) -> bool {
        self.standing.lock().word
    }

    /// Waits until the operator speaks or the other host writes, at most a moment. The two sides wait
    /// for different times, so that their letters don't go on crossing.
    fn wait(&self) {
        let pause = match self.me.side {
            Side::A => AGAIN,
            Side::B => AGAIN * 8 / 5,
        };
        let mut standing = self.standing.lock();
        if !standing.word {
            self.changed.wait_for(&mut standing, pause);
        }
    }

    fn held_text(&self, loss: Option<Why>) -> String {
        let nothing = self.manual.known().is_none();
        let loss = match loss {
            Some(why) => format!(" ({why})"),
            None if nothing => {
                " (it has never run here, as far as is known: what it did elsewhere \
                                 would be lost)"
                    .to_owned()
            }
            None => String::new(),
        };
        format!(
            "the operator's word: host {} can't be reached; if it is dead, `axvm resume {} \
             --i-know-the-peer-is-dead` lets the guest go on here{loss}",
            self.peer.lock(),
            self.name
        )
    }
}

/// Has a letter that comes on this connection answered, in a thread of its own.
pub fn receive(desk: Option<&Arc<Desk>>, incoming: Incoming) {
    let Some(desk) = desk.map(Arc::clone) else {
        return incoming.refuse("a third party decides for this VM");
    };
    let served = std::thread::Builder::new()
        .name("letter".into())
        .spawn(move || desk.serve(incoming));
    if let Err(error) = served {
        tracing::warn!(%error, "no thread for a letter of the other host");
    }
}

/// Asks at a desk.
pub struct AtDesk(pub Arc<Desk>);

impl AtDesk {
    fn request(&self, from: Generation, change: Change) -> Request {
        Request {
            pair: self.0.pair,
            caller: self.0.me,
            machine: self.0.machine,
            from,
            change,
        }
    }

    /// What holds of the question without anybody's word: an answer, or what is to be asked for.
    fn look(&self, request: &Request, away: bool) -> Result<(Request, Option<Why>), Heard> {
        let known = self.0.known();
        match rules::decide(Arbiter::Operator, Some(&known.record), request) {
            Decision::Already(record) => Err(Heard::Granted(record)),
            Decision::Granted(_) => Ok((*request, None)),
            // With the other host away an operator may start this copy all the same (rule 23).
            Decision::Refused(Refusal {
                why: why @ Why::NotCurrent(_),
                ..
            }) if away && request.change == Change::Start => {
                let request = Request {
                    change: Change::StartByOperator,
                    ..*request
                };
                Ok((request, Some(why)))
            }
            Decision::Refused(refusal) => Err(Heard::Refused(refusal)),
        }
    }

    /// Changes the record without the other host; none when that may not be, or could not be written.
    fn alone(&self, word: Word, request: &Request, tell: &Tell) -> Option<Heard> {
        match self.0.manual.alone(&self.0.first, word, request) {
            Ok(Ok(known)) => {
                tracing::info!(record = %known.record, ?word, "changed without the other host");
                Some(Heard::Granted(known.record))
            }
            Ok(Err(_)) => None,
            Err(error) => {
                tell(Heard::Silent(error.to_string()));
                None
            }
        }
    }

    fn answer_to(&self, request: &Request, tell: &Tell) -> Heard {
        let desk = &self.0;
        let mut away = false;
        loop {
            let (wanted, loss) = match self.look(request, away) {
                // Who is away may know better than this host's record.
                Err(Heard::Refused(Refusal {
                    why: Why::NotCurrent(_),
                    ..
                })) if !away && request.change == Change::Start => match desk.consult(None) {
                    Consulted::Away => {
                        away = true;
                        continue;
                    }
                    _ => match self.look(request, false) {
                        Err(heard) => return heard,
                        Ok(found) => found,
                    },
                },
                Err(heard) => return heard,
                Ok(found) => found,
            };
            if desk.has_word()
                && let Some(heard) = self.alone(Word::Operator, &wanted, tell)
            {
                if !matches!(wanted.change, Change::EnterFt { .. } | Change::Handover) {
                    // What those lead to without a peer is a question more.
                    desk.standing.lock().word = false;
                }
                return heard;
            }
            match desk.consult((wanted.change == request.change).then_some(&wanted)) {
                Consulted::Met => {
                    away = false;
                    if self.look(request, false).is_err() {
                        continue;
                    }
                    // It learned something from this host, and is asked again.
                    std::thread::sleep(Duration::from_millis(5));
                }
                Consulted::Refused(refusal) => match self.look(request, false) {
                    Err(_) => {}
                    Ok(_) => return Heard::Refused(refusal),
                },
                Consulted::NotNow(why) => {
                    away = false;
                    tell(Heard::Silent(format!("host {}: {why}", desk.peer.lock())));
                    desk.wait();
                }
                Consulted::Away => {
                    away = true;
                    if let Some(heard) = self.alone(Word::Nobody, &wanted, tell) {
                        return heard;
                    }
                    tell(Heard::Silent(desk.held_text(loss)));
                    desk.wait();
                }
                Consulted::Conflict(conflict) => {
                    tell(Heard::Silent(conflict.to_string()));
                    desk.wait();
                }
            }
        }
    }
}

impl Keeper for AtDesk {
    fn learn(&mut self, tell: &Tell) -> Heard {
        if let Consulted::Conflict(conflict) = self.0.consult(None) {
            tell(Heard::Alarm(conflict.to_string()));
        }
        Heard::Known(self.0.known().record)
    }

    fn probe(&mut self) -> Heard {
        let found = match self.0.consult(None) {
            Consulted::Met => Ok(self.0.known().record),
            Consulted::Refused(refusal) => Err(refusal.to_string()),
            Consulted::NotNow(why) => Err(format!("host {}: {why}", self.0.peer.lock())),
            Consulted::Away => Err(format!("host {} can't be reached", self.0.peer.lock())),
            Consulted::Conflict(conflict) => Err(conflict.to_string()),
        };
        ax_failpoint::reached(Point::Found);
        Heard::Reachable(found)
    }

    fn ask(&mut self, from: Generation, change: Change, tell: &Tell) -> Heard {
        ax_failpoint::reached(Point::Asking);
        {
            let mut standing = self.0.standing.lock();
            (standing.questioned, standing.starting) = (true, change == Change::Start);
        }
        let record = self.0.known().record;
        let accepted = super::accepting_loss(self.0.accept_loss, &record, change);
        let request = self.request(from, accepted);
        let told = match accepted == change {
            true => None,
            // The operator has given the word already.
            false => self.alone(Word::Operator, &request, tell),
        };
        let heard = told.unwrap_or_else(|| self.answer_to(&self.request(from, change), tell));
        {
            let mut standing = self.0.standing.lock();
            (standing.questioned, standing.starting, standing.held) = (false, false, false);
        }
        if matches!(heard, Heard::Granted(_)) {
            ax_failpoint::reached(Point::Granted);
        }
        heard
    }

    fn aim(
        &mut self,
        configured: Place,
        _standby: Option<Place>,
        _tell: &Tell,
    ) -> Result<(), String> {
        match configured {
            Place::Manual => Ok(()),
            third => Err(format!(
                "{third} decides for this VM from its next start on"
            )),
        }
    }

    /// What was changed without the other host is told it as soon as it is there again.
    fn idle(&mut self, tell: &Tell) {
        let desk = &self.0;
        if desk.known().alone_since.is_none() {
            return;
        }
        if let Consulted::Conflict(conflict) = desk.consult(None) {
            tell(Heard::Alarm(conflict.to_string()));
        }
    }
}
