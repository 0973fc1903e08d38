//! `cargo xtask bench-peers`: AX beside other systems that protect a guest, with the same guest and the same
//! clients on the same machine in one run.
//!
//! Every repetition of a system has a laboratory and a guest of its own, and nothing else runs meanwhile. The
//! systems take turns, in the other direction each time, so that a drift of the machine cancels out.

mod ax;
mod clients;
mod colo;
mod cpu;
mod qemu;
mod qmp;
mod ram;
mod system;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use testkit::net::{Host, Lab, isolate};

use crate::summary::median;
use crate::{Error, apart};
use clients::{Answers, Clients};
use colo::{Held, Setting};
use system::{Case, System};
use table::Measured;

/// The guest's network card, the same in every run.
const MAC: &str = "02:61:78:00:00:10";
/// How long anything may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(20);
/// x-checkpoint-delay beside filter-buffer, where every answer waits for a checkpoint. With 0 the guest hardly
/// runs between two of them, and answers later still.
const BUFFER_DELAY: u32 = 20;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench-peers --json                     everything, about 25 minutes\n  \
    cargo xtask bench-peers --quick --only qemu,colo   a look, about a minute\n  \
    cargo xtask bench-peers --repetitions 1 --results peers.jsonl\n                                                     \
    one more repetition, counted with those before\n\n\
    Needs KVM, and Debian's packages qemu-system-x86 and redis-tools.")]
pub struct Options {
    /// One line of JSON at the end: a list of {system, case, p50_us, p99_us, kept, cpu_s, blackout_ms}; times are
    /// what protection added, null where it was not run.
    #[arg(long)]
    json: bool,
    /// Only these systems: qemu, colo, filter-buffer, ax, or one of theirs (colo-100, ax-ft).
    #[arg(long, value_delimiter = ',', value_name = "SYSTEM")]
    only: Vec<String>,
    /// How often each system is measured, each time with a fresh guest; the table has the medians.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Length of a run of a client, seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// One repetition, runs of one second: to see that it works.
    #[arg(long, conflicts_with_all = ["repetitions", "seconds"])]
    quick: bool,
    /// Guest RAM.
    #[arg(long, default_value = "512M")]
    memory: String,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    /// Adds what is measured to this file, and counts what is in it already.
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// Build profile of AX.
    #[arg(long, default_value = "release")]
    profile: String,
}

/// The guest, the same in every system.
#[derive(Debug, Clone)]
pub struct Guest {
    cpus: u8,
    memory: String,
}

