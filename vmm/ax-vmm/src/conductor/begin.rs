//! From the start of the process to the first question.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ax_api::process::{Arbiter, Start};
use ax_api::vm::{Mode, Secondary};
use ax_link::{Acceptor, Channel};
use ax_wire::hello::Role as HelloRole;
use ax_wire::record::{Copies, Flush, Record};
use ax_wire::{Generation, Session};
use io_barrier::SoloGrant;
use statepoint::pair::Pair;

use super::{Conductor, Input, Life};
use crate::asker::manual::{self, AtDesk, Desk, Owner};
use crate::asker::third::AtThird;
use crate::asker::{Asker, Course, Keeper, Tell};
use crate::control::{self, Boards};
use crate::error::Error;
use crate::guest::Part;
use crate::hello::hello;
use crate::session::{Gathering, Took};

/// The mark in a VM's state that an arbiter knows it: that it was one side of a pair here, or was to be.
const PAIRED: &str = "paired";

impl Conductor {
    /// Marks, durably, that an arbiter knows this VM. A shadow goes no further without the mark: its copy
    /// could be started in mode none without anyone being asked, long after it had become stale.
    pub(super) fn remember_pair(&self) -> Result<(), Error> {
        let mark = self.spec.state_dir.join(PAIRED);
        let marked = std::fs::File::create(&mark).and_then(|file| {
            file.sync_all()?;
            std::fs::File::open(&self.spec.state_dir)?.sync_all()
        });
        match marked {
            Err(e) if self.spec.start == Start::Shadow => {
                Err(Error::Arbiter(format!("write {}: {e}", mark.display())))
            }
            Err(error) => {
                tracing::error!(%error, path = %mark.display(), "the mark of a pair");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// A machine without a part in a VM that has run since it was defined boots nothing, whatever the record says
    /// of its side: its images are new, or another machine's (I4).
    pub(super) fn require_part(&self, record: &Record) -> Result<(), Error> {
        match self.was_paired || record.generation == Generation(0) || self.spec.accept_loss {
            true => Ok(()),
            false => Err(Error::Arbiter(format!(
                "host {} has no part in this VM, or has lost it, and the VM has run since it was defined \
                 ({record}): its disks here are not current; start it on the other host",
                self.spec.host
            ))),
        }
    }

    pub(super) fn begin(&mut self) -> Result<(), Error> {
        self.serve_control()?;
        if self.spec.start == Start::Boot {
            // Whatever can be missing is found before anyone is asked.
            self.parts
                .images
                .iter()
                .try_for_each(|image| image.require_consistent())?;
            self.parts.taps.open()?;
            self.parts.machine.lock().boot()?;
        } else {
            // A shadow that can't open its taps could never take over.
            self.parts.taps.try_out()?;
            if self.part() == Part::Disks {
                // Nor could one that is to boot the guest and lacks what it boots from.
                self.parts.machine.lock().boot()?;
            }
        }
        // One that was ever a side of a pair may have a newer copy there, whatever its mode is now (I4).
        let known = self.spec.state_dir.join(PAIRED).exists();
        self.was_paired = known;
        let paired = self.spec.peer.is_some() && (known || self.spec.vm.mode != Mode::None);
        let keeper = match paired {
            true => Some(self.keeper()?),
            false => None,
        };
        if self.spec.peer.is_some() {
            self.listen()?;
        }
        match (keeper, self.spec.start) {
            (Some(keeper), start) => {
                let asker = Asker::start(keeper, self.tell())?;
                asker.learn();
                self.asker = Some(asker);
                if start == Start::Shadow {
                    self.life = Life::Paired(Pair::shadow(self.me, self.flush()));
                    self.show();
                }
                Ok(())
            }
            (_, Start::Shadow) => Err(Error::Arbiter("a VM of mode none has no shadow".into())),
            (_, Start::Boot) => {
                self.life = Life::Local;
                self.start_guest(None)?;
                self.parts.barrier.pass(SoloGrant::never_paired());
                self.show();
                Ok(())
            }
        }
    }

    pub(super) fn flush(&self) -> Flush {
        let sync = |d: &ax_api::vm::Disk| d.secondary == Secondary::Sync;
        let mirrored = self.part() == Part::Disks;
        if mirrored || (!self.spec.vm.disks.is_empty() && self.spec.vm.disks.iter().all(sync)) {
            Flush::Both
        } else {
            Flush::Local
        }
    }

    pub(super) fn tell(&self) -> Tell {
        let heard = self.sender.clone();
        Arc::new(move |what| {
            let _ = heard.send(Input::Heard(what));
        })
    }

    /// Who keeps the record of this pair. Nobody is asked anything yet.
    pub(super) fn keeper(&mut self) -> Result<Box<dyn Keeper>, Error> {
        // A pair that was never started has its images where it is started first.
        let current = Copies::Only(match self.spec.start {
            Start::Boot => self.me.side,
            Start::Shadow => self.me.side.other(),
        });
        let (pair, me, state_dir) = (self.spec.vm.pair, self.me, &self.spec.state_dir);
        let failed = |e: std::io::Error| Error::Arbiter(format!("{}: {e}", state_dir.display()));
        if self.spec.arbiter != Arbiter::Manual {
            let (arbiter, standby) = (self.spec.arbiter.clone(), self.spec.standby.clone());
            let course = Course::open(state_dir, arbiter, standby).map_err(failed)?;
            let connect = self.parts.third_parties();
            let keeper = AtThird::new(connect, course, pair, me, current)?;
            let keeper = keeper.on(self.spec.machine, self.spec.accept_loss);
            return Ok(Box::new(keeper));
        }
        Course::forget(state_dir).map_err(failed)?;
        let owner = Owner {
            name: &self.spec.vm.name,
            pair,
            me,
            machine: self.spec.machine,
            accept_loss: self.spec.accept_loss,
            peer: self.spec.peer.as_deref().unwrap_or_default(),
            current,
            fresh: self.spec.start == Start::Shadow,
        };
        let axd = self.parts.peer_axd(&self.spec)?;
        let desk = Desk::open(&owner, state_dir, axd, self.tell())?;
        self.desk = Some(Arc::clone(&desk));
        Ok(Box::new(AtDesk(desk)))
    }

    fn serve_control(&self) -> Result<(), Error> {
        let (board, orders, typed) = (
            Arc::clone(&self.board),
            self.sender.clone(),
            self.parts.handle.clone(),
        );
        let of_epochs = Arc::clone(&self.board);
        let boards = Boards {
            status: Box::new(move || board.status()),
            epochs: Box::new(move |request| of_epochs.epochs(request)),
            events: Arc::clone(&self.events),
            console: Arc::clone(&self.parts.console),
            type_in: Box::new(move |bytes| {
                let mut rest = bytes;
                for _ in 0..200 {
                    let taken = typed.console_in(rest);
                    rest = rest.get(taken..).unwrap_or_default();
                    if rest.is_empty() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }),
            order: Box::new(move |order| {
                let _ = orders.send(Input::Order(order));
            }),
        };
        control::serve(&self.spec.control, Arc::new(boards))
    }

    /// Takes the connections of a primary, in a thread of its own.
    fn listen(&self) -> Result<(), Error> {
        let at: Vec<SocketAddr> = self
            .spec
            .link
            .iter()
            .map(|ip| SocketAddr::new(*ip, 0))
            .collect();
        let acceptor = Acceptor::bind(&at, self.parts.security.clone())
            .map_err(|e| Error::Link(e.to_string()))?;
        self.board.listens(acceptor.local_addrs().to_vec());
        let (spec, me, tell) = (self.spec.clone(), self.me, self.sender.clone());
        let caps = self.parts.machine.lock().caps().clone();
        let door = self.door.clone();
        let desk = self.desk.clone();
        let gather = move || {
            let mut gathering = Gathering::new(door);
            while let Some(incoming) = acceptor.accept() {
                if incoming.preamble().channel() == Channel::Witness {
                    manual::receive(desk.as_ref(), incoming);
                    continue;
                }
                let mine = |theirs: Session| {
                    let session = Session {
                        pair: spec.vm.pair,
                        generation: theirs.generation,
                        incarnation: me.incarnation,
                    };
                    hello(&spec, &caps, session, HelloRole::Shadow)
                };
                let told = match gathering.take(incoming, mine) {
                    Took::Nothing => Ok(()),
                    Took::Heartbeat(incoming) => tell.send(Input::Heartbeat(Box::new(incoming))),
                    Took::Whole(gathered) => tell.send(Input::Gathered(gathered)),
                    Took::Talk(session, peer) => tell.send(Input::Talk(session, peer)),
                };
                if told.is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("gather".into())
            .spawn(gather)
            .map_err(Error::Thread)?;
        Ok(())
    }
}
