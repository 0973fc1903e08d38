//! How vCPU threads are parked and let go.
//!
//! A vCPU thread is *parked* when it waits here; then its pending exit is complete and nobody
//! holds its lock. Its owner parks all with [`Gate::park`]: it says so under the lock, sets each
//! running vCPU's `immediate_exit`, signals it and waits on a condition variable (a futex), never
//! polling. The kick can't be lost: a signal before KVM_RUN leaves `immediate_exit` set, so KVM_RUN
//! completes the pending exit and returns EINTR. Only [`Gate::go`] clears it, when all are parked.
//!
//! Whoever parks the vCPUs to do something with the guest meanwhile does it best on the thread of the
//! vCPU that parks last ([`Gate::park_and`]): nobody has to be woken first, and what the guest wrote
//! last is in that core's caches.
//!
//! A *halted* guest (powered off, crashed, waiting for its reset) counts as parked until
//! [`Gate::set_halted`] says otherwise.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicU64, Ordering, fence};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};

type Borrowed<'a> = *mut (dyn FnMut() + Send + 'a);
type Free = *mut (dyn FnMut() + Send + 'static);

/// What vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Park,
    Exit,
}

/// What is to be done once all are parked.
#[derive(Debug)]
enum Errand {
    None,
    Waiting(Act),
    Running,
    /// False when it panicked.
    Done(bool),
}

/// A closure that [`Gate::park_and`] keeps alive until it was called or can't be called any more.
#[derive(Debug)]
struct Act(NonNull<dyn FnMut() + Send>);

// SAFETY: the closure itself is Send, and the pointer is used by one thread, once.
unsafe impl Send for Act {}

#[derive(Debug)]
struct State {
    order: Order,
    halted: bool,
    parked: usize,
    gone: bool,
    errand: Errand,
}

/// What is needed to kick one vCPU out of KVM_RUN.
#[derive(Debug)]
pub(crate) struct Kick {
    thread: AtomicI32,
    parked: std::sync::atomic::AtomicBool,
    /// `kvm_run.immediate_exit`; valid while the vCPU exists, null when it does not.
    immediate_exit: AtomicPtr<AtomicU8>,
}

impl Kick {
    /// # Safety
    /// `immediate_exit` must stay valid until the [`Gate`] holding this is told [`Gate::forget`].
    pub(crate) unsafe fn new(immediate_exit: *mut u8) -> Self {
        Kick {
            thread: AtomicI32::new(0),
            parked: false.into(),
            immediate_exit: AtomicPtr::new(immediate_exit.cast()),
        }
    }

    fn set_immediate_exit(&self, value: u8) {
        let flag = self.immediate_exit.load(Ordering::Acquire);
        // SAFETY: non-null means valid by the contract of `new`; the kernel only reads the byte.
        if let Some(flag) = unsafe { flag.as_ref() } {
            flag.store(value, Ordering::SeqCst);
        }
    }

    fn kick(&self) {
        self.set_immediate_exit(1);
        fence(Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: signals a thread of this process; a thread clears its number before it ends.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }
}

/// The signal that makes KVM_RUN return. It has an empty handler in every process with a machine.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Parks and releases the vCPU threads of one machine.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    go: Condvar,
    all_parked: Condvar,
    vcpus: Box<[Kick]>,
    /// Counts harvests that freed dirty-ring entries, and releases.
    freed: AtomicU64,
    /// When a released vCPU last went on, nanoseconds of CLOCK_BOOTTIME.
    entered: AtomicU64,
}

/// Now, nanoseconds of CLOCK_BOOTTIME.
pub(crate) fn boottime_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |t| {
        t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
    })
}

impl Gate {
    /// A gate that is shut.
    pub(crate) fn new(vcpus: Vec<Kick>) -> Self {
        Gate {
            state: Mutex::new(State {
                order: Order::Park,
                halted: false,
                parked: 0,
                gone: false,
                errand: Errand::None,
            }),
            go: Condvar::new(),
            all_parked: Condvar::new(),
            vcpus: vcpus.into(),
            freed: AtomicU64::new(0),
            entered: AtomicU64::new(0),
        }
    }

