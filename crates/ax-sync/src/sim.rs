//! The seeded scheduler.
//!
//! Threads of a [`World`] are threads of this process of which one at a time has the *turn*. It keeps it until it
//! waits, locks or asks for the time to pass; then the next is drawn among those that can go on. Time
//! moves a little with every turn and jumps to the next deadline when nobody can go on.
//!
//! Threads belong to *groups*: a simulated process each. A group that is killed never has the turn again,
//! which is what SIGKILL does to a process: nothing is unwound, no destructor runs. Its threads stay where
//! they were until this process ends, so few worlds are run in one process.
//!
//! Nothing that is shared between groups may be locked with a [`crate::Mutex`] while its holder can lose the
//! turn: a killed holder would keep it for ever, as no shared memory does between two hosts.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A simulated process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(pub u32);

/// A small fast generator: repeatable randomness.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.word() % n.max(1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

enum State {
    Ready { timed_out: bool },
    Waits { key: usize, until: Option<u64> },
}

struct Thread {
    id: usize,
    name: String,
    group: Group,
    state: State,
    turn: Arc<Condvar>,
}

struct Inner {
    now: u64,
    rng: Rng,
    /// Of those not done, in the order of their births.
    threads: Vec<Thread>,
    born: usize,
    running: usize,
    dead: Vec<Group>,
    /// Groups that stand still until then.
    frozen: Vec<(Group, u64)>,
    /// A hash of every turn so far.
    trace: u64,
    turns: u64,
}

/// A world of threads under one seed.
pub struct World {
    inner: Mutex<Inner>,
    /// Told of what must never happen; does not return.
    failed: Box<dyn Fn(&str) + Send + Sync>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "World")
    }
}

