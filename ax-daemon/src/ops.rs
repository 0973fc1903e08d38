//! What can be done with a VM besides starting it.

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, Definition, HostEvent, NewVm, Reply, Request};
use ax_api::process::{self, Role};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::define;
use crate::failure::Failure;

/// How long an orderly stop, or a planned failover, may take.
pub(crate) const ORDERLY: Duration = Duration::from_secs(60);

impl Daemon {
    /// Defines a VM, or changes one that runs nowhere.
    ///
    /// # Errors
    /// A limit is broken, or it runs.
    pub async fn define(self: &Arc<Self>, new: &NewVm, tell: &Tell) -> Result<(), Failure> {
        let _claim = self.claim(&new.name).await?;
        let known = self.store.vm(&new.name).ok();
        let vm = define::resolve(new, known.as_ref(), &self.config, &self.offload().await)?;
        if let Some(known) = &known {
            if *known == vm {
                return Ok(());
            }
            if self.runs_anywhere(known).await {
                return Err(Failure::new(
                    Code::State,
                    format!("{} runs; stop it before changing its definition", vm.name),
                ));
            }
        }
        self.store.change(&new.name, Some(vm))?;
        self.events.note(Some(&new.name), "defined");
        self.share_now(tell).await;
        Ok(())
    }

    /// Forgets a VM that runs nowhere; its images stay.
    ///
    /// # Errors
    /// There is none of this name, or it runs.
    pub async fn undefine(self: &Arc<Self>, name: &str) -> Result<String, Failure> {
        let _claim = self.claim(name).await?;
        let vm = self.store.vm(name)?;
        if self.runs_anywhere(&vm).await {
            return Err(Failure::new(
                Code::State,
                format!("{name} runs; `axvm stop {name}` first"),
            ));
        }
        self.store.change(name, None)?;
        self.forget_files(name);
        self.events.note(Some(name), "undefined");
        Ok(match self.share().await {
            Ok(()) => format!("{name} is undefined; its images stay"),
            Err(failure) => format!(
                "{name} is undefined here and its images stay; the other host will learn of it: {failure}"
            ),
        })
    }

    /// What an undefined VM leaves beside its tombstone. Its dirty-region maps would be taken for
    /// another VM's of that name.
    pub fn forget_files(&self, name: &str) {
        let dir = self.config.vm_dir(name);
        let _ = std::fs::remove_dir_all(dir.join("state"));
        for file in ["spec.json", "stopped", "starting", "log", "log.1"] {
            let _ = std::fs::remove_file(dir.join(file));
        }
    }

    /// Whether a VM is started when a host boots.
    ///
    /// # Errors
    /// There is none of this name.
    pub async fn autostart(self: &Arc<Self>, name: &str, on: bool) -> Result<String, Failure> {
        let mut vm = self.store.vm(name)?;
        let word = if on { "on" } else { "off" };
        if vm.autostart != on {
            vm.autostart = on;
            self.store.change(name, Some(vm))?;
            self.events.note(Some(name), format!("autostart {word}"));
        }
        Ok(match self.share().await {
            Ok(()) => format!("autostart of {name} is {word}"),
            Err(failure) => format!(
                "autostart of {name} is {word} here; the other host will learn of it: {failure}"
            ),
        })
    }

    /// Gives the process that runs the guest an order, on whichever host it is.
    ///
    /// # Errors
    /// It does not run, its host does not answer, or it refused.
    pub async fn order_primary(
        self: &Arc<Self>,
        request: Request,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let (name, order, done) = match &request {
            Request::Reboot { name } => (name, process::Request::Reboot, "is being reset"),
            Request::Pause { name } => (name, process::Request::Pause, "is paused"),
            Request::Resume { name, .. } => (name, process::Request::Resume, "goes on"),
            Request::Failover { name } => {
                (name, process::Request::Failover, "runs on the other host")
            }
            _ => {
                return Err(Failure::new(
                    Code::Failed,
                    "not an order for the guest's process",
                ));
            }
        };
        self.store.vm(name)?;
        if let Some((process, Some(Role::Primary))) = self.local_role(name).await {
            control::order(&process.control, &order, ORDERLY).await?;
            let text = match (&request, &self.config.peer) {
                (Request::Failover { .. }, Some(peer)) => format!("{name} runs on {}", peer.name),
                _ => format!("{name} {done}"),
            };
            self.events.note(Some(name), format!("operator: {text}"));
            return Ok(text);
        }
        self.forward_or_not_running(name, request.clone(), asker, tell)
            .await
    }

    pub(crate) async fn forward_or_not_running(
        self: &Arc<Self>,
        name: &str,
        request: Request,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        match (asker, &self.peer) {
            (Asker::User, Some(peer)) => {
                match peer.forward(request, Some(tell.0.clone())).await {
                    Ok(Reply::Done { text }) => Ok(text),
                    Ok(other) => Err(peer.unexpected(&other)),
                    // It has not heard of it yet, so it cannot run it.
                    Err(failure) if failure.code == Code::NoSuchVm => Err(self.does_not_run(name)),
                    Err(failure) => Err(failure),
                }
            }
            _ => Err(self.does_not_run(name)),
        }
    }

