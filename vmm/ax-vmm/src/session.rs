//! The connections of one session between a primary and its shadow.
//!
//! The primary dials four: *peer* (handshake first, then messages and answers), *heartbeat* (owned
//! by the sentinel), *forward* and *backward* (owned by the epoch engines). All carry the same
//! session in their preamble; the shadow takes them as one.

use std::io::{Read, Write};
use std::time::Duration;

use ax_link::{Channel, Connector, Incoming, LinkError, Preamble, Stream, handshake};
use ax_wire::Session;
use ax_wire::frame::{FrameHeader, FrameKind, HEADER};
use ax_wire::hello::Hello;
use ax_wire::peer::PeerMessage;

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a session could not be formed or went on no longer.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A connection failed or the hosts do not fit.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A message failed.
    #[error("conversation with the peer process: {0}")]
    Talk(String),
}

fn talk(error: impl std::fmt::Display) -> SessionError {
    SessionError::Talk(error.to_string())
}

/// Sends one message.
///
/// # Errors
/// The connection failed.
pub fn send(stream: &mut Stream, message: PeerMessage) -> Result<(), SessionError> {
    let bytes = message.encode().map_err(talk)?;
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
    PeerMessage::parse(&body).map_err(talk)
}

/// The primary's ends of a new session, but the heartbeat's, which the sentinel dials itself.
#[derive(Debug)]
pub struct Dialled {
    /// Messages and answers.
    pub peer: Stream,
    /// Epochs.
    pub forward: Stream,
    /// Acknowledgements.
    pub backward: Stream,
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
    let open = |channel| connector.open(Preamble::of(channel, session));
    let mut peer = open(Channel::Peer)?;
    let (theirs, _) = handshake::exchange(&mut peer, mine, PATIENCE)?;
    let forward = open(Channel::Forward)?;
    let backward = open(Channel::Backward)?;
    send(&mut peer, PeerMessage::Begin)?;
    match receive(&mut peer)? {
        PeerMessage::Done => Ok(Dialled {
            peer,
            forward,
            backward,
            theirs,
        }),
        other => Err(talk(format!(
            "the shadow answered {other:?} to the beginning"
        ))),
    }
}

/// The shadow's ends of a session, gathered as they come in.
#[derive(Debug, Default)]
pub struct Gathering {
    session: Option<Session>,
    peer: Option<Stream>,
    forward: Option<Stream>,
    backward: Option<Stream>,
    formed: bool,
}

/// The shadow's ends of a whole session, but the heartbeat's.
#[derive(Debug)]
pub struct Gathered {
    /// Messages and answers; none when only the epoch stream was made anew (rule 10).
    pub peer: Option<Stream>,
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
    /// The session is whole.
    Whole(Box<Gathered>),
}

impl Gathering {
    /// Takes one incoming connection. A *peer* connection begins a new session and drops what an
    /// earlier one had gathered; the others must belong to it.
    pub fn take(&mut self, incoming: Incoming, mine: impl FnOnce(Session) -> Hello) -> Took {
        let preamble = *incoming.preamble();
        let Some(session) = preamble.session() else {
            incoming.refuse("this port serves the processes of a pair");
            return Took::Nothing;
        };
        let taken = match preamble.channel() {
            Channel::Peer if self.formed => {
                incoming.refuse("this shadow belongs to another session already");
                return Took::Nothing;
            }
            Channel::Peer => self.begin(incoming, session, mine),
            _ if self.session != Some(session) => {
                incoming.refuse("no such session: the handshake comes first");
                return Took::Nothing;
            }
            Channel::Forward => incoming
                .accept()
                .map(|s| self.forward = Some(s))
                .map_err(Into::into),
            Channel::Backward => incoming
                .accept()
                .map(|s| self.backward = Some(s))
                .map_err(Into::into),
            Channel::Heartbeat => return Took::Heartbeat(incoming),
            _ => {
                incoming.refuse("the processes of a pair do not use this channel");
                return Took::Nothing;
            }
        };
        if let Err(error) = taken {
            tracing::warn!(%error, "a connection of a session was not formed");
            if !self.formed {
                *self = Gathering::default();
            }
        }
        self.whole()
    }

    fn begin(
        &mut self,
        incoming: Incoming,
        session: Session,
        mine: impl FnOnce(Session) -> Hello,
    ) -> Result<(), SessionError> {
        *self = Gathering::default();
        let mut peer = incoming.accept()?;
        handshake::exchange(&mut peer, &mine(session), PATIENCE)?;
        self.session = Some(session);
        self.peer = Some(peer);
        Ok(())
    }

    fn whole(&mut self) -> Took {
        let (forward, backward, session) =
            match (self.forward.take(), self.backward.take(), self.session) {
                (Some(forward), Some(backward), Some(session)) => (forward, backward, session),
                (forward, backward, _) => {
                    (self.forward, self.backward) = (forward, backward);
                    return Took::Nothing;
                }
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
                    forward,
                    backward,
                    session,
                }))
            }
            Err(error) => {
                tracing::warn!(%error, "a session was not formed");
                *self = Gathering::default();
                Took::Nothing
            }
        }
    }
}
