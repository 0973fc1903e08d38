//! The power button: ACPI's fixed event, and what follows a press.

use crate::acpi::{Fixed, POWER_BUTTON};
use crate::bootinfo;
use crate::command::Button;
use crate::cpu::{self, inw, outw};
use crate::percpu;

/// RAM that the loader's tables may lie in.
const LOW_END: u64 = 1 << 20;
/// SLP_EN of the PM1 control register.
const SLEEP_ENABLE: u16 = 1 << 13;

/// The button of this machine.
pub struct PowerButton {
    fixed: Option<Fixed>,
    does: Button,
    seen: u32,
}

impl PowerButton {
    /// Finds it; nobody listens to it yet.
    pub fn new() -> Self {
        let fixed = bootinfo::rsdp().and_then(|rsdp| Fixed::find(rsdp, byte));
        Self {
            fixed,
            does: Button::Unheard,
            seen: 0,
        }
    }

    /// What is done from now on when it is pressed; false where there is no button.
    pub fn listen(&mut self, does: Button) -> bool {
        let Some(fixed) = self.fixed else {
            return false;
        };
        // A press that nobody listened to is none.
        outw(fixed.events, POWER_BUTTON);
        self.seen = percpu::pin_count(fixed.sci);
        cpu::route_pin(fixed.sci);
        let enable = if does == Button::Unheard {
            0
        } else {
            POWER_BUTTON
        };
        outw(fixed.events + 2, enable);
        self.does = does;
        true
    }

    /// Looks whether it was pressed since the last time, and what is to be done then.
    pub fn poll(&mut self) -> Option<Button> {
        let fixed = self.fixed?;
        let count = percpu::pin_count(fixed.sci);
        if count == core::mem::replace(&mut self.seen, count) {
            return None;
        }
        let pressed = inw(fixed.events) & POWER_BUTTON != 0;
        outw(fixed.events, POWER_BUTTON);
        pressed.then_some(self.does)
    }

    /// Soft off; does nothing where the tables do not say how.
    pub fn power_off(&self) {
        if let Some(fixed) = self.fixed {
            outw(fixed.control, u16::from(fixed.s5) << 10 | SLEEP_ENABLE);
        }
    }
}

/// The byte at a physical address below 1 MiB.
fn byte(at: u64) -> Option<u8> {
    // SAFETY: memory below 1 MiB is mapped, and holds plain bytes that nobody writes now.
    (at != 0 && at < LOW_END).then(|| unsafe { (at as *const u8).read_volatile() })
}
