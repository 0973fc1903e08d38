//! The witness: a small durable server that says who may run.
//!
//! One thread per connection reads questions and writes answers; one clerk thread decides and makes
//! the decision durable in between. It may be killed at any moment: what it answered, it will
//! still know.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

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
/// Stack of a connection's thread, bytes.
const STACK: usize = 256 << 10;

/// A connection between a host and a witness, already authenticated where the link is.
pub trait Channel: Read + Write + Send {
    /// Bounds each following read and write.
    ///
    /// # Errors
    /// The system's.
    fn set_timeout(&mut self, timeout: Duration) -> std::io::Result<()>;

    /// The authenticated name of the other end, if there is one.
    fn peer_name(&self) -> Option<String>;
}

/// A plain connection: nobody is authenticated.
impl Channel for TcpStream {
    fn set_timeout(&mut self, timeout: Duration) -> std::io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        self.set_read_timeout(timeout)?;
        self.set_write_timeout(timeout)
    }

    fn peer_name(&self) -> Option<String> {
        None
    }
}

/// Why a witness ended.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its listening socket.
    #[error("the witness cannot accept connections")]
    Accept(#[source] std::io::Error),
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

    /// Accepts connections until [`Witness::stop`] or a failure of the store. `secure` turns an
    /// accepted connection into an authenticated one; it runs on the connection's own thread.
    ///
    /// # Errors
    /// The listening socket's, or the store's.
    pub fn serve<F>(&self, listener: &TcpListener, secure: F) -> Result<(), WitnessError>
    where
        F: Fn(TcpStream, SocketAddr) -> std::io::Result<Box<dyn Channel>> + Send + Sync + 'static,
    {
        let secure = Arc::new(secure);
        let own = listener.local_addr().map_err(WitnessError::Accept)?;
        loop {
            let accepted = listener.accept();
            if self.ended() {
                return self.close();
            }
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "witness: connection not accepted");
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                }
                Err(error) => return Err(WitnessError::Accept(error)),
            };
            let Some(slot) = Slot::take(&self.shared) else {
                tracing::warn!(%from, "witness: {MAX_CONNECTIONS} connections open, one refused");
                continue;
            };
            let (witness, secure) = (self.clone(), Arc::clone(&secure));
            let started = std::thread::Builder::new()
                .name("witness-conn".into())
                .stack_size(STACK)
                .spawn(move || {
                    let _slot = slot;
                    let attended = secure(stream, from)
                        .map_err(MessageError::Io)
                        .and_then(|mut channel| witness.attend(channel.as_mut()));
                    if let Err(error) = attended {
                        tracing::debug!(%from, %error, "witness: connection ended");
                    }
                    if witness.ended() {
                        // The clerk is gone: let the accepting thread see it.
                        let _ = TcpStream::connect_timeout(&own, Duration::from_secs(1));
                    }
                });
            if let Err(error) = started {
                tracing::warn!(%from, %error, "witness: no thread for a connection");
            }
        }
    }

    /// Answers one connection until it ends.
    ///
    /// # Errors
    /// Why it ended: the connection's error, bytes that are no message, or the clerk's end.
    pub fn attend(&self, channel: &mut dyn Channel) -> Result<(), MessageError> {
        let host = channel.peer_name();
        channel.set_timeout(IDLE)?;
        let mut greeted = false;
        loop {
            let Call { id, ask } = message::read(channel, FrameKind::ArbiterCall)?;
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
            message::write(channel, FrameKind::ArbiterAnswer, &Answer { id, said })?;
        }
    }

    /// Ends the witness: its store is closed when this returns. `listening` is where
    /// [`Witness::serve`] accepts, which then returns.
    ///
    /// # Errors
    /// The store had failed before.
    pub fn stop(&self, listening: Option<SocketAddr>) -> Result<(), WitnessError> {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let closed = self.close();
        if let Some(own) = listening {
            let _ = TcpStream::connect_timeout(&own, Duration::from_secs(1));
        }
        closed
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

/// True for errors of one connection or a passing shortage, which must not end the witness.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::*;
    // ENFILE, EMFILE, ENOBUFS, EPERM (a firewall), EPROTO
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted | OutOfMemory
    ) || matches!(error.raw_os_error(), Some(23 | 24 | 105 | 1 | 71))
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