/// Runs the comparison.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    let systems = System::chosen(&options.only).map_err(Error::Failed)?;
    if apart::inside() {
        return compare(options, &systems);
    }
    // Whatever may be missing is told before anything is built.
    if let Err(no) = testkit::kvm::usable() {
        return Err(Error::NotHere(format!(
            "bench-peers runs virtual machines, and there is no usable KVM here: {no}.\n\
             How to get it: {}.",
            no.remedy
        )));
    }
    let qemu = systems.iter().any(|s| s.is_qemu());
    for (program, package, needed) in [
        (qemu::PROGRAM, "qemu-system-x86", qemu),
        (clients::REDIS_BENCHMARK, "redis-tools", true),
    ] {
        if needed && !on_path(program) {
            return Err(Error::NotHere(format!(
                "there is no {program} here. How to get it: apt-get install {package}."
            )));
        }
    }
    isolate::tun_opens()
        .map_err(|why| Error::NotHere(format!("bench-peers' guests need taps: {why}.")))?;
    isolate::possible()?;
    let mut product = PathBuf::from(".");
    if systems.iter().any(|s| !s.is_qemu()) {
        testkit::product::use_profile(&options.profile)?;
        let programs = testkit::product::Product::get()?;
        product = programs.axd.parent().unwrap_or(Path::new(".")).into();
    }
    apart::run(&product, false)
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// In the child that may make test hosts.
fn compare(options: &Options, systems: &[System]) -> Result<ExitCode, Error> {
    let (repetitions, seconds) = match options.quick {
        true => (1, 1),
        false => (options.repetitions, options.seconds),
    };
    let bench = Bench {
        guest: Guest {
            cpus: options.cpus,
            memory: options.memory.clone(),
        },
        run: Duration::from_secs(seconds),
        began: Instant::now(),
    };
    let mut results = Results::open(options.results.as_deref())?;
    println!(
        "{} CPUs and {} of RAM for the guest, runs of {seconds} s, {repetitions} repetitions",
        options.cpus, options.memory
    );
    let mut said = Vec::new();
    for system in systems {
        println!("\n{system}:");
        let lines = bench.settings(*system);
        for line in lines.iter().filter(|line| !said.contains(*line)) {
            println!("  {line}");
        }
        if lines.iter().any(|line| said.contains(line)) {
            println!("  the rest as above");
        }
        said.extend(lines);
    }
    println!();
    let before = table::repetitions(&results.all);
    for n in 0..repetitions {
        let mut order = systems.to_vec();
        if (before + n as usize) % 2 == 1 {
            order.reverse();
        }
        for system in order {
            bench.tell(&format!("repetition {} of {repetitions}: {system}", n + 1));
            results.add(bench.one(system))?;
        }
    }
    println!("{}", table::text(&results.all, systems));
    for reason in table::reasons(&results.all) {
        println!("not run: {reason}");
    }
    if options.json {
        let rows = table::rows(&results.all, systems);
        let line = serde_json::to_string(&rows).map_err(|e| Error::Failed(e.to_string()))?;
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

/// What was measured so far, and the file it is added to.
struct Results {
    all: Vec<Measured>,
    file: Option<std::fs::File>,
}

impl Results {
    fn open(path: Option<&Path>) -> Result<Results, Error> {
        let Some(path) = path else {
            return Ok(Results {
                all: Vec::new(),
                file: None,
            });
        };
        let failed = |e: &dyn std::fmt::Display| Error::Failed(format!("{}: {e}", path.display()));
        let before = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(failed(&e)),
        };
        let all = before
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .map_err(|e| failed(&e))?;
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path);
        let file = Some(file.map_err(|e| failed(&e))?);
        Ok(Results { all, file })
    }

    fn add(&mut self, measured: Vec<Measured>) -> Result<(), Error> {
        if let Some(file) = &mut self.file {
            for m in &measured {
                let line = serde_json::to_string(m).map_err(|e| Error::Failed(e.to_string()))?;
                writeln!(file, "{line}").map_err(|e| Error::Failed(format!("results: {e}")))?;
            }
        }
        self.all.extend(measured);
        Ok(())
    }
}

/// A system with the guest on it.
enum Running {
    Plain(qemu::Plain),
    Pair(colo::Pair),
    Ax(Box<ax::Ax>, System),
}

impl Running {
    fn start(guest: &Guest, system: System) -> Result<Running, Error> {
        Ok(match system {
            System::Qemu => Running::Plain(qemu::Plain::start(guest)?),
            System::Colo(_) | System::FilterBuffer => {
                Running::Pair(colo::Pair::start(guest, setting(system))?)
            }
            System::AxNone | System::AxHa | System::AxFt => {
                Running::Ax(Box::new(ax::Ax::start(guest, mode(system))?), system)
            }
        })
    }

    fn lab(&self) -> &Lab {
        match self {
            Running::Plain(plain) => &plain.place.lab,
            Running::Pair(pair) => &pair.place.lab,
            Running::Ax(ax, _) => &ax.site.lab,
        }
    }

    /// Whether anybody takes over.
    fn is_alone(&self) -> bool {
        matches!(self, Running::Plain(_) | Running::Ax(_, System::AxNone))
    }

    /// The hosts whose processes are the system's.
    fn hosts(&self) -> [&Host; 3] {
        let lab = self.lab();
        [&lab.a, &lab.b, &lab.witness]
    }

    fn stop_ms(&self) -> Option<f64> {
        match self {
            Running::Pair(pair) => Some(pair.stops()).filter(|s| !s.is_empty()).map(median),
            Running::Plain(_) | Running::Ax(..) => None,
        }
    }
}

fn setting(system: System) -> Setting {
    match system {
        System::Colo(delay) => Setting {
            held: Held::Compare,
            delay,
        },
        _ => Setting {
            held: Held::Buffer,
            delay: BUFFER_DELAY,
        },
    }
}

fn mode(system: System) -> &'static str {
    match system {
        System::AxHa => "ha",
        System::AxFt => "ft",
        _ => "none",
    }
}

struct Bench {
    guest: Guest,
    run: Duration,
    began: Instant,
}

impl Bench {
    fn tell(&self, text: &str) {
        eprintln!("[{:7.1} s] {text}", self.began.elapsed().as_secs_f64());
    }

