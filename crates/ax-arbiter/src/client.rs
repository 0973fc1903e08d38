//! A host's side of the dialogue with its witness.
//!
//! A connection is kept warm in the background, so that the question that matters costs one round
//! trip and one commit. An answer may be lost; asking again is always safe ([`rules::decide`]).
//! What is not safe is to act on an answer of another store than the one that knows the pair
//! (rule 27), so every connection first learns whom it has reached.
//!
//! [`rules::decide`]: crate::rules::decide

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ax_link::{Connector, LinkError, Preamble, Stream};
use ax_wire::frame::FrameKind;
use ax_wire::record::{Decision, Record, Request, WitnessId};
use ax_wire::{Generation, PairId};
use parking_lot::{Condvar, Mutex};

use crate::message::{self, Answer, Ask, Call, Fault, MOVES, MessageError, Said, VERSIONS};
use crate::rules::{Registered, Registration, Standing};

/// How often an idle connection is pinged, and a lost one dialled again.
pub const PING: Duration = Duration::from_secs(1);
/// The least time one attempt is given, if the deadline allows.
const ATTEMPT: Duration = Duration::from_millis(100);
/// Pause before the next attempt, for failures that come at once.
const RETRY: Duration = Duration::from_millis(5);

/// Why there is no answer. Whether the request was granted is then unknown (rule 21): ask again.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody answered in time.
    #[error("the witness did not answer in time: {last}")]
    Unreachable {
        /// The last failure, in words.
        last: String,
    },
    /// Another witness, or another store, than the one that knows the pair: it decides nothing
    /// until both hosts have registered with it (rule 27).
    #[error(
        "the witness has a new store (or is another one): nothing can be granted until both hosts \
         have registered with it"
    )]
    OtherWitness {
        /// The one the pair's record names.
        expected: WitnessId,
        /// The one reached.
        found: WitnessId,
    },
    /// The witness did not consider the question.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Asks one witness. Cheap to clone; all clones share the warm connection.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    connector: Connector,
    expected: Mutex<Option<WitnessId>>,
    warm: Mutex<Option<Connection>>,
    lost: Condvar,
    ids: AtomicU64,
}

/// A greeted connection.
struct Connection {
    stream: Stream,
    witness: WitnessId,
    version: u16,
}

/// How one attempt failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("an answer to another question")]
    Mismatch,
    #[error(
        "it speaks version {0} of its protocol and takes no pair over from another arbiter: upgrade it"
    )]
    TooOld(u16),
    #[error(transparent)]
    Fault(Fault),
}

