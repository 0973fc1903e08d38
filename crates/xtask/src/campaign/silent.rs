//! A host that neither answers nor resets: everything on it stands still, or no cable of it carries anything.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::Chance;
use testkit::net::Cable;
use testkit::site::{Side, Site};

use super::cables;
use crate::Error;

/// The shortest silence: by then the other host has taken over.
const LEAST: Duration = Duration::from_millis(1000);
/// So much longer it may be.
const MORE_MS: u64 = 2000;

/// Silences the host for a while.
///
/// # Errors
/// The kernel's.
pub fn a_while(site: &Site, side: Side, chance: &mut Chance) -> Result<(), Error> {
    let (stands, dark) = match chance.below(3) {
        0 => (true, false),
        1 => (false, true),
        _ => (true, true),
    };
    let length = LEAST + Duration::from_millis(chance.below(MORE_MS));
    let pids = match stands {
        true => processes(site, side),
        false => Vec::new(),
    };
    signal(&pids, Signal::SIGSTOP);
    if dark {
        uplink(site, side).silence_both()?;
        cables::cut(site)?;
    }
    std::thread::sleep(length);
    if dark {
        cables::mend(site)?;
        uplink(site, side).mend()?;
    }
    signal(&pids, Signal::SIGCONT);
    Ok(())
}

/// Everything that runs on the host, the guests first: they are stopped in this order.
fn processes(site: &Site, side: Side) -> Vec<Pid> {
    let mut all: Vec<(u32, String)> = site.host(side).processes().into_iter().collect();
    all.sort_by_key(|(_, line)| !line.contains(" --spec "));
    let pid = |(pid, _): (u32, String)| Pid::from_raw(pid as i32);
    all.into_iter().map(pid).collect()
}

fn signal(pids: &[Pid], what: Signal) {
    for pid in pids {
        // One that has ended meanwhile is silent as well.
        let _ = kill(*pid, what);
    }
}

fn uplink(site: &Site, side: Side) -> &Cable {
    match side {
        Side::A => &site.lab.uplinks.a,
        Side::B => &site.lab.uplinks.b,
    }
}
