//! A host's side of the dialogue with its witness.
//!
//! A connection is kept warm in the background, so that the question that matters costs one round
//! trip and one commit. An answer may be lost; asking again is always safe ([`rules::decide`]).
//! What is not safe is to act on an answer of another store than the one that knows the pair
//! (rule 27), so every connection first learns whom it has reached.
//!
//! [`rules::decide`]: crate::rules::decide

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ax_wire::frame::FrameKind;
use ax_wire::record::{Decision, Record, Request, WitnessId};
use ax_wire::{Generation, PairId};
use parking_lot::{Condvar, Mutex};

use crate::message::{self, Answer, Ask, Call, Fault, MessageError, Said, VERSIONS};
use crate::rules::{Registered, Registration};
use crate::witness::Channel;

/// How often an idle connection is pinged, and a lost one dialled again.
pub const PING: Duration = Duration::from_secs(1);
/// The least time one address is given, if the deadline allows.
const ATTEMPT: Duration = Duration::from_millis(100);
/// Pause before all addresses are tried again, when they fail at once.
const RETRY: Duration = Duration::from_millis(5);

/// Opens connections to the witness.
pub trait Dial: Send + Sync {
    /// Connects, and authenticates where the link does, within `timeout`.
    ///
    /// # Errors
    /// Why there is no connection.
    fn dial(&self, to: SocketAddr, timeout: Duration) -> std::io::Result<Box<dyn Channel>>;
}

/// Plain TCP: for a private cable, and only when configured so.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Dial for Plain {
    fn dial(&self, to: SocketAddr, timeout: Duration) -> std::io::Result<Box<dyn Channel>> {
        let stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// Why there is no answer. Whether the request was granted is then unknown (rule 21): ask again.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody answered in time.
    #[error("the witness cannot be reached: {}", .tried.join("; "))]
    Unreachable {
        /// The last failure at each address.
        tried: Vec<String>,
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
    addresses: Vec<SocketAddr>,
    dial: Box<dyn Dial>,
    expected: Mutex<Option<WitnessId>>,
    warm: Mutex<Option<Connection>>,
    lost: Condvar,
    ids: AtomicU64,
}

/// A greeted connection.
struct Connection {
    channel: Box<dyn Channel>,
    address: SocketAddr,
    witness: WitnessId,
}

/// How one attempt failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("an answer to another question")]
    Mismatch,
    #[error(transparent)]
    Fault(Fault),
}

