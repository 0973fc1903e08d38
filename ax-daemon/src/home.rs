//! A VM's preferred host: where it is to run when both hosts are there.
//!
//! A guest that ran elsewhere while its preferred host was away may go back by planned failover once that host
//! protects it again. It does so by itself where its definition says `return = "auto"`: the host has been synced
//! anew and has been in sync for a while. What an operator moved stays where it is until then. It is given up
//! after some attempts, and not done again and again for a host that goes on failing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::host::Code;
use ax_api::process::{self, Phase, Role, Status};
use ax_api::vm::{Mode, Preferred, Return};

use crate::control;
use crate::daemon::Daemon;
use crate::define;
use crate::failure::Failure;
use crate::ops::ORDERLY;
use crate::process::Process;

/// How often VMs that run here are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a VM is to have been in sync before it goes back.
const STEADY: Duration = Duration::from_secs(5);
/// Before the second attempt; twice as long before each further one.
const PAUSE: Duration = Duration::from_secs(10);
/// Attempts after one sync.
const TRIES: u32 = 5;
/// So many returns within [`RETURNS_WITHIN`] are enough: the preferred host goes on failing.
const MOST_RETURNS: usize = 3;
/// The time over which they are counted.
const RETURNS_WITHIN: Duration = Duration::from_secs(3600);

/// How far a VM that runs here is on the way back to its preferred host.
#[derive(Debug, Default)]
pub struct Homeward {
    /// Its shadow has been synced from here, not only changed roles with it.
    synced: bool,
    steady_since: Option<Instant>,
    tries: u32,
    not_before: Option<Instant>,
    /// When it went back by itself.
    returns: Vec<Instant>,
}

/// What comes next for a VM that might go back.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Nothing, yet.
    Wait,
    /// Back by planned failover.
    Go,
    /// It stays, as it has gone back too often.
    Enough,
}

impl Homeward {
    /// A sync of a shadow from here begins.
    fn synced(&mut self) {
        self.synced = true;
        self.steady_since = None;
        self.tries = 0;
        self.not_before = None;
    }

    /// At `now` it is protected by its preferred host, or not.
    fn next(&mut self, protected: bool, now: Instant) -> Next {
        if !protected {
            self.steady_since = None;
            return Next::Wait;
        }
        let since = *self.steady_since.get_or_insert(now);
        let early = now.duration_since(since) < STEADY || self.not_before.is_some_and(|t| now < t);
        if !self.synced || early || self.tries >= TRIES {
            return Next::Wait;
        }
        let lately = |at: &Instant| now.duration_since(*at) < RETURNS_WITHIN;
        self.returns.retain(lately);
        if self.returns.len() >= MOST_RETURNS {
            self.synced = false;
            return Next::Enough;
        }
        Next::Go
    }

    /// It went back.
    fn returned(&mut self, now: Instant) {
        self.synced = false;
        self.returns.push(now);
    }

    /// It did not; whether another attempt follows.
    fn failed(&mut self, now: Instant) -> bool {
        self.not_before = Some(now + PAUSE * 2_u32.pow(self.tries.min(TRIES)));
        self.tries += 1;
        self.tries < TRIES
    }
}

impl Daemon {
    /// Says where a VM is to run when both hosts are there.
    ///
    /// # Errors
    /// There is no such VM, or no such host.
    pub async fn prefer(
        self: &Arc<Self>,
        name: &str,
        preferred: Option<Preferred>,
    ) -> Result<String, Failure> {
        let mut vm = self.store.vm(name)?;
        if let Some(preferred) = &preferred {
            define::check_host(&preferred.host, &self.config)?;
        }
        let text = match &preferred {
            Some(preferred) => format!("the preferred host of {name} is {preferred}"),
            None => format!("{name} has no preferred host"),
        };
        if vm.preferred != preferred {
            vm.preferred = preferred;
            self.store.change(name, Some(vm))?;
            self.events.note(Some(name), format!("operator: {text}"));
        }
        Ok(match self.share().await {
            Ok(()) => text,
            Err(failure) => {
                format!("{text}, for this host; the other one will learn of it: {failure}")
            }
        })
    }

    /// Remembers that a VM which runs here gives its shadow a full copy.
    pub(crate) fn synced_anew(&self, name: &str) {
        let mut homeward = self.homeward.lock();
        homeward.entry(name.to_owned()).or_default().synced();
    }

    /// Takes VMs, for ever, back to their preferred host.
    pub async fn keep_home(self: Arc<Self>) {
        if self.peer.is_none() {
            return;
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            for process in self.processes() {
                self.look_homeward(&process).await;
            }
        }
    }

