//! ACPI fixed hardware with one fixed event: the power button (ACPI 6.5, chapter 4.8).
//!
//! | port | |
//! |---|---|
//! | 0x600, 2 bytes | PM1a status: PWRBTN_STS; a one written clears it |
//! | 0x602, 2 bytes | PM1a enable: PWRBTN_EN; GBL_EN and RTC_EN, which enable nothing |
//! | 0x604, 2 bytes | PM1a control: SCI_EN, always set; SLP_TYP and SLP_EN |
//!
//! The system control interrupt is a level: high while an event is pending and enabled. There is no
//! SMI command port, so the machine is always in ACPI mode (4.8.2.5), no sleep but S5, no power
//! management timer, no general-purpose event.

use super::records::PlatformRecord;
use crate::ports::Power;

/// First port of the event block.
pub(crate) const EVENT_BLOCK: u16 = 0x600;
/// Bytes of it: status, then enable.
pub(crate) const EVENT_LEN: u8 = 4;
/// First port of the control block, where QEMU's machines have theirs.
pub(crate) const CONTROL_BLOCK: u16 = 0x604;
/// Bytes of it.
pub(crate) const CONTROL_LEN: u8 = 2;
/// Global system interrupt of the system control interrupt.
pub(crate) const SCI: u32 = 9;
/// SLP_TYP of S5, soft off.
pub(crate) const S5: u8 = 0;

/// Last port of both blocks.
const LAST: u16 = CONTROL_BLOCK + CONTROL_LEN as u16 - 1;
/// PWRBTN_STS and PWRBTN_EN (4.8.3.1.1, 4.8.3.1.2).
const POWER_BUTTON: u16 = 1 << 8;
/// GBL_EN and RTC_EN: nothing ever sets their status here, but the drivers of the global lock and of the clock
/// (Linux's, whatever FIX_RTC says) complain where the bits don't stick.
const GLOBAL_LOCK: u16 = 1 << 5;
const RTC: u16 = 1 << 10;
/// The enable register's bits.
const ENABLE: u16 = POWER_BUTTON | GLOBAL_LOCK | RTC;
/// SCI_EN in the control register (4.8.3.2.1).
const SCI_EN: u8 = 1;
/// SLP_EN and SLP_TYP in the high byte of the control register.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 7 << 2;

/// The registers that have a memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pm1 {
    status: u16,
    enable: u16,
}

impl Pm1 {
    /// Whether `port` belongs to one of the blocks.
    pub(super) fn has(port: u16) -> bool {
        (EVENT_BLOCK..=LAST).contains(&port)
    }

    /// Reads from `port` on. What lies beyond the blocks is left as it is.
    pub(super) fn read(&self, port: u16, out: &mut [u8]) {
        for (port, byte) in (port..=LAST).zip(out) {
            let ([status_low, status_high], [enable_low, enable_high]) =
                (self.status.to_le_bytes(), self.enable.to_le_bytes());
            *byte = match port - EVENT_BLOCK {
                0 => status_low,
                1 => status_high,
                2 => enable_low,
                3 => enable_high,
                4 => SCI_EN,
                _ => 0,
            };
        }
    }

    /// Writes from `port` on; whether the guest has switched itself off by it.
    pub(super) fn write(&mut self, port: u16, data: &[u8]) -> Option<Power> {
        let mut power = None;
        for (port, byte) in (port..=LAST).zip(data) {
            let (low, high) = (u16::from(*byte), u16::from(*byte) << 8);
            match port - EVENT_BLOCK {
                0 => self.status &= !low,
                1 => self.status &= !high,
                2 => self.enable = (self.enable & 0xff00) | (low & ENABLE),
                3 => self.enable = (self.enable & 0x00ff) | (high & ENABLE),
                5 if byte & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_ENABLE | S5 << 2 => {
                    power = Some(Power::Off);
                }
                _ => {}
            }
        }
        power
    }

    /// Presses the power button, if the guest listens to it; whether it does. Pressing again before
    /// the guest has seen it is the same press.
    pub(super) fn press(&mut self) -> bool {
        let listens = self.enable & POWER_BUTTON != 0;
        if listens {
            self.status |= POWER_BUTTON;
        }
        listens
    }

    /// The level of the system control interrupt.
    pub(super) fn sci(&self) -> bool {
        self.status & self.enable != 0
    }

    pub(super) fn save(&self, record: &mut PlatformRecord) {
        record.pm1_status = self.status;
        record.pm1_enable = self.enable;
    }

