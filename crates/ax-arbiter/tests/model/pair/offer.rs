//! Which steps a world offers.

use ax_wire::Generation;
use ax_wire::Side;
use ax_wire::record::Record;
use statepoint::pair::Phase;

use super::{SIDES, Step, World, at};

impl World {
    /// What may happen, given what has.
    pub fn steps(&self, steps: &mut Vec<Step>) {
        self.steps_of_hosts(steps);
        let session = self.session.as_ref();
        for side in SIDES {
            let other = side.other();
            let replaces = match self.phase(side) {
                None => true,
                Some(Phase::Alone { filling, .. }) => filling.is_none(),
                Some(_) => false,
            };
            // Where nothing has ever run nothing is lost.
            let ran = self.record.generation > Generation(0);
            if self.budget.replacements > 0
                && self.processes[at(other)].is_none()
                && replaces
                && ran
            {
                steps.push(Step::Replace(side));
            }
            let Some(process) = &self.processes[at(side)] else {
                if self.budget.restarts > 0 || self.incarnations < 2 {
                    steps.push(Step::StartShadow(side));
                    if !self.marked[at(side)] {
                        steps.push(Step::StartBoot(side));
                    }
                }
                continue;
            };
            let phase = &process.pair.phase;
            if process.asking.is_some() && self.hosts.is_none() {
                steps.push(Step::Decide(side));
            }
            if process.answer.is_some() {
                steps.push(Step::Deliver(side));
            }
            if self.may_show(side) {
                steps.push(Step::Show(side));
            }
            if self.permits[at(side)] {
                steps.push(Step::Expire(side));
            }
            if self.has_peer(side) && (!self.linked() || self.budget.suspicions > 0) {
                steps.push(Step::Lose(side));
            }
            if matches!(phase, Phase::Waiting { .. }) {
                steps.push(Step::PermissionOver(side));
            }
            if matches!(phase, Phase::Promoting { .. }) {
                steps.push(Step::Running(side));
                if self.budget.failures > 0 {
                    steps.push(Step::PromotionFails(side));
                }
            }
            if matches!(phase, Phase::HandedOver { .. })
                && matches!(self.phase(other), Some(Phase::Ft { .. }))
                && self.linked()
            {
                steps.push(Step::SeesRunning(side));
            }
            if self.budget.failovers > 0 && matches!(phase, Phase::Ft { .. }) {
                steps.push(Step::Failover(side));
            }
            if self.budget.failures > 0 && matches!(phase, Phase::Ft { .. }) {
                steps.push(Step::Resign(side));
            }
            if self.budget.stops > 0
                && matches!(
                    phase,
                    Phase::Ft { .. } | Phase::Alone { .. } | Phase::Entering { .. }
                )
            {
                steps.push(Step::Stop(side));
            }
            let protected = matches!(
                phase,
                Phase::Ft { .. }
                    | Phase::AskingFt { .. }
                    | Phase::Entering { .. }
                    | Phase::Alone {
                        filling: Some(_),
                        ..
                    }
            );
            if self.budget.leaves > 0 && protected {
                steps.push(Step::Leave(side));
            }
            if let Phase::Parking { record, .. } = phase {
                let acknowledged =
                    self.linked() && matches!(self.phase(other), Some(Phase::InSync { .. }));
                if record.shadow().is_none() || acknowledged {
                    steps.push(Step::FinalDone(side));
                    if acknowledged && self.budget.failures > 0 {
                        steps.push(Step::FinalNotDurable(side));
                    }
                }
            }
            if self.budget.crashes > 0 {
                steps.push(Step::Crash(side));
            }
            if matches!(phase, Phase::Alone { filling: None, .. })
                && session.is_none()
                && matches!(self.phase(other), Some(Phase::Copying))
            {
                steps.push(Step::CopyBegins);
            }
        }
        steps.extend((0..self.strays.len()).map(Step::Stray));
        let Some(session) = session else {
            return;
        };
        let (holder, shadow) = (session.holder, session.holder.other());
        if self.linked()
            && !session.shipped
            && matches!(
                self.phase(holder),
                Some(Phase::Alone {
                    filling: Some(_),
                    ..
                })
            )
        {
            steps.push(Step::CopyDone);
        }
        if self.shadow_confirmation().is_some() {
            steps.push(Step::ShadowConfirms);
        }
        if self.linked()
            && session.confirmed
            && matches!(self.phase(holder), Some(Phase::Entering { .. }))
        {
            steps.push(Step::HolderConfirms);
        }
        if self.linked()
            && !self.permits[at(holder)]
            && matches!(self.phase(shadow), Some(Phase::InSync { .. }))
        {
            steps.push(Step::Acknowledge);
        }
        if session.told.is_some() && session.open[at(shadow)] {
            steps.push(Step::Told);
        }
    }

    /// True when this process has a peer to lose.
    fn has_peer(&self, side: Side) -> bool {
        match self.phase(side) {
            Some(Phase::Alone { filling, .. }) => filling.is_some(),
            Some(Phase::AskingFt { lost, .. }) => !lost,
            Some(Phase::Entering { .. } | Phase::Ft { .. } | Phase::HandedOver { .. }) => true,
            Some(Phase::Parking { record, .. }) => record.shadow().is_some(),
            Some(Phase::Copying | Phase::InSync { .. }) => self.takes_part(side),
            _ => false,
        }
    }

    /// The generation the shadow would confirm next: a whole epoch that has reached it, even when
    /// the holder has given up on it since.
    pub(super) fn shadow_confirmation(&self) -> Option<Generation> {
        let session = self.session.as_ref()?;
        let shadow = session.holder.other();
        if !session.shipped || !session.open[at(shadow)] {
            return None;
        }
        match (self.phase(shadow)?, self.phase(session.holder)) {
            // Which generation the epoch was sent under: that of the holder's record.
            (Phase::Copying, Some(holder)) => record_of(holder).map(|record| record.generation),
            (Phase::InSync { known }, Some(Phase::Ft { record })) => {
                (self.linked() && record.generation > *known).then_some(record.generation)
            }
            _ => None,
        }
    }
}

/// The record a primary's phase carries.
fn record_of(phase: &Phase) -> Option<Record> {
    match phase {
        Phase::Alone { record, .. }
        | Phase::Entering { record, .. }
        | Phase::AskingFt { record, .. }
        | Phase::Ft { record }
        | Phase::AskingAlone { record }
        | Phase::Parking { record, .. }
        | Phase::AskingHandover { record, .. }
        | Phase::AskingStop { record, .. }
        | Phase::HandedOver { record } => Some(*record),
        _ => None,
    }
}