thread_local! {
    static SIMULATED: Cell<bool> = const { Cell::new(false) };
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

/// The calling thread's place in its world.
#[derive(Clone, Debug)]
pub struct Here {
    world: Arc<World>,
    id: usize,
    group: Group,
}

/// Where the calling thread is, if in a world at all.
#[inline]
pub fn current() -> Option<Here> {
    if !SIMULATED.get() {
        return None;
    }
    HERE.with_borrow(Clone::clone)
}

/// How much time one turn takes at most, nanoseconds.
const TURN: u64 = 4_000;

/// Of so many locks taken one loses the turn first.
const YIELDS: u64 = 12;

impl World {
    /// Runs `main` as the first thread of a new world, on this thread. `failed` is told when no thread can ever
    /// go on or one panics, and must not return.
    pub fn run<T>(
        seed: u64,
        failed: impl Fn(&str) + Send + Sync + 'static,
        main: impl FnOnce() -> T,
    ) -> T {
        let world = Arc::new(World {
            inner: Mutex::new(Inner {
                now: 1_000_000_000,
                rng: Rng(seed),
                threads: Vec::new(),
                born: 0,
                running: 0,
                dead: Vec::new(),
                frozen: Vec::new(),
                trace: seed,
                turns: 0,
            }),
            failed: Box::new(failed),
        });
        let (id, _) = world.add("main", Group(0));
        let here = Here {
            world,
            id,
            group: Group(0),
        };
        SIMULATED.set(true);
        HERE.set(Some(here));
        let done = main();
        SIMULATED.set(false);
        HERE.set(None);
        done
    }

    fn add(&self, name: &str, group: Group) -> (usize, Arc<Condvar>) {
        let mut inner = self.inner.lock();
        let (id, turn) = (inner.born, Arc::new(Condvar::new()));
        inner.born += 1;
        inner.threads.push(Thread {
            id,
            name: name.into(),
            group,
            state: State::Ready { timed_out: false },
            turn: Arc::clone(&turn),
        });
        (id, turn)
    }
}

impl Inner {
    fn thread(&mut self, id: usize) -> Option<&mut Thread> {
        self.threads.iter_mut().find(|t| t.id == id)
    }

    fn stands_still(&self, group: Group) -> bool {
        let now = self.now;
        self.dead.contains(&group) || self.frozen.iter().any(|f| f.0 == group && f.1 > now)
    }

    /// Draws who has the turn next; none when nobody ever can.
    fn draw(&mut self) -> Option<usize> {
        self.turns += 1;
        self.now += self.rng.below(TURN);
        loop {
            let now = self.now;
            self.frozen.retain(|f| f.1 > now);
            for thread in &mut self.threads {
                if let State::Waits {
                    until: Some(until), ..
                } = thread.state
                    && until <= now
                {
                    thread.state = State::Ready { timed_out: true };
                }
            }
            let can =
                |t: &&Thread| matches!(t.state, State::Ready { .. }) && !self.stands_still(t.group);
            let mut rng = self.rng.clone();
            let ready = self.threads.iter().filter(can).count() as u64;
            if ready > 0 {
                let nth = rng.below(ready) as usize;
                let id = self.threads.iter().filter(can).nth(nth).map(|t| t.id)?;
                self.rng = rng;
                self.trace = (self.trace ^ id as u64)
                    .wrapping_mul(0x100_0000_01b3)
                    .rotate_left(17)
                    ^ self.now;
                return Some(id);
            }
            let deadline = |t: &Thread| match t.state {
                State::Waits { until, .. } if !self.dead.contains(&t.group) => until,
                _ => None,
            };
            let deadlines = self.threads.iter().filter_map(deadline);
            let thaws = self.frozen.iter().map(|f| f.1);
            self.now = deadlines.chain(thaws).filter(|at| *at > now).min()?;
        }
    }
}

impl Here {
    /// Gives the turn away and returns when it comes back: whether the wait was over by time.
    fn turn(&self, mut inner: parking_lot::MutexGuard<'_, Inner>) -> bool {
        let Some(next) = inner.draw() else {
            let waiting: Vec<&str> = inner.threads.iter().map(|t| t.name.as_str()).collect();
            let what = format!("nobody can go on: {waiting:?}");
            drop(inner);
            return self.fail(&what);
        };
        inner.running = next;
        if next != self.id {
            let Some(mine) = inner.thread(self.id).map(|t| Arc::clone(&t.turn)) else {
                return false;
            };
            if let Some(thread) = inner.thread(next) {
                thread.turn.notify_one();
            }
            while inner.running != self.id {
                mine.wait(&mut inner);
            }
        }
        match inner.thread(self.id).map(|t| &t.state) {
            Some(State::Ready { timed_out }) => *timed_out,
            _ => false,
        }
    }

    fn fail(&self, what: &str) -> bool {
        (self.world.failed)(what);
        // It must not return; should it, nothing can be believed any more.
        std::process::abort()
    }

    /// Now, nanoseconds since some moment before the world began.
    pub fn now(&self) -> u64 {
        self.world.inner.lock().now
    }

    /// The calling thread's group.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Randomness of the world's seed.
    pub fn below(&self, n: u64) -> u64 {
        self.world.inner.lock().rng.below(n)
    }

    /// A hash of every turn so far, and how many there were.
    pub fn trace(&self) -> (u64, u64) {
        let inner = self.world.inner.lock();
        (inner.trace, inner.turns)
    }

    /// Lets others go first, or not.
    pub fn may_yield(&self) {
        let mut inner = self.world.inner.lock();
        if inner.rng.below(YIELDS) == 0 {
            self.ready(&mut inner);
            self.turn(inner);
        }
    }

    fn ready(&self, inner: &mut Inner) {
        if let Some(me) = inner.thread(self.id) {
            me.state = State::Ready { timed_out: false };
        }
    }

    /// Waits until `key` is woken, or for `timeout` at most: true when that was over.
    pub fn block(&self, key: usize, timeout: Option<Duration>) -> bool {
        let mut inner = self.world.inner.lock();
        let until = timeout.map(|t| inner.now.saturating_add(t.as_nanos() as u64));
        if let Some(me) = inner.thread(self.id) {
            me.state = State::Waits { key, until };
        }
        self.turn(inner)
    }

    /// Waits for so long.
    pub fn sleep(&self, time: Duration) {
        self.block(usize::MAX, Some(time));
    }

    /// All that wait for `key` can go on.
    pub fn wake(&self, key: usize) {
        let mut inner = self.world.inner.lock();
        for thread in &mut inner.threads {
            if matches!(thread.state, State::Waits { key: k, .. } if k == key) {
                thread.state = State::Ready { timed_out: false };
            }
        }
    }

    /// One of those that wait for `key` can go on.
    pub fn wake_one(&self, key: usize) {
        let mut inner = self.world.inner.lock();
        let waits = |t: &&mut Thread| matches!(t.state, State::Waits { key: k, .. } if k == key);
        if let Some(thread) = inner.threads.iter_mut().find(waits) {
            thread.state = State::Ready { timed_out: false };
        }
    }

    /// A thread that is to begin, in the calling one's group.
    pub fn enter(&self, name: &str) -> Spawned {
        self.enter_group(name, self.group)
    }

    /// A thread that is to begin in `group`.
    fn enter_group(&self, name: &str, group: Group) -> Spawned {
        let (id, turn) = self.world.add(name, group);
        Spawned {
            here: Here {
                world: Arc::clone(&self.world),
                id,
                group,
            },
            turn,
        }
    }

    /// Starts a thread in `group`, which nobody waits for.
    ///
    /// # Errors
    /// The host has no room for another thread.
    pub fn spawn_in(
        &self,
        group: Group,
        name: &str,
        run: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<()> {
        let thread = self.enter_group(name, group);
        let builder = std::thread::Builder::new().name(name.into());
        builder.spawn(move || thread.run(run)).map(drop)
    }

    /// The threads of `group` never run again. If the calling one is among them this does not return.
    pub fn kill(&self, group: Group) {
        let mut inner = self.world.inner.lock();
        if !inner.dead.contains(&group) {
            inner.dead.push(group);
        }
        let mine = group == self.group;
        // The calling thread is still to give its turn away.
        let me = self.id;
        inner.threads.retain(|t| t.group != group || t.id == me);
        if mine {
            self.turn(inner);
        }
    }

    /// True when `group` was killed and not brought back.
    pub fn is_dead(&self, group: Group) -> bool {
        self.world.inner.lock().dead.contains(&group)
    }

    /// New threads of a killed group may run.
    pub fn revive(&self, group: Group) {
        self.world.inner.lock().dead.retain(|g| *g != group);
    }

    /// The threads of `group` stand still for so long.
    pub fn freeze(&self, group: Group, time: Duration) {
        let mut inner = self.world.inner.lock();
        let until = inner.now + time.as_nanos() as u64;
        inner.frozen.push((group, until));
    }
}

/// A thread of a world.
#[derive(Clone, Debug)]
pub struct Spawned {
    here: Here,
    turn: Arc<Condvar>,
}

impl Spawned {
    /// The thread's life: waits for its first turn, runs, gives the turn away for good.
    pub(crate) fn run<T>(self, run: impl FnOnce() -> T) -> T {
        let here = self.here.clone();
        let mut inner = here.world.inner.lock();
        while inner.running != here.id {
            self.turn.wait(&mut inner);
        }
        drop(inner);
        SIMULATED.set(true);
        HERE.set(Some(here.clone()));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        SIMULATED.set(false);
        HERE.set(None);
        match result {
            Ok(done) => {
                self.end();
                done
            }
            Err(panic) => {
                let said = panic.downcast_ref::<&str>().map(ToString::to_string);
                let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
                here.fail(&format!("a thread panicked: {}", said.unwrap_or_default()));
                std::panic::resume_unwind(panic)
            }
        }
    }

    /// What threads that wait for its end wait for: no address is that small.
    fn key(&self) -> usize {
        self.here.id * 2 + 1
    }

    fn end(&self) {
        self.here.wake(self.key());
        let mut inner = self.here.world.inner.lock();
        let me = self.here.id;
        inner.threads.retain(|t| t.id != me);
        match inner.draw() {
            Some(next) => {
                inner.running = next;
                if let Some(thread) = inner.thread(next) {
                    thread.turn.notify_one();
                }
            }
            None => {
                drop(inner);
                self.here.fail("nobody can go on after a thread's end");
            }
        }
    }

    /// True when it has ended, or will never run again.
    pub(crate) fn is_done(&self) -> bool {
        let mut inner = self.here.world.inner.lock();
        inner.thread(self.here.id).is_none()
    }

    /// Waits for its end.
    pub(crate) fn join(&self) {
        while let Some(world) = current()
            && !self.is_done()
        {
            world.block(self.key(), None);
        }
    }
}
