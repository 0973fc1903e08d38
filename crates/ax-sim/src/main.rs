//! `ax-sim`: seeds of the simulation. `cargo xtask simulate` is the same.

use clap::Parser;

/// Simulates a whole pair under faults drawn from seeds.
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    simulate: ax_sim::run::Simulate,
}

fn main() -> std::io::Result<std::process::ExitCode> {
    let held = ax_sim::run::run(&Cli::parse().simulate, &[])?;
    Ok(match held {
        true => std::process::ExitCode::SUCCESS,
        false => std::process::ExitCode::FAILURE,
    })
}
