//! What operators, axd and the guest itself ask for.

use std::net::SocketAddr;
use std::time::Instant;

use ax_api::process::{Press, Reply, Request, Role, What};
use ax_wire::MachineId;
use statepoint::pair::{Event, Phase};

use super::{Conductor, Ended, Life};
use crate::control::Order;
use crate::error::Error;

impl Conductor {
    pub(super) fn obey(&mut self, order: Order) -> Result<(), Error> {
        let Order { request, reply } = order;
        let done = |result: Result<(), String>| match result {
            Ok(()) => Reply::Done,
            Err(why) => Reply::Refused { why },
        };
        let primary = self.board.status().role == Role::Primary;
        let answer = match request {
            Request::Protect {
                addresses,
                incarnation,
            } => match self.protect(addresses, incarnation, reply.clone()) {
                Ok(()) => return Ok(()),
                Err(why) => Reply::Refused { why },
            },
            Request::Pause | Request::Resume if !primary => Reply::Refused {
                why: "a shadow has no running guest".into(),
            },
            Request::Pause | Request::Resume | Request::Reboot if self.leaving => Reply::Refused {
                why: "the VM is being stopped or moved; try again in a moment".into(),
            },
            Request::Pause => done(self.parts.machine.park(true).map_err(|e| e.to_string())),
            Request::Resume => done(self.parts.machine.park(false).map_err(|e| e.to_string())),
            Request::Reboot if primary => {
                self.reboot()?;
                Reply::Done
            }
            Request::PowerButton if primary => Reply::Button {
                press: self.press_power_button(),
            },
            Request::Stop if primary => {
                self.waiting.push(reply);
                let before = self.phase().cloned();
                self.stop()?;
                if self.ended.is_none() && before.is_some() && self.phase() == before.as_ref() {
                    let why = "the VM is between two states; try again, or use --force".into();
                    self.answer(&Reply::Refused { why });
                }
                return Ok(());
            }
            Request::Failover => match self.fail_over(reply.clone()) {
                Ok(()) => return Ok(()),
                Err(why) => Reply::Refused { why },
            },
            Request::SetMode { mode } if primary => match self.set_mode(mode, reply.clone()) {
                Ok(()) => return Ok(()),
                Err(why) => Reply::Refused { why },
            },
            Request::GiveUp => match self.phase() {
                Some(Phase::Copying) => {
                    let why = "the start it was for has failed".into();
                    self.events.tell(What::Ended { why, clean: false });
                    self.ended = Some(Ended::Fenced);
                    Reply::Done
                }
                _ => Reply::Refused {
                    why: "this process is in sync, or runs the guest".into(),
                },
            },
            Request::Quit => {
                self.ended = Some(Ended::InOrder);
                self.events.tell(What::Ended {
                    why: "ended by force".into(),
                    clean: false,
                });
                Reply::Done
            }
            Request::PeerIsDead => done(self.peer_is_dead()),
            Request::Arbiter { arbiter, standby } => {
                if let Some(asker) = &self.asker {
                    asker.aim(*arbiter, standby.map(|standby| *standby));
                }
                Reply::Done
            }
            Request::Peer {
                name,
                addresses,
                machine,
            } => done(self.peer_is(name, addresses, machine)),
            Request::Word { letter } => self.written_to(&letter),
            Request::PeerGone { incarnation } => {
                let primary = self.shadowing.as_ref().map(|s| s.primary.incarnation);
                if primary == Some(incarnation) && self.permission_over.is_some() {
                    self.permission_over = Some(Instant::now());
                }
                Reply::Done
            }
            _ => Reply::Refused {
                why: "this process is the shadow; ask the primary".into(),
            },
        };
        let _ = reply.send(answer);
        self.show();
        Ok(())
    }

    /// The other host is this one from now on.
    fn peer_is(
        &mut self,
        name: String,
        addresses: Vec<SocketAddr>,
        machine: Option<MachineId>,
    ) -> Result<(), String> {
        if self.spec.peer.is_none() {
            return Err("this VM was started without another host".into());
        }
        let mut spec = self.spec.clone();
        (spec.peer, spec.peer_axd) = (Some(name.clone()), addresses);
        let axd = self.parts.peer_axd(&spec).map_err(|e| e.to_string())?;
        if let Some(desk) = &self.desk {
            desk.peer_is(&name, axd, machine)?;
        }
        self.spec = spec;
        Ok(())
    }

    /// An input of the running side alone: what presses goes on asking where the guest goes on.
    fn press_power_button(&self) -> Press {
        if self.leaving || self.parts.machine.is_parked() {
            return Press::StandsStill;
        }
        // Between two epochs: the press belongs to the one that follows.
        let press = |machine: &mut vmm::Machine| machine.press_power_button();
        match self.parts.machine.between_epochs(press) {
            vmm::Press::Pressed => Press::Pressed,
            vmm::Press::NobodyListens => Press::NobodyListens,
            vmm::Press::StandsStill => Press::StandsStill,
        }
    }

    pub(super) fn power(&mut self, what: io_barrier::Power) -> Result<(), Error> {
        let why = match what {
            // After a promotion it may be said twice: the reset is done by then.
            io_barrier::Power::Reset if self.parts.machine.lock().power().is_none() => {
                return Ok(());
            }
            io_barrier::Power::Reset => {
                self.events.note("the guest resets");
                return self.reboot();
            }
            io_barrier::Power::Off => "the guest switched itself off",
            io_barrier::Power::Crash => "the guest crashed",
        };
        self.why_stopping = Some(why.into());
        self.stop()
    }

    fn reboot(&mut self) -> Result<(), Error> {
        let parked = self.parts.machine.is_parked();
        self.parts.machine.between_epochs(|machine| {
            machine.reset()?;
            if parked { Ok(()) } else { machine.resume() }
        })?;
        self.parts.bell.with(|engine| engine.trigger());
        Ok(())
    }

    /// Ends the VM in order (rule 26).
    pub(super) fn stop(&mut self) -> Result<(), Error> {
        let unpaired = matches!(self.life, Life::Local);
        if unpaired || matches!(self.phase(), Some(Phase::Joining { .. })) {
            self.parts.machine.park(true)?;
            let why = self
                .why_stopping
                .take()
                .unwrap_or_else(|| "stopped in order".into());
            let (why, clean) = match self.flush_disks() {
                Ok(()) => (why, true),
                Err(disk) => (self.not_durable_here(&why, &disk), false),
            };
            self.events.tell(What::Ended { why, clean });
            self.ended = Some(Ended::InOrder);
            return Ok(());
        }
        self.step(Event::Stop)
    }
}