    async fn look_homeward(self: &Arc<Self>, process: &Arc<Process>) {
        let name = process.name.as_str();
        let Some(home) = self.home_there(name) else {
            return;
        };
        let status = process.status().await;
        let protected = status.as_ref().is_some_and(is_protected_here);
        let next = {
            let mut homeward = self.homeward.lock();
            let homeward = homeward.entry(name.to_owned()).or_default();
            homeward.next(protected, Instant::now())
        };
        match next {
            Next::Wait => {}
            Next::Enough => {
                let text = format!(
                    "stays here: it has returned to {home} {MOST_RETURNS} times within {} minutes; \
                     `axvm failover {name}` takes it back",
                    RETURNS_WITHIN.as_secs() / 60
                );
                self.events.note(Some(name), text);
            }
            Next::Go => self.go_home(process, &home).await,
        }
    }

    /// The other host's name, if the VM is to go back to it by itself.
    fn home_there(&self, name: &str) -> Option<String> {
        let vm = self.store.vm(name).ok()?;
        let there = self.peer.as_ref()?.name();
        let preferred = vm.preferred.filter(|p| p.host == there)?;
        (preferred.back == Return::Auto && vm.mode == Mode::Ft).then_some(preferred.host)
    }

    async fn go_home(self: &Arc<Self>, process: &Arc<Process>, home: &str) {
        let name = process.name.as_str();
        let result = match self.peer_takes_vms().await {
            Some(true) => {
                // What an operator is doing with it comes first; it will be looked at again.
                let Ok(_claim) = self.claim_behind(name) else {
                    return;
                };
                let text = format!("returns to its preferred host {home}");
                self.events.note(Some(name), text);
                control::order(&process.control, &process::Request::Failover, ORDERLY).await
            }
            // Its maintenance ends when it ends; that is no attempt.
            Some(false) => return,
            None => Err(Failure::new(
                Code::Peer,
                format!("host {home} does not answer"),
            )),
        };
        let text = {
            let mut homeward = self.homeward.lock();
            let homeward = homeward.entry(name.to_owned()).or_default();
            match result {
                Ok(()) => {
                    homeward.returned(Instant::now());
                    format!("has returned to its preferred host {home}")
                }
                Err(failure) => match homeward.failed(Instant::now()) {
                    true => format!("has not returned to {home}, another try follows: {failure}"),
                    false => format!(
                        "does not return to {home} after {TRIES} attempts: {failure}; \
                         `axvm failover {name}` takes it back"
                    ),
                },
            }
        };
        self.events.note(Some(name), text);
    }
}

fn is_protected_here(status: &Status) -> bool {
    status.role == Role::Primary && status.phase == Phase::Protected
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Looks each second until something is to be done, at most for `seconds`; what, and when.
    fn run(homeward: &mut Homeward, from: Instant, seconds: u32) -> (Next, u32) {
        for n in 0..seconds {
            match homeward.next(true, from + SECOND * n) {
                Next::Wait => {}
                next => return (next, n),
            }
        }
        (Next::Wait, seconds)
    }

    #[test]
    fn it_goes_back_after_a_sync_that_lasted_and_only_then() {
        let (mut homeward, start) = (Homeward::default(), Instant::now());
        // Roles that changed by an operator's failover are no sync.
        assert_eq!(run(&mut homeward, start, 100), (Next::Wait, 100));
        homeward.synced();
        let start = start + SECOND * 100;
        assert_eq!(homeward.next(true, start), Next::Wait);
        assert_eq!(homeward.next(true, start + SECOND * 4), Next::Wait);
        // Lost again: the time begins anew.
        assert_eq!(homeward.next(false, start + SECOND * 5), Next::Wait);
        assert_eq!(run(&mut homeward, start + SECOND * 6, 100), (Next::Go, 5));
        homeward.returned(start + SECOND * 11);
        let later = start + SECOND * 12;
        assert_eq!(run(&mut homeward, later, 100), (Next::Wait, 100));
    }

    #[test]
    fn attempts_come_less_and_less_often_and_end() {
        let (mut homeward, mut now) = (Homeward::default(), Instant::now());
        homeward.synced();
        let mut waited = vec![];
        loop {
            let (next, after) = run(&mut homeward, now, 1000);
            if next == Next::Wait {
                break;
            }
            waited.push(after);
            now += SECOND * after;
            let again = homeward.failed(now);
            assert_eq!(again, waited.len() < TRIES as usize);
        }
        assert_eq!(waited, [5, 10, 20, 40, 80]);
        // Another sync is another reason to hope.
        homeward.synced();
        assert_eq!(run(&mut homeward, now, 1000).0, Next::Go);
    }

    #[test]
    fn a_host_that_goes_on_failing_is_not_gone_back_to_for_ever() {
        let (mut homeward, mut now) = (Homeward::default(), Instant::now());
        for _ in 0..MOST_RETURNS {
            homeward.synced();
            let (next, after) = run(&mut homeward, now, 100);
            assert_eq!(next, Next::Go);
            now += SECOND * after;
            homeward.returned(now);
        }
        homeward.synced();
        assert_eq!(run(&mut homeward, now, 100).0, Next::Enough);
        assert_eq!(run(&mut homeward, now, 100).0, Next::Wait, "said once");
        homeward.synced();
        let next = run(&mut homeward, now + RETURNS_WITHIN, 100).0;
        assert_eq!(next, Next::Go, "it is forgotten");
    }
}