    fn settings(&self, system: System) -> Vec<String> {
        match system {
            System::Qemu => qemu::Plain::settings(&self.guest),
            System::Colo(_) | System::FilterBuffer => {
                colo::Pair::settings(&self.guest, setting(system))
            }
            System::AxNone | System::AxHa | System::AxFt => {
                ax::Ax::settings(&self.guest, mode(system))
            }
        }
    }

    /// Every case of one system, on a guest of its own.
    fn one(&self, system: System) -> Vec<Measured> {
        let named = |case: Case| Measured {
            system: system.to_string(),
            case: case.to_string(),
            ..Measured::default()
        };
        let failed = |case: Case, e: &Error| {
            let why = crate::chain(e);
            self.tell(&format!("  {case}: {why}"));
            Measured {
                why_not: Some(why.lines().next().unwrap_or_default().into()),
                ..named(case)
            }
        };
        let started = Running::start(&self.guest, system).and_then(|running| {
            Clients::new(running.lab(), self.run).warm_up()?;
            Ok(running)
        });
        let mut running = match started {
            Ok(running) => running,
            Err(e) => {
                self.tell(&format!("  it does not start: {}", crate::chain(&e)));
                return Case::ALL.map(|case| failed(case, &e)).into();
            }
        };
        let cases = Case::ALL.into_iter();
        cases
            .map(|case| match self.case(&mut running, case, named(case)) {
                Ok(measured) => {
                    self.tell(&format!("  {}", shown(&measured)));
                    measured
                }
                Err(e) => failed(case, &e),
            })
            .collect()
    }

    fn case(&self, running: &mut Running, case: Case, blank: Measured) -> Result<Measured, Error> {
        if case == Case::Failover {
            return self.failover(running, blank);
        }
        // Stops before the run are not the run's.
        let _ = running.stop_ms();
        let clients = Clients::new(running.lab(), self.run);
        let hosts = running.hosts();
        let (since, before) = (Instant::now(), cpu::used(&hosts));
        let answers = match case {
            Case::Idle => {
                std::thread::sleep(self.run);
                None
            }
            Case::UdpEcho => Some(clients.udp_echo()?),
            Case::Get(n) => Some(clients.redis_benchmark("get", n)?),
            Case::Set(n) => Some(clients.redis_benchmark("set", n)?),
            Case::Ledger => Some(clients.ledger()?),
            Case::Dirty(rate) => Some(clients.dirty(rate)?),
            Case::Failover => None,
        };
        let used = cpu::used(&hosts).saturating_sub(before).as_secs_f64();
        // A run is a little longer or shorter than it was to be.
        let share = self.run.as_secs_f64() / since.elapsed().as_secs_f64();
        let measured = Measured {
            cpu_s: Some(used * share),
            stop_ms: running.stop_ms(),
            ..blank
        };
        Ok(match answers {
            None => measured,
            Some(Answers {
                p50_us,
                p99_us,
                per_s,
            }) => Measured {
                p50_us: Some(p50_us),
                p99_us: Some(p99_us),
                per_s: Some(per_s),
                ..measured
            },
        })
    }

    fn failover(&self, running: &mut Running, blank: Measured) -> Result<Measured, Error> {
        if running.is_alone() {
            return Err(Error::Failed("no other host has the guest".into()));
        }
        if let Running::Pair(pair) = &running {
            pair.expect_failover();
        }
        let lab = running.lab();
        let seen = Clients::new(lab, self.run).failover(|| Ok(lab.a.kill_all()?.at));
        if let Running::Pair(pair) = running
            && let Some(e) = pair.failover_error()
        {
            return Err(e);
        }
        let seen = seen?;
        let v = seen.verdict;
        Ok(Measured {
            blackout_ms: Some(seen.blackout_ms),
            harm: Some(v.lost + v.duplicated + v.connections_broken),
            ..blank
        })
    }
}

/// One measurement in a line of progress.
fn shown(m: &Measured) -> String {
    let part = |name: &str, value: Option<f64>, unit: &str| {
        value.map_or(String::new(), |v| format!("  {name} {v:.1}{unit}"))
    };
    format!(
        "{:14}{}{}{}{}{}{}",
        m.case,
        part("p50", m.p50_us, " µs"),
        part("p99", m.p99_us, " µs"),
        part("answers", m.per_s, "/s"),
        part("CPU", m.cpu_s, " s"),
        part("stop", m.stop_ms, " ms"),
        part("blackout", m.blackout_ms, " ms"),
    )
}
