//! Save and restore: a guest moved again and again into fresh machines ends as one that never moved.

use std::sync::Arc;

use super::payload::{ARENA, ARENA_LEN, COUNTERS, DONE, LIMIT, Mode, TICKS};
use super::rig::{BITMAP, Random, Silence, booted, config, ram, revived, state, word};
use super::{Fault, until};
use crate::ports::Outputs;
use crate::{HostCaps, Machine, MachineConfig};

/// vCPUs of the guest that is moved: one works, the other halts and wakes.
const VCPUS: u8 = 2;

/// The guest that is moved: it works until it is told where to end.
pub fn worker() -> MachineConfig {
    config(Mode::Work, VCPUS, u64::MAX, BITMAP)
}

/// What the work leaves behind: the memory it was done on, and its steps.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The memory.
    pub arena: Vec<u8>,
    /// The steps.
    pub steps: u64,
}

/// Waits until the work is done, and reads what it left behind.
///
/// # Errors
/// The guest hangs.
pub fn outcome(machine: &mut Machine) -> Result<Outcome, Fault> {
    until("the work is done", || Ok(word(machine, DONE)? == 1))?;
    machine.pause()?;
    let all = ram(machine)?;
    let arena = all.get(ARENA as usize..(ARENA + ARENA_LEN) as usize);
    Ok(Outcome {
        arena: arena.unwrap_or_default().to_vec(),
        steps: word(machine, COUNTERS)?,
    })
}

/// What `limit` steps leave behind in a guest that nobody moves.
///
/// # Errors
/// The machine can't be made, or the guest hangs.
pub fn undisturbed(caps: &HostCaps, limit: u64) -> Result<Outcome, Fault> {
    let outputs: Arc<Silence> = Arc::default();
    let mut machine = booted(caps, &config(Mode::Work, VCPUS, limit, BITMAP), outputs)?;
    machine.start()?;
    outcome(&mut machine)
}

/// RAM of a paused guest whose work is to end `further` steps on, and the step it ends at.
///
/// # Errors
/// RAM can't be read.
pub fn ending(machine: &Machine, further: u64) -> Result<(Vec<u8>, u64), Fault> {
    let limit = word(machine, COUNTERS)?.saturating_add(further);
    let mut all = ram(machine)?;
    let place = all.iter_mut().skip(LIMIT as usize);
    place
        .zip(limit.to_le_bytes())
        .for_each(|(to, from)| *to = from);
    Ok((all, limit))
}

/// Moves a working guest `moves` times, at random moments, into fresh machines; then its work ends,
/// and must have been done as if undisturbed. Both vCPUs and their timers must go on. `on_the_way`
/// sees each move's RAM; it changes it only in a test of this check.
///
/// # Errors
/// How the guest differs, or why it could not be tried.
pub fn work_survives(
    caps: &HostCaps,
    moves: usize,
    mut on_the_way: impl FnMut(usize, &mut [u8]),
) -> Result<Outcome, Fault> {
    let config = worker();
    let silence: Arc<Silence> = Arc::default();
    let outputs = || Arc::clone(&silence) as Arc<dyn Outputs>;
    let mut random = Random(11);
    let mut machine = booted(caps, &config, outputs())?;
    machine.start()?;
    until("the second vCPU has started", || {
        Ok(word(&machine, COUNTERS + 64)? > 0)
    })?;
    for number in 0..moves {
        random.nap(3000);
        machine.pause()?;
        let (saved, mut all) = (state(&machine)?, ram(&machine)?);
        on_the_way(number, &mut all);
        let mut next = revived(caps, &config, outputs(), &saved, &all)?;
        drop(machine);
        next.start()?;
        machine = next;
    }
    for place in [COUNTERS, COUNTERS + 64, TICKS, TICKS + 64] {
        let before = word(&machine, place)?;
        until("both vCPUs and their timers go on", || {
            Ok(word(&machine, place)? > before)
        })?;
    }
    machine.pause()?;
    let (all, limit) = ending(&machine, 1000 + random.below(1_000_000))?;
    let mut last = revived(caps, &config, outputs(), &state(&machine)?, &all)?;
    drop(machine);
    last.start()?;
    let got = outcome(&mut last)?;
    if silence.is_broken() {
        return Err(Fault::Exception);
    }
    if got.steps != limit || got != undisturbed(caps, limit)? {
        return Err(Fault::Differs { moves });
    }
    Ok(got)
}