impl Client {
    /// A client of the witness that `connector` leads to. `expected` is the witness the pair's
    /// record names, if this host knows one. A thread keeps a connection warm as long as a clone
    /// exists.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn new(connector: Connector, expected: Option<WitnessId>) -> std::io::Result<Client> {
        let shared = Arc::new(Shared {
            connector,
            expected: Mutex::new(expected),
            warm: Mutex::new(None),
            lost: Condvar::new(),
            ids: AtomicU64::new(1),
        });
        let weak = Arc::downgrade(&shared);
        std::thread::Builder::new()
            .name("witness-warm".into())
            .spawn(move || keep_warm(&weak))?;
        Ok(Client { shared })
    }

    /// Asks for a change, again and again until `deadline`. A connection that has fallen silent
    /// takes half of what is left until then: ask with short deadlines, and go on asking.
    /// Persist the record granted before acting on it: it is what this host registers if the
    /// witness loses its store.
    ///
    /// # Errors
    /// No answer; the outcome is unknown unless it is [`AskError::OtherWitness`] or
    /// [`AskError::Fault`] at the first try.
    pub fn ask(&self, request: &Request, deadline: Instant) -> Result<Decision, AskError> {
        self.call(Ask::Change(*request), deadline, true, |said| match said {
            Said::Decision(decision) => Some(decision),
            _ => None,
        })
    }

    /// The record of a pair, if the witness knows it.
    ///
    /// # Errors
    /// No answer.
    pub fn look(&self, pair: PairId, deadline: Instant) -> Result<Option<Record>, AskError> {
        self.call(Ask::Look(pair), deadline, true, |said| match said {
            Said::Record(record) => Some(record),
            _ => None,
        })
    }

    /// Tells the witness what this side knows; repeat until it is [`Registered::Known`]. From then
    /// on the witness reached is the expected one. Not while a request to an earlier witness is
    /// unanswered: its grant must not arrive later.
    ///
    /// # Errors
    /// No answer.
    pub fn register(
        &self,
        registration: Registration,
        by_operator: bool,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        let ask = Ask::Register {
            registration,
            by_operator,
        };
        let registered = self.call(ask, deadline, false, |said| match said {
            Said::Registered(registered) => Some(registered),
            _ => None,
        })?;
        if let Registered::Known(Record {
            arbiter: ax_wire::record::Arbiter::Witness(witness),
            ..
        }) = registered
        {
            *self.shared.expected.lock() = Some(witness);
        }
        Ok(registered)
    }

    /// Tells the witness what this side knows of a pair that another arbiter decides for, or did.
    ///
    /// # Errors
    /// No answer.
    pub fn stand(
        &self,
        registration: Registration,
        standing: Standing,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        let ask = Ask::Stand {
            registration,
            standing,
        };
        self.call(ask, deadline, false, |said| match said {
            Said::Registered(registered) => Some(registered),
            _ => None,
        })
    }

    /// Who the witness is, and which store it has; asks it only if no connection is warm.
    ///
    /// # Errors
    /// No answer.
    pub fn identify(&self, deadline: Instant) -> Result<WitnessId, AskError> {
        let warm = self.shared.warm.lock().as_ref().map(|c| c.witness);
        match warm {
            Some(witness) => Ok(witness),
            None => {
                self.call(Ask::Ping, deadline, false, |said| {
                    matches!(said, Said::Pong).then_some(())
                })?;
                let warm = self.shared.warm.lock().as_ref().map(|c| c.witness);
                warm.ok_or_else(|| AskError::Unreachable {
                    last: "the connection was lost at once".into(),
                })
            }
        }
    }

    /// From now on grants of this witness count, and of no other.
    pub fn expect(&self, witness: WitnessId) {
        *self.shared.expected.lock() = Some(witness);
    }

    /// Makes the witness forget a stopped pair that has been undefined; true when it is unknown now.
    ///
    /// # Errors
    /// No answer.
    pub fn forget(
        &self,
        pair: PairId,
        from: Generation,
        deadline: Instant,
    ) -> Result<bool, AskError> {
        self.call(
            Ask::Forget { pair, from },
            deadline,
            true,
            |said| match said {
                Said::Forgotten(forgotten) => Some(forgotten),
                _ => None,
            },
        )
    }

    /// True while a connection is open and was answered within about [`PING`].
    pub fn is_warm(&self) -> bool {
        self.shared.warm.lock().is_some()
    }

    /// The witness whose grants this client accepts, if any yet.
    pub fn expected(&self) -> Option<WitnessId> {
        *self.shared.expected.lock()
    }

    fn call<T>(
        &self,
        ask: Ask,
        deadline: Instant,
        must_be_expected: bool,
        pick: impl Fn(Said) -> Option<T>,
    ) -> Result<T, AskError> {
        let shared = &self.shared;
        let mut last = String::from("no time was left to ask");
        let mut warm = shared.warm.lock().take();
        loop {
            let now = Instant::now();
            if now >= deadline {
                shared.lost.notify_all();
                return Err(AskError::Unreachable { last });
            }
            // A connection that has died silently must leave time for a new one.
            let attempt = ((deadline - now) / 2).max(ATTEMPT);
            let until = deadline.min(now + attempt);
            let asked = warm
                .take()
                .map_or_else(|| shared.connect(until), Ok)
                .and_then(|mut connection| {
                    let found = connection.witness;
                    match *shared.expected.lock() {
                        Some(expected) if must_be_expected && expected != found => {
                            shared.keep(connection);
                            return Ok(Err(AskError::OtherWitness { expected, found }));
                        }
                        _ => {}
                    }
                    if matches!(ask, Ask::Stand { .. }) && connection.version < MOVES {
                        return Err(AttemptError::TooOld(connection.version));
                    }
                    let ask = ask.in_version(connection.version);
                    let answer = exchange(&mut connection, shared.id(), ask, until, &pick)?;
                    shared.keep(connection);
                    Ok(Ok(answer))
                });
            match asked {
                Ok(answer) => return answer,
                Err(AttemptError::Fault(fault)) => return Err(fault.into()),
                Err(error) => last = chain(&error),
            }
            std::thread::sleep(RETRY.min(deadline.saturating_duration_since(Instant::now())));
        }
    }
}

