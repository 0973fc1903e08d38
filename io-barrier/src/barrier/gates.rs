//! Every change of the gate, and what leaves with it.

use std::sync::atomic::Ordering;

use ax_sync::MutexGuard;
use ax_wire::EpochId;
use ax_wire::records::{Record, Records, push, record_size};

use super::{Barrier, Gate, Held, OutputSink, POWER_RESERVE, Queue, leave};
use crate::{FtGrant, Grant, ShadowOutputs, ShadowOutputsFull, SoloGrant};

impl Barrier {
    /// Rule 22, step 1: from the return on nothing leaves until its epoch is committed *and*
    /// [`Barrier::protect`] was called. Only from [`Gate::Passing`]; otherwise nothing changes.
    /// Returns the gate that holds now.
    pub fn start_holding(&self) -> Gate {
        let _sink = self.sink.lock();
        let mut queue = self.queue.lock();
        if queue.gate == Gate::Passing {
            self.permitted_until.store(0, Ordering::Release);
            queue.gate = Gate::Entering;
        }
        queue.gate
    }

    /// Rule 28: from the return on outputs leave at once, as before, but each only while the lease lasts: for
    /// `lease_ns` from now, and from the stamp of every acknowledgement ([`Barrier::release`]). Whoever
    /// acknowledges promises not to ask for the VM before that. Beyond it an output is refused as
    /// [`Full`], a power output waits. Only from [`Gate::Passing`]; otherwise nothing changes. Returns the gate that holds now.
    pub fn start_leasing(&self, lease_ns: u64) -> Gate {
        let _sink = self.sink.lock();
        let mut queue = self.queue.lock();
        if queue.gate == Gate::Passing {
            self.lease_ns.store(lease_ns, Ordering::Release);
            let until = self.clock.now_ns().saturating_add(lease_ns);
            self.permitted_until.store(until, Ordering::Release);
            queue.gate = Gate::Leased;
        }
        queue.gate
    }

    /// Rule 22, step 4: the arbiter granted protection; acknowledgements release from now on.
    pub fn protect(&self, grant: FtGrant) {
        let _sink = self.sink.lock();
        let mut queue = self.queue.lock();
        if queue.gate == Gate::Passing {
            // Outputs already left alone: the grant cannot be for what this process does.
            tracing::error!(
                ?grant,
                "protection granted while outputs pass: holding first"
            );
        }
        queue.gate = Gate::Protected;
    }

    /// Rule 21: from the return on nothing leaves, whatever was acknowledged, until a new grant.
    pub fn freeze(&self) {
        let _sink = self.sink.lock();
        self.queue.lock().gate = Gate::Frozen;
    }

    /// This side hands over (rule 25): nothing leaves any more, and the outputs of committed epochs
    /// that have not left are put into `outputs`, which the shadow that it becomes starts from. The
    /// guest is paused since its last epoch was sealed, so the open epoch is empty.
    ///
    /// # Errors
    /// They do not fit: more than a shadow remembers. Nothing has changed but the gate.
    pub fn retire(&self, outputs: &mut ShadowOutputs) -> Result<(), ShadowOutputsFull> {
        let _sink = self.sink.lock();
        let mut queue = self.queue.lock();
        queue.gate = Gate::Frozen;
        outputs.released(self.released());
        for held in &queue.sealed {
            let rest = held.records.get(held.at..).unwrap_or_default();
            outputs.push(held.epoch, rest)?;
        }
        while let Some(mut held) = queue.sealed.pop_front() {
            held.records.clear();
            queue.spare.push(held.records);
        }
        Ok(())
    }

    /// The VM runs alone: everything held leaves, in order, and everything later at once.
    pub fn pass(&self, grant: SoloGrant) {
        let mut sink = self.sink.lock();
        tracing::info!(?grant, "outputs pass");
        self.drain_all(&mut sink);
        drop(sink);
        self.resumed();
    }

