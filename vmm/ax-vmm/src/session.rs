//! The connections of one session between a primary and its shadow.
//!
//! The primary dials four: *peer* (handshake first, then messages and answers), *heartbeat* (owned
//! by the sentinel, one on every path), *forward* and *backward* (owned by the epoch engines). All carry
//! the same session in their preamble; the shadow takes them as one. Later pairs of *forward* and *backward*,
//! one on every path, wait until the stream goes over them ([`crate::standby`]), and the conversation goes on
//! over another *peer* connection when the one before is lost.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use ax_link::heartbeat::MAX_PATHS;
use ax_link::{Channel, Closer, Connector, Incoming, LinkError, Preamble, Stream, handshake};
use ax_wire::Session;
use ax_wire::frame::{FrameHeader, FrameKind, HEADER};
use ax_wire::hello::Hello;
use ax_wire::peer::{PeerError, PeerMessage};
use ax_wire::version::Lacks;
use parking_lot::Mutex;

use crate::standby::Pair;

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a session could not be formed or went on no longer.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A connection failed or the hosts do not fit.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The other side, of an older build, does not know this message; it was not sent.
    #[error("conversation with the peer process: {0}")]
    Lacks(#[from] Lacks),
    /// A message failed.
    #[error("conversation with the peer process: {0}")]
    Talk(String),
}

impl From<PeerError> for SessionError {
    fn from(error: PeerError) -> SessionError {
        match error {
            PeerError::Lacks(lacks) => SessionError::Lacks(lacks),
            other => talk(other),
        }
    }
}

fn talk(error: impl std::fmt::Display) -> SessionError {
    SessionError::Talk(error.to_string())
}

/// Sends one message.
///
/// # Errors
/// The connection failed, or its wire version has no such message: then nothing was sent.
pub fn send(stream: &mut Stream, message: PeerMessage) -> Result<(), SessionError> {
    let bytes = message.encode(stream.version())?;
    stream
        .write_all(&bytes)
        .and_then(|()| stream.flush())
        .map_err(talk)
}

/// Waits for one message.
///
/// # Errors
/// The connection ended, or what came is no message.
pub fn receive(stream: &mut Stream) -> Result<PeerMessage, SessionError> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).map_err(talk)?;
    let header = FrameHeader::parse(&header, FrameKind::Peer).map_err(talk)?;
    let mut body = vec![0; header.body_len()];
    stream.read_exact(&mut body).map_err(talk)?;
    header.check(&body).map_err(talk)?;
    PeerMessage::parse(&body, stream.version()).map_err(talk)
}

/// The primary's ends of a new session, but the heartbeat's, which the sentinel dials itself.
#[derive(Debug)]
pub struct Dialled {
    /// Messages and answers.
    pub peer: Stream,
    /// Epochs and acknowledgements.
    pub pair: Pair,
    /// What the other side said of itself.
    pub theirs: Hello,
}

/// Forms a session as primary: handshake first, so that a pair that could not fail over is refused
/// before anything else is opened.
///
/// # Errors
/// Names every difference, or the connection's failure.
pub fn dial(
    connector: &Connector,
    mine: &Hello,
    session: Session,
) -> Result<Dialled, SessionError> {
    let mut peer = connector.open(Preamble::of(Channel::Peer, session))?;
    let (theirs, _) = handshake::exchange(&mut peer, mine, PATIENCE)?;
    // Both on one path, and rather on that which answered just now.
    let at = peer.peer_addr();
    let mut ways = connector.each();
    ways.sort_by_key(|(way, _)| *way != at);
    let mut opened = Err(talk("no way to the shadow is known"));
    for (_, way) in &ways {
        opened = Pair::open(way, session);
        if opened.is_ok() {
            break;
        }
    }
    let pair = opened?;
    send(&mut peer, PeerMessage::Begin)?;
    match receive(&mut peer)? {
        PeerMessage::Done => Ok(Dialled { peer, pair, theirs }),
        other => Err(talk(format!(
            "the shadow answered {other:?} to the beginning"
        ))),
    }
}

/// What came of a message: the answer, or why there was none.
pub type Answer = Box<dyn FnOnce(Result<PeerMessage, SessionError>) + Send>;

/// The primary's end of the conversation, in a thread of its own: what is said may take the other
/// side as long as its disks take.
#[derive(Debug)]
pub struct Talk {
    say: mpsc::Sender<(PeerMessage, Answering)>,
    line: Arc<Line>,
}

/// The connection that the conversation goes over, to be ended from other threads.
#[derive(Debug)]
pub struct Line {
    /// The shadow's address, and the end; none once it has been ended.
    now: Mutex<Option<(IpAddr, Closer)>>,
    over: AtomicBool,
}

