//! When an epoch ends (rules 1 and 2): one pure function.

/// Times and bounds of the trigger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Least time from a resume to the next pause, nanoseconds.
    pub min_gap_ns: u64,
    /// Largest share of time the guest may be paused, percent (1..=99): after a long pause the gap is
    /// longer.
    pub pause_share: u64,
    /// With no output pending, an epoch is stretched to this, nanoseconds.
    pub max_interval_ns: u64,
    /// Bytes (pages, disk payload, frames) at which an epoch ends whatever its age.
    pub budget: usize,
    /// How often the running count is looked at while the guest runs, nanoseconds.
    pub poll_ns: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            min_gap_ns: 100_000,
            pause_share: 50,
            max_interval_ns: 50_000_000,
            budget: 8 << 20,
            poll_ns: 5_000_000,
        }
    }
}

/// What the decision depends on. All times are of one clock, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// Now.
    pub now: u64,
    /// When the guest last resumed.
    pub resumed: u64,
    /// How long its last pause was; 0 if it was idle, so that the pause cost it nothing.
    pub paused_for: u64,
    /// Output waits in the open epoch.
    pub pending: bool,
    /// An epoch was asked for (a device waits for room, a ring is full, the last epoch).
    pub asked: bool,
    /// Bytes the open epoch would carry, as far as known.
    pub bytes: usize,
    /// A staging slot is free and the barrier can close an epoch.
    pub room: bool,
    /// The vCPUs are parked already.
    pub parked: bool,
}

/// Why an epoch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// Nothing waited: it was as old as it may become.
    Idle,
    /// Output waited.
    Output,
    /// It was asked for: a device waited for room, the machine was reset.
    Asked,
    /// A dirty ring was full.
    RingFull,
    /// It had as many bytes as it may have.
    Full,
    /// It had as many bytes as it may have, and the guest stood still until there was room to end it.
    Backpressure,
    /// It was to be the last one.
    Final,
}

impl Reason {
    /// All of them, by number.
    pub const ALL: [Reason; 7] = [
        Reason::Idle,
        Reason::Output,
        Reason::Asked,
        Reason::RingFull,
        Reason::Full,
        Reason::Backpressure,
        Reason::Final,
    ];

    /// The reason of this number (`reason as u64`).
    pub fn from_number(number: u64) -> Option<Reason> {
        Reason::ALL.get(usize::try_from(number).ok()?).copied()
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// End the epoch now.
    Capture(Reason),
    /// There is no room to end it and it must not grow: park the vCPUs.
    Park,
    /// Look again then, or when the trigger rings.
    WaitUntil(u64),
}

impl Policy {
    /// Decides.
    pub fn decide(&self, s: &Situation) -> Decision {
        let full = s.bytes >= self.budget;
        let idle_until = s.resumed.saturating_add(self.max_interval_ns);
        if !s.room {
            return if full && !s.parked {
                Decision::Park
            } else {
                Decision::WaitUntil(s.now.saturating_add(self.poll_ns))
            };
        }
        if s.parked {
            return Decision::Capture(Reason::Backpressure);
        }
        if full {
            return Decision::Capture(Reason::Full);
        }
        let share = self.pause_share.clamp(1, 99);
        let gap = (s.paused_for / share)
            .saturating_mul(100 - share)
            .max(self.min_gap_ns);
        let earliest = s.resumed.saturating_add(gap);
        let (due, reason) = match (s.pending, s.asked) {
            (true, _) => (earliest, Reason::Output),
            (false, true) => (earliest, Reason::Asked),
            (false, false) => (idle_until.max(earliest), Reason::Idle),
        };
        if s.now >= due {
            Decision::Capture(reason)
        } else {
            Decision::WaitUntil(due.min(s.now.saturating_add(self.poll_ns)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDLE: Situation = Situation {
        now: 1_000_000_000,
        resumed: 999_900_000,
        paused_for: 100_000,
        pending: false,
        asked: false,
        bytes: 0,
        room: true,
        parked: false,
    };

    #[test]
    fn output_ends_the_epoch_after_the_gap() {
        let policy = Policy::default();
        let pending = Situation {
            now: IDLE.resumed + 40_000,
            pending: true,
            ..IDLE
        };
        assert_eq!(
            policy.decide(&pending),
            Decision::WaitUntil(IDLE.resumed + 100_000)
        );
        let later = Situation {
            now: IDLE.resumed + 100_000,
            ..pending
        };
        assert_eq!(policy.decide(&later), Decision::Capture(Reason::Output));
    }

    #[test]
    fn a_long_pause_makes_the_gap_longer() {
        let policy = Policy::default();
        let s = Situation {
            pending: true,
            paused_for: 3_000_000,
            now: IDLE.resumed + 2_900_000,
            ..IDLE
        };
        assert_eq!(
            policy.decide(&s),
            Decision::WaitUntil(IDLE.resumed + 3_000_000)
        );
    }

    #[test]
    fn without_output_it_is_stretched_to_the_maximum_and_no_further() {
        let policy = Policy::default();
        assert!(matches!(policy.decide(&IDLE), Decision::WaitUntil(_)));
        let later = Situation {
            now: IDLE.resumed + policy.max_interval_ns,
            ..IDLE
        };
        assert_eq!(policy.decide(&later), Decision::Capture(Reason::Idle));
        let asked = Situation {
            asked: true,
            ..later
        };
        assert_eq!(policy.decide(&asked), Decision::Capture(Reason::Asked));
    }

    #[test]
    fn a_full_epoch_ends_at_once_or_parks() {
        let policy = Policy::default();
        let full = Situation {
            bytes: policy.budget,
            ..IDLE
        };
        assert_eq!(policy.decide(&full), Decision::Capture(Reason::Full));
        let no_room = Situation {
            room: false,
            ..full
        };
        assert_eq!(policy.decide(&no_room), Decision::Park);
        let parked = Situation {
            parked: true,
            ..no_room
        };
        assert!(matches!(policy.decide(&parked), Decision::WaitUntil(_)));
        let room_again = Situation {
            room: true,
            ..parked
        };
        let stood_still = Decision::Capture(Reason::Backpressure);
        assert_eq!(policy.decide(&room_again), stood_still);
    }

    proptest! {
        #[test]
        fn never_without_room_never_in_the_past_and_never_past_the_maximum(
            ago in 0u64..200_000_000, paused_for in 0u64..5_000_000, pending: bool, asked: bool,
            bytes in 0usize..32 << 20, room: bool, parked: bool,
        ) {
            let policy = Policy::default();
            let s = Situation {
                resumed: IDLE.now - ago, paused_for, pending, asked, bytes, room, parked, ..IDLE
            };
            match policy.decide(&s) {
                Decision::Capture(_) => prop_assert!(room),
                Decision::Park => prop_assert!(!room && !parked && bytes >= policy.budget),
                Decision::WaitUntil(t) => {
                    prop_assert!(t > s.now);
                    prop_assert!(!room || ago < policy.max_interval_ns.max(paused_for));
                }
            }
        }
    }
}
