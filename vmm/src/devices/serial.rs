//! The serial console: a 16550A at port 0x3f8, interrupt line 4.
//!
//! Output is handed on at the end of the port write that made it, so it belongs to the epoch in
//! which the guest wrote it. While nobody takes it, it stays in a bounded backlog, part of the
//! saved state, and the transmitter reports itself busy.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::warn;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::FromZeros;

use super::records::{BACKLOG, FIFO, SerialRecord};
use crate::ports::Outputs;

/// First I/O port.
pub(super) const BASE: u16 = 0x3f8;
/// Last I/O port.
pub(super) const LAST: u16 = BASE + 7;
/// Global system interrupt.
pub(super) const GSI: u32 = 4;

const LINE_STATUS: u16 = 5;
const TRANSMITTER_EMPTY: u8 = 0x60;
const TRANSMITTER_INTERRUPT_ENABLED: u8 = 0x02;
const TRANSMITTER_INTERRUPT: u8 = 0x02;
const NO_INTERRUPT: u8 = 0x01;

/// The interrupt line, shared with the port when it is rebuilt.
#[derive(Debug, Clone)]
struct Irq(Arc<EventFd>);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes the console's writer when the guest has read all input.
#[derive(Debug)]
struct InputRead {
    wakeup: EventFd,
    wanted: AtomicBool,
}

impl SerialEvents for InputRead {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.wanted.swap(false, Ordering::Relaxed) {
            // A full counter means that a wakeup is pending.
            let _ = self.wakeup.write(1);
        }
    }
}

type Port = Serial<Irq, Arc<InputRead>, Vec<u8>>;

/// The serial port.
pub(super) struct SerialPort {
    port: Port,
    irq: Irq,
    input: Arc<InputRead>,
    outputs: Arc<dyn Outputs>,
    /// All state, as it will be saved. The registers are copied here after every access, because
    /// reading them from `port` may allocate and saving must not; the backlog lives here.
    record: SerialRecord,
    warned: bool,
}

/// A checked record, ready to be put in place.
pub(super) struct Restored(SerialRecord, SerialState);

impl SerialPort {
    /// A port after reset, at the start of the console stream.
    pub(super) fn new(outputs: Arc<dyn Outputs>, irq: EventFd, wakeup: EventFd) -> Self {
        let irq = Irq(Arc::new(irq));
        let input = Arc::new(InputRead {
            wakeup,
            wanted: AtomicBool::new(false),
        });
        let mut serial = SerialPort {
            port: Serial::with_events(irq.clone(), Arc::clone(&input), Vec::with_capacity(8)),
            irq,
            input,
            outputs,
            record: SerialRecord::new_zeroed(),
            warned: false,
        };
        serial.note();
        serial
    }

    /// Reads a port, as often as `out` has bytes (string instructions).
    pub(super) fn read(&mut self, port: u16, out: &mut [u8]) {
        let register = port.wrapping_sub(BASE);
        for byte in out {
            *byte = self.port.read(register as u8);
            if register == LINE_STATUS && self.record.backlog_len > 0 {
                *byte &= !TRANSMITTER_EMPTY;
            }
        }
        self.note();
    }

    /// Writes a port, as often as `data` has bytes. True when output is left that nobody takes.
    pub(super) fn write(&mut self, port: u16, data: &[u8]) -> bool {
        let register = port.wrapping_sub(BASE) as u8;
        for byte in data {
            if let Err(error) = self.port.write(register, *byte) {
                self.warn(&format!("serial port: {error}"));
            }
            if !self.port.writer().is_empty() {
                self.push();
            }
        }
        self.note();
        self.drain();
        self.record.backlog_len > 0
    }

    /// Gives the guest input. Returns how many bytes fit; a wakeup follows if not all did.
    pub(super) fn input(&mut self, bytes: &[u8]) -> usize {
        self.input.wanted.store(true, Ordering::Relaxed);
        // The only errors: no room (0 fit), or an interrupt not raised (all that fit did).
        let room = bytes.len().min(self.port.fifo_capacity());
        let fit = match self.port.enqueue_raw_bytes(bytes) {
            Ok(fit) => fit,
            Err(vm_superio::serial::Error::FullFifo) => 0,
            Err(_) => room,
        };
        if fit == bytes.len() {
            self.input.wanted.store(false, Ordering::Relaxed);
        }
        self.note();
        fit
    }

