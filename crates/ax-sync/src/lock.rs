//! `Mutex` and `Condvar` in the shape of `parking_lot`'s.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use crate::sim;

/// A lock that is never poisoned.
#[derive(Default)]
pub struct Mutex<T: ?Sized> {
    inner: parking_lot::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex {
            inner: parking_lot::Mutex::new(value),
        }
    }

    /// What was locked.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// What threads that wait for this lock wait for.
    fn key(&self) -> usize {
        std::ptr::from_ref(&self.inner).cast::<()>().addr()
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let guard = match sim::current() {
            None => self.inner.lock(),
            Some(world) => {
                world.may_yield();
                loop {
                    match self.inner.try_lock() {
                        Some(guard) => break guard,
                        None => {
                            world.block(self.key(), None);
                        }
                    }
                }
            }
        };
        MutexGuard {
            guard: Some(guard),
            lock: self,
        }
    }

    /// Waits for the lock, for `timeout` at most.
    pub fn try_lock_for(&self, timeout: Duration) -> Option<MutexGuard<'_, T>> {
        let guard = match sim::current() {
            None => self.inner.try_lock_for(timeout),
            Some(world) => {
                world.may_yield();
                let until = world.now().saturating_add(timeout.as_nanos() as u64);
                loop {
                    let left = until.saturating_sub(world.now());
                    match self.inner.try_lock() {
                        None if left == 0 => break None,
                        None => {
                            world.block(self.key(), Some(Duration::from_nanos(left)));
                        }
                        locked => break locked,
                    }
                }
            }
        };
        guard.map(|guard| MutexGuard {
            guard: Some(guard),
            lock: self,
        })
    }

    /// The value, by a borrow that makes locking needless.
    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut()
    }
}

impl<T: ?Sized + std::fmt::Debug> std::fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

/// The right to the value, until dropped.
pub struct MutexGuard<'a, T: ?Sized> {
    /// None only inside a wait, and while being dropped.
    guard: Option<parking_lot::MutexGuard<'a, T>>,
    lock: &'a Mutex<T>,
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[allow(clippy::expect_used)]
    fn deref(&self) -> &T {
        self.guard.as_deref().expect("held outside a wait")
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[allow(clippy::expect_used)]
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_deref_mut().expect("held outside a wait")
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.guard = None;
        if let Some(world) = sim::current() {
            world.wake(self.lock.key());
        }
    }
}

impl<T: ?Sized + std::fmt::Debug> std::fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

/// How a wait of bounded time ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// True when the time was over.
    pub fn timed_out(self) -> bool {
        self.0
    }
}

/// Where threads wait for a change of what a lock protects.
#[derive(Debug, Default)]
pub struct Condvar {
    inner: parking_lot::Condvar,
}

impl Condvar {
    /// One that nobody waits at.
    pub const fn new() -> Condvar {
        Condvar {
            inner: parking_lot::Condvar::new(),
        }
    }

    fn key(&self) -> usize {
        std::ptr::from_ref(&self.inner).addr()
    }

    fn simulated<T: ?Sized>(
        &self,
        world: &sim::Here,
        guard: &mut MutexGuard<'_, T>,
        timeout: Option<Duration>,
    ) -> WaitTimeoutResult {
        // Nobody else runs before this thread is down as waiting: no notification is missed.
        guard.guard = None;
        world.wake(guard.lock.key());
        let timed_out = world.block(self.key(), timeout);
        loop {
            match guard.lock.inner.try_lock() {
                Some(locked) => {
                    guard.guard = Some(locked);
                    return WaitTimeoutResult(timed_out);
                }
                None => {
                    world.block(guard.lock.key(), None);
                }
            }
        }
    }

    /// Gives the lock back, waits to be notified, and takes it again.
    pub fn wait<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) {
        match (sim::current(), &mut guard.guard) {
            (Some(world), _) => {
                self.simulated(&world, guard, None);
            }
            (None, Some(inner)) => self.inner.wait(inner),
            (None, None) => {}
        }
    }

    /// As [`Self::wait`], for `timeout` at most.
    pub fn wait_for<T: ?Sized>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        timeout: Duration,
    ) -> WaitTimeoutResult {
        match (sim::current(), &mut guard.guard) {
            (Some(world), _) => self.simulated(&world, guard, Some(timeout)),
            (None, Some(inner)) => {
                WaitTimeoutResult(self.inner.wait_for(inner, timeout).timed_out())
            }
            (None, None) => WaitTimeoutResult(true),
        }
    }

    /// Wakes one of those that wait.
    pub fn notify_one(&self) {
        match sim::current() {
            None => {
                self.inner.notify_one();
            }
            Some(world) => world.wake_one(self.key()),
        }
    }

    /// Wakes all that wait.
    pub fn notify_all(&self) {
        match sim::current() {
            None => {
                self.inner.notify_all();
            }
            Some(world) => world.wake(self.key()),
        }
    }
}