    /// A vCPU thread introduces itself; the guard reports its end.
    pub(crate) fn enter(&self, vcpu: usize) -> Presence<'_> {
        if let Some(kick) = self.vcpus.get(vcpu) {
            // SAFETY: gettid has no arguments and can't fail.
            kick.thread
                .store(unsafe { libc::gettid() }, Ordering::Release);
        }
        Presence { gate: self, vcpu }
    }

    /// Parks the calling vCPU thread until it shall run (true) or end (false).
    pub(crate) fn wait(&self, vcpu: usize) -> bool {
        let mut state = self.state.lock();
        state.parked += 1;
        self.set_parked(vcpu, true);
        if state.parked == self.vcpus.len() {
            match std::mem::replace(&mut state.errand, Errand::None) {
                Errand::Waiting(act) => {
                    state.errand = Errand::Running;
                    drop(state);
                    self.perform(act);
                    state = self.state.lock();
                }
                other => {
                    state.errand = other;
                    self.all_parked.notify_all();
                }
            }
        }
        while state.order == Order::Park || (state.order == Order::Run && state.halted) {
            self.go.wait(&mut state);
        }
        state.parked -= 1;
        self.set_parked(vcpu, false);
        let run = state.order == Order::Run;
        drop(state);
        if run {
            self.entered.fetch_max(boottime_ns(), Ordering::Release);
        }
        run
    }

    /// Does the errand on the calling vCPU thread, which counts as parked meanwhile: whoever parks the
    /// vCPUs again before it has returned finds it so.
    fn perform(&self, mut act: Act) {
        struct Report<'a>(&'a Gate, bool);
        impl Drop for Report<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state.lock();
                state.errand = Errand::Done(self.1);
                // It unwinds: no vCPU runs here any more.
                state.gone |= !self.1;
                drop(state);
                self.0.all_parked.notify_all();
            }
        }
        let mut report = Report(self, false);
        // SAFETY: `park_and` does not return before the errand is done, and has lent the closure to it.
        (unsafe { act.0.as_mut() })();
        report.1 = true;
    }

    /// When the last of the vCPUs let go went on.
    pub(crate) fn entered_ns(&self) -> Option<u64> {
        Some(self.entered.load(Ordering::Acquire)).filter(|at| *at != 0)
    }

    fn set_parked(&self, vcpu: usize, parked: bool) {
        if let Some(kick) = self.vcpus.get(vcpu) {
            kick.parked.store(parked, Ordering::Relaxed);
        }
    }

    fn kick_running(&self) {
        self.vcpus
            .iter()
            .filter(|v| !v.parked.load(Ordering::Relaxed))
            .for_each(Kick::kick);
    }

    /// Whether a vCPU that KVM_RUN returned from with EINTR shall park (or was woken for nothing).
    pub(crate) fn shall_park(&self) -> bool {
        let state = self.state.lock();
        state.order != Order::Run || state.halted
    }

    /// Whether vCPUs park for [`Gate::park_and`].
    pub(crate) fn is_captured(&self) -> bool {
        !matches!(self.state.lock().errand, Errand::None)
    }

    /// Kicks every running vCPU and waits until all are parked.
    ///
    /// # Errors
    /// When a vCPU thread has ended.
    pub(crate) fn park(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.order = Order::Park;
        self.kick_running();
        self.go.notify_all(); // those waiting for a full ring to be emptied
        while state.parked < self.vcpus.len() && !state.gone {
            self.all_parked.wait(&mut state);
        }
        if state.gone {
            Err(Error::VcpuGone)
        } else {
            Ok(())
        }
    }

    /// Kicks every running vCPU and calls `act` when all are parked: once, on the thread of the last one
    /// to park, or here if all were parked. Returns when `act` has, which may have let the vCPUs go.
    ///
    /// # Errors
    /// When a vCPU thread has ended: `act` was not called, unless it was what panicked.
    pub(crate) fn park_and(&self, act: &mut (dyn FnMut() + Send)) -> Result<()> {
        let mut state = self.state.lock();
        state.order = Order::Park;
        if state.gone {
            return Err(Error::VcpuGone);
        }
        if state.parked == self.vcpus.len() {
            drop(state);
            act();
            return Ok(());
        }
        let act = std::ptr::from_mut(act);
        // SAFETY: only the lifetime is changed: the closure is not touched once this function has
        // returned, which it does with the errand done or taken back. Never null.
        let act = unsafe { NonNull::new_unchecked(std::mem::transmute::<Borrowed<'_>, Free>(act)) };
        state.errand = Errand::Waiting(Act(act));
        self.kick_running();
        self.go.notify_all(); // those waiting for a full ring to be emptied
        loop {
            match state.errand {
                Errand::Done(well) => {
                    state.errand = Errand::None;
                    return if well { Ok(()) } else { Err(Error::VcpuGone) };
                }
                Errand::Waiting(_) if state.gone => {
                    state.errand = Errand::None;
                    return Err(Error::VcpuGone);
                }
                _ => self.all_parked.wait(&mut state),
            }
        }
    }

    /// Lets parked vCPUs run. Call it only when all are parked.
    pub(crate) fn go(&self) {
        let mut state = self.state.lock();
        self.vcpus.iter().for_each(|v| v.set_immediate_exit(0));
        self.freed.fetch_add(1, Ordering::SeqCst);
        state.order = Order::Run;
        self.go.notify_all();
    }

    /// Stops the guest as a whole, from one of its vCPU threads: each parks once its pending exit is
    /// complete, and stays parked.
    pub(crate) fn halt(&self) {
        let mut state = self.state.lock();
        state.halted = true;
        self.kick_running();
        self.go.notify_all();
    }

    /// Halts (when restoring a halted guest) or undoes [`Gate::halt`]. Only while all are parked.
    pub(crate) fn set_halted(&self, halted: bool) {
        self.state.lock().halted = halted;
    }

    /// How often rings were emptied or vCPUs let go. Read it before KVM_RUN.
    pub(crate) fn freed(&self) -> u64 {
        self.freed.load(Ordering::SeqCst)
    }

    /// A harvest emptied the dirty rings of running vCPUs.
    pub(crate) fn rings_freed(&self) {
        let _state = self.state.lock();
        self.freed.fetch_add(1, Ordering::SeqCst);
        self.go.notify_all();
    }

    /// Waits, on a vCPU thread whose ring is full, until the rings are emptied (since `seen` was
    /// read) or the vCPU shall park.
    pub(crate) fn wait_freed(&self, seen: u64) {
        let mut state = self.state.lock();
        while state.order == Order::Run && !state.halted && self.freed() == seen {
            self.go.wait(&mut state);
        }
    }

    /// Tells every vCPU thread to end; they are joined by whoever spawned them.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.order = Order::Exit;
        self.kick_running();
        self.go.notify_all();
    }

    /// Forgets the vCPUs' `immediate_exit` flags: the vCPUs are about to be closed.
    pub(crate) fn forget(&self) {
        let none = std::ptr::null_mut();
        self.vcpus
            .iter()
            .for_each(|v| v.immediate_exit.store(none, Ordering::Release));
    }
}

