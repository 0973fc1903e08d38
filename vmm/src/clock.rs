//! Guest time across a restore: pure arithmetic (rule 11, I7).
//!
//! The guest has two clocks, kvmclock (nanoseconds, `KVM_GET_CLOCK`) and each vCPU's TSC. Both
//! must advance by the same elapsed time between the capture and the restore on another host,
//! whose own TSC stands elsewhere. The guest's TSC is `host TSC + offset`, wrapping.

use std::time::Duration;

/// Largest difference of TSC rates at which a guest may move, parts per million.
pub const MAX_RATE_PPM: u64 = 250;

/// When a guest was captured, by the clocks of the host it ran on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapturedTime {
    /// kvmclock, nanoseconds.
    pub clock_ns: u64,
    /// The host's TSC at the same moment.
    pub host_tsc: u64,
    /// Rate of the guest's TSC, kHz.
    pub tsc_khz: u32,
}

/// kvmclock after `elapsed`, nanoseconds. Never less than before (saturates).
pub fn clock_after(captured: &CapturedTime, elapsed: Duration) -> u64 {
    let ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    captured.clock_ns.saturating_add(ns)
}

/// TSC ticks in `elapsed` at `tsc_khz`, rounded down.
pub fn ticks(tsc_khz: u32, elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_nanos() * u128::from(tsc_khz) / 1_000_000).unwrap_or(u64::MAX)
}

/// The offset that makes a vCPU's TSC go on `elapsed` after its capture, when the new host's TSC
/// reads `host_tsc_now`. `offset` is what it was on the old host.
pub fn tsc_offset_after(
    captured: &CapturedTime,
    offset: u64,
    elapsed: Duration,
    host_tsc_now: u64,
) -> u64 {
    captured
        .host_tsc
        .wrapping_add(offset)
        .wrapping_add(ticks(captured.tsc_khz, elapsed))
        .wrapping_sub(host_tsc_now)
}

/// True when a guest may move between hosts of these TSC rates, kHz.
pub fn rates_compatible(a: u32, b: u32) -> bool {
    let (a, b) = (u64::from(a), u64::from(b));
    a.abs_diff(b) * 1_000_000 <= MAX_RATE_PPM * a.max(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn captured() -> CapturedTime {
        CapturedTime {
            clock_ns: 5_000_000_000,
            host_tsc: 900_000_000_000,
            tsc_khz: 2_500_000,
        }
    }

    /// The guest's TSC as it reads on a host whose own reads `host`.
    fn guest_tsc(host: u64, offset: u64) -> u64 {
        host.wrapping_add(offset)
    }

    #[test]
    fn both_clocks_advance_by_the_same_time_wherever_the_new_hosts_tsc_stands() {
        let then = captured();
        for offset in [0, 17, u64::MAX - 899_999_999_999, u64::MAX] {
            for host_now in [0, 1, 42_000_000, 900_000_000_000, u64::MAX - 3] {
                for elapsed in [
                    Duration::ZERO,
                    Duration::from_micros(1),
                    Duration::from_millis(60),
                    HOUR,
                ] {
                    let new = tsc_offset_after(&then, offset, elapsed, host_now);
                    let went =
                        guest_tsc(host_now, new).wrapping_sub(guest_tsc(then.host_tsc, offset));
                    let clock_went = clock_after(&then, elapsed) - then.clock_ns;
                    assert_eq!(clock_went, elapsed.as_nanos() as u64);
                    assert_eq!(went, clock_went * 5 / 2);
                }
            }
        }
    }

    #[test]
    fn time_never_runs_backwards_even_at_the_end_of_numbers() {
        let mut then = captured();
        then.clock_ns = u64::MAX - 5;
        assert_eq!(clock_after(&then, HOUR), u64::MAX);
        assert_eq!(clock_after(&captured(), Duration::MAX), u64::MAX);
        assert_eq!(ticks(u32::MAX, Duration::MAX), u64::MAX);
    }

    #[test]
    fn vcpus_keep_their_distance() {
        let then = captured();
        let a = tsc_offset_after(&then, 1000, HOUR, 77);
        let b = tsc_offset_after(&then, 1250, HOUR, 77);
        assert_eq!(b.wrapping_sub(a), 250);
    }

    #[test]
    fn rates_up_to_250_ppm_apart_are_compatible() {
        assert!(rates_compatible(2_500_000, 2_500_625));
        assert!(!rates_compatible(2_500_000, 2_500_700));
        assert!(!rates_compatible(0, 1));
        assert!(rates_compatible(u32::MAX, u32::MAX));
    }
}