    /// Promotion: the outputs of committed epochs that are not known released leave again, in order
    /// (rule 6), before any other. Alone they leave at once, and the gate opens as in [`Barrier::pass`]. After
    /// a planned failover it opens as in [`Barrier::protect`], with epochs going on after `committed`, and they
    /// wait for the first permission as all others do: the old primary may have taken the guest back
    /// meanwhile, without this process having heard of it (rules 24, 25).
    pub fn promote(&self, grant: impl Into<Grant>, outputs: &ShadowOutputs, committed: EpochId) {
        let grant = grant.into();
        let mut sink = self.sink.lock();
        tracing::info!(
            ?grant,
            ?committed,
            "promoted: outputs leave here from now on"
        );
        // A reader of the console may not have got them from a host that died (rule 8).
        outputs.released_console(|at, bytes| sink.console(at, bytes));
        match grant {
            Grant::Solo(_) => {
                for (_, record) in outputs.unreleased() {
                    leave(sink.as_mut(), record);
                }
                self.released.fetch_max(committed.0, Ordering::AcqRel);
                let mut queue = self.queue.lock();
                queue.last_sealed = queue.last_sealed.max(committed);
                drop(queue);
                self.drain_all(&mut sink);
                drop(sink);
                self.resumed();
            }
            Grant::Ft(_) => {
                let again = self.again(outputs);
                let released = match again.is_empty() {
                    true => committed,
                    false => outputs.last_released(),
                };
                self.released.fetch_max(released.0, Ordering::AcqRel);
                self.permitted_until.store(0, Ordering::Release);
                let mut queue = self.queue.lock();
                queue.last_sealed = queue.last_sealed.max(committed);
                if !again.is_empty() {
                    queue.sealed.push_front(Held {
                        epoch: committed,
                        records: again,
                        at: 0,
                        since_ns: self.clock.now_ns(),
                    });
                }
                queue.gate = Gate::Protected;
            }
        }
    }

    /// What is not known released, in a buffer that an epoch can use later.
    fn again(&self, outputs: &ShadowOutputs) -> Vec<u8> {
        let bytes = |(_, record): (EpochId, Record<'_>)| record_size(record.payload.len());
        let needed: usize = outputs.unreleased().map(bytes).sum();
        let room = self.config.epoch_bytes.max(POWER_RESERVE);
        let mut again = Vec::with_capacity(needed.max(room));
        for (_, record) in outputs.unreleased() {
            if !push(&mut again, record) {
                tracing::error!(kind = ?record.kind, "an output to be sent again found no room");
            }
        }
        again
    }

    /// Lets out what was held in the open epoch while a lease was over. Without a buffer to take its place the
    /// next acknowledgement tries again.
    pub(super) fn drain_open(&self, sink: &mut MutexGuard<'_, Box<dyn OutputSink>>) {
        let queue = self.queue.lock();
        if !queue.open.is_empty() {
            self.let_open_out(sink, queue);
        }
    }

    /// Lets everything out until the queue is empty with both locks held, then opens the gate.
    pub(super) fn drain_all(&self, sink: &mut MutexGuard<'_, Box<dyn OutputSink>>) {
        loop {
            let _ = self.drain_sealed(sink, EpochId(u64::MAX), |_| true);
            let mut queue = self.queue.lock();
            if !queue.sealed.is_empty() {
                // Sealed since: it is older than what is open now, and must not be left behind.
                continue;
            }
            if queue.open.is_empty() {
                queue.gate = Gate::Passing;
                return;
            }
            // With nothing sealed every other buffer is spare, and there is at least one.
            self.let_open_out(sink, queue);
        }
    }

    fn let_open_out(
        &self,
        sink: &mut MutexGuard<'_, Box<dyn OutputSink>>,
        mut queue: MutexGuard<'_, Queue>,
    ) {
        let Some(next) = queue.spare.pop() else {
            return;
        };
        let mut open = std::mem::replace(&mut queue.open, next);
        (queue.open_has_power, queue.open_outputs) = (false, 0);
        drop(queue);
        Records::new(&open)
            .map_while(Result::ok)
            .for_each(|record| leave(sink.as_mut(), record));
        open.clear();
        self.queue.lock().spare.push(open);
    }
}
