//! `cargo xtask test`: cargo's tests, with the clients they use, and an honest summary.

use std::fs;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::Error;

#[derive(Debug, Args)]
pub struct Options {
    /// Run only tests whose name contains this.
    filter: Option<String>,
    /// Run only this package's tests.
    #[arg(short, long)]
    package: Option<String>,
    /// Passed on to the tests, after `--`.
    #[arg(last = true)]
    rest: Vec<String>,
}

/// Runs the tests and lists those that could not run here.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    redis_tools();
    let notes = tempfile::NamedTempFile::new()
        .map_err(|e| Error::Failed(format!("cannot make a temporary file: {e}")))?;
    let mut command = cargo("test");
    match &options.package {
        Some(package) => command.args(["--package", package]),
        None => command.arg("--workspace"),
    };
    // One failing test binary does not hide what the others have to say.
    command
        .arg("--no-fail-fast")
        .args(&options.filter)
        .arg("--")
        .args(&options.rest);
    command.env(testkit::skip::LOG_VAR, notes.path());
    let status = command
        .status()
        .map_err(|e| Error::Failed(format!("cannot run cargo test: {e}")))?;

    let skipped = skipped(&fs::read_to_string(notes.path()).unwrap_or_default());
    println!();
    if skipped.is_empty() {
        println!("no test was skipped");
    } else {
        println!(
            "{} skipped, because this machine lacks what they need:",
            tests(skipped.len())
        );
        for line in &skipped {
            println!("  {line}");
        }
    }
    if status.success() {
        println!("every other test passed");
        Ok(ExitCode::SUCCESS)
    } else {
        println!("tests FAILED, see above");
        Ok(ExitCode::FAILURE)
    }
}

/// `cargo bench`, with arguments.
pub fn bench(args: &[String]) -> Result<ExitCode, Error> {
    let status = cargo("bench")
        // One that can't run here does not keep the others from running.
        .args(["--package", "ax", "--no-fail-fast"])
        .args(args)
        .status()
        .map_err(|e| Error::Failed(format!("cannot run cargo bench: {e}")))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn cargo(task: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(task);
    command
}

/// Distinct lines of the skip log, sorted.
fn skipped(log: &str) -> Vec<String> {
    let mut lines: Vec<String> = log
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_string)
        .collect();
    lines.sort();
    lines.dedup();
    lines
}

fn tests(n: usize) -> String {
    if n == 1 {
        "1 test was".into()
    } else {
        format!("{n} tests were")
    }
}

/// redis-benchmark and redis-cli are clients in some tests; those are skipped without them.
fn redis_tools() {
    let there = || {
        Command::new("redis-benchmark")
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    if there() {
        return;
    }
    let root = fs::metadata("/proc/self").is_ok_and(|m| {
        use std::os::unix::fs::MetadataExt;
        m.uid() == 0
    });
    let install = "apt-get install -y --no-install-recommends redis-tools";
    if root {
        eprintln!("installing redis-tools: {install}");
        for command in ["apt-get update -qq", install] {
            let mut words = command.split(' ');
            let Some(program) = words.next() else {
                continue;
            };
            let mut apt = Command::new(program);
            // Its chatter does not belong among the tests' results.
            apt.args(words)
                .env("DEBIAN_FRONTEND", "noninteractive")
                .stdout(std::io::stderr());
            if let Err(e) = apt.status() {
                eprintln!("{command}: {e}");
            }
        }
    }
    if !there() {
        eprintln!("redis-tools is missing; tests with redis-benchmark are skipped. Install it:");
        eprintln!("  sudo {install}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_tests_are_listed_once_each() {
        let log = "SKIPPED (x): b\nSKIPPED (x): a\n\nSKIPPED (x): b\n";
        assert_eq!(skipped(log), ["SKIPPED (x): a", "SKIPPED (x): b"]);
        assert!(skipped("").is_empty());
    }
}
