//! Answers as text for people or JSON for programs. Results go to standard output, progress and
//! failures to standard error; with JSON a failure is a document on standard output too.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::IsTerminal;

use ax_api::host::{Code, HostEvent, HostWhat, PeerReport, Reply, VmReport};
use ax_api::process::{Phase, Role, What};
use ax_api::units::{Bytes, Mac};
use ax_api::vm::Boot;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli::Output;
use crate::client::Failure;
use crate::hosts;

/// How to print.
pub struct Show {
    output: Output,
    bar: RefCell<Option<ProgressBar>>,
    /// Last text and tenth told, where there is no bar.
    told: RefCell<Option<(String, u64)>>,
}

impl Show {
    /// In this format.
    pub fn new(output: Output) -> Show {
        Show {
            output,
            bar: RefCell::new(None),
            told: RefCell::new(None),
        }
    }

    /// A failure.
    pub fn failure(&self, failure: &Failure) {
        if self.output.is_json() {
            let document = json!({
                "ok": false, "code": failure.code, "exit": failure.code.exit(), "error": failure.why,
            });
            println!("{document}");
        } else {
            eprintln!("axvm: {failure}");
        }
    }

    /// A line that is not the last.
    pub fn meanwhile(&self, reply: &Reply) {
        match reply {
            Reply::Event { event } if self.output.is_json() => print_json(event),
            Reply::Event { event } => println!("{}", event_line(event)),
            Reply::Progress { text, done, total } if !self.output.is_json() => {
                self.progress(text, done.zip(*total));
            }
            _ => {}
        }
    }

    fn progress(&self, text: &str, bytes: Option<(u64, u64)>) {
        match bytes {
            Some((done, total)) if std::io::stderr().is_terminal() => {
                let mut bar = self.bar.borrow_mut();
                let bar = bar.get_or_insert_with(|| {
                    let style = ProgressStyle::with_template(
                        "{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}",
                    );
                    let bar = ProgressBar::new(total);
                    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                    bar
                });
                bar.set_message(text.to_owned());
                bar.set_length(total);
                bar.set_position(done);
            }
            Some((done, total)) => {
                let percent = done.saturating_mul(100).checked_div(total).unwrap_or(0);
                let now = Some((text.to_owned(), percent / 10));
                if self.told.replace(now.clone()) != now {
                    eprintln!("{text}: {percent} %");
                }
            }
            None => {
                self.progress_ends();
                eprintln!("{text}");
            }
        }
    }

    /// Nothing more will be said meanwhile.
    pub fn progress_ends(&self) {
        if let Some(bar) = self.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }

    /// This program's own version.
    pub fn version(&self) {
        if !self.output.is_json() {
            println!("axvm {}", env!("CARGO_PKG_VERSION"));
        }
    }

    /// One of the hosts in an answer that has them all.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn one_host(&self, reply: &Reply, host: &str) -> Result<(), Failure> {
        let found = match reply {
            Reply::Hosts { hosts, .. } => hosts.iter().find(|h| h.host == host),
            _ => None,
        };
        let found = found.ok_or_else(|| Failure {
            code: Code::Usage,
            why: format!("no host of this pair is called {host}"),
        })?;
        match self.output.is_json() {
            true => print_json(found),
            false => print!("{}", hosts::details(found)),
        }
        Ok(())
    }

    /// The last line of an answer.
    pub fn reply(&self, reply: &Reply) {
        if self.output.is_json() {
            match reply {
                Reply::Done { text } => print_json(&json!({"ok": true, "text": text})),
                Reply::Vms { vms, peer } => print_json(&json!({"vms": vms, "peer": peer})),
                Reply::Vm { vm } => print_json(vm),
                Reply::Hosts { hosts, arbiter } => {
                    print_json(&json!({"hosts": hosts, "arbiter": arbiter}));
                }
                Reply::Version {
                    host,
                    version,
                    peer,
                } => print_json(&json!({
                    "axvm": env!("CARGO_PKG_VERSION"), "axd": version, "host": host, "peer": peer,
                })),
                other => print_json(other),
            }
            return;
        }
        match reply {
            Reply::Done { text } if text.is_empty() => {}
            Reply::Done { text } => println!("{text}"),
            Reply::Vms { vms, peer } => {
                print!("{}", table(vms));
                print_peer(peer.as_ref());
            }
            Reply::Vm { vm } => print!("{}", details(vm)),
            Reply::Hosts { hosts, arbiter } => print!("{}", hosts::table(hosts, arbiter)),
            Reply::Version {
                host,
                version,
                peer,
            } => {
                println!("axd  {version} on {host}");
                print_peer(peer.as_ref());
            }
            other => println!("{other:?}"),
        }
    }
}

