//! Starting a VM: all of it, or nothing is left.
//!
//! ```text
//!   axvm        axd here                         axd there
//!    | start ->  | define, images
//!    |           | SpawnShadow ----------------->| take definition, images, run shadow
//!    |           | run primary (at the same time)| shadow waits
//!    |           |<------------------- Shadow ---|   (its run, where it listens)
//!    |           | Protect -> primary
//!    | progress<-| primary copies, is granted protection
//!    |           | Settle ---------------------->| keep what was made
//!    |<-- done --|
//! ```
//! Whatever fails before the guest is as protected as its mode says undoes the rest: processes on both
//! hosts, images made for it, and the definition if this start made it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ax_api::host::{Code, Definition, NewVm, PeerRequest, Reply};
use ax_api::process::{Phase, Request, Start, Status};
use ax_api::vm::{Mode, Vm};
use ax_wire::Incarnation;
use tokio::time::Instant;

use crate::control;
use crate::daemon::{Asker, Daemon, Tell};
use crate::define;
use crate::failure::Failure;
use crate::images;
use crate::process::Process;

/// How often a starting process is asked where it is.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How long a guest may be held, run alone, or make no progress before its start counts as failed.
const SETBACK_PATIENCE: Duration = Duration::from_secs(10);
/// How long a primary may take to reach its shadow.
const DIALLING: Duration = Duration::from_secs(15);

/// What a start without a shadow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WithoutShadow {
    /// A failure, undone.
    Fails,
    /// Better than no guest at all.
    RunsAlone,
}

/// A shadow that waits for its primary.
pub(crate) struct Shadow {
    pub(crate) incarnation: Incarnation,
    pub(crate) listen: Vec<SocketAddr>,
}

/// What a start has made so far.
struct Made {
    operation: u64,
    defined: bool,
    images: Vec<PathBuf>,
    primary: Option<Arc<Process>>,
    asked_peer: bool,
}

impl Daemon {
    /// Starts a VM here.
    ///
    /// # Errors
    /// What failed, on which host; nothing is left of the start.
    pub async fn start(
        self: &Arc<Self>,
        name: &str,
        new: Option<&NewVm>,
        wait: bool,
        alone_ok: bool,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let without = if alone_ok {
            WithoutShadow::RunsAlone
        } else {
            WithoutShadow::Fails
        };
        self.refuse_in_maintenance()?;
        let _claim = self.claim(name).await?;
        let known = self.store.vm(name).ok();
        let (definition, defined) = match (new, known) {
            (Some(new), known) => {
                let vm = define::resolve(new, known.as_ref(), &self.config, &self.offload().await)?;
                match known {
                    Some(known) if known == vm => (self.store.get(name)?, false),
                    Some(_) => {
                        return Err(Failure::new(
                            Code::State,
                            format!(
                                "{name} is defined otherwise; `axvm define` changes it, `axvm start {name}` starts it as it is"
                            ),
                        ));
                    }
                    None => {
                        self.may_start(&vm, without).await?;
                        (self.store.change(name, Some(vm))?, true)
                    }
                }
            }
            (None, Some(_)) => (self.store.get(name)?, false),
            (None, None) => return Err(no_such_vm_to_start(name)),
        };
        let Some(vm) = definition.vm.clone() else {
            return Err(no_such_vm_to_start(name));
        };
        self.forget_crashes(name);
        if !defined {
            self.may_start(&vm, without).await?;
        }
        self.start_claimed(&vm, definition, defined, without, wait, tell)
            .await
    }

    /// Refuses what cannot work before anything is made.
    async fn may_start(&self, vm: &Vm, without: WithoutShadow) -> Result<(), Failure> {
        if let Some(process) = self.process(&vm.name) {
            return Err(Failure::new(
                Code::State,
                format!("{} runs already (process {})", vm.name, process.pid),
            ));
        }
        if vm.mode == Mode::None && self.peer.is_none() {
            return Ok(());
        }
        let peer = self.peer()?;
        match peer.processes().await {
            Ok(theirs) => match theirs.iter().find(|p| p.pair == vm.pair.to_string()) {
                Some(found) => Err(Failure::new(
                    Code::State,
                    format!("{} runs already on host {}", vm.name, found.host),
                )),
                None => Ok(()),
            },
            // Whether it may run here without the other host is the arbiter's to say, if it ever was a pair.
            Err(_) if without == WithoutShadow::RunsAlone || vm.mode == Mode::None => Ok(()),
            Err(failure) => Err(Failure::new(
                Code::Peer,
                format!(
                    "{}; without it {} cannot be protected (--alone-ok starts it all the same)",
                    failure.why, vm.name
                ),
            )),
        }
    }