    /// Hands on what nobody took before, and tells the driver that it may send again. True when
    /// some is still left.
    pub(super) fn retry(&mut self) -> bool {
        if self.record.backlog_len > 0 {
            self.drain();
            if self.record.backlog_len == 0 {
                self.transmitter_ready();
            }
        }
        self.record.backlog_len > 0
    }

    /// Raises the interrupt if the driver uses interrupts (rule 12).
    pub(super) fn signal_anyway(&mut self) {
        if self.record.interrupt_enable != 0 {
            let _ = self.irq.trigger();
        }
    }

    /// Registers as at power-on. The console stream goes on: what the guest wrote stays written.
    pub(super) fn reset(&mut self) {
        self.rebuild(&SerialState::default());
        self.note();
    }

    /// The state as it will be saved.
    pub(super) fn record(&self) -> &SerialRecord {
        &self.record
    }

    pub(super) fn check(record: &SerialRecord) -> Result<Restored, &'static str> {
        let fifo = record.fifo.get(..usize::from(record.fifo_len));
        let fifo = fifo.ok_or("its input is longer than the port's FIFO")?;
        if usize::from(record.backlog_len) > BACKLOG {
            return Err("its output is longer than the port's backlog");
        }
        let state = SerialState {
            baud_divisor_low: record.divisor_low,
            baud_divisor_high: record.divisor_high,
            interrupt_enable: record.interrupt_enable,
            interrupt_identification: record.interrupt_identification,
            line_control: record.line_control,
            line_status: record.line_status,
            modem_control: record.modem_control,
            modem_status: record.modem_status,
            scratch: record.scratch,
            in_buffer: fifo.to_vec(),
        };
        Ok(Restored(*record, state))
    }

    pub(super) fn load(&mut self, Restored(record, state): Restored) {
        self.record = record;
        self.rebuild(&state);
        self.note();
    }

    /// Moves what the port has put out to the backlog.
    fn push(&mut self) {
        let bytes = std::mem::take(self.port.writer_mut());
        for byte in &bytes {
            if usize::from(self.record.backlog_len) == BACKLOG {
                self.drain();
            }
            match self
                .record
                .backlog
                .get_mut(usize::from(self.record.backlog_len))
            {
                Some(free) => {
                    *free = *byte;
                    self.record.backlog_len += 1;
                }
                // A driver that ignores "transmitter busy" overruns it, as on a real port.
                None => self.warn("console output is lost: the guest writes to a busy port"),
            }
        }
        let writer = self.port.writer_mut();
        *writer = bytes;
        writer.clear();
    }

    fn drain(&mut self) {
        let bytes = self
            .record
            .backlog
            .get(..usize::from(self.record.backlog_len));
        let bytes = bytes.unwrap_or_default();
        if !bytes.is_empty() && self.outputs.console(self.record.offset, bytes).is_ok() {
            self.record.offset = self.record.offset.wrapping_add(bytes.len() as u64);
            self.record.backlog_len = 0;
        }
    }

    /// The transmitter-empty interrupt, which the driver waits for after it saw it busy.
    fn transmitter_ready(&mut self) {
        let mut state = self.port.state();
        if state.interrupt_enable & TRANSMITTER_INTERRUPT_ENABLED != 0 {
            state.interrupt_identification &= !NO_INTERRUPT;
            state.interrupt_identification |= TRANSMITTER_INTERRUPT;
            self.rebuild(&state); // raises it
            self.note();
        }
    }

    fn rebuild(&mut self, state: &SerialState) {
        let input = Arc::clone(&self.input);
        match Port::from_state(state, self.irq.clone(), input, Vec::with_capacity(8)) {
            Ok(port) => self.port = port,
            Err(error) => self.warn(&format!("serial port: {error}")),
        }
    }

    fn note(&mut self) {
        let state = self.port.state();
        let record = &mut self.record;
        record.divisor_low = state.baud_divisor_low;
        record.divisor_high = state.baud_divisor_high;
        record.interrupt_enable = state.interrupt_enable;
        record.interrupt_identification = state.interrupt_identification;
        record.line_control = state.line_control;
        record.line_status = state.line_status;
        record.modem_control = state.modem_control;
        record.modem_status = state.modem_status;
        record.scratch = state.scratch;
        record.fifo = [0; FIFO];
        record.fifo_len = state.in_buffer.len().min(FIFO) as u8;
        record
            .fifo
            .iter_mut()
            .zip(&state.in_buffer)
            .for_each(|(to, from)| *to = *from);
    }

    fn warn(&mut self, what: &str) {
        if !self.warned {
            self.warned = true;
            warn!("{what} (said once)");
        }
    }
}
