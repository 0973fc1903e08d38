//! `axd`: the daemon, its pairing, the witness, and the check of a host.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use ax_api::host::Code;
use ax_daemon::failure::Failure;
use ax_daemon::{config, pair, run, selfcheck, witness};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  axd --config /etc/axd/axd.toml                  run the daemon of this host
  axd pair --config /etc/axd/axd.toml             print a one-time token and wait for the other host
  axd pair --config /etc/axd/axd.toml --token T   use the token another host (or witness) printed
  axd pair --config /etc/axd/axd.toml --replace beta   host beta is gone; a new machine takes its place
  axd witness --config /etc/axd/witness.toml      run the witness, on a third machine
  axd selfcheck --config /etc/axd/axd.toml        can this host protect VMs?

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 no usable KVM, 7 another axd uses the data
folder, 8 the other host does not answer, 10 an address cannot be used, 12 the witness does not answer";

/// Daemon of AX: fault-tolerant virtual machines on two hosts.
#[derive(Parser)]
#[command(name = "axd", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Cli {
    /// Configuration of this host.
    #[arg(long, value_name = "FILE", default_value = "/etc/axd/axd.toml")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Make two machines know each other, by a one-time token.
    ///
    /// Without --token it prints one and waits; with it, it goes to the machine that printed it.
    /// Hosts are paired with each other and each with the witness.
    Pair {
        /// Configuration of this machine (axd.toml or witness.toml).
        #[arg(long, value_name = "FILE", default_value = "/etc/axd/axd.toml")]
        config: PathBuf,
        /// The token the other machine printed.
        #[arg(long, value_name = "TOKEN")]
        token: Option<String>,
        /// Address the other machine can reach this one at, for the time of pairing.
        #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "token")]
        listen: Option<SocketAddr>,
        /// The host of this name is gone for good; the machine that uses the token takes its place.
        ///
        /// Run it on the host that is left; on a witness to have it trust the new machine, not the old one.
        /// VMs go on meanwhile. The new machine begins with an empty data folder, under the old name or another.
        /// What fails half-way is mended by the same command.
        #[arg(long, value_name = "HOST", conflicts_with = "token")]
        replace: Option<String>,
        /// With --replace: it will never run again, and what is lost with it is lost.
        #[arg(long, requires = "replace")]
        i_know_the_peer_is_dead: bool,
    },
    /// Run a witness: a third machine that decides who may run.
    Witness {
        /// Configuration of the witness.
        #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "data_dir", "listen", "plain"])]
        config: Option<PathBuf>,
        /// Its name.
        #[arg(long, default_value = "witness")]
        name: String,
        /// Folder for its records and keys.
        #[arg(long, value_name = "DIR", required_unless_present = "config")]
        data_dir: Option<PathBuf>,
        /// Address it listens on.
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7431")]
        listen: Vec<SocketAddr>,
        /// No encryption, no authentication: a private cable.
        #[arg(long)]
        plain: bool,
    },
    /// Tell whether this host can protect VMs: KVM, save and restore, dirty tracking, link, witness.
    Selfcheck {
        /// Configuration of this host; without one only KVM is checked.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// How to print.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Print shell completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => {
            log_to_stderr("info");
            load(&cli.config, run::PORT).and_then(run::run)
        }
        Some(Command::Pair {
            config,
            token,
            listen,
            replace,
            i_know_the_peer_is_dead: word,
        }) => {
            log_to_stderr("warn");
            load(&config, run::PORT).and_then(|config| match token {
                Some(token) => pair::use_token(&config, &token),
                None => {
                    let replace = replace.map(|old| pair::Replace { old, word });
                    pair::wait_for_other(&config, listen, replace.as_ref())
                }
            })
        }
        Some(Command::Witness {
            config: Some(path), ..
        }) => {
            log_to_stderr("info");
            load(&path, witness::PORT).and_then(|config| witness::run(&config))
        }
        Some(Command::Witness {
            config: None,
            name,
            data_dir,
            listen,
            plain,
        }) => {
            log_to_stderr("info");
            witness::config_of(&name, data_dir.as_deref(), &listen, plain)
                .and_then(|config| witness::run(&config))
        }
        Some(Command::Selfcheck { config, output }) => {
            log_to_stderr("error");
            let config = config.map(|path| load(&path, run::PORT)).transpose();
            config.and_then(|config| selfcheck::run(config.as_ref(), output == Output::Json))
        }
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "axd", &mut std::io::stdout());
            Ok(())
        }
        Some(Command::Man) => clap_mangen::Man::new(Cli::command())
            .render(&mut std::io::stdout())
            .map_err(|e| Failure::io("printing", &e)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("axd: {failure}");
            ExitCode::from(failure.code.exit())
        }
    }
}

fn load(path: &std::path::Path, port: u16) -> Result<config::Config, Failure> {
    config::load(path, port).map_err(|e| Failure::new(Code::Usage, e.to_string()))
}

fn log_to_stderr(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("AX_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}
