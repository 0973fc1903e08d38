//! The fixed ports of a PC that guests expect: CMOS and RTC, keyboard controller, reset, and ACPI's
//! power button and poweroff ([`super::pm1`]).
//!
//! PCI configuration ports answer all ones: there is no PCI.

use std::time::{SystemTime, UNIX_EPOCH};

use super::SciLine;
use super::pm1::Pm1;
use super::records::PlatformRecord;
use crate::ports::Power;
use zerocopy::FromZeros;

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
const RESET_CONTROL: u16 = 0xcf9;

/// "Pulse the reset line", the keyboard controller's command.
const PULSE_RESET: u8 = 0xfe;
/// Input buffer free, so a reset command is taken at once; output buffer always full, so a
/// driver that looks for a keyboard finds within a few reads that none is there.
const KEYBOARD_STATUS: u8 = 0xfd;
/// "Reset CPU" in the reset control register.
const RESET_CPU: u8 = 0x04;

/// The fixed ports.
pub(super) struct Platform {
    record: PlatformRecord,
    pm1: Pm1,
    line: Option<SciLine>,
    /// What the line was told last; it is low when it is new.
    driven: bool,
}

/// A checked record, ready to be put in place.
#[derive(Debug)]
pub(super) struct Restored(PlatformRecord, Pm1);

impl Platform {
    pub(super) fn new() -> Self {
        Platform {
            record: PlatformRecord::new_zeroed(),
            pm1: Pm1::default(),
            line: None,
            driven: false,
        }
    }

    /// From here on the system control interrupt goes to `line`, which is low.
    pub(super) fn connect(&mut self, line: SciLine) {
        self.line = Some(line);
        self.driven = false;
        self.drive();
    }

    /// Presses the power button; whether the guest listens to it.
    pub(super) fn press(&mut self) -> bool {
        let listens = self.pm1.press();
        self.drive();
        listens
    }

    /// Gives the line the level that the registers say.
    fn drive(&mut self) {
        let level = self.pm1.sci();
        if level != self.driven
            && let Some(line) = &self.line
        {
            line(level);
            self.driven = level;
        }
    }

    /// Reads `port`. What is not there reads as all ones.
    pub(super) fn read(&mut self, port: u16, out: &mut [u8]) {
        out.fill(0xff);
        if Pm1::has(port) {
            return self.pm1.read(port, out);
        }
        let value = match port {
            KEYBOARD_DATA => 0,
            KEYBOARD_COMMAND => KEYBOARD_STATUS,
            CMOS_INDEX => self.record.cmos_index,
            CMOS_DATA => self.cmos(),
            RESET_CONTROL => 0,
            _ => return,
        };
        if let Some(first) = out.first_mut() {
            *first = value;
        }
    }

    /// Writes `port`, and says what that means for the whole machine.
    pub(super) fn write(&mut self, port: u16, data: &[u8]) -> Option<Power> {
        let first = *data.first()?;
        match port {
            KEYBOARD_COMMAND if first == PULSE_RESET => return Some(Power::Reset),
            RESET_CONTROL if first & RESET_CPU != 0 => return Some(Power::Reset),
            _ if Pm1::has(port) => {
                let power = self.pm1.write(port, data);
                self.drive();
                return power;
            }
            CMOS_INDEX => self.record.cmos_index = first & 0x7f,
            CMOS_DATA => {
                let index = usize::from(self.record.cmos_index);
                if let Some(byte) = self.record.cmos.get_mut(index) {
                    *byte = first;
                }
            }
            _ => {}
        }
        None
    }

