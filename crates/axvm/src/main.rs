//! `axvm`: the command people type.
//!
//! - [`cli`]: the words and options. [`describe`]: from them, or a file, to a VM.
//! - [`client`]: one request to axd and its answer, blocking. [`console`]: raw bytes.
//! - [`show`]: answers as text or JSON.
//! - [`trace`], [`stats`], [`top`]: a VM's epochs.
//!
//! It decides nothing: axd does, on whichever host the VM runs, so it may be typed on either.

mod cli;
mod client;
mod console;
mod describe;
mod hosts;
mod show;
mod stats;
mod top;
mod trace;

use std::process::ExitCode;

use ax_api::host::{Code, Reply, Request};
use clap::{CommandFactory, Parser};

use cli::{Cli, Command, HostCommand, OnOff, Output};
use client::{Client, Failure};
use show::Show;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let show = Show::new(cli.output);
    match run(cli, &show) {
        Ok(code) => code,
        Err(failure) => {
            show.failure(&failure);
            ExitCode::from(failure.code.exit())
        }
    }
}

fn run(cli: Cli, show: &Show) -> Result<ExitCode, Failure> {
    let client = Client::new(cli.socket);
    if cli.output == Output::Perfetto && !matches!(cli.command, Command::Trace { .. }) {
        let why = "-o perfetto is for `axvm trace` only";
        return Err(Failure::new(Code::Usage, why));
    }
    let request = match cli.command {
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "axvm", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man => {
            clap_mangen::Man::new(Cli::command())
                .render(&mut std::io::stdout())
                .map_err(|e| Failure::new(Code::Failed, format!("printing: {e}")))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Console { name } => {
            console::run(&client, &name)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Top { name } => {
            top::run(&client, &name, cli.output)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Trace { args } => {
            trace::run(&client, &args, cli.output, show)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Stats { name, seconds } => {
            stats::run(&client, &name, seconds, cli.output, show)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::List { check } => {
            let reply = client.ask(&Request::List, show)?;
            show.reply(&reply);
            let sound = match &reply {
                Reply::Vms { vms, .. } => vms.iter().all(|vm| vm.healthy),
                _ => true,
            };
            return Ok(match check && !sound {
                true => ExitCode::from(Code::Unprotected.exit()),
                false => ExitCode::SUCCESS,
            });
        }
        Command::Define { name, vm } => Request::Define {
            vm: Box::new(describe::required(name.as_deref(), &vm)?),
        },
        Command::Start {
            name,
            vm,
            no_wait,
            alone_ok,
            accept_loss,
        } => Request::Start {
            define: describe::optional(&name, &vm)?.map(Box::new),
            name,
            wait: !no_wait,
            alone_ok,
            accept_loss,
        },
        Command::Undefine { name } => Request::Undefine { name },
        Command::Autostart { name, state } => Request::Autostart {
            name,
            on: state == OnOff::On,
        },
        Command::Prefer {
            name, host, back, ..
        } => Request::Prefer {
            name,
            preferred: describe::preferred(host, back),
        },
        Command::Stop {
            name,
            timeout,
            force,
        } => Request::Stop {
            name,
            force,
            timeout_s: timeout,
        },
        Command::Reboot { name } => Request::Reboot { name },
        Command::Pause { name } => Request::Pause { name },
        Command::Resume {
            name,
            i_know_the_peer_is_dead,
        } => Request::Resume {
            name,
            peer_is_dead: i_know_the_peer_is_dead,
        },
        Command::Show { name } => Request::Show { name },
        Command::Failover { name } => Request::Failover { name },
        Command::SetMode {
            name,
            mode,
            no_wait,
        } => Request::SetMode {
            name,
            mode: describe::mode(mode),
            wait: !no_wait,
        },
        Command::Host { what } => match what {
            HostCommand::List => Request::Hosts,
            HostCommand::Show { host } => {
                let (reply, here) = (client.ask(&Request::Hosts, show)?, host.is_none());
                let host = match (host, here) {
                    (Some(host), _) => host,
                    (None, _) => match client.ask(&Request::Version, show)? {
                        Reply::Version { host, .. } => host,
                        _ => String::new(),
                    },
                };
                return show.one_host(&reply, &host).map(|()| ExitCode::SUCCESS);
            }
            HostCommand::Maintenance { state, host } => Request::Maintenance {
                host,
                on: state == OnOff::On,
            },
            HostCommand::Drain { timeout } => Request::Drain { timeout_s: timeout },
        },
        Command::Kill { name, host } => Request::Kill { name, host },
        Command::Events {
            name,
            follow,
            this_host,
        } => Request::Events {
            vm: name,
            follow,
            both_hosts: !this_host,
        },
        Command::Version => {
            show.version();
            Request::Version
        }
    };
    let reply = client.ask(&request, show)?;
    show.reply(&reply);
    Ok(ExitCode::SUCCESS)
}

impl Output {
    fn is_json(self) -> bool {
        self == Output::Json
    }
}
