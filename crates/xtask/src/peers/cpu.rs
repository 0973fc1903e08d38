//! The processor time of a system: of every process on its hosts, which the clients' is not.

use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use testkit::net::Host;

/// Time all processes on these hosts have had so far, in user mode (a guest's own time is in it) and in the
/// kernel, to a hundredth of a second for each process. One that ended is forgotten.
pub fn used(hosts: &[&Host]) -> Duration {
    let ticks: u64 = hosts
        .iter()
        .flat_map(|host| host.processes().into_keys())
        .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok())
        .filter_map(|stat| ticks(&stat))
        .sum();
    // The kernel's USER_HZ has been 100 on every architecture that has KVM.
    let per_second = match sysconf(SysconfVar::CLK_TCK) {
        Ok(Some(n)) if n > 0 => n as u64,
        _ => 100,
    };
    Duration::from_secs_f64(ticks as f64 / per_second as f64)
}

/// utime and stime of `/proc/PID/stat` (proc(5)), fields 14 and 15, in clock ticks.
fn ticks(stat: &str) -> Option<u64> {
    // The second field is the name in parentheses, and a name may contain anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_are_found_behind_any_name() {
        let stat = "4711 (a) b (c) S 1 4711 4711 0 -1 4194304 20 0 0 0 120 34 5 6 20 0 1 0 99 1 2";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks("4711 (a) S 1 2"), None);
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn a_process_that_computes_has_used_time() {
        let own = || ticks(&std::fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        let before = own();
        let mut x = 1u64;
        while own() <= before {
            (0..1_000_000u64).for_each(|i| x = std::hint::black_box(x.wrapping_mul(i | 1)));
        }
        assert!(own() > before, "{x}");
    }
}
