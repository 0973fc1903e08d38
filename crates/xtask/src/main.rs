//! The two commands of the README, and the benches.
//!
//! - `cargo xtask demo`: a fault-tolerant pair, a client, a dead host ([`demo`])
//! - `cargo xtask campaign`: faults drawn by a seed, one after the other ([`campaign`])
//! - `cargo xtask simulate`: a whole simulated pair under many seeds ([`ax_sim`])
//! - `cargo xtask test`: every test, and by name those that could not run here ([`test`])
//! - `cargo xtask bench`: the benches, in their own profile
//! - `cargo xtask bench-compare`: one bench of two commits, in turn ([`compare`])
//! - `cargo xtask bench-peers`: AX beside other systems, same guest, same clients ([`peers`])
//!
//! They set up what they need themselves: as root directly, as an ordinary user in namespaces
//! of their own.

mod apart;
mod campaign;
mod compare;
mod demo;
mod peers;
mod summary;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Exit status when this machine cannot do what was asked: no usable KVM, no namespaces.
const NOT_HERE: u8 = 3;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Two hosts, a witness, a client; one host dies. Tells the story and sums it up.
    ///
    /// Exits 0 when nobody outside could tell, 1 when somebody could or something failed, 3 when
    /// this machine has no usable KVM.
    Demo(demo::Options),
    /// One protected guest, its clients, and one fault after the other (takes seconds a fault).
    ///
    /// Exits 0 when nothing was lost or run twice and the guest was protected again after each.
    Campaign(campaign::Options),
    /// A whole simulated pair, deterministically, under faults drawn from each of N seeds.
    ///
    /// Exits 0 when nothing was violated. A seed that violates something is named, with the command that
    /// plays it again: `cargo xtask simulate --first SEED --seeds 1 --story`.
    Simulate(ax_sim::run::Simulate),
    /// Run every test; list by name those that could not run here.
    Test(test::Options),
    /// Run the benches (takes minutes; arguments go to them).
    Bench {
        /// Passed on to `cargo bench`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run one bench of two commits in turn, A B, B A, and print the ratio of each figure.
    ///
    /// Both are checked out in folders of their own and built (release; the first time that takes
    /// minutes each). Settings of the bench (AX_BENCH_SECONDS …) pass through. Example:
    /// AX_BENCH_ONLY=udp-echo-idle cargo xtask bench-compare HEAD~1 HEAD --bench latency
    BenchCompare(compare::Options),
    /// AX beside QEMU alone, COLO and filter-buffer: latency, throughput, CPU, blackout (takes minutes).
    BenchPeers(peers::Options),
}

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// This machine cannot do it.
    #[error("{0}")]
    NotHere(String),
    /// It failed.
    #[error("{0}")]
    Failed(String),
    /// The test equipment failed.
    #[error(transparent)]
    Testkit(#[from] testkit::Error),
}

fn main() -> ExitCode {
    // An answer that nobody waits for any more, when the power is cut, is no error.
    let usual = || EnvFilter::new("error,fuser=off");
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| usual()))
        .with_writer(std::io::stderr)
        .init();
    let done = match Cli::parse().task {
        Task::Demo(options) => demo::run(&options),
        Task::Campaign(options) => campaign::run(&options),
        Task::Simulate(options) => simulate(&options),
        Task::Test(options) => test::run(&options),
        Task::Bench { args } => test::bench(&args),
        Task::BenchCompare(options) => compare::run(&options),
        Task::BenchPeers(options) => peers::run(&options),
    };
    match done {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {}", chain(&e));
            match e {
                Error::NotHere(_) | Error::Testkit(testkit::Error::NoNamespaces { .. }) => {
                    NOT_HERE.into()
                }
                Error::Failed(_) | Error::Testkit(_) => ExitCode::FAILURE,
            }
        }
    }
}

fn simulate(options: &ax_sim::run::Simulate) -> Result<ExitCode, Error> {
    let held = ax_sim::run::run(options, &["simulate"]);
    match held.map_err(|e| Error::Failed(format!("the simulation: {e}")))? {
        true => Ok(ExitCode::SUCCESS),
        false => Ok(ExitCode::FAILURE),
    }
}

/// An error and what caused it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let said = e.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = e.source();
    }
    text
}
