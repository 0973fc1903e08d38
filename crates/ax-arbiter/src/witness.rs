//! The witness: a small durable server that says who may run.
//!
//! One thread per connection reads questions and writes answers; one clerk thread decides and makes
//! the decision durable in between. It may be killed at any moment: what it answered, it will
//! still know.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use ax_link::{Acceptor, Channel, Stream};
use ax_wire::frame::FrameKind;
use ax_wire::record::WitnessId;
use parking_lot::Mutex;

use crate::clerk::{Clerk, Job};
use crate::message::{self, Answer, Ask, Call, Fault, MessageError, Said, VERSIONS};
use crate::store::{Store, StoreError};

/// Most connections at a time; further ones are closed at once.
pub const MAX_CONNECTIONS: usize = 1024;
/// A connection silent for so long is closed. Clients ping far more often.
pub const IDLE: Duration = Duration::from_secs(60);
/// How often the accepting thread looks whether the store has failed.
const LOOK_UP: Duration = Duration::from_millis(200);
/// Stack of a connection's thread, bytes.
const STACK: usize = 256 << 10;

/// Why a witness ended.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A thread could not be started.
    #[error("the witness cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// An open witness. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct Witness {
    shared: Arc<Shared>,
}

struct Shared {
    id: WitnessId,
    jobs: SyncSender<Job>,
    clerk: Mutex<Option<JoinHandle<Result<(), StoreError>>>>,
    connections: AtomicUsize,
    stopping: AtomicBool,
}

impl Witness {
    /// Opens the witness whose records are in `data_dir`, or makes a new one there.
    ///
    /// # Errors
    /// The store cannot be used, or no thread started.
    pub fn open(data_dir: &Path) -> Result<Witness, WitnessError> {
        let store = Store::open(data_dir)?;
        let id = store.id();
        let (jobs, receiver) = mpsc::sync_channel(MAX_CONNECTIONS);
        let clerk = std::thread::Builder::new()
            .name("witness-clerk".into())
            .spawn(move || Clerk::new(store).run(&receiver))
            .map_err(WitnessError::Thread)?;
        Ok(Witness {
            shared: Arc::new(Shared {
                id,
                jobs,
                clerk: Mutex::new(Some(clerk)),
                connections: AtomicUsize::new(0),
                stopping: AtomicBool::new(false),
            }),
        })
    }

    /// Who this is, with which store.
    pub fn id(&self) -> WitnessId {
        self.shared.id
    }

    /// Serves what `acceptor` accepts until its stopper is used, or the store fails. The store is
    /// closed when this returns.
    ///
    /// # Errors
    /// The store failed.
    pub fn serve(&self, acceptor: &Acceptor) -> Result<(), WitnessError> {
        while !self.ended() {
            let incoming = match acceptor.accept_timeout(LOOK_UP) {
                Ok(Some(incoming)) => incoming,
                Ok(None) => continue,
                Err(_) => break,
            };
            if incoming.preamble().channel() != Channel::Witness {
                incoming.refuse("this is a witness: it serves only the witness channel");
                continue;
            }
            let Some(slot) = Slot::take(&self.shared) else {
                incoming.refuse("the witness has too many connections");
                continue;
            };
            let witness = self.clone();
            let started = std::thread::Builder::new()
                .name("witness-conn".into())
                .stack_size(STACK)
                .spawn(move || {
                    let _slot = slot;
                    let peer = incoming.stream().describe();
                    let attended = incoming
                        .accept()
                        .map_err(|error| MessageError::Io(std::io::Error::other(error)))
                        .and_then(|stream| witness.attend(stream));
                    if let Err(error) = attended {
                        tracing::debug!(peer, %error, "witness: connection ended");
                    }
                });
            if let Err(error) = started {
                tracing::warn!(%error, "witness: no thread for a connection; dropped it");
            }
        }
        self.close()
    }

    /// Answers one connection until it ends: by its error, by bytes that are no message, or with
    /// the clerk.
    fn attend(&self, mut stream: Stream) -> Result<(), MessageError> {
        let host = stream.peer_name().map(ToString::to_string);
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        let mut greeted = false;
        loop {
            let Call { id, ask } = message::read(&mut stream, FrameKind::ArbiterCall)?;
            let said = match ask {
                Ask::Hello(theirs) if !greeted => match VERSIONS.common(theirs) {
                    Some(version) => {
                        greeted = true;
                        Said::Hello {
                            version,
                            witness: self.shared.id,
                        }
                    }
                    None => Said::Fault(Fault::Version(VERSIONS)),
                },
                Ask::Hello(_) => Said::Fault(Fault::Order),
                _ if !greeted => Said::Fault(Fault::Order),
                Ask::Ping => Said::Pong,
                ask => {
                    let (reply, answer) = mpsc::sync_channel(1);
                    let job = Job::Decide {
                        ask,
                        host: host.clone(),
                        reply,
                    };
                    // Unanswered only when the clerk has ended, its store failed or closed.
                    let said = self
                        .shared
                        .jobs
                        .send(job)
                        .ok()
                        .and_then(|()| answer.recv().ok());
                    said.ok_or_else(|| {
                        self.shared.stopping.store(true, Ordering::SeqCst);
                        MessageError::Io(std::io::Error::other("the witness is stopping"))
                    })?
                }
            };
            message::write(&mut stream, FrameKind::ArbiterAnswer, &Answer { id, said })?;
        }
    }

    fn ended(&self) -> bool {
        self.shared.stopping.load(Ordering::SeqCst)
            || self
                .shared
                .clerk
                .lock()
                .as_ref()
                .is_none_or(JoinHandle::is_finished)
    }

    fn close(&self) -> Result<(), WitnessError> {
        let Some(clerk) = self.shared.clerk.lock().take() else {
            return Ok(());
        };
        let _ = self.shared.jobs.send(Job::Stop);
        match clerk.join() {
            Ok(ended) => Ok(ended?),
            Err(_) => Err(WitnessError::Thread(std::io::Error::other(
                "the clerk panicked",
            ))),
        }
    }
}

/// One connection's place among [`MAX_CONNECTIONS`].
struct Slot(Arc<Shared>);

impl Slot {
    fn take(shared: &Arc<Shared>) -> Option<Slot> {
        let slot = Slot(Arc::clone(shared));
        let taken = shared.connections.fetch_add(1, Ordering::SeqCst);
        (taken < MAX_CONNECTIONS).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
    }
}