    /// From a record that anyone may have made.
    pub(super) fn of(record: &PlatformRecord) -> Result<Self, &'static str> {
        let (status, enable) = (record.pm1_status, record.pm1_enable);
        if status & !POWER_BUTTON != 0 || enable & !ENABLE != 0 {
            return Err("its PM1 registers have bits that this machine has not");
        }
        Ok(Pm1 { status, enable })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn word(pm1: &Pm1, port: u16) -> u16 {
        let mut bytes = [0; 2];
        pm1.read(port, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn listening() -> Pm1 {
        let mut pm1 = Pm1::default();
        assert_eq!(pm1.write(0x602, &POWER_BUTTON.to_le_bytes()), None);
        pm1
    }

    #[test]
    fn a_press_is_seen_until_it_is_acknowledged_and_only_by_who_listens() {
        let mut pm1 = Pm1::default();
        assert!(!pm1.press(), "nobody listens");
        assert_eq!((word(&pm1, 0x600), pm1.sci()), (0, false));

        let mut pm1 = listening();
        assert!(!pm1.sci());
        assert!(pm1.press() && pm1.sci());
        let pressed = pm1;
        assert!(pm1.press(), "and again");
        assert_eq!(pm1, pressed);
        assert_eq!(word(&pm1, 0x600), POWER_BUTTON);
        assert_eq!(pm1.write(0x600, &[0xff, 0xfe]), None);
        assert!(pm1.sci(), "zeros and other bits clear nothing");
        // Disabled the level falls, enabled it is back: the event is still pending.
        pm1.write(0x602, &[0, 0]);
        assert!(!pm1.sci());
        pm1.write(0x603, &[1]);
        assert!(pm1.sci());
        pm1.write(0x600, &POWER_BUTTON.to_le_bytes());
        assert_eq!((word(&pm1, 0x600), pm1.sci()), (0, false));
        assert_eq!(word(&pm1, 0x602), POWER_BUTTON, "it goes on listening");
    }

    #[test]
    fn the_machine_is_in_acpi_mode_and_off_by_s5_alone() {
        let mut pm1 = Pm1::default();
        assert_eq!(word(&pm1, 0x604), 1);
        for word in 0..=u16::MAX {
            let off = word & 0x3c00 == 0x2000;
            let power = pm1.write(0x604, &word.to_le_bytes());
            assert_eq!(power, off.then_some(Power::Off), "{word:#x}");
        }
        assert_eq!(pm1.write(0x605, &[0x20]), Some(Power::Off));
        assert_eq!(pm1, Pm1::default());
    }

    #[test]
    fn enable_bits_that_drivers_check_stick_and_no_others_do() {
        let mut pm1 = Pm1::default();
        pm1.write(0x600, &[0xff; 8]);
        assert_eq!(word(&pm1, 0x602), ENABLE);
        assert_eq!(word(&pm1, 0x600), 0, "a write sets no status");
        let mut all = [0xaa; 8];
        pm1.read(0x600, &mut all);
        assert_eq!(all, [0, 0, 0x20, 5, 1, 0, 0xaa, 0xaa]);
    }

    proptest! {
        /// Whatever a guest does, its registers come through a checkpoint as they are, and the level
        /// is what they say.
        #[test]
        fn any_state_a_guest_can_make_is_restored(
            acts in prop::collection::vec((0x5f0u16..0x610, any::<[u8; 4]>(), 1usize..5, any::<bool>()), 0..40)
        ) {
            let mut pm1 = Pm1::default();
            for (port, data, len, press) in acts {
                if Pm1::has(port) {
                    pm1.write(port, &data[..len]);
                }
                if press {
                    pm1.press();
                }
                let mut record = PlatformRecord::new_zeroed();
                pm1.save(&mut record);
                prop_assert_eq!(Pm1::of(&record), Ok(pm1));
                prop_assert_eq!(pm1.sci(), word(&pm1, 0x600) & word(&pm1, 0x602) != 0);
            }
        }

        /// A record is taken as it is or refused; what is taken is one that a guest could have made.
        #[test]
        fn a_hostile_record_is_refused_or_means_what_it_says(status: u16, enable: u16) {
            let mut record = PlatformRecord::new_zeroed();
            (record.pm1_status, record.pm1_enable) = (status, enable);
            let sound = status & !POWER_BUTTON == 0 && enable & !ENABLE == 0;
            let taken = Pm1::of(&record);
            prop_assert_eq!(taken.is_ok(), sound);
            if let Ok(pm1) = taken {
                prop_assert_eq!((word(&pm1, 0x600), word(&pm1, 0x602)), (status, enable));
            }
        }
    }
}
