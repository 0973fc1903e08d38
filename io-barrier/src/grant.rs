//! Permissions as values: the gate cannot be opened without one.

use ax_wire::Generation;
use ax_wire::record::{Member, Record, State};

/// The arbiter's answer that this process may show outputs without a shadow (rules 20–22).
///
/// Not `Clone`: one answer opens the gate once.
#[derive(Debug, PartialEq, Eq)]
pub struct SoloGrant {
    generation: Option<Generation>,
}

impl SoloGrant {
    /// The permission in a record the arbiter has just answered with; none unless exactly `me` is
    /// its holder, alone.
    pub fn of(record: &Record, me: Member) -> Option<SoloGrant> {
        let alone = matches!(record.state, State::Alone { holder } if holder == me);
        alone.then_some(SoloGrant {
            generation: Some(record.generation),
        })
    }

    /// A VM that was never paired (mode `none` without a peer): there is nobody to race with.
    pub fn never_paired() -> SoloGrant {
        SoloGrant { generation: None }
    }

    /// The generation granted; none for a VM that was never paired.
    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }
}

/// The arbiter's answer that this process is the holder of a protected pair: it may release what
/// its shadow has acknowledged.
#[derive(Debug, PartialEq, Eq)]
pub struct FtGrant {
    generation: Generation,
}

impl FtGrant {
    /// The permission in a record the arbiter has just answered with; none unless exactly `me` is
    /// its holder in FT.
    pub fn of(record: &Record, me: Member) -> Option<FtGrant> {
        let protected = matches!(record.state, State::Ft { holder, .. } if holder == me);
        protected.then_some(FtGrant {
            generation: record.generation,
        })
    }

    /// The generation granted.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}

/// Either permission.
#[derive(Debug, PartialEq, Eq)]
pub enum Grant {
    /// Outputs leave at once.
    Solo(SoloGrant),
    /// Outputs leave when acknowledged.
    Ft(FtGrant),
}

impl From<SoloGrant> for Grant {
    fn from(grant: SoloGrant) -> Grant {
        Grant::Solo(grant)
    }
}

impl From<FtGrant> for Grant {
    fn from(grant: FtGrant) -> Grant {
        Grant::Ft(grant)
    }
}