impl Client {
    /// A client of the witness at these addresses, tried in order. `expected` is the witness the
    /// pair's record names, if this host knows one. A thread keeps a connection warm as long as a
    /// clone exists.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn new(
        addresses: Vec<SocketAddr>,
        dial: Box<dyn Dial>,
        expected: Option<WitnessId>,
    ) -> std::io::Result<Client> {
        let shared = Arc::new(Shared {
            addresses,
            dial,
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

    /// Asks for a change, again and again until `deadline`, at every address. Persist the record
    /// granted before acting on it: it is what this host registers if the witness loses its store.
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
        let mut tried: Vec<String> = vec![String::new(); shared.addresses.len()];
        let mut warm = shared.warm.lock().take();
        let mut order = (0..shared.addresses.len()).cycle();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                shared.lost.notify_all();
                tried.retain(|error| !error.is_empty());
                if tried.is_empty() {
                    tried.push("no time was left to ask".into());
                }
                return Err(AskError::Unreachable { tried });
            }
            // Every address gets its share of what is left, so that a silent one leaves time for
            // the others.
            let share = left / (shared.addresses.len() as u32 + 1);
            let attempt = share.max(ATTEMPT).min(left);
            let connection = match warm.take() {
                Some(connection) => Ok(connection),
                None => {
                    let Some(at) = order.next() else {
                        return Err(AskError::Unreachable {
                            tried: vec!["no address is configured".into()],
                        });
                    };
                    shared.connect(shared.addresses[at], attempt)
                }
            };
            let failed = match connection {
                Ok(mut connection) => {
                    let expected = *shared.expected.lock();
                    if let Some(expected) = expected
                        && must_be_expected
                        && connection.witness != expected
                    {
                        let found = connection.witness;
                        shared.keep(connection);
                        return Err(AskError::OtherWitness { expected, found });
                    }
                    let address = connection.address;
                    match shared.exchange(&mut connection, ask, attempt, &pick) {
                        Ok(answer) => {
                            shared.keep(connection);
                            return Ok(answer);
                        }
                        Err(error) => (address, error),
                    }
                }
                Err(failed) => failed,
            };
            match failed {
                (_, AttemptError::Fault(fault)) => return Err(fault.into()),
                (address, error) => {
                    let at = shared
                        .addresses
                        .iter()
                        .position(|a| *a == address)
                        .unwrap_or(0);
                    tried[at] = format!("{address}: {}", chain(&error));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            std::thread::sleep(RETRY.min(left));
        }
    }
}

impl Shared {
    fn connect(
        &self,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<Connection, (SocketAddr, AttemptError)> {
        let greet = || -> Result<Connection, AttemptError> {
            let until = Instant::now() + timeout;
            let channel = self.dial.dial(address, timeout).map_err(MessageError::Io)?;
            let nobody = WitnessId {
                identity: [0; 16],
                store: [0; 16],
            };
            let mut connection = Connection {
                channel,
                address,
                witness: nobody,
            };
            let left = until.saturating_duration_since(Instant::now());
            connection.witness = self.exchange(
                &mut connection,
                Ask::Hello(VERSIONS),
                left,
                &|said| match said {
                    Said::Hello { witness, .. } => Some(witness),
                    _ => None,
                },
            )?;
            Ok(connection)
        };
        greet().map_err(|error| (address, error))
    }

    /// One question and its answer. After an error the connection must be dropped: an answer may
    /// still be on its way.
    fn exchange<T>(
        &self,
        connection: &mut Connection,
        ask: Ask,
        timeout: Duration,
        pick: &impl Fn(Said) -> Option<T>,
    ) -> Result<T, AttemptError> {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let channel = &mut connection.channel;
        channel.set_timeout(timeout).map_err(MessageError::Io)?;
        message::write(channel, FrameKind::ArbiterCall, &Call { id, ask })?;
        let answer: Answer = message::read(channel, FrameKind::ArbiterAnswer)?;
        if answer.id != id {
            return Err(AttemptError::Mismatch);
        }
        match answer.said {
            Said::Fault(fault) => Err(AttemptError::Fault(fault)),
            said => pick(said).ok_or(AttemptError::Mismatch),
        }
    }

    fn keep(&self, connection: Connection) {
        *self.warm.lock() = Some(connection);
    }
}

/// Pings the warm connection, opens one when there is none; ends with the last clone of the client.
fn keep_warm(client: &Weak<Shared>) {
    let mut complained = false;
    while let Some(shared) = client.upgrade() {
        // Taken out, so that a question that matters never waits for a ping: it dials anew.
        let warm = shared.warm.lock().take();
        let warm = warm.and_then(|mut connection| {
            let pong = |said| matches!(said, Said::Pong).then_some(());
            shared
                .exchange(&mut connection, Ask::Ping, PING, &pong)
                .ok()
                .map(|()| connection)
        });
        let warm = warm.map_or_else(
            || {
                let mut failed = None;
                for address in &shared.addresses {
                    match shared.connect(*address, PING) {
                        Ok(connection) => return Ok(connection),
                        Err(error) => failed = Some(error),
                    }
                }
                Err(failed)
            },
            Ok,
        );
        match warm {
            Ok(connection) => {
                complained = false;
                shared.warm.lock().get_or_insert(connection);
            }
            Err(Some((address, error))) if !complained => {
                complained = true;
                tracing::warn!(%address, error = chain(&error), "the witness cannot be reached");
            }
            Err(_) => {}
        }
        let mut warm = shared.warm.lock();
        shared.lost.wait_for(&mut warm, PING);
        drop(warm);
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
