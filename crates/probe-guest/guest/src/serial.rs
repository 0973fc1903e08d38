//! The serial console (COM1): queued output, interrupt-driven input.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::cpu::{inb, outb, outsb};

const DATA: u16 = 0x3f8;
const IER: u16 = 0x3f9;
const FCR: u16 = 0x3fa;
const LCR: u16 = 0x3fb;
const MCR: u16 = 0x3fc;
const LSR: u16 = 0x3fd;
const LSR_DATA: u8 = 0x01;
const LSR_EMPTY: u8 = 0x20;
const FIFO: usize = 16;

/// Input and output pin of the I/O APIC.
pub const PIN: u8 = 4;
/// Log lines are dropped beyond this many waiting bytes; replies wait with their producers.
pub const QUEUE: usize = 64 * 1024;

/// The console.
#[derive(Default)]
pub struct Serial {
    out: VecDeque<u8>,
    line: Vec<u8>,
    too_long: bool,
    seen: u32,
}

impl Serial {
    /// Sets up 115200 8N1 with FIFO, receive interrupt on.
    pub fn new() -> Self {
        for (port, value) in [
            (LCR, 0x80),
            (DATA, 1),
            (IER, 0),
            (LCR, 3),
            (FCR, 7),
            (MCR, 0xb),
            (IER, 1),
        ] {
            outb(port, value);
        }
        // Bytes may have come before the interrupt was on: look once.
        Self {
            seen: u32::MAX,
            ..Self::default()
        }
    }

    /// Queues text; lines end with CR LF on the wire.
    pub fn write(&mut self, text: &str) {
        for b in text.bytes() {
            if b == b'\n' {
                self.out.push_back(b'\r');
            }
            self.out.push_back(b);
        }
    }

    /// Bytes not yet given to the device.
    pub fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Gives the device what it takes now; false if it would take no more.
    pub fn flush(&mut self) -> bool {
        while !self.out.is_empty() {
            if inb(LSR) & LSR_EMPTY == 0 {
                return false;
            }
            let mut chunk = [0; FIFO];
            let n = self.out.len().min(FIFO);
            for (to, from) in chunk.iter_mut().zip(self.out.drain(..n)) {
                *to = from;
            }
            outsb(DATA, &chunk[..n]);
        }
        true
    }

    /// Takes in bytes if an interrupt announced some; calls `run` with each whole line.
    pub fn poll(&mut self, count: u32, mut run: impl FnMut(&mut Self, &str)) {
        if count == self.seen {
            return;
        }
        self.seen = count;
        while inb(LSR) & LSR_DATA != 0 {
            match inb(DATA) {
                b'\r' | b'\n' => {
                    let line = core::mem::take(&mut self.line);
                    if self.too_long {
                        self.too_long = false;
                        self.write("ERR line too long\n");
                    } else if let Ok(text) = core::str::from_utf8(&line)
                        && !text.trim().is_empty()
                    {
                        run(self, text);
                    }
                    self.line = line;
                    self.line.clear();
                }
                8 | 127 => {
                    self.line.pop();
                }
                _ if self.line.len() >= crate::command::MAX_LINE => self.too_long = true,
                b => self.line.push(b),
            }
        }
    }
}

/// Writes without any state, for panics.
pub fn write_now(text: &str) {
    for b in text.bytes() {
        for _ in 0..100_000 {
            if inb(LSR) & LSR_EMPTY != 0 {
                break;
            }
        }
        outb(DATA, b);
    }
}