    /// Starts a VM that is claimed, defined and runs nowhere.
    pub(crate) async fn start_claimed(
        self: &Arc<Self>,
        vm: &Vm,
        definition: Definition,
        defined: bool,
        without: WithoutShadow,
        wait: bool,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let mut made = Made {
            operation: u64::from_le_bytes(define::random()?),
            defined,
            images: vec![],
            primary: None,
            asked_peer: false,
        };
        let journal = self.journal(&vm.name);
        let begun = match journal.begin() {
            Ok(()) => {
                self.bring_up(vm, definition, without, wait, &mut made, tell)
                    .await
            }
            Err(e) => Err(Failure::io("noting the start down", &e)),
        };
        match begun {
            Ok(text) => {
                if made.asked_peer
                    && let Some(peer) = &self.peer
                {
                    let settle = PeerRequest::Settle {
                        name: vm.name.clone(),
                        operation: made.operation,
                    };
                    // If it does not hear of it now, it settles the shadow by what it sees it do.
                    let _ = peer.call(settle).await;
                }
                journal.end();
                self.unmark_stopped(&vm.name);
                if made.defined {
                    self.share_now(tell).await;
                }
                self.events.note(Some(&vm.name), format!("started: {text}"));
                Ok(text)
            }
            Err(failure) => {
                let failure = self.undo(vm, made, failure).await;
                journal.end();
                self.events
                    .note(Some(&vm.name), format!("start failed: {failure}"));
                Err(failure)
            }
        }
    }

    async fn bring_up(
        self: &Arc<Self>,
        vm: &Vm,
        definition: Definition,
        without: WithoutShadow,
        wait: bool,
        made: &mut Made,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let here = &self.config.name;
        made.images = images::prepare(&self.config, vm, Start::Boot).map_err(|f| f.at(here))?;
        if vm.mode == Mode::None {
            tell.progress(format!("starting {} on {here}", vm.name));
            let primary = self.spawn(vm, Start::Boot).await.map_err(|f| f.at(here))?;
            made.primary = Some(primary.clone());
            self.until_running(&primary).await.map_err(|f| f.at(here))?;
            return Ok(format!("{} runs on {here}, unprotected", vm.name));
        }

        if let Some(warning) = self.config.arbiter.warning() {
            tell.progress(format!("warning: {warning}"));
        }
        let peer = self.peer()?.clone();
        let there = peer.name().to_owned();
        tell.progress(format!(
            "starting {} on {here}, its shadow on {there}",
            vm.name
        ));
        made.asked_peer = true;
        let spawn_shadow = PeerRequest::SpawnShadow {
            definition: Box::new(definition),
            operation: made.operation,
        };
        // Together: before either is granted anything the arbiter may want to hear from both.
        let (primary, shadow) = tokio::join!(self.spawn(vm, Start::Boot), peer.call(spawn_shadow));
        let primary = primary.map_err(|f| f.at(here));
        made.primary = primary.as_ref().ok().cloned();
        let shadow = match shadow {
            Ok(Reply::Shadow {
                incarnation,
                listen,
            }) => Ok(Shadow {
                incarnation,
                listen,
            }),
            Ok(other) => Err(Failure::new(
                Code::Peer,
                format!("host {there} answered {other:?} to the order for a shadow"),
            )),
            Err(failure) => Err(failure.at(&there)),
        };
        let (primary, shadow) = match (primary, shadow, without) {
            (Ok(primary), Ok(shadow), _) => (primary, shadow),
            (Ok(primary), Err(failure), WithoutShadow::RunsAlone) => {
                let runs = self.until_running(&primary).await;
                if let Some(held) = self.held_for_an_operator(&primary).await {
                    return Ok(held);
                }
                runs.map_err(|f| f.at(here))?;
                return Ok(format!("{} runs on {here}, alone: {failure}", vm.name));
            }
            // The side that runs the guest is the one to hear of first.
            (Err(failure), _, _) | (_, Err(failure), _) => return Err(failure),
        };
        self.protect(&primary, &shadow)
            .await
            .map_err(|f| f.at(here))?;
        if !wait {
            return Ok(format!(
                "{} runs on {here}; {there} is being synced",
                vm.name
            ));
        }
        match self.until_protected(&primary, tell).await {
            Ok(()) => Ok(format!("{} runs on {here}, protected by {there}", vm.name)),
            Err(failure) if without == WithoutShadow::RunsAlone && primary.exited().is_none() => {
                Ok(format!("{} runs on {here}, alone: {failure}", vm.name))
            }
            Err(failure) => Err(failure.at(here)),
        }
    }

