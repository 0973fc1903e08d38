//! Every network that the two hosts share, looked after: so that a cut cable is known for what it is,
//! whether a VM runs or not.
//!
//! Each of the peer's addresses is asked in turn whether the other axd answers there. This decides nothing:
//! requests go by whatever address answers, and VMs have their own heartbeats.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ax_api::report::HostPath;

use crate::daemon::Daemon;
use crate::peer::PeerLink;

/// How often an address is asked.
const EVERY: Duration = Duration::from_secs(2);
/// So many attempts in a row fail on a path that is lost: one may be a busy host.
const FAILURES: u32 = 2;

/// One address of the other host, from what it has answered so far: pure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    address: SocketAddr,
    /// None before the first attempt has succeeded or enough have failed.
    up: Option<bool>,
    failed: u32,
    why: String,
}

impl Path {
    /// Nothing known yet.
    pub fn new(address: SocketAddr) -> Path {
        Path {
            address,
            up: None,
            failed: 0,
            why: String::new(),
        }
    }

    /// What came of an attempt; the line for the operator, if it is news.
    pub fn tried(&mut self, outcome: Result<(), String>, peer: &str) -> Option<String> {
        let at = self.address;
        match outcome {
            Ok(()) => {
                (self.failed, self.why) = (0, String::new());
                let was = self.up.replace(true);
                (was == Some(false)).then(|| format!("host {peer} answers at {at} again"))
            }
            Err(why) => {
                self.failed = self.failed.saturating_add(1);
                if self.failed < FAILURES {
                    return None;
                }
                self.why.clone_from(&why);
                let was = self.up.replace(false);
                (was != Some(false)).then(|| format!("host {peer} does not answer at {at}: {why}"))
            }
        }
    }

    /// For `axvm host`.
    pub fn report(&self) -> HostPath {
        HostPath {
            address: self.address,
            up: self.up,
            why: self.why.clone(),
        }
    }
}

impl Daemon {
    /// Looks after every path to the other host, for as long as axd lives.
    pub fn look_after_paths(self: &Arc<Self>) {
        let Some(peer) = &self.peer else { return };
        for path in 0..peer.paths().len() {
            let (daemon, peer) = (self.clone(), peer.clone());
            tokio::spawn(async move {
                loop {
                    daemon.try_path(&peer, path).await;
                    tokio::time::sleep(EVERY).await;
                }
            });
        }
    }

    async fn try_path(&self, peer: &Arc<PeerLink>, path: usize) {
        let asked = peer.clone();
        let outcome = tokio::task::spawn_blocking(move || asked.try_path(path)).await;
        let outcome = outcome.unwrap_or_else(|e| Err(e.to_string()));
        if let Some(news) = peer.path_tried(path, outcome) {
            self.events.note(None, news);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_lost_when_it_fails_twice_and_back_when_it_answers_once() {
        let mut path = Path::new("10.99.0.2:7430".parse().unwrap());
        let bad = || Err("no answer in time".to_owned());
        assert_eq!(path.report().up, None);
        assert_eq!(path.tried(Ok(()), "b"), None);
        assert_eq!(path.report().up, Some(true));
        assert_eq!(path.tried(bad(), "b"), None);
        assert_eq!(
            path.report().up,
            Some(true),
            "a busy host is not a cut cable"
        );
        let told = path.tried(bad(), "b").unwrap();
        assert!(
            told.contains("10.99.0.2:7430") && told.contains("no answer"),
            "{told}"
        );
        assert_eq!(path.report().up, Some(false));
        assert_eq!(path.tried(bad(), "b"), None, "it is said once");
        assert!(path.tried(Ok(()), "b").unwrap().contains("again"));
        assert_eq!(path.report().why, "");
    }
}
