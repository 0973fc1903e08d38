//! What the benches share: a site, a guest on it, and how figures are told.

#![allow(dead_code, reason = "every bench uses another part of it")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use testkit::client::port;
use testkit::net::{GUEST, addr, isolate};
use testkit::site::{Side, Site, SiteSpec};

/// Result of a bench or a part of one.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs a bench where it can run; elsewhere says by name what is missing, and that is no failure.
pub fn main(name: &str, bench: fn() -> Result<()>) -> ExitCode {
    if let Err(no) = testkit::kvm::usable() {
        testkit::skip::report("no usable KVM", &no.why, name);
        eprintln!("how to get it: {}", no.remedy);
        return ExitCode::SUCCESS;
    }
    match isolate::enter_program() {
        isolate::Entered::Here => {}
        isolate::Entered::RanElsewhere { success: true } => return ExitCode::SUCCESS,
        isolate::Entered::RanElsewhere { success: false } => return ExitCode::FAILURE,
        isolate::Entered::Unavailable(why) => {
            testkit::skip::report("no namespaces", &why, name);
            return ExitCode::SUCCESS;
        }
    }
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does something on a new site; when that fails, prints every log of it first.
///
/// # Errors
/// The site's, or those of what is done.
pub fn on_site<T>(spec: SiteSpec, act: impl FnOnce(&Site) -> Result<T>) -> Result<T> {
    let site = Site::new(spec)?;
    let done = act(&site);
    if done.is_err() {
        eprintln!("{}", site.logs());
    }
    done
}

/// A number from the environment, for shorter or longer runs.
///
/// # Errors
/// It is there and is no number.
pub fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .map_err(|_| format!("{name}={text}: not a number").into()),
        Err(_) => Ok(default),
    }
}

/// Whether `AX_BENCH_ONLY`, a part of a case's name, leaves this case in. Without it every case is.
pub fn is_asked_for(case: &str) -> bool {
    case.contains(&std::env::var("AX_BENCH_ONLY").unwrap_or_default())
}

/// What the guest is like, where the bench does not say: `AX_BENCH_CPUS` (2) and `AX_BENCH_MEMORY` (512M).
#[derive(Debug, Clone)]
pub struct Shape {
    /// Virtual CPUs, as axvm takes them.
    pub cpus: String,
    /// RAM, as axvm takes it.
    pub memory: String,
}

impl Shape {
    /// As the environment says.
    pub fn from_env() -> Shape {
        let or = |name: &str, default: &str| std::env::var(name).unwrap_or(default.into());
        Shape {
            cpus: or("AX_BENCH_CPUS", "2"),
            memory: or("AX_BENCH_MEMORY", "512M"),
        }
    }

    /// Options of `axvm start`.
    pub fn args(&self) -> [&str; 4] {
        ["--cpus", &self.cpus, "--memory", &self.memory]
    }

    /// For the result of a bench.
    pub fn json(&self) -> Value {
        serde_json::json!({"cpus": self.cpus, "memory": self.memory})
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} vCPU, {}", self.cpus, self.memory)
    }
}

/// The order of the modes in a round: turned round from one to the next, so that a drift of the machine
/// cancels out. Indices of [`MODES`].
pub fn order(round: u64) -> [usize; 2] {
    if round.is_multiple_of(2) {
        [0, 1]
    } else {
        [1, 0]
    }
}

/// Without protection and with it.
pub const MODES: [&str; 2] = ["none", "ft"];

/// The median; of an even number of figures the mean of the middle two, of none 0.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let at = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
    (at(n / 2) + at(n.saturating_sub(1) / 2)) / 2.0
}

/// The probe guest on host a. Dropping it ends its processes on both hosts.
pub struct Guest<'a> {
    site: &'a Site,
    name: &'a str,
}

impl<'a> Guest<'a> {
    /// Starts it, as protected as `mode` says; `more` are further options of `axvm start`.
    ///
    /// # Errors
    /// axvm's.
    pub fn start(site: &'a Site, name: &'a str, mode: &str, more: &[&str]) -> Result<Guest<'a>> {
        let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
        let mut args = vec!["start", name, "--mode", mode, "--probe"];
        // The MAC is the same in every run: the client has it in its ARP cache.
        let net = "tap=axtap0,mac=02:61:78:00:00:10";
        args.extend(["--net", net, "--cmdline", &cmdline]);
        args.extend(more);
        site.run_axvm(Side::A, &args)?;
        Ok(Guest { site, name })
    }

    /// One command to its control service, and the answer.
    ///
    /// # Errors
    /// The connection's, or an answer that is an error.
    pub fn command(&self, line: &str) -> Result<String> {
        let ask = || -> std::io::Result<String> {
            let target = SocketAddr::from((GUEST, port::CONTROL));
            let patience = Duration::from_secs(20);
            let mut stream = TcpStream::connect_timeout(&target, patience)?;
            stream.set_read_timeout(Some(patience))?;
            stream.write_all(format!("{line}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer.trim_end().to_string())
        };
        let answer = self.site.lab.client.run(ask)??;
        if answer.is_empty() || answer.starts_with("ERR") {
            return Err(format!("the guest answered {answer:?} to {line}").into());
        }
        Ok(answer)
    }

    /// How many pages it can be told to write to: it names the bound when asked for too many.
    ///
    /// # Errors
    /// It takes an impossible order, or names no number.
    pub fn all_pages(&self) -> Result<u64> {
        match self.command(&format!("DIRTY {} 1 8", u64::MAX)) {
            Ok(said) => Err(format!("the guest took an impossible order: {said}").into()),
            Err(refusal) => {
                let text = refusal.to_string();
                let bound = text.split_whitespace().find_map(|word| word.parse().ok());
                bound.ok_or_else(|| format!("no number of pages in {text:?}").into())
            }
        }
    }

    /// One of its counters (`COUNTERS`: `writes`, `spins` …), all CPUs together.
    ///
    /// # Errors
    /// The connection's, or an answer that is no counter.
    pub fn counted(&self, what: &str) -> Result<u64> {
        let counters = self.command("COUNTERS")?;
        let mut all = 0;
        for word in counters.split(' ') {
            let (counter, count) = word.split_once('=').unwrap_or((word, ""));
            if counter.rsplit('.').next() == Some(what) {
                all += count.parse::<u64>()?;
            }
        }
        Ok(all)
    }

    /// What its primary says of itself (`axvm -o json show`).
    ///
    /// # Errors
    /// axvm's, or no process says that it runs the guest protected.
    pub fn status(&self) -> Result<Value> {
        let shown = self.site.show(Side::A, self.name)?;
        let processes = shown["processes"].as_array().cloned().unwrap_or_default();
        let statuses = processes.into_iter().map(|p| p["status"].clone());
        statuses
            .into_iter()
            .find(|s| s["role"] == "primary")
            .ok_or_else(|| format!("no process runs {}: {shown}", self.name).into())
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // Gone already is as good; the site takes whatever is left with it.
        let _ = self.site.run_axvm(Side::A, &["stop", "--force", self.name]);
    }
}

/// A number in a JSON document that must be there.
///
/// # Errors
/// It is not.
pub fn number(of: &Value) -> Result<f64> {
    of.as_f64()
        .ok_or_else(|| format!("{of} where a number was due").into())
}

/// To three decimals: a share.
pub fn share(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

/// To one decimal: what a clock and a percentile are good for.
pub fn rounded(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}
