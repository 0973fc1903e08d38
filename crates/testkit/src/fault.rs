//! Faults inside the product's processes, at moments that can't be met from outside.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use ax_failpoint::{Action, BUILT_IN, Order, Point};

use crate::site::{Side, Site};
use crate::{Error, Result};

/// How long orders take to be known on a busy machine.
const TAKEN_UP: Duration = Duration::from_millis(30);

impl Site {
    /// Where the processes of a side's VMs look for [`Order`]s.
    pub(crate) fn orders(&self, side: Side) -> PathBuf {
        self.dir().join(format!("{}.orders", side.name()))
    }

    /// Orders faults in the processes of a side's VMs, in place of those ordered before. They look for orders
    /// every 2 ms, and this returns after 15 looks; those started later know of them from their start.
    ///
    /// # Errors
    /// When the orders cannot be written.
    pub fn order(&self, side: Side, orders: &[Order]) -> Result<()> {
        let file = self.orders(side);
        let new = file.with_extension("new");
        let text: String = orders.iter().map(|order| format!("{order}\n")).collect();
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &file))
            .map_err(Error::os(format!("write {}", file.display())))?;
        std::thread::sleep(TAKEN_UP);
        Ok(())
    }

    /// Waits until a fault ordered at `point` has happened in a VM's process on a side.
    ///
    /// # Errors
    /// When it does not within `patience`; with that process's log.
    pub fn wait_for_fault(
        &self,
        side: Side,
        vm: &str,
        point: Point,
        patience: Duration,
    ) -> Result<()> {
        let wanted = format!("fail point {point} has come due");
        let deadline = Instant::now() + patience;
        loop {
            let log = self.vm_log(side, vm);
            if log.contains(&wanted) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::NotReady {
                    program: format!("VM {vm} on host {}", side.name()),
                    wanted,
                    seconds: patience.as_secs(),
                    log,
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What a VM's processes on a side have told of one kind (`promoted`, `peer-lost` …), in order.
    ///
    /// # Errors
    /// When axvm fails, or prints no JSON.
    pub fn told(&self, side: Side, vm: &str, kind: &str) -> Result<Vec<Value>> {
        let text = self.run_axvm(side, &["-o", "json", "events", vm, "--this-host"])?;
        let events: serde_json::Result<Vec<Value>> =
            text.lines().map(serde_json::from_str).collect();
        let events = events.map_err(|e| {
            Error::Product(format!("axvm -o json events printed no JSON ({e}): {text}"))
        })?;
        let what = events
            .into_iter()
            .map(|mut event| event["what"]["event"].take());
        Ok(what.filter(|told| told["what"] == kind).collect())
    }

    /// What a VM's processes on a side have said so far.
    pub fn vm_log(&self, side: Side, vm: &str) -> String {
        let path = self.data_dir(side).join("vms").join(vm).join("log");
        let bytes = fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Returns from the calling test, listed as skipped, when the product is built without fail points.
#[macro_export]
macro_rules! require_fail_points {
    () => {
        if !$crate::fault::BUILT_IN {
            let why = "this build has none: build with debug assertions";
            $crate::skip::report("no fail points", why, &$crate::skip::test_name());
            return;
        }
    };
}