    /// Tells the primary of its shadow. One that is still starting is asked again.
    ///
    /// # Errors
    /// It does not take it.
    pub(crate) async fn protect(&self, primary: &Process, shadow: &Shadow) -> Result<(), Failure> {
        let request = Request::Protect {
            addresses: shadow.listen.clone(),
            incarnation: shadow.incarnation,
        };
        let deadline = Instant::now() + SETBACK_PATIENCE;
        loop {
            // It takes a shadow only once it runs alone, by the arbiter's grant.
            let before = primary.status().await.map(|s| s.phase);
            let ordered = control::order(&primary.control, &request, DIALLING).await;
            let after = primary.status().await.map(|s| s.phase);
            let too_early = matches!(before, None | Some(Phase::Starting | Phase::Held { .. }));
            let under_way = matches!(
                after,
                Some(Phase::Syncing { .. } | Phase::Entering | Phase::Protected)
            );
            match ordered {
                Ok(()) => return Ok(()),
                // It took it, and its answer was late.
                Err(_) if under_way => return Ok(()),
                Err(_) if primary.exited().is_some() => return Err(primary.why_it_ended()),
                // It was asked too early, whatever became of it since.
                Err(_) if too_early && Instant::now() < deadline => {
                    tokio::time::sleep(ASK_EVERY).await;
                }
                Err(failure) => match after {
                    Some(Phase::Held { .. }) if Instant::now() < deadline => {
                        tokio::time::sleep(ASK_EVERY).await;
                    }
                    Some(Phase::Held { waits_for }) => {
                        let why = format!("{} is held: waits for {waits_for}", primary.name);
                        return Err(Failure::new(Code::Arbiter, why));
                    }
                    _ => return Err(failure),
                },
            }
        }
    }

    /// Waits until the guest runs, protected or not.
    pub(crate) async fn until_running(&self, primary: &Process) -> Result<(), Failure> {
        self.until(primary, |status| match status.phase {
            Phase::Starting | Phase::Waiting | Phase::FailingOver | Phase::Held { .. } => Ok(false),
            _ => Ok(true),
        })
        .await
    }

    pub(crate) async fn until_protected(
        &self,
        primary: &Process,
        tell: &Tell,
    ) -> Result<(), Failure> {
        let mut told = None;
        self.until(primary, |status| {
            if told.as_ref() != Some(&status.phase) {
                match &status.phase {
                    Phase::Syncing { done, total } => {
                        tell.bytes("copying memory and disks", Some((*done, *total)));
                    }
                    Phase::Entering => tell.progress("entering protection"),
                    Phase::Held { waits_for } => tell.progress(format!("waits for {waits_for}")),
                    _ => {}
                }
                told = Some(status.phase.clone());
            }
            Ok(status.phase == Phase::Protected)
        })
        .await
    }