/// A vCPU thread's life.
pub(crate) struct Presence<'a> {
    gate: &'a Gate,
    vcpu: usize,
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        if let Some(kick) = self.gate.vcpus.get(self.vcpu) {
            kick.thread.store(0, Ordering::Release);
        }
        let mut state = self.gate.state.lock();
        if state.order != Order::Exit {
            state.gone = true;
            self.gate.all_parked.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    /// Threads that live as vCPU threads do, without vCPUs. `running` counts those that run.
    fn vcpus(n: usize, running: &Arc<AtomicUsize>) -> (Arc<Gate>, Vec<thread::JoinHandle<()>>) {
        vmm_sys_util::signal::register_signal_handler(kick_signal(), ignore).unwrap();
        // SAFETY: null is no flag at all.
        let kicks = (0..n).map(|_| unsafe { Kick::new(std::ptr::null_mut()) });
        let gate = Arc::new(Gate::new(kicks.collect()));
        let life = |vcpu| {
            let (gate, running) = (Arc::clone(&gate), Arc::clone(running));
            move || {
                let _presence = gate.enter(vcpu);
                while gate.wait(vcpu) {
                    running.fetch_add(1, Ordering::SeqCst);
                    while !gate.shall_park() {
                        thread::yield_now();
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                }
            }
        };
        let threads = (0..n).map(|vcpu| thread::spawn(life(vcpu))).collect();
        gate.park().unwrap();
        (gate, threads)
    }

    fn end(gate: &Gate, threads: Vec<thread::JoinHandle<()>>) {
        gate.end();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn an_errand_is_done_once_with_all_parked_on_a_vcpus_thread_and_may_let_them_go() {
        for n in [1, 4] {
            let running = Arc::new(AtomicUsize::new(0));
            let (gate, threads) = vcpus(n, &running);
            let here = thread::current().id();
            let mut elsewhere = 0;
            for round in 0..2000 {
                gate.go();
                if round % 3 == 0 {
                    thread::yield_now();
                }
                let mut done = 0;
                gate.park_and(&mut || {
                    done += 1;
                    assert_eq!(running.load(Ordering::SeqCst), 0);
                    elsewhere += usize::from(thread::current().id() != here);
                    if round % 2 == 0 {
                        gate.go();
                    }
                })
                .unwrap();
                assert_eq!(done, 1);
                // Parked already, or parked again while the errand's thread is on its way back.
                gate.park().unwrap();
                assert_eq!(running.load(Ordering::SeqCst), 0);
            }
            assert!(
                elsewhere > 0,
                "the errand was never done on a vCPU's thread"
            );
            end(&gate, threads);
        }
    }

    #[test]
    fn with_all_parked_the_caller_does_the_errand() {
        let (gate, threads) = vcpus(2, &Arc::default());
        let here = thread::current().id();
        let mut there = None;
        gate.park_and(&mut || there = Some(thread::current().id()))
            .unwrap();
        assert_eq!(there, Some(here));
        end(&gate, threads);
    }

    #[test]
    fn an_errand_that_panics_is_an_error_and_waits_for_nobody() {
        let running = Arc::new(AtomicUsize::new(0));
        let (gate, threads) = vcpus(1, &running);
        gate.go();
        while running.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        let failed = gate.park_and(&mut || panic!("as a test asks"));
        assert!(matches!(failed, Err(Error::VcpuGone)));
        assert!(matches!(gate.park(), Err(Error::VcpuGone)));
        let mut done = false;
        assert!(gate.park_and(&mut || done = true).is_err());
        assert!(!done, "no vCPU can be said to be parked");
        gate.end();
        assert!(threads.into_iter().all(|thread| thread.join().is_err()));
    }
}