impl Line {
    /// Ends it if `lost` says so of the shadow's address: the conversation goes on over another.
    pub fn leave(&self, lost: impl FnOnce(IpAddr) -> bool) {
        let mut now = self.now.lock();
        if now.as_ref().is_some_and(|(at, _)| lost(*at))
            && let Some((_, closer)) = now.take()
        {
            closer.close();
        }
    }

    fn over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Where it goes on, and how it is ended.
    fn take_up(&self, peer: &Stream) -> std::io::Result<()> {
        *self.now.lock() = Some((peer.peer_addr().ip(), peer.closer()?));
        if self.over() {
            self.leave(|_| true);
        }
        Ok(())
    }
}

/// Opens another connection to the shadow for the conversation.
pub type Reopen = Box<dyn Fn() -> Result<Stream, SessionError> + Send>;

/// The thread's state.
struct Speaker {
    peer: Stream,
    reopen: Reopen,
    line: Arc<Line>,
    broken: bool,
}

impl Speaker {
    /// Says one thing and hears the answer. What means the same said twice is said again when the
    /// connection is lost on the way.
    fn ask(&mut self, message: PeerMessage) -> Result<PeerMessage, SessionError> {
        let again = !matches!(message, PeerMessage::Follow(_) | PeerMessage::Begin);
        let fresh = self.line.now.lock().is_some() && !self.broken;
        if fresh {
            let heard = self.once(message.clone());
            if heard.is_ok() || !again || matches!(heard, Err(SessionError::Lacks(_))) {
                return heard;
            }
        }
        self.anew()?;
        self.once(message)
    }

    fn once(&mut self, message: PeerMessage) -> Result<PeerMessage, SessionError> {
        let heard = send(&mut self.peer, message).and_then(|()| receive(&mut self.peer));
        self.broken = matches!(heard, Err(SessionError::Link(_) | SessionError::Talk(_)));
        heard
    }

    fn anew(&mut self) -> Result<(), SessionError> {
        if self.line.over() {
            return Err(talk("it has ended"));
        }
        self.peer = (self.reopen)()?;
        self.line.take_up(&self.peer).map_err(talk)?;
        self.broken = false;
        Ok(())
    }
}

struct Answering(Answer);

impl std::fmt::Debug for Answering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answering")
    }
}

impl Talk {
    /// Takes over the connection.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(peer: Stream, reopen: Reopen) -> std::io::Result<Talk> {
        let line = Arc::new(Line {
            now: Mutex::new(None),
            over: AtomicBool::new(false),
        });
        line.take_up(&peer)?;
        let mut speaker = Speaker {
            peer,
            reopen,
            line: Arc::clone(&line),
            broken: false,
        };
        let (say, said) = mpsc::channel::<(PeerMessage, Answering)>();
        std::thread::Builder::new()
            .name("peer-talk".into())
            .spawn(move || {
                for (message, Answering(answer)) in said {
                    answer(speaker.ask(message));
                }
            })?;
        Ok(Talk { say, line })
    }

    /// The connection it goes over.
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// Says one thing; `answer` is called with what comes back, or why nothing does.
    pub fn say(&self, message: PeerMessage, answer: Answer) {
        if let Err(mpsc::SendError((_, Answering(answer)))) =
            self.say.send((message, Answering(answer)))
        {
            answer(Err(talk("it has ended")));
        }
    }

    /// Says one thing and waits for the answer, at most for `patience`.
    ///
    /// # Errors
    /// The connection failed, or no answer came in time.
    pub fn ask(
        &self,
        message: PeerMessage,
        patience: Duration,
    ) -> Result<PeerMessage, SessionError> {
        let (tell, heard) = mpsc::channel();
        let answer = move |said| {
            let _ = tell.send(said);
        };
        self.say(message, Box::new(answer));
        heard
            .recv_timeout(patience)
            .unwrap_or_else(|_| Err(talk("no answer in time")))
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.line.over.store(true, Ordering::Release);
        self.line.leave(|_| true);
    }
}

/// Whether this process may become the shadow of a session that begins now.
#[derive(Clone, Debug)]
pub struct Door(Arc<AtomicBool>);

impl Door {
    /// Open for a process that waits for a primary.
    pub fn new(open: bool) -> Door {
        Door(Arc::new(AtomicBool::new(open)))
    }