    /// Asks the process for its status until `there` says yes. Gives up when it ends, or shows the
    /// same face for too long.
    async fn until(
        &self,
        primary: &Process,
        mut there: impl FnMut(&Status) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let mut face = None;
        let mut since = Instant::now();
        loop {
            if primary.exited().is_some() {
                return Err(primary.why_it_ended());
            }
            if let Some(status) = primary.status().await {
                if there(&status)? {
                    return Ok(());
                }
                if face.as_ref() != Some(&status.phase) {
                    face = Some(status.phase);
                    since = Instant::now();
                }
            }
            if since.elapsed() > SETBACK_PATIENCE && primary.exited().is_none() {
                let (code, what) = match &face {
                    Some(Phase::Held { waits_for }) => {
                        (Code::Arbiter, format!("is held: waits for {waits_for}"))
                    }
                    Some(Phase::Alone) => (
                        Code::Peer,
                        format!(
                            "ran without its shadow{} and was ended again",
                            self.last_loss(primary)
                        ),
                    ),
                    Some(phase) => (Code::Failed, format!("is stuck: {phase:?}")),
                    None => (Code::Failed, "does not answer".to_owned()),
                };
                return Err(Failure::new(code, format!("{} {what}", primary.name)));
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// How the process last lost its peer, as words to append.
    fn last_loss(&self, process: &Process) -> String {
        use ax_api::host::HostWhat;
        use ax_api::process::What;
        let (events, _) = self.events.subscribe();
        let told = events.iter().rev().find_map(|e| match &e.what {
            HostWhat::Process {
                incarnation,
                event: What::PeerLost { how },
                ..
            } if *incarnation == process.incarnation => Some(format!(" (lost it by {how})")),
            HostWhat::Process {
                incarnation,
                event: What::Note { text },
                ..
            } if *incarnation == process.incarnation => Some(format!(" ({text})")),
            _ => None,
        });
        told.unwrap_or_default()
    }

    async fn undo(self: &Arc<Self>, vm: &Vm, made: Made, failure: Failure) -> Failure {
        let mut failure = failure;
        if made.asked_peer
            && let Some(peer) = &self.peer
        {
            let undo = PeerRequest::Undo {
                name: vm.name.clone(),
                operation: made.operation,
                spare: false,
            };
            // The shadow first: with its primary gone it might take over.
            match peer.call(undo).await {
                Ok(Reply::Done { text }) if !text.is_empty() => {
                    failure.why = format!("{} ({}: {text})", failure.why, peer.name());
                }
                Ok(_) => {}
                Err(e) => {
                    failure.why = format!(
                        "{}; host {} could not be told to clean up: {e}",
                        failure.why,
                        peer.name()
                    );
                }
            }
        }
        if let Some(primary) = made.primary {
            if !made.defined {
                // In order if it can, so that its record says so and it may start on either host.
                let patience = Duration::from_secs(3);
                let _ = control::order(&primary.control, &Request::Stop, patience).await;
            }
            primary.kill_and_wait().await;
            self.let_go(&primary);
        }
        images::remove(&made.images);
        let _ = std::fs::remove_file(self.config.vm_dir(&vm.name).join("spec.json"));
        if made.defined {
            let _ = std::fs::remove_dir_all(self.config.vm_dir(&vm.name).join("state"));
            if let Err(e) = self.store.change(&vm.name, None) {
                failure.why = format!("{}; its definition stays: {e}", failure.why);
            }
            self.sync_soon();
        }
        failure
    }

    /// Starts a VM as autostart does: alone rather than not at all.
    ///
    /// # Errors
    /// It could not be started at all.
    pub async fn start_somehow(
        self: &Arc<Self>,
        name: &str,
        tell: &Tell,
    ) -> Result<String, Failure> {
        let _behind = self.behind(name);
        self.start(name, None, true, true, tell).await
    }

    /// Whether anything of the VM runs on either host, as far as can be known.
    pub async fn runs_anywhere(&self, vm: &Vm) -> bool {
        let (reports, _) = self.reports_of_both(Asker::User).await;
        let pair = vm.pair.to_string();
        reports.iter().any(|r| r.pair == pair)
    }
}

fn no_such_vm_to_start(name: &str) -> Failure {
    Failure::new(
        Code::NoSuchVm,
        format!(
            "no VM is called {name:?}; say what it is (--probe or --kernel, or --config) to define it"
        ),
    )
}