    /// The operator's word that the other host is dead, to the process here that waits for it.
    ///
    /// # Errors
    /// None waits here.
    pub async fn peer_is_dead(
        self: &Arc<Self>,
        name: &str,
        request: &Request,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        self.store.vm(name)?;
        let Some(process) = self.process(name) else {
            return self
                .forward_or_not_running(name, request.clone(), asker, tell)
                .await;
        };
        control::order(&process.control, &process::Request::PeerIsDead, ORDERLY).await?;
        let text = format!(
            "{name} on {}: told that the other host is dead",
            self.config.name
        );
        self.events.note(Some(name), format!("operator: {text}"));
        Ok(text)
    }

    /// Simulated fault: SIGKILL to the primary's process, or to the one on `host`.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn kill(
        self: &Arc<Self>,
        name: &str,
        host: Option<String>,
        asker: Asker,
        tell: &Tell,
    ) -> Result<String, Failure> {
        self.store.vm(name)?;
        let here = match (&host, self.local_role(name).await) {
            (Some(host), local) if *host == self.config.name => match local {
                Some((process, _)) => Some(process),
                None => {
                    return Err(Failure::new(
                        Code::State,
                        format!("{name} has no process on {host}"),
                    ));
                }
            },
            (None, Some((process, Some(Role::Primary)))) => Some(process),
            _ => None,
        };
        if let Some(process) = here {
            // As a fault would: whatever follows the end of such a process follows this one.
            process.kill();
            process.wait().await;
            let text = format!(
                "killed process {} of {name} on {}",
                process.pid, self.config.name
            );
            self.events.note(Some(name), format!("operator: {text}"));
            return Ok(text);
        }
        match (&self.peer, &host) {
            (peer, Some(host)) if peer.as_ref().is_none_or(|p| p.name() != host) => {
                Err(Failure::new(
                    Code::Usage,
                    format!("no host of this pair is called {host}"),
                ))
            }
            _ => {
                let request = Request::Kill {
                    name: name.to_owned(),
                    host,
                };
                self.forward_or_not_running(name, request, asker, tell)
                    .await
            }
        }
    }

    /// Tells what happened, oldest first, and goes on if asked to.
    ///
    /// # Errors
    /// There is no such VM.
    pub async fn tell_events(
        self: &Arc<Self>,
        vm: Option<String>,
        follow: bool,
        both: bool,
        tell: &Tell,
    ) -> Result<(), Failure> {
        let (mut all, mut live) = self.events.subscribe();
        let (their_tell, mut theirs) = mpsc::unbounded_channel();
        if both && let Some(peer) = &self.peer {
            let peer = peer.clone();
            let request = Request::Events {
                vm: vm.clone(),
                follow,
                both_hosts: false,
            };
            tokio::spawn(async move { peer.forward(request, Some(their_tell)).await });
        } else {
            drop(their_tell);
        }
        // What it remembers comes at once; after that, or after a while, only what is new.
        let first = Duration::from_millis(if follow { 1000 } else { 5000 });
        let quiet = Duration::from_millis(if follow { 100 } else { 5000 });
        let mut patience = first;
        while let Ok(Some(reply)) = tokio::time::timeout(patience, theirs.recv()).await {
            if let Reply::Event { event } = reply {
                all.push(event);
            }
            patience = quiet;
        }
        all.sort_by_key(|e| e.at_ms);
        let wanted = |e: &HostEvent| vm.is_none() || e.vm == vm;
        for event in all.into_iter().filter(wanted) {
            if tell.0.send(Reply::Event { event }).is_err() {
                return Ok(());
            }
        }
        if !follow {
            return Ok(());
        }
        loop {
            let event = tokio::select! {
                event = live.recv() => match event {
                    Ok(event) => Some(event),
                    Err(RecvError::Lagged(_)) => None,
                    Err(RecvError::Closed) => return Ok(()),
                },
                Some(Reply::Event { event }) = theirs.recv() => Some(event),
                () = tell.0.closed() => return Ok(()),
            };
            if let Some(event) = event.filter(wanted)
                && tell.0.send(Reply::Event { event }).is_err()
            {
                return Ok(());
            }
        }
    }

    /// Takes the other host's definitions where they are newer. What runs here is not pulled away
    /// from under its process.
    ///
    /// # Errors
    /// A definition is bad, or cannot be written.
    pub fn take_definitions(&self, definitions: Vec<Definition>) -> Result<(), Failure> {
        for definition in definitions {
            let name = definition.name.clone();
            let runs = self.process(&name).is_some_and(|process| {
                definition
                    .vm
                    .as_ref()
                    .is_none_or(|vm| vm.pair != process.pair)
            });
            if runs {
                tracing::warn!(
                    "{name} runs here: the other host's newer definition is not taken yet"
                );
                continue;
            }
            let gone = definition.vm.is_none();
            let old_pair = self.store.vm(&name).ok().map(|vm| vm.pair);
            let new_pair = definition.vm.as_ref().map(|vm| vm.pair);
            if self.store.take(definition)? {
                if gone || (old_pair.is_some() && old_pair != new_pair) {
                    self.forget_files(&name);
                }
                tracing::info!("{name}: definition taken from the other host");
            }
        }
        Ok(())
    }
}