    /// From here on one session may begin.
    pub fn open(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn shut(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// The shadow's ends of a session, gathered as they come in.
#[derive(Debug)]
pub struct Gathering {
    door: Door,
    parts: Parts,
}

#[derive(Debug, Default)]
struct Parts {
    session: Option<Session>,
    peer: Option<Stream>,
    /// Halves of pairs, by the address they came to.
    halves: Vec<Half>,
    formed: bool,
}

#[derive(Debug)]
struct Half {
    at: IpAddr,
    forward: Option<Stream>,
    backward: Option<Stream>,
}

/// The shadow's ends of a whole session, but the heartbeat's.
#[derive(Debug)]
pub struct Gathered {
    /// Messages and answers; none of a pair that waits for the epoch stream to go over it (rule 10).
    pub peer: Option<Stream>,
    /// This side's address on their path.
    pub at: IpAddr,
    /// Epochs.
    pub forward: Stream,
    /// Acknowledgements.
    pub backward: Stream,
    /// Whose session it is.
    pub session: Session,
}

/// What came of one incoming connection.
#[derive(Debug)]
pub enum Took {
    /// It was refused, or more are to come.
    Nothing,
    /// It is the heartbeat's: the sentinel takes it.
    Heartbeat(Incoming),
    /// The session is whole, or has one more pair.
    Whole(Box<Gathered>),
    /// The conversation goes on over this one.
    Talk(Session, Box<Stream>),
}

impl Gathering {
    /// Gathers while `door` is open; shuts it when a session is formed.
    pub fn new(door: Door) -> Gathering {
        Gathering {
            door,
            parts: Parts::default(),
        }
    }

    /// Takes one incoming connection. A *peer* connection begins a new session and drops what an
    /// earlier one had gathered; the others must belong to it.
    pub fn take(&mut self, incoming: Incoming, mine: impl FnOnce(Session) -> Hello) -> Took {
        let preamble = *incoming.preamble();
        let Some(session) = preamble.session() else {
            incoming.refuse("this port serves the processes of a pair");
            return Took::Nothing;
        };
        let parts = &mut self.parts;
        let taken = match preamble.channel() {
            Channel::Peer
                if !self.door.is_open() && parts.formed && parts.session == Some(session) =>
            {
                return match incoming.accept() {
                    Ok(peer) => Took::Talk(session, Box::new(peer)),
                    Err(error) => {
                        tracing::warn!(%error, "a conversation did not go on");
                        Took::Nothing
                    }
                };
            }
            Channel::Peer if !self.door.is_open() => {
                incoming.refuse("this process waits for no primary now");
                return Took::Nothing;
            }
            Channel::Peer => parts.begin(incoming, session, mine),
            _ if parts.session != Some(session) => {
                incoming.refuse("no such session: the handshake comes first");
                return Took::Nothing;
            }
            channel @ (Channel::Forward | Channel::Backward) => parts.half(channel, incoming),
            Channel::Heartbeat => return Took::Heartbeat(incoming),
            _ => {
                incoming.refuse("the processes of a pair do not use this channel");
                return Took::Nothing;
            }
        };
        if let Err(error) = taken {
            tracing::warn!(%error, "a connection of a session was not formed");
            if !parts.formed {
                *parts = Parts::default();
            }
        }
        let took = parts.whole();
        if matches!(&took, Took::Whole(gathered) if gathered.peer.is_some()) {
            self.door.shut();
        }
        took
    }
}

impl Parts {
    fn begin(
        &mut self,
        incoming: Incoming,
        session: Session,
        mine: impl FnOnce(Session) -> Hello,
    ) -> Result<(), SessionError> {
        *self = Parts::default();
        let mut peer = incoming.accept()?;
        handshake::exchange(&mut peer, &mine(session), PATIENCE)?;
        self.session = Some(session);
        self.peer = Some(peer);
        Ok(())
    }

    fn half(&mut self, channel: Channel, incoming: Incoming) -> Result<(), SessionError> {
        let stream = incoming.accept()?;
        let at = stream.local_addr().map_err(talk)?.ip();
        let known = self.halves.iter().position(|half| half.at == at);
        let place = known.unwrap_or(self.halves.len());
        if place >= MAX_PATHS {
            return Err(talk("more paths than a session has"));
        }
        if known.is_none() {
            self.halves.push(Half {
                at,
                forward: None,
                backward: None,
            });
        }
        if let Some(half) = self.halves.get_mut(place) {
            match channel {
                Channel::Forward => half.forward = Some(stream),
                _ => half.backward = Some(stream),
            }
        }
        Ok(())
    }

    fn whole(&mut self) -> Took {
        let is_whole = |half: &Half| half.forward.is_some() && half.backward.is_some();
        let Some(place) = self.halves.iter().position(is_whole) else {
            return Took::Nothing;
        };
        let half = self.halves.swap_remove(place);
        let (Some(forward), Some(backward), Some(session)) =
            (half.forward, half.backward, self.session)
        else {
            return Took::Nothing;
        };
        let mut peer = self.peer.take();
        let begun = peer.as_mut().map_or(Ok(()), |peer| match receive(peer)? {
            PeerMessage::Begin => send(peer, PeerMessage::Done),
            other => Err(talk(format!("{other:?} where the beginning was due"))),
        });
        match begun {
            Ok(()) => {
                self.formed = true;
                Took::Whole(Box::new(Gathered {
                    peer,
                    at: half.at,
                    forward,
                    backward,
                    session,
                }))
            }
            Err(error) => {
                tracing::warn!(%error, "a session was not formed");
                *self = Parts::default();
                Took::Nothing
            }
        }
    }
}