    /// The CMOS byte at the index: the clock's registers, or what the guest stored there.
    fn cmos(&mut self) -> u8 {
        let index = self.record.cmos_index;
        match index {
            0x0a => 0x26, // 32768 Hz, no update in progress
            0x0b => 0x02, // BCD, 24 hours
            0x0c => 0,    // no interrupt
            0x0d => 0x80, // battery good
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | 0x32 => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                let now = now.map_or(0, |t| t.as_secs());
                // I7: another host's clock may be behind what the guest has read here before.
                self.record.latest = self.record.latest.max(now);
                clock_register(index, self.record.latest)
            }
            _ => self
                .record
                .cmos
                .get(usize::from(index))
                .copied()
                .unwrap_or(0),
        }
    }

    /// As at power-on; the clock keeps going.
    pub(super) fn reset(&mut self) {
        self.record.cmos_index = 0;
        self.pm1 = Pm1::default();
        self.drive();
    }

    pub(super) fn record(&self) -> PlatformRecord {
        let mut record = self.record;
        self.pm1.save(&mut record);
        record
    }

    pub(super) fn check(record: &PlatformRecord) -> Result<Restored, &'static str> {
        let pm1 = Pm1::of(record)?;
        let mut record = *record;
        record.cmos_index &= 0x7f;
        Ok(Restored(record, pm1))
    }

    /// The line is driven again, whatever the chips' own state says of it: they do not save whether it is
    /// high (rule 11: devices after KVM).
    pub(super) fn load(&mut self, Restored(record, pm1): Restored) {
        self.record = record;
        self.pm1 = pm1;
        self.drive();
    }
}

/// An RTC register (BCD) at `seconds` since 1970, UTC.
fn clock_register(index: u8, seconds: u64) -> u8 {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let value = match index {
        0x00 => second % 60,
        0x02 => second / 60 % 60,
        0x04 => second / 3600,
        0x06 => (days + 4) % 7 + 1, // 1970-01-01 was a Thursday; Sunday is 1
        0x07 => day,
        0x08 => month,
        0x09 => year % 100,
        _ => year / 100 % 100,
    };
    (value / 10 * 16 + value % 10) as u8
}

/// Year, month, day of the day that many days after 1970-01-01 (Gregorian).
fn civil(days: u64) -> (u64, u64, u64) {
    // Years counted from March, so that the leap day is the last: day 0 is 0000-03-01.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, wraps) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (400 * era + year + wraps, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_shows_known_moments_in_bcd() {
        let shown = |t| [0x32, 9, 8, 7, 4, 2, 0, 6].map(|r| clock_register(r, t));
        assert_eq!(shown(0), [0x19, 0x70, 1, 1, 0, 0, 0, 5]);
        assert_eq!(
            shown(951_782_399),
            [0x20, 0x00, 2, 0x28, 0x23, 0x59, 0x59, 2]
        );
        assert_eq!(shown(951_782_400), [0x20, 0x00, 2, 0x29, 0, 0, 0, 3]);
        assert_eq!(
            shown(4_107_542_399),
            [0x21, 0x00, 2, 0x28, 0x23, 0x59, 0x59, 1]
        );
        assert_eq!(shown(4_107_542_400), [0x21, 0x00, 3, 1, 0, 0, 0, 2]);
    }

    #[test]
    fn the_clock_never_runs_backwards() {
        let mut platform = Platform::new();
        let mut record = platform.record();
        record.latest = 4_107_542_400;
        platform.load(Platform::check(&record).unwrap());
        for (register, want) in [(0x32, 0x21), (0x09, 0x00), (0x08, 0x03), (0x07, 0x01)] {
            platform.write(CMOS_INDEX, &[register]);
            let mut byte = [0];
            platform.read(CMOS_DATA, &mut byte);
            assert_eq!(byte, [want]);
        }
    }

    #[test]
    fn power_and_reset_ports_mean_what_they_say_and_nothing_else_does() {
        let mut p = Platform::new();
        assert_eq!(p.write(0x604, &[0x00, 0x20]), Some(Power::Off));
        assert_eq!(p.write(0x604, &[0x00, 0x20, 0, 0]), Some(Power::Off));
        assert_eq!(p.write(0x64, &[0xfe]), Some(Power::Reset));
        assert_eq!(p.write(0xcf9, &[0x06]), Some(Power::Reset));
        for (port, data) in [
            (0x604, 0x20),
            (0x64, 0x20),
            (0x60, 0xfe),
            (0xcf9, 0x02),
            (0x80, 0xfe),
        ] {
            assert_eq!(p.write(port, &[data]), None, "port {port:#x}");
        }
        let mut out = [0; 4];
        p.read(0xcfc, &mut out);
        assert_eq!(out, [0xff; 4]);
    }
}
