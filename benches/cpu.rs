//! What protection costs a guest that only computes, and what it costs to do nothing.
//!
//! *busy*: turns of a busy loop a second (`SPIN`, `COUNTERS` of the probe guest) of a guest without
//! output, in modes `none` and `ft`, in turn. The loop runs on every CPU but the first, where there are
//! more. *idle*: the CPU time that all `ax-vmm` and `axd` of both hosts take, in shares of one core,
//! without a client; what `ft` takes more than `none` is the cost of an idle protected VM.
//!
//! `AX_BENCH_SECONDS` (30): length of a run. `AX_BENCH_ROUNDS` (2): runs of each kind.
//! `AX_BENCH_ONLY`: `busy` or `idle`. `AX_BENCH_CPUS` (2), `AX_BENCH_MEMORY` (512M): the guest.

mod common;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Guest, MODES, Result, Shape, median, setting, share};
use serde_json::json;
use testkit::site::{Side, Site, SiteSpec};

/// From the start of a guest to the first look: its copy is made, its clients' caches are warm.
const SETTLE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    common::main("cpu", bench)
}

fn bench() -> Result<()> {
    let time = Duration::from_secs(setting("AX_BENCH_SECONDS", 30)?.max(1));
    let rounds = setting("AX_BENCH_ROUNDS", 2)?;
    let shape = Shape::from_env();
    let kinds = ["busy", "idle"].map(common::is_asked_for);
    let mut seen: [[Vec<f64>; 2]; 2] = Default::default();
    println!("mutual TLS, {shape}, runs of {time:?}");
    println!("round  mode    busy: turns/s   idle: share of a core");
    common::on_site(SiteSpec::default(), |site| {
        for round in 0..rounds {
            for mode in common::order(round) {
                let name = format!("{}-{round}", MODES[mode]);
                let guest = Guest::start(site, &name, MODES[mode], &shape.args())?;
                let mut told = ["-".to_string(), "-".to_string()];
                for (kind, _) in kinds.iter().enumerate().filter(|(_, asked)| **asked) {
                    let figure = match kind {
                        0 => busy(&guest, time)?,
                        _ => idle(site, time)?,
                    };
                    told[kind] = format!("{figure:.4}");
                    seen[kind][mode].push(figure);
                }
                println!(
                    "{:5}  {:4} {:>16} {:>23}",
                    round + 1,
                    MODES[mode],
                    told[0],
                    told[1]
                );
            }
        }
        Ok(())
    })?;
    let [busy, idle] = seen.map(|modes| modes.map(|runs| median(&runs)));
    let mut results = Vec::new();
    if kinds[0] {
        let kept = busy[1] / busy[0];
        println!("busy: {kept:.4} kept (target 0.97)");
        results.push(json!({
            "case": "busy", "none_per_second": busy[0].round(), "ft_per_second": busy[1].round(),
            "kept": share(kept), "target_kept": 0.97,
        }));
    }
    if kinds[1] {
        let added = idle[1] - idle[0];
        println!("idle: {:.1} % of a core more (target 3 %)", added * 100.0);
        results.push(json!({
            "case": "idle", "none_cores": share(idle[0]), "ft_cores": share(idle[1]),
            "added_cores": share(added), "target_added_cores": 0.03,
        }));
    }
    println!(
        "{}",
        json!({"bench": "cpu", "guest": shape.json(), "results": results})
    );
    Ok(())
}

/// Turns of the busy loop a second.
fn busy(guest: &Guest, time: Duration) -> Result<f64> {
    guest.command("SPIN on")?;
    std::thread::sleep(SETTLE);
    let (before, began) = (guest.counted("spins")?, Instant::now());
    std::thread::sleep(time);
    let (after, took) = (guest.counted("spins")?, began.elapsed());
    guest.command("SPIN off")?;
    Ok((after - before) as f64 / took.as_secs_f64())
}

/// CPU time of the product on both hosts, in cores.
fn idle(site: &Site, time: Duration) -> Result<f64> {
    std::thread::sleep(SETTLE);
    let (before, began) = (ticks(site)?, Instant::now());
    std::thread::sleep(time);
    let (after, took) = (ticks(site)?, began.elapsed());
    let second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.ok_or("no clock tick")?;
    Ok((after - before) as f64 / second as f64 / took.as_secs_f64())
}

/// User and system time of every ax-vmm and axd of both hosts so far, all threads, clock ticks.
fn ticks(site: &Site) -> Result<u64> {
    let mut all = 0;
    for side in [Side::A, Side::B] {
        for (pid, line) in site.host(side).processes() {
            let program = line.split(' ').next().unwrap_or_default();
            if program.ends_with("/ax-vmm") || program.ends_with("/axd") {
                all += of(&fs::read_to_string(format!("/proc/{pid}/stat"))?)?;
            }
        }
    }
    Ok(all)
}

/// `utime` and `stime` of a process's stat (proc_pid_stat(5): fields 14 and 15), which sum up its threads.
fn of(stat: &str) -> Result<u64> {
    // The second field may hold anything, and ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(')').ok_or("no process's stat")?;
    let mut times = rest.split_ascii_whitespace().skip(11);
    let mut next = || times.next().ok_or("a process's stat cut short");
    Ok(next()?.parse::<u64>()? + next()?.parse::<u64>()?)
}
