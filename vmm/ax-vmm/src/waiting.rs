//! The shadow's ends of the pairs that wait for the epoch stream to go over them.
//!
//! Each has a thread that waits for the primary's first word on it. Then the pair before is ended, and the
//! engine takes this one up.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc;

use ax_link::Stream;
use ax_link::heartbeat::{PathView, PathViews};
use ax_wire::peer::PeerMessage;
use parking_lot::Mutex;
use statepoint::link::{Closer, ShadowLink};

use crate::session;
use crate::standby::{Service, spoken};

#[derive(Default)]
struct State {
    /// To the engine's thread; none once the following has ended.
    links: Option<mpsc::Sender<ShadowLink>>,
    /// What the stream goes over, and its end.
    active: Option<(IpAddr, Closer)>,
    /// Pairs that wait, by the address they came to: of a path the last one counts.
    waiting: Vec<(IpAddr, Closer)>,
}

/// The pairs of one session.
#[derive(Clone)]
pub struct Waiting(Arc<Mutex<State>>);

fn link(forward: Stream, backward: Stream) -> std::io::Result<ShadowLink> {
    let ends = [forward.closer()?, backward.closer()?];
    Ok(ShadowLink {
        version: spoken(&forward, &backward)?,
        forward: Box::new(forward),
        backward: Box::new(backward),
        close: Arc::new(move || ends.iter().for_each(ax_link::Closer::close)),
    })
}

impl Waiting {
    /// Links go to `links`, one after the other.
    pub fn new(links: mpsc::Sender<ShadowLink>) -> Waiting {
        Waiting(Arc::new(Mutex::new(State {
            links: Some(links),
            ..State::default()
        })))
    }

    /// The stream goes over this pair from now on.
    ///
    /// # Errors
    /// The system's.
    pub fn take_up(&self, at: IpAddr, forward: Stream, backward: Stream) -> std::io::Result<()> {
        let link = link(forward, backward)?;
        let mut state = self.0.lock();
        // Every one ends its predecessor, whether the engine has come to that or not.
        let before = state.active.replace((at, Arc::clone(&link.close)));
        if let Some((_, close)) = before {
            close();
        }
        match &state.links {
            Some(links) => drop(links.send(link)),
            None => (link.close)(),
        }
        Ok(())
    }

    /// Keeps the pair until the primary's first word on it.
    ///
    /// # Errors
    /// The thread could not be started, or the system's.
    pub fn keep(&self, at: IpAddr, mut forward: Stream, backward: Stream) -> std::io::Result<()> {
        let ends = [forward.closer()?, backward.closer()?];
        let close: Closer = Arc::new(move || ends.iter().for_each(ax_link::Closer::close));
        {
            let mut state = self.0.lock();
            if state.links.is_none() {
                return Ok(());
            }
            state.forget(at);
            state.waiting.push((at, Arc::clone(&close)));
        }
        let this = self.clone();
        let wait = move || {
            let word = session::receive(&mut forward);
            let its = |(_, end): &(IpAddr, Closer)| Arc::ptr_eq(end, &close);
            this.0.lock().waiting.retain(|waiting| !its(waiting));
            match word {
                Ok(PeerMessage::Begin) => {
                    tracing::info!(%at, "the epoch stream goes over another connection");
                    if let Err(error) = this.take_up(at, forward, backward) {
                        tracing::warn!(%error, "a connection could not be used");
                    }
                }
                Ok(other) => tracing::warn!(?other, "a connection began with another word"),
                Err(error) => tracing::debug!(%error, "a standby connection ended"),
            }
        };
        std::thread::Builder::new()
            .name("standby".into())
            .spawn(wait)
            .map(drop)
    }

    /// How each path serves the stream; none once the following has ended.
    pub fn service(&self, paths: &PathViews) -> Vec<Service> {
        let state = self.0.lock();
        if state.links.is_none() {
            return Vec::new();
        }
        let at = |(at, _): &(IpAddr, Closer)| *at;
        let service = |view: PathView| Service {
            address: view.address,
            state: view.state,
            carries: state.active.as_ref().map(at) == Some(view.address),
            ready: state.waiting.iter().map(at).any(|at| at == view.address),
        };
        paths.now().into_iter().map(service).collect()
    }

    /// No more links: the engine's thread ends with the one it has.
    pub fn end(&self) {
        let mut state = self.0.lock();
        state.links = None;
        state.waiting.drain(..).for_each(|(_, close)| close());
    }
}

impl State {
    /// Ends the pair that waits on a path.
    fn forget(&mut self, at: IpAddr) {
        self.waiting.retain(|(its, close)| {
            if *its == at {
                close();
            }
            *its != at
        });
    }
}
