//! `axd selfcheck`: can this host protect VMs?
//!
//! KVM, save and restore and the exactness of dirty tracking are `ax-vmm --selfcheck`'s to try, which
//! prints one JSON line for each; link, peer and witness are tried from here.

use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ax_api::host::Code;
use ax_api::process::Arbiter;
use ax_link::{AddressPair, Connector, Preamble};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::failure::Failure;
use crate::peer::PeerLink;
use crate::run;

/// What one check found. This is also the line `ax-vmm --selfcheck` prints for each of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, and what to do about it.
    pub detail: String,
    /// Exit status this failure asks for; 0 when ok.
    #[serde(default)]
    pub code: i32,
}

impl Check {
    fn ok(check: &str, detail: impl Into<String>) -> Check {
        Check {
            check: check.to_owned(),
            ok: true,
            detail: detail.into(),
            code: 0,
        }
    }

    fn bad(check: &str, code: Code, detail: impl Into<String>) -> Check {
        Check {
            check: check.to_owned(),
            ok: false,
            detail: detail.into(),
            code: i32::from(code.exit()),
        }
    }
}

/// Checks, prints, and fails with the first failure's code.
///
/// # Errors
/// Something is not as it should be.
pub fn run(config: Option<&Config>, json: bool) -> Result<(), Failure> {
    let mut checks = machine(config);
    if let Some(config) = config {
        checks.extend(link(config));
    }
    for check in &checks {
        if json {
            if let Ok(line) = serde_json::to_string(check) {
                println!("{line}");
            }
        } else {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            println!("{mark} {}: {}", check.check, check.detail);
        }
    }
    match checks.iter().find(|c| !c.ok) {
        None => Ok(()),
        Some(first) => Err(Failure::new(
            match first.code {
                3 => Code::NotHere,
                8 => Code::Peer,
                10 => Code::Network,
                12 => Code::Arbiter,
                2 => Code::Usage,
                _ => Code::Failed,
            },
            format!(
                "this host cannot protect VMs: {}: {}",
                first.check, first.detail
            ),
        )),
    }
}

/// KVM and what `ax-vmm` can say of it.
fn machine(config: Option<&Config>) -> Vec<Check> {
    const KVM: &str = "kvm";
    if let Err(e) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        let cure = match e.kind() {
            std::io::ErrorKind::NotFound => {
                "enable virtualisation in the firmware and load kvm_intel or kvm_amd"
            }
            std::io::ErrorKind::PermissionDenied => "add this user to group kvm",
            _ => "see the kernel's log",
        };
        return vec![Check::bad(
            KVM,
            Code::NotHere,
            format!("/dev/kvm: {e}; {cure}"),
        )];
    }
    let program = match config {
        Some(config) => run::program(config),
        None => run::program(&Config::bare("selfcheck", "/".into(), &[], true)),
    };
    let output = match Command::new(&program).arg("--selfcheck").output() {
        Ok(output) => output,
        Err(e) => {
            let why = format!("cannot run {}: {e}", program.display());
            return vec![Check::bad(KVM, Code::Failed, why)];
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let mut checks: Vec<Check> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    if checks.is_empty() || (!output.status.success() && checks.iter().all(|c| c.ok)) {
        let told = String::from_utf8_lossy(&output.stderr);
        let last = told.lines().last().unwrap_or("nothing").to_owned();
        let code = match output.status.code() {
            Some(status) => Code::of_process(status),
            None => Code::Failed,
        };
        checks.push(Check::bad(
            KVM,
            code,
            format!(
                "{} --selfcheck: {}; {last}",
                program.display(),
                output.status
            ),
        ));
    }
    checks
}

/// The dedicated link's addresses, the other host, the witness.
fn link(config: &Config) -> Vec<Check> {
    let mut checks = vec![];
    for address in &config.link {
        let name = format!("link {address}");
        checks.push(match TcpListener::bind((*address, 0)) {
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
            checks.push(Check::bad("keys", failure.code, failure.why));
            return checks;
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
        checks.push(match answered {
            Ok(()) => Check::ok(&name, format!("answers after {:.1?}", began.elapsed())),
            Err(failure) => Check::bad(&name, failure.code, failure.why),
        });
    }
    match &config.arbiter {
        Arbiter::Witness { name, addresses } => {
            let label = format!("witness {name}");
            let paths = addresses.iter().copied().map(AddressPair::from).collect();
            let opened = Connector::new(security, paths, name.parse().ok())
                .timeout(Duration::from_secs(2))
                .open(Preamble::witness());
            checks.push(match opened {
                Ok(_) => Check::ok(&label, "answers"),
                Err(e) => Check::bad(&label, Code::Arbiter, e.to_string()),
            });
        }
        Arbiter::Manual => checks.push(Check::ok(
            "witness",
            "none configured: after a failure a guest is held until an operator decides",
        )),
    }
    checks
}
