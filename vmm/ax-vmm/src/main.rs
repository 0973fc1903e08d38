//! `ax-vmm`: the process that is one VM on one side of its pair.
//!
//! Everything is wired here and nothing is decided here: the machine comes from `vmm`, epochs and the
//! pair's state machine from `statepoint`, held outputs from `io-barrier`, disks from `ax-disk`,
//! the link from `ax-link`, permission from `ax-arbiter`. One thread, the conductor, feeds the state
//! machine and performs its actions; everything that waits (link, arbiter, taps, control
//! connections) has a thread of its own and reports to the conductor.

mod announce;
mod asker;
mod board;
mod conductor;
mod console;
mod control;
mod disks;
mod epochs;
mod error;
mod events;
mod faults;
mod guest;
mod hello;
mod maps;
mod outside;
mod parts;
mod protect;
mod seen;
mod selfcheck;
mod session;
mod shadowing;
mod standby;
mod tap;
mod waiting;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ax_api::process::Spec;
use clap::{Parser, ValueEnum};
use error::Error;

/// One VM on one side of its pair. Started by axd, not by hand.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 ended in order, 1 failed, 2 bad spec, 3 no usable \
KVM, 4 disk image, 5 tap, 6 memory, 7 link or port, 8 refused by the arbiter, 9 superseded by the \
other side."
)]
struct Args {
    /// The specification written by axd (JSON).
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "selfcheck",
        conflicts_with = "selfcheck"
    )]
    spec: Option<PathBuf>,
    /// Run no VM: try whether this host's KVM can protect one.
    #[arg(long)]
    selfcheck: bool,
    /// How the self-check prints.
    #[arg(short, long, value_enum, default_value_t = Output::Text, requires = "selfcheck")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn load(path: &Path) -> Result<Spec, Error> {
    let wrong = |why: String| Error::Spec {
        path: path.to_path_buf(),
        why,
    };
    let text = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))
}

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("AX_LOG").unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let Some(spec) = args.spec else {
        return ExitCode::from(selfcheck::run(args.output == Output::Json));
    };
    ax_failpoint::listen();
    match load(&spec).and_then(conductor::run) {
        Ok(ending) => ExitCode::from(ending.code()),
        Err(error) => {
            // The last line of standard error is for axd: what to tell the user.
            let line = serde_json::json!({ "error": error.to_string(), "code": error.code() });
            eprintln!("{line}");
            ExitCode::from(error.code())
        }
    }
}
