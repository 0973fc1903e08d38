//! Threads.

use std::io;
use std::time::Duration;

use crate::sim;

/// A running thread that may be waited for.
#[derive(Debug)]
pub struct JoinHandle<T> {
    inner: std::thread::JoinHandle<T>,
    simulated: Option<sim::Spawned>,
}

impl<T> JoinHandle<T> {
    /// Waits for its end.
    ///
    /// # Errors
    /// It panicked.
    pub fn join(self) -> std::thread::Result<T> {
        if let Some(thread) = &self.simulated {
            thread.join();
        }
        self.inner.join()
    }

    /// True when it has ended.
    pub fn is_finished(&self) -> bool {
        match &self.simulated {
            Some(thread) => thread.is_done(),
            None => self.inner.is_finished(),
        }
    }
}

/// Starts a thread of this name.
///
/// # Errors
/// The host has no room for another thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = std::thread::Builder::new().name(name.into());
    match sim::current() {
        None => Ok(JoinHandle {
            inner: builder.spawn(run)?,
            simulated: None,
        }),
        Some(world) => {
            let thread = world.enter(name);
            let inside = thread.clone();
            Ok(JoinHandle {
                inner: builder.spawn(move || inside.run(run))?,
                simulated: Some(thread),
            })
        }
    }
}

/// Where threads live that borrow: all have ended when [`scope`] returns.
#[derive(Debug)]
pub struct Scope<'scope, 'env: 'scope> {
    inner: &'scope std::thread::Scope<'scope, 'env>,
    children: parking_lot::Mutex<Vec<sim::Spawned>>,
}

impl<'scope> Scope<'scope, '_> {
    /// Starts a thread of this name.
    ///
    /// # Errors
    /// The host has no room for another thread.
    pub fn spawn<T: Send + 'scope>(
        &self,
        name: &str,
        run: impl FnOnce() -> T + Send + 'scope,
    ) -> io::Result<ScopedJoinHandle<'scope, T>> {
        let builder = std::thread::Builder::new().name(name.into());
        let simulated = sim::current().map(|world| world.enter(name));
        let inner = match simulated.clone() {
            None => builder.spawn_scoped(self.inner, run)?,
            Some(thread) => builder.spawn_scoped(self.inner, move || thread.run(run))?,
        };
        self.children.lock().extend(simulated.clone());
        Ok(ScopedJoinHandle { inner, simulated })
    }
}

/// As [`JoinHandle`], in a [`Scope`].
#[derive(Debug)]
pub struct ScopedJoinHandle<'scope, T> {
    inner: std::thread::ScopedJoinHandle<'scope, T>,
    simulated: Option<sim::Spawned>,
}

impl<T> ScopedJoinHandle<'_, T> {
    /// Waits for its end.
    ///
    /// # Errors
    /// It panicked.
    pub fn join(self) -> std::thread::Result<T> {
        if let Some(thread) = &self.simulated {
            thread.join();
        }
        self.inner.join()
    }
}

/// Runs `act`, which may start threads that borrow, and waits for their end.
pub fn scope<'env, T>(act: impl for<'scope> FnOnce(&Scope<'scope, 'env>) -> T) -> T {
    std::thread::scope(|inner| {
        let scope = Scope {
            inner,
            children: parking_lot::Mutex::default(),
        };
        let done = act(&scope);
        scope.children.lock().iter().for_each(sim::Spawned::join);
        done
    })
}

/// Does nothing for so long.
pub fn sleep(time: Duration) {
    match sim::current() {
        None => std::thread::sleep(time),
        Some(world) => world.sleep(time),
    }
}
