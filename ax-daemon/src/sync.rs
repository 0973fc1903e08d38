//! Keeping the two hosts' definitions the same, and knowing whether the other host is there.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{PeerRequest, Reply};
use ax_api::process::{Phase, Start};
use ax_wire::Versions;
use ax_wire::records::RecordKind;

use crate::daemon::{Asker, Daemon, Tell};
use crate::failure::Failure;

/// How often the definitions are compared, which is also how soon a lost peer is noticed here. The
/// guests' own heartbeats are another matter.
const EVERY: Duration = Duration::from_secs(2);
/// How long a shadow may wait for a primary that was announced and does not come.
const ORPHAN: Duration = Duration::from_secs(60);

impl Daemon {
    /// Gives the other host this one's definitions and takes its newer ones.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn share(self: &Arc<Self>) -> Result<(), Failure> {
        let Some(peer) = &self.peer else {
            return Ok(());
        };
        let definitions = self.store.all();
        match peer.call(PeerRequest::Sync { definitions }).await? {
            Reply::Synced { definitions } => self.take_definitions(definitions),
            other => Err(peer.unexpected(&other)),
        }
    }

    /// [`Daemon::share`], telling the user if it must wait.
    pub async fn share_now(self: &Arc<Self>, tell: &Tell) {
        if let Err(failure) = self.share().await {
            tell.progress(format!("the other host will learn of it: {failure}"));
        }
    }

    /// [`Daemon::share`], without waiting for it.
    pub fn sync_soon(self: &Arc<Self>) {
        let daemon = self.clone();
        tokio::spawn(async move { daemon.share().await });
    }

    /// Why network devices can't have offloads, if they can't: an other host of an earlier build refuses a
    /// definition that has them, and could not take over a guest that uses them.
    pub async fn offload(self: &Arc<Self>) -> Result<(), String> {
        let headers = RecordKind::FrameWithHeader;
        let Some(peer) = &self.peer else {
            let ours = Versions::ours().newest();
            return ours.has(&headers).map_err(|lacks| lacks.to_string());
        };
        if peer.spoken().is_none() {
            let _ = peer.hello().await;
        }
        match peer.spoken() {
            Some(spoken) => spoken
                .has(&headers)
                .map_err(|lacks| format!("host {}: {lacks}", peer.name())),
            None => Err(format!(
                "host {} has not answered yet, and may be too old for it",
                peer.name()
            )),
        }
    }

    /// Goes on sharing definitions, and notes when the other host comes and goes.
    pub async fn keep_in_touch(self: Arc<Self>) {
        let mut there: Option<bool> = None;
        loop {
            if let Some(peer) = &self.peer {
                let shared = self.share().await;
                // A refused definition is no absence.
                let now = !matches!(peer.state(), Some(Err(_)));
                if there != Some(now) {
                    match (&shared, now) {
                        (_, true) => {
                            self.peer_back.notify_waiters();
                            let text = format!("host {} answers", peer.name());
                            self.events.note(None, text);
                        }
                        (Err(failure), false) => self.events.note(None, failure.why.clone()),
                        (Ok(()), false) => {}
                    }
                    there = Some(now);
                } else if let (Err(failure), true) = (&shared, now) {
                    tracing::warn!("definitions differ: {failure}");
                }
            }
            self.end_orphans().await;
            tokio::time::sleep(EVERY).await;
        }
    }

    /// Ends a shadow whose start nobody saw through: the axd that wanted it is gone.
    async fn end_orphans(self: &Arc<Self>) {
        for process in self.processes() {
            if process.start != Start::Shadow
                || process.since.elapsed() < ORPHAN
                || !self.journal(&process.name).is_open()
            {
                continue;
            }
            let Some(status) = process.status().await else {
                continue;
            };
            if status.phase != Phase::Waiting {
                // It serves a primary: the start went well and only the last word was lost.
                self.journal(&process.name).end();
                continue;
            }
            let started: Vec<u64> = {
                let made = self.made.lock();
                let mine = made.keys().filter(|(name, _)| *name == process.name);
                mine.map(|(_, operation)| *operation).collect()
            };
            for operation in started {
                self.undo_shadow(&process.name, operation, true).await;
            }
            if !self.give_up(&process).await {
                continue;
            }
            self.journal(&process.name).end();
            self.events.note(
                Some(&process.name),
                "ended a shadow whose primary never came",
            );
        }
    }

    /// What the other host asks.
    pub async fn answer_peer(self: &Arc<Self>, request: PeerRequest, tell: &Tell) -> Reply {
        let done = || Reply::Done {
            text: String::new(),
        };
        match request {
            PeerRequest::Hello { host: _ } => Reply::Version {
                host: self.config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                peer: None,
            },
            PeerRequest::Sync { definitions } => match self.take_definitions(definitions) {
                Ok(()) => Reply::Synced {
                    definitions: self.store.all(),
                },
                Err(failure) => failure.into_reply(),
            },
            PeerRequest::Processes => Reply::Processes {
                processes: self.reports().await,
            },
            PeerRequest::SpawnShadow {
                definition,
                operation,
            } => match self.spawn_shadow(*definition, operation).await {
                Ok(reply) => reply,
                Err(failure) => failure.into_reply(),
            },
            PeerRequest::Undo {
                name,
                operation,
                spare,
            } => Reply::Done {
                text: self.undo_shadow(&name, operation, spare).await,
            },
            PeerRequest::Settle { name, operation } => {
                self.settle(&name, operation);
                done()
            }
            PeerRequest::Stopped { name } => {
                if self.store.vm(&name).is_ok() {
                    self.mark_stopped(&name);
                }
                done()
            }
            PeerRequest::Fence { pair, generation } => Reply::Gone {
                incarnations: self.end_older(&pair, generation).await,
            },
            PeerRequest::Word { name, letter } => match self.word(&name, *letter).await {
                Ok(answer) => Reply::Word {
                    answer: Box::new(answer),
                },
                Err(failure) => failure.into_reply(),
            },
            PeerRequest::Forward { request } => self.answer(request, Asker::Peer, tell).await,
        }
    }
}
