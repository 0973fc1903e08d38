//! `axd selfcheck`: can this host protect VMs?
//!
//! KVM, save and restore and the exactness of dirty tracking are `ax-vmm --selfcheck`'s to try, which
//! prints one JSON line for each; link, peer and witness are tried from here.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::check::Check;
use ax_api::host::Code;
use ax_api::process::Arbiter;
use ax_link::{AddressPair, Connector, Preamble, Security};

use crate::config::Config;
use crate::failure::Failure;
use crate::peer::PeerLink;
use crate::run;

/// What a failure to check KVM at all is told as.
const KVM: &str = "kvm";

/// Prints each check as it is done, and remembers the first that failed.
struct Report {
    json: bool,
    failed: Option<Check>,
}

impl Report {
    fn say(&mut self, check: Check) {
        check.print(self.json);
        if !check.ok && self.failed.is_none() {
            self.failed = Some(check);
        }
    }
}

/// Checks, prints, and fails with the first failure's code.
///
/// # Errors
/// Something is not as it should be.
pub fn run(config: Option<&Config>, json: bool) -> Result<(), Failure> {
    let mut report = Report { json, failed: None };
    machine(config, &mut report);
    if let Some(config) = config {
        link(config, &mut report);
    }
    match report.failed {
        None => Ok(()),
        Some(first) => Err(Failure::new(
            match first.code {
                2 => Code::Usage,
                3 => Code::NotHere,
                8 => Code::Peer,
                10 => Code::Network,
                11 => Code::Memory,
                12 => Code::Arbiter,
                _ => Code::Failed,
            },
            format!(
                "this host cannot protect VMs: {}: {}",
                first.check, first.detail
            ),
        )),
    }
}

/// KVM and what `ax-vmm` can say of it, line by line as it says it.
fn machine(config: Option<&Config>, report: &mut Report) {
    let program = match config {
        Some(config) => run::program(config),
        None => run::program(&Config::bare("selfcheck", "/".into(), &[], true)),
    };
    let failed = |why: String| Check::bad(KVM, Code::Failed, why);
    let mut command = Command::new(&program);
    command.args(["--selfcheck", "-o", "json"]);
    let started = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(e) => return report.say(failed(format!("cannot run {}: {e}", program.display()))),
    };
    let mut said = 0;
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if let Ok(check) = serde_json::from_str(&line) {
                report.say(check);
                said += 1;
            }
        }
    }
    let ended = match child.wait_with_output() {
        Ok(ended) => ended,
        Err(e) => return report.say(failed(format!("wait for {}: {e}", program.display()))),
    };
    // One that died on the way has not said what of.
    if said == 0 || (!ended.status.success() && report.failed.is_none()) {
        let told = String::from_utf8_lossy(&ended.stderr);
        let last = told.lines().last().unwrap_or("it says no more").to_owned();
        let code = ended.status.code().map_or(Code::Failed, Code::of_process);
        let why = format!(
            "{} --selfcheck: {}; {last}",
            program.display(),
            ended.status
        );
        report.say(Check::bad(KVM, code, why));
    }
}

/// The dedicated link's addresses, the other host, the witness.
fn link(config: &Config, report: &mut Report) {
    for address in &config.link {
        let name = format!("link {address}");
        report.say(match TcpListener::bind((*address, 0)) {
            Ok(_) => Check::ok(&name, "is this host's own"),
            Err(e) => Check::bad(
                &name,
                Code::Network,
                format!("cannot be listened on: {e}; is the interface up, the address right?"),
            ),
        });
    }
    let security = match run::security(config) {
        Ok(security) => security,
        Err(failure) => {
            return report.say(Check::bad("keys", failure.code, failure.why));
        }
    };
    if let Some(peer) = &config.peer {
        let began = Instant::now();
        let answered = PeerLink::new(config, peer, security.clone()).and_then(|link| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| Failure::io("starting", &e))?;
            let report = runtime.block_on(Arc::new(link).hello());
            if report.reachable {
                Ok(())
            } else {
                Err(Failure::new(Code::Peer, report.why))
            }
        });
        let name = format!("peer {}", peer.name);
        report.say(match answered {
            Ok(()) => Check::ok(&name, format!("answers after {:.1?}", began.elapsed())),
            Err(failure) => Check::bad(&name, failure.code, failure.why),
        });
    }
    if let Some(standby) = &config.standby {
        arbiter(standby, security.clone(), report);
    }
    arbiter(&config.arbiter, security, report);
}

fn arbiter(arbiter: &Arbiter, security: Security, report: &mut Report) {
    match arbiter {
        Arbiter::Witness { name, addresses } => {
            let label = format!("witness {name}");
            let paths = addresses.iter().copied().map(AddressPair::from).collect();
            let opened = Connector::new(security, paths, name.parse().ok())
                .timeout(Duration::from_secs(2))
                .open(Preamble::witness());
            report.say(match opened {
                Ok(_) => Check::ok(&label, "answers"),
                Err(e) => Check::bad(&label, Code::Arbiter, e.to_string()),
            });
        }
        Arbiter::Etcd { members } => {
            let mut etcd = ax_arbiter::Etcd::new(members.clone(), None);
            // Whether it knows that pair is no matter.
            let nobody = ax_wire::PairId([0; 16]);
            let until = Instant::now() + Duration::from_secs(2);
            report.say(match etcd.look(nobody, until) {
                Ok(_) => Check::ok("etcd", "answers"),
                Err(e) => Check::bad("etcd", Code::Arbiter, e.to_string()),
            });
        }
        Arbiter::Manual => report.say(Check::ok(
            "witness",
            "none configured: after a failure a guest is held until an operator decides",
        )),
    }
}
