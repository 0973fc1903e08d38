//! Control: commands from TCP 7001 and from the console, and the jobs they start.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::button::PowerButton;
use crate::command::{BadCommand, Button, Command, MAX_LINE};
use crate::cpu::{self, Clock};
use crate::load::{DONE, ORDERS};
use crate::mem::Arena;
use crate::percpu;
use crate::serial::{QUEUE, Serial};
use crate::stack::{Conn, Consumed, line};
use crate::virtio::blk::Blk;
use crate::work::{DigestJob, Work};

/// Where a command came from, and its answer goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The serial console.
    Console,
    /// The connection with this index and generation.
    Tcp(usize, u32),
}

/// An end of the machine's life, once its answer is out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Triple fault after a panic line.
    Crash,
    /// ACPI S5.
    Poweroff,
    /// Keyboard controller reset.
    Reboot,
}

/// Port that takes `OUTSB`'s bytes.
const TEST_PORT: u16 = 0x510;
/// Digests waiting for their turn.
const MAX_JOBS: usize = 16;

/// State behind the commands.
pub struct Control {
    clock: &'static Clock,
    cpus: usize,
    arena: Arena,
    work_pages: u64,
    jobs: VecDeque<(Origin, DigestJob)>,
    work: Option<Work>,
    counting: Option<(u64, u64)>,
    /// Set by `CRASH`, `POWEROFF` and `REBOOT`.
    pub end: Option<End>,
    /// The power button.
    pub button: PowerButton,
    /// Times CPU 0's timer was armed.
    pub armed: u64,
}

enum Outcome {
    Reply(String),
    /// Answered by a job.
    Later,
}

impl Control {
    /// `work_pages` of the arena are for `WORK`.
    pub fn new(clock: &'static Clock, cpus: usize, arena: Arena, work_pages: u64) -> Self {
        Self {
            clock,
            cpus,
            arena,
            work_pages,
            jobs: VecDeque::with_capacity(MAX_JOBS),
            work: None,
            counting: None,
            end: None,
            button: PowerButton::new(),
            armed: 0,
        }
    }