fn print_json(what: &impl serde::Serialize) {
    match serde_json::to_string(what) {
        Ok(text) => println!("{text}"),
        Err(e) => eprintln!("axvm: {e}"),
    }
}

fn print_peer(peer: Option<&PeerReport>) {
    if let Some(peer) = peer.filter(|p| !p.reachable) {
        // `why` already says what host it is when it comes from asking it.
        eprintln!("note: {}", peer.why);
    }
}

fn table(vms: &[VmReport]) -> String {
    let head = [
        "NAME", "MODE", "STATE", "PRIMARY", "SHADOW", "CPUS", "MEMORY", "NOTE",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for report in vms {
        let host = |h: &Option<String>| h.clone().unwrap_or_else(|| "-".to_owned());
        rows.push([
            report.vm.name.clone(),
            report.vm.mode.to_string(),
            report.state.to_string(),
            host(&report.primary),
            host(&report.shadow),
            report.vm.cpus.to_string(),
            Bytes(report.vm.memory).to_string(),
            report.note.clone(),
        ]);
    }
    let mut widths = [0; 8];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let line: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn details(report: &VmReport) -> String {
    let vm = &report.vm;
    let mut lines = vec![
        ("name", vm.name.clone()),
        ("pair", vm.pair.to_string()),
        ("mode", vm.mode.to_string()),
        (
            "state",
            match report.note.as_str() {
                "" => report.state.to_string(),
                note => format!("{} ({note})", report.state),
            },
        ),
        ("memory", Bytes(vm.memory).to_string()),
        ("cpus", vm.cpus.to_string()),
        (
            "autostart",
            if vm.autostart { "on" } else { "off" }.to_owned(),
        ),
    ];
    if let Some(preferred) = &vm.preferred {
        lines.push(("preferred", preferred.to_string()));
    }
    match &vm.boot {
        Boot::Probe { cmdline } => lines.push(("boot", format!("probe guest, {cmdline:?}"))),
        Boot::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            lines.push(("boot", format!("{}, {cmdline:?}", kernel.display())));
            if let Some(initrd) = initrd {
                lines.push(("initrd", initrd.display().to_string()));
            }
        }
    }
    for disk in &vm.disks {
        let read_only = if disk.read_only { ", read-only" } else { "" };
        let size = Bytes(disk.size);
        lines.push((
            "disk",
            format!("{}, {size}{read_only}", disk.path.display()),
        ));
    }
    for nic in &vm.nics {
        let offload = if nic.offload { ", offload" } else { "" };
        lines.push(("nic", format!("tap {}, {}{offload}", nic.tap, Mac(nic.mac))));
    }
    if !report.arbiter.is_empty() {
        lines.push(("arbiter", report.arbiter.clone()));
    }
    let wires = report.processes.iter().filter_map(|p| p.status.as_ref());
    let wires: BTreeSet<u16> = wires.map(|status| status.wire).collect();
    for process in &report.processes {
        let what = match &process.status {
            None => "does not answer".to_owned(),
            Some(s) => {
                let role = match s.role {
                    Role::Primary => "primary",
                    Role::Shadow => "shadow",
                };
                format!(
                    "{role}, {}, generation {}, epoch {} ({:.0}/s), pause p50/p99 {}/{} us, commit {}/{} us, pages {}/{}, link {:.1} MB/s{}",
                    phase_text(&s.phase),
                    s.generation.0,
                    s.epoch,
                    s.epochs_per_second,
                    s.pause_us[0],
                    s.pause_us[1],
                    s.commit_us[0],
                    s.commit_us[1],
                    s.pages[0],
                    s.pages[1],
                    s.link_bytes_per_second as f64 / 1e6,
                    // In an upgrade: which of the two is to be started anew.
                    match wires.len() {
                        0 | 1 => String::new(),
                        _ => format!(", wire version {}", s.wire),
                    },
                )
            }
        };
        lines.push((
            "process",
            format!("{} on {}: {what}", process.pid, process.host),
        ));
        let paths = process.status.iter().flat_map(|status| &status.paths);
        lines.extend(paths.map(|path| ("  path", path.to_string())));
    }
    lines
        .into_iter()
        .map(|(key, value)| format!("{key:10} {value}\n"))
        .collect()
}

fn phase_text(phase: &Phase) -> String {
    match phase {
        Phase::Starting => "starting".to_owned(),
        Phase::Waiting => "waits for its primary".to_owned(),
        Phase::Syncing { done, total } => {
            format!("syncing {}/{} MiB", done >> 20, total >> 20)
        }
        Phase::Entering => "entering protection".to_owned(),
        Phase::Protected => "protected".to_owned(),
        Phase::Alone => "degraded (runs alone)".to_owned(),
        Phase::Unprotected => "unprotected".to_owned(),
        Phase::Held { waits_for } => format!("held: waits for {waits_for}"),
        Phase::FailingOver => "failing over".to_owned(),
        Phase::Paused => "paused".to_owned(),
        Phase::Ending => "ending".to_owned(),
        Phase::Other => "in a phase that this axvm is too old to know".to_owned(),
    }
}

/// In an upgrade, of a build one version on.
const UNKNOWN_EVENT: &str = "something that this axvm is too old to know";

fn event_line(event: &HostEvent) -> String {
    let what = match &event.what {
        HostWhat::Note { text } => text.clone(),
        HostWhat::Exited { how, .. } => format!("its process {how}"),
        HostWhat::Process { event, .. } => match event {
            What::Phase {
                role,
                phase,
                generation,
            } => {
                let role = match role {
                    Role::Primary => "primary",
                    Role::Shadow => "shadow",
                };
                format!("{role}: {}, generation {}", phase_text(phase), generation.0)
            }
            What::PeerLost { how } => format!("lost the other side: {how}"),
            What::PathLost { address, how } => {
                format!("lost the path by {address} to the other side: {how}")
            }
            What::PathBack { address } => {
                format!("the path by {address} to the other side works again")
            }
            What::Promoted { epoch, took_us, .. } => format!(
                "took over at epoch {epoch}, {}.{:03} ms after the notice",
                took_us / 1000,
                took_us % 1000
            ),
            What::Ended { why, clean } => {
                let clean = if *clean { ", cleanly stopped" } else { "" };
                format!("ended: {why}{clean}")
            }
            What::DiskFails { why } => format!("a disk of this host fails: {why}"),
            What::DiskWorks { disk } => format!("the disk works again: {disk}"),
            What::Note { text } => text.clone(),
            What::Other => UNKNOWN_EVENT.to_owned(),
        },
        HostWhat::Other => UNKNOWN_EVENT.to_owned(),
    };
    let vm = event.vm.as_deref().unwrap_or("-");
    format!("{} {} {vm}: {what}", utc(event.at_ms), event.host)
}

/// `2026-11-22T23:29:14.123Z`: milliseconds since 1970 by the civil calendar (proleptic Gregorian).
fn utc(ms: u64) -> String {
    let days = ms / 86_400_000;
    let rest = ms % 86_400_000;
    // Days are counted in eras of 400 years from 0000-03-01, so that the leap day ends a year.
    let z = days + 719_468;
    let era = z / 146_097;
    let of_era = z % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        rest / 3_600_000,
        rest / 60_000 % 60,
        rest / 1000 % 60,
        rest % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_civil() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(utc(1_795_390_154_123), "2026-11-22T23:29:14.123Z");
        assert_eq!(utc(4_107_542_400_000), "2100-03-01T00:00:00.000Z");
    }
}