impl Shared {
    fn connect(&self, until: Instant) -> Result<Connection, AttemptError> {
        let stream = self.connector.open_until(Preamble::witness(), until)?;
        let nobody = WitnessId {
            identity: [0; 16],
            store: [0; 16],
        };
        let mut connection = Connection {
            stream,
            witness: nobody,
            version: 0,
        };
        let hello = |said| match said {
            Said::Hello { witness, version } => Some((witness, version)),
            _ => None,
        };
        (connection.witness, connection.version) = exchange(
            &mut connection,
            self.id(),
            Ask::Hello(VERSIONS),
            until,
            &hello,
        )?;
        Ok(connection)
    }

    fn id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn keep(&self, connection: Connection) {
        *self.warm.lock() = Some(connection);
    }
}

/// One question and its answer. After an error the connection must be dropped: an answer may still
/// be on its way.
fn exchange<T>(
    connection: &mut Connection,
    id: u64,
    ask: Ask,
    until: Instant,
    pick: &impl Fn(Said) -> Option<T>,
) -> Result<T, AttemptError> {
    let stream = &mut connection.stream;
    let left = until
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1));
    let timed = stream.set_read_timeout(Some(left));
    timed
        .and_then(|()| stream.set_write_timeout(Some(left)))
        .map_err(MessageError::Io)?;
    message::write(stream, FrameKind::ArbiterCall, &Call { id, ask })?;
    let answer: Answer = message::read(stream, FrameKind::ArbiterAnswer)?;
    if answer.id != id {
        return Err(AttemptError::Mismatch);
    }
    match answer.said {
        Said::Fault(fault) => Err(AttemptError::Fault(fault)),
        said => pick(said).ok_or(AttemptError::Mismatch),
    }
}

/// Pings the warm connection, opens one when there is none; ends with the last clone of the client.
fn keep_warm(client: &Weak<Shared>) {
    let mut complained = false;
    while let Some(shared) = client.upgrade() {
        // Taken out, so that a question that matters never waits for a ping: it dials anew.
        let warm = shared.warm.lock().take().and_then(|mut connection| {
            let pong = |said| matches!(said, Said::Pong).then_some(());
            let until = Instant::now() + PING;
            exchange(&mut connection, shared.id(), Ask::Ping, until, &pong).ok()?;
            Some(connection)
        });
        match warm.map_or_else(|| shared.connect(Instant::now() + PING), Ok) {
            Ok(connection) => {
                complained = false;
                shared.warm.lock().get_or_insert(connection);
            }
            Err(error) if !complained => {
                complained = true;
                tracing::warn!(error = chain(&error), "the witness cannot be reached");
            }
            Err(_) => {}
        }
        let mut warm = shared.warm.lock();
        shared.lost.wait_for(&mut warm, PING);
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.ends_with(&text) {
            line = format!("{line}: {text}");
        }
        source = cause.source();
    }
    line
}