    /// Deals with input of connection `conn`.
    pub fn serve(
        &mut self,
        conn: usize,
        generation: u32,
        disks: &[Blk],
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Consumed {
        let (text, bytes) = match line(input, MAX_LINE) {
            Ok(Some(found)) => found,
            Ok(None) => {
                return Consumed {
                    bytes: 0,
                    close: false,
                    wait: false,
                };
            }
            Err(()) => {
                out.extend_from_slice(b"ERR line too long\n");
                return Consumed {
                    bytes: input.len(),
                    close: true,
                    wait: false,
                };
            }
        };
        let text = core::str::from_utf8(text).unwrap_or("?");
        match self.execute(Origin::Tcp(conn, generation), text, disks) {
            Outcome::Reply(reply) => {
                out.extend_from_slice(reply.as_bytes());
                out.push(b'\n');
                Consumed {
                    bytes,
                    close: false,
                    wait: false,
                }
            }
            Outcome::Later => Consumed {
                bytes,
                close: false,
                wait: true,
            },
        }
    }

    /// Deals with a line from the console.
    pub fn console(&mut self, text: &str, disks: &[Blk], serial: &mut Serial) {
        if let Outcome::Reply(reply) = self.execute(Origin::Console, text, disks) {
            serial.write(&reply);
            serial.write("\n");
        }
    }

    fn execute(&mut self, origin: Origin, text: &str, disks: &[Blk]) -> Outcome {
        Outcome::Reply(match Command::parse(text) {
            Err(BadCommand::Unknown) => "ERR unknown command; try HELP".into(),
            Err(BadCommand::Usage(usage)) => format!("ERR usage: {usage}"),
            Ok(Command::Ping) => "PONG".into(),
            Ok(Command::Echo(text)) => text.into(),
            Ok(Command::Help) => "PING | ECHO <text> | DIRTY <pages> <per-second> \
                <bytes-per-page> | SPIN on|off | CLOCK | HASH [start_page n_pages] | \
                DISKHASH [dev] | WORK <seed> <steps> | WORKSTATUS | COUNTERS | COUNT <n> | \
                OUTSB <n> | BUTTON unheard|poweroff|ignore|reboot | CRASH | POWEROFF | REBOOT"
                .into(),
            Ok(Command::Dirty {
                pages,
                per_second,
                bytes,
            }) => {
                let room = self.arena.pages() - self.work_pages;
                if pages > room {
                    format!("ERR at most {room} pages in this machine")
                } else {
                    ORDERS.dirty(pages, per_second, bytes);
                    "OK".into()
                }
            }
            Ok(Command::Spin(on)) => {
                ORDERS.spin(on);
                "OK".into()
            }
            Ok(Command::Clock) => {
                let (tsc, ns) = (cpu::rdtsc(), self.clock.now());
                let (source, back) = (self.clock.source(), self.clock.backward_steps());
                format!("tsc={tsc} ns={ns} source={source} backward={back}")
            }
            Ok(Command::Hash(range)) => {
                let (start, n) = range.unwrap_or((0, self.work_pages));
                match start
                    .checked_add(n)
                    .filter(|end| *end <= self.arena.pages())
                {
                    None => format!("ERR the arena has {} pages", self.arena.pages()),
                    Some(end) => {
                        return self.start(origin, DigestJob::arena(self.arena, start, end));
                    }
                }
            }
            Ok(Command::DiskHash(n)) => {
                match usize::try_from(n).ok().filter(|n| *n < disks.len()) {
                    None => format!("ERR there are {} disks", disks.len()),
                    Some(n) => return self.start(origin, DigestJob::disk(n)),
                }
            }
            Ok(Command::Work { seed, steps }) => {
                if self.work.as_ref().is_some_and(|w| !w.finished()) {
                    "ERR work is under way".into()
                } else {
                    self.work = Some(Work::new(
                        seed,
                        steps,
                        self.arena,
                        self.work_pages,
                        disks.last(),
                    ));
                    "OK".into()
                }
            }
            Ok(Command::WorkStatus) => match &self.work {
                None => "none 0/0".into(),
                Some(w) => {
                    let state = match (w.failed, w.finished()) {
                        (true, _) => "failed",
                        (_, true) => "done",
                        _ => "running",
                    };
                    format!("{state} {}/{}", w.step, w.steps)
                }
            },
            Ok(Command::Counters) => self.counters(),
            Ok(Command::Crash) => {
                self.end = Some(End::Crash);
                "OK".into()
            }
            Ok(Command::Outsb(n)) => {
                let bytes: Vec<u8> = (0..n).map(|i| i as u8).collect();
                cpu::outsb(TEST_PORT, &bytes);
                "OK".into()
            }
            Ok(Command::Count(n)) => {
                self.counting = Some((0, n));
                "OK".into()
            }
            Ok(Command::Button(does)) => match self.button.listen(does) {
                true => "OK".into(),
                false => "ERR this machine has no power button".into(),
            },
            Ok(Command::Poweroff) => {
                self.end = Some(End::Poweroff);
                "OK".into()
            }
            Ok(Command::Reboot) => {
                self.end = Some(End::Reboot);
                "OK".into()
            }
        })
    }

    fn start(&mut self, origin: Origin, job: DigestJob) -> Outcome {
        if self.jobs.len() >= MAX_JOBS {
            return Outcome::Reply("ERR too many digests under way".into());
        }
        self.jobs.push_back((origin, job));
        Outcome::Later
    }

    fn counters(&self) -> String {
        let mut text = format!("cpus={}", self.cpus);
        for (cpu, done) in DONE.iter().enumerate().take(self.cpus) {
            let get =
                |n: &core::sync::atomic::AtomicU64| n.load(core::sync::atomic::Ordering::Relaxed);
            let armed = if cpu == 0 {
                self.armed
            } else {
                get(&done.armed)
            };
            text += &format!(
                " cpu{cpu}.armed={armed} cpu{cpu}.ticks={} cpu{cpu}.interrupts={} \
                 cpu{cpu}.writes={} cpu{cpu}.spins={}",
                percpu::timer_ticks(cpu),
                percpu::events(cpu),
                get(&done.writes),
                get(&done.spins),
            );
        }
        text
    }

    /// Looks at the power button. True when the guest is to be ended in order.
    pub fn pressed(&mut self) -> bool {
        match self.button.poll() {
            Some(Button::Reboot) => self.end = Some(End::Reboot),
            Some(Button::Poweroff) => return true,
            Some(Button::Unheard | Button::Ignore) | None => {}
        }
        false
    }

    /// Whether there are lines of `COUNT` to come.
    pub fn is_counting(&self) -> bool {
        self.counting.is_some()
    }

    /// Moves jobs on. True while there is something to do right away, answers to send included.
    pub fn poll(&mut self, conns: &mut [Conn], disks: &mut [Blk], serial: &mut Serial) -> bool {
        let mut answered = false;
        if let Some((origin, job)) = self.jobs.front_mut()
            && let Some(result) = job.poll(disks)
        {
            let text = match result {
                Ok(digest) => format!("{digest:016x}\n"),
                Err(why) => format!("ERR {why}\n"),
            };
            match *origin {
                Origin::Console => serial.write(&text),
                Origin::Tcp(n, generation) => {
                    if let Some(conn) = conns.get_mut(n).filter(|c| c.generation == generation) {
                        conn.answer(text.as_bytes());
                    }
                }
            }
            self.jobs.pop_front();
            answered = true;
        }
        if let Some(work) = &mut self.work {
            work.poll(disks.last_mut());
        }
        if let Some((next, n)) = &mut self.counting {
            while *next < *n && serial.waiting() < QUEUE / 2 {
                serial.write(&format!("{next}\n"));
                *next += 1;
            }
            if next == n {
                self.counting = None;
            }
        }
        answered
            || self.work.as_ref().is_some_and(Work::busy)
            || self.jobs.front().is_some_and(|(_, job)| job.busy())
    }
}
