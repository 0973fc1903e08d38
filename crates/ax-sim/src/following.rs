//! A shadow that follows a primary: the real engine and the real replica of the disk.

use std::collections::VecDeque;
use std::sync::Arc;

use ax_disk::Replica;
use ax_sync::thread::JoinHandle;
use ax_sync::{Condvar, Mutex};
use ax_wire::resync::Ask;
use ax_wire::{EpochId, Generation, Session};
use statepoint::guest::GuestError;
use statepoint::link::ShadowLink;
use statepoint::shadow::{
    CommittedState, Inheritance, ShadowConfig, ShadowEngine, ShadowEvents, ShadowHandle, ShadowSink,
};

use crate::net::Mailbox;
use crate::process::{Input, Parts};
use crate::universe::Running;

/// What its threads tell the process's main thread.
#[derive(Debug)]
pub enum Following {
    /// The first epoch was acknowledged under this generation, or the primary was granted it.
    Known(Generation),
    /// This copy can't be promoted any more.
    Spoiled(String),
}

struct Events {
    inbox: Mailbox<Input>,
    stint: u64,
}

impl ShadowEvents for Events {
    fn confirmed(&self, _: EpochId, generation: Generation) {
        self.granted(generation);
    }

    fn granted(&self, generation: Generation) {
        let known = Following::Known(generation);
        self.inbox.tell(Input::Following(self.stint, known));
    }
}

struct Disks(Arc<Replica>);

fn trouble(source: impl std::fmt::Display) -> GuestError {
    GuestError {
        doing: "change the disk",
        source: source.to_string().into(),
    }
}

impl ShadowSink for Disks {
    fn begin_sync(&mut self) -> Result<(), GuestError> {
        self.0.begin_sync().map_err(trouble)
    }

    fn asked(&mut self, ask: &Ask, answer: &mut Vec<u8>) -> Result<bool, GuestError> {
        self.0.answer(ask, answer).map_err(trouble)
    }

    fn bulk(&mut self, records: &[u8]) -> Result<(), GuestError> {
        self.0.bulk(records).map_err(trouble)
    }

    fn nearly_in_sync(&mut self) -> Result<(), GuestError> {
        self.0.settle().map_err(trouble)
    }

    fn committed(&mut self, epoch: EpochId, records: &mut Vec<u8>) -> Result<(), GuestError> {
        self.0.committed(epoch, records).map_err(trouble)
    }

    fn in_sync(&mut self, _: EpochId, generation: Generation) -> Result<(), GuestError> {
        self.0.mark_in_sync(generation).map_err(trouble)
    }

    fn applied(&self) -> EpochId {
        self.0.progress().0
    }

    fn durable(&self) -> EpochId {
        self.0.progress().1
    }
}

#[derive(Default)]
struct Links {
    /// None once no more are taken.
    come: Mutex<Option<VecDeque<ShadowLink>>>,
    news: Condvar,
}

/// A shadow in its work.
pub struct Shadowing {
    /// Whom it follows.
    pub primary: Running,
    /// The engine.
    pub engine: ShadowHandle,
    /// The disk.
    pub replica: Arc<Replica>,
    links: Arc<Links>,
    thread: Option<JoinHandle<()>>,
}

impl Shadowing {
    /// Begins to follow.
    pub fn begin(
        parts: &Parts,
        session: Session,
        primary: Running,
        from: Option<Inheritance>,
        stint: u64,
    ) -> Option<Shadowing> {
        let replica = Arc::new(Replica::new(vec![Arc::clone(&parts.image)], 2).ok()?);
        let me = parts.mine.me.incarnation;
        let mut config = ShadowConfig::new(session, me, std::env::temp_dir());
        config.stage_bytes = 64 << 10;
        config.state_bytes = 4096;
        config.disk_bytes = 8 << 20;
        config.output_bytes = 1 << 20;
        config.received_bytes = 4096;
        let inbox = parts.mine.inbox.clone();
        let (mut engine, handle) = ShadowEngine::new(
            config,
            parts.machine.clone(),
            Disks(Arc::clone(&replica)),
            from,
            Arc::new(Events {
                inbox: inbox.clone(),
                stint,
            }),
            parts.clock.clone(),
        );
        let durable = handle.clone();
        replica.on_durable(move |epoch| durable.tell_durable(epoch));
        let links = Arc::new(Links {
            come: Mutex::new(Some(VecDeque::new())),
            news: Condvar::new(),
        });
        let (come, ended) = (Arc::clone(&links), handle.clone());
        let run = move || {
            loop {
                let mut links = come.come.lock();
                let next = loop {
                    match &mut *links {
                        None => return,
                        Some(queue) => match queue.pop_front() {
                            Some(link) => break link,
                            None => come.news.wait(&mut links),
                        },
                    }
                };
                drop(links);
                let error = engine.run(next);
                if ended.is_spoiled() {
                    let spoiled = Following::Spoiled(error.to_string());
                    inbox.tell(Input::Following(stint, spoiled));
                    return;
                }
            }
        };
        Some(Shadowing {
            primary,
            engine: handle,
            replica,
            links,
            thread: Some(ax_sync::thread::spawn("epochs", run).ok()?),
        })
    }

    /// Takes the connections of a session, the first or those made anew.
    pub fn join(&self, link: ShadowLink) {
        self.engine.disconnect();
        if let Some(queue) = &mut *self.links.come.lock() {
            queue.push_back(link);
        }
        self.links.news.notify_all();
    }

    /// Ends the stream, waits until everything acknowledged is applied.
    pub fn finish(&mut self) -> Option<CommittedState> {
        let late = self.links.come.lock().take();
        for link in late.into_iter().flatten() {
            (link.close)();
        }
        self.links.news.notify_all();
        self.engine.disconnect();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.engine.committed()
    }
}
