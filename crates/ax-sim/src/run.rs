//! Many seeds, each in a process of its own: killed simulated processes leave threads behind.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;

use crate::seed::{self, Fault, Report};
use crate::universe::{Broken, Wish};

/// Seeds one process lives through before it is replaced.
const BATCH: u64 = 8;

/// What to simulate.
#[derive(Args, Clone, Debug)]
pub struct Simulate {
    /// How many seeds.
    #[arg(long, default_value_t = 500)]
    pub seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    pub first: u64,
    /// Processes at a time; default: one for each core.
    #[arg(long)]
    pub jobs: Option<usize>,
    /// Print what happened in each seed, line by line.
    #[arg(long)]
    pub story: bool,
    /// The last line is JSON.
    #[arg(long)]
    pub json: bool,
    /// Have the processes break a rule, to see that it is noticed.
    #[arg(long, value_name = "RULE")]
    pub broken: Option<Broken>,
    /// Strike this fault only.
    #[arg(long, value_name = "FAULT")]
    pub only: Option<Fault>,
    /// Live through the seeds in this process (used by itself).
    #[arg(long, hide = true)]
    pub here: bool,
}

/// What came of all seeds.
#[derive(Debug, Default)]
struct Sum {
    violations: Vec<(u64, String)>,
    turns: u64,
    answers: u64,
    simulated_ms: u64,
    faults: std::collections::BTreeMap<String, u64>,
}

/// Simulates; true when nothing was violated.
///
/// # Errors
/// This program can't be started again, or what it prints can't be read.
pub fn run(asked: &Simulate, again: &[&str]) -> io::Result<bool> {
    if asked.here {
        live_here(asked);
        return Ok(true);
    }
    let jobs = asked
        .jobs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    let (next, end) = (AtomicU64::new(asked.first), asked.first + asked.seeds);
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        let work = || -> io::Result<()> {
            loop {
                let from = next.fetch_add(BATCH, Ordering::SeqCst);
                if from >= end {
                    return Ok(());
                }
                batch(asked, again, from, (from + BATCH).min(end), &sum)?;
            }
        };
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => done?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        io::Result::Ok(())
    })?;
    let sum = sum.into_inner().unwrap_or_else(|e| e.into_inner());
    println!(
        "{} seeds: {} violations; {} answers in {:.1} simulated s, {} turns",
        asked.seeds,
        sum.violations.len(),
        sum.answers,
        sum.simulated_ms as f64 / 1000.0,
        sum.turns
    );
    for (fault, times) in &sum.faults {
        println!("  {times:>6} {fault}");
    }
    for (seed, what) in &sum.violations {
        println!(
            "seed {seed}: {what}\n  again: cargo xtask simulate --first {seed} --seeds 1 --story"
        );
    }
    if asked.json {
        let seeds: Vec<u64> = sum.violations.iter().map(|v| v.0).collect();
        println!(
            "{}",
            serde_json::json!({"seeds": asked.seeds, "violations": seeds.len(), "violating": seeds,
                "answers": sum.answers, "simulated_ms": sum.simulated_ms})
        );
    }
    Ok(sum.violations.is_empty())
}

/// Lives through seeds `from..end` in processes; one that ends early has met a violation in the seed it was at.
fn batch(
    asked: &Simulate,
    again: &[&str],
    mut from: u64,
    end: u64,
    sum: &Mutex<Sum>,
) -> io::Result<()> {
    while from < end {
        let mut child = spawn(asked, again, from, end)?;
        let output = child.stdout.take();
        let lines = output.map(|out| BufReader::new(out).lines());
        let mut said = Vec::new();
        for line in lines.into_iter().flatten() {
            let line = line?;
            match line.strip_prefix("done ") {
                Some(report) => {
                    from += 1;
                    said.clear();
                    let mut sum = sum.lock().unwrap_or_else(|e| e.into_inner());
                    let mut words = report.splitn(4, ' ');
                    let mut number = || words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
                    sum.turns += number();
                    sum.answers += number();
                    sum.simulated_ms += number();
                    for fault in words
                        .next()
                        .unwrap_or_default()
                        .split(',')
                        .filter(|f| !f.is_empty())
                    {
                        *sum.faults.entry(fault.to_owned()).or_default() += 1;
                    }
                }
                None => {
                    if asked.story {
                        println!("{line}");
                    }
                    said.push(line);
                }
            }
        }
        if !child.wait()?.success() {
            let what = said.iter().rev().find_map(|l| l.strip_prefix("VIOLATION "));
            let what = what.unwrap_or("its process ended").to_owned();
            let mut sum = sum.lock().unwrap_or_else(|e| e.into_inner());
            sum.violations.push((from, what));
            from += 1;
        }
    }
    Ok(())
}

fn spawn(asked: &Simulate, again: &[&str], from: u64, end: u64) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(again).args(["--here", "--first"]);
    command.arg(from.to_string()).arg("--seeds");
    command.arg((end - from).to_string());
    if asked.story {
        command.arg("--story");
    }
    if let Some(rule) = asked
        .broken
        .as_ref()
        .and_then(clap::ValueEnum::to_possible_value)
    {
        command.args(["--broken", rule.get_name()]);
    }
    if let Some(fault) = asked
        .only
        .as_ref()
        .and_then(clap::ValueEnum::to_possible_value)
    {
        command.args(["--only", fault.get_name()]);
    }
    command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn()
}

fn live_here(asked: &Simulate) {
    let wish = Wish {
        broken: asked.broken,
        only: asked.only,
    };
    for seed in asked.first..asked.first + asked.seeds {
        let failed = move |what: &str, story: &[String]| {
            let out = io::stdout();
            let mut out = out.lock();
            for line in story {
                let _ = writeln!(out, "{line}");
            }
            let _ = writeln!(out, "VIOLATION {what}");
            let _ = out.flush();
            std::process::exit(1);
        };
        let report = seed::live(seed, wish, failed);
        print(&report, seed, asked.story);
    }
    // Threads of killed processes are still there: nothing waits for them.
    std::process::exit(0);
}

fn print(report: &Report, seed: u64, story: bool) {
    if story {
        println!("seed {seed}, trace {:016x}", report.trace);
        report.story.iter().for_each(|line| println!("{line}"));
    }
    println!(
        "done {} {} {} {}",
        report.turns,
        report.answers,
        report.simulated_ms,
        report.faults.join(",")
    );
}
