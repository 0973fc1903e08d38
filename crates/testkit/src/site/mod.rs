//! A site as a customer has it: two hosts with axd, paired, and a witness; set up with the
//! product's own commands, in a [`Lab`].

mod arbiters;
mod keys;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::builds::Build;
use crate::fuse::Disk;
use crate::net::{Host, Lab, LabSpec, addr};
use crate::power;
use crate::product::Daemon;
use crate::{Error, Result};

/// Where axd listens for the other axd.
pub const AXD_PORT: u16 = 7430;
/// Where the witness listens.
pub const WITNESS_PORT: u16 = 7431;
/// The witness's place among the builds.
const WITNESS: usize = 2;
/// Where a second one listens, on the same host.
const SECOND_WITNESS_PORT: u16 = 7441;
const SECOND_WITNESS: &str = "0.0.0.0:7441";
/// Where a side waits for the other for the time of pairing.
const PAIRING_PORT: u16 = 7432;
/// Where etcd listens.
pub const ETCD_PORT: u16 = 2379;
/// How long a daemon may take to say that it is ready.
const READY: Duration = Duration::from_secs(20);

/// What a [`Site`] is to be like.
#[derive(Debug, Clone)]
pub struct SiteSpec {
    /// The networks.
    pub lab: LabSpec,
    /// Mutual TLS on the link (the default), or plain.
    pub mtls: bool,
    /// A witness, or an operator as arbiter.
    pub witness: bool,
    /// An etcd on the witness's host in the witness's place.
    pub etcd: bool,
    /// Images, data folders and the witness's store lie on [`Disk`]s, which lose what was not flushed when
    /// [`Site::cut_power`] strikes.
    pub disks: bool,
    /// More lines for the top of both hosts' axd.toml.
    pub extra: String,
    /// Which build host a, host b and the witness have, to begin with.
    pub builds: [Build; 3],
}

impl Default for SiteSpec {
    fn default() -> Self {
        SiteSpec {
            lab: LabSpec::default(),
            mtls: true,
            witness: true,
            etcd: false,
            disks: false,
            extra: String::new(),
            builds: [Build::Ours; 3],
        }
    }
}

impl SiteSpec {
    /// With so many dedicated links, and so many more through user space.
    #[must_use]
    pub fn with_links(mut self, links: u8, user_links: u8) -> SiteSpec {
        (self.lab.links, self.lab.user_links) = (links, user_links);
        self
    }

    /// With VMs that stay without a shadow once they have lost theirs, so that a test can look at that.
    #[must_use]
    pub fn without_reprotection(mut self) -> SiteSpec {
        self.extra.push_str("\nreprotect = false\n");
        self
    }
}

/// One of the two hosts of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Host a.
    A,
    /// Host b.
    B,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }

    /// The host's name.
    pub fn name(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }

    /// The side whose host has this name.
    pub fn named(name: &str) -> Option<Side> {
        [Side::A, Side::B].into_iter().find(|s| s.name() == name)
    }
}

/// Two hosts and a witness at work. Dropping it ends everything.
#[derive(Debug)]
pub struct Site {
    witness: Option<Daemon>,
    second: Option<Daemon>,
    axd: [Option<Daemon>; 2],
    /// The name of each side's host, and of its folder and files.
    machines: [(&'static str, &'static str); 2],
    /// The hosts and networks.
    pub lab: Lab,
    builds: [Build; 3],
    spec: SiteSpec,
    /// After whatever uses them, before the folder they are mounted in. None where [`SiteSpec::disks`] is not
    /// asked for; of host a, of host b, of the witness.
    pub(crate) disks: Option<[Disk; 3]>,
    dir: TempDir,
    pub(crate) keep: bool,
}

impl Site {
    /// Builds the product and the laboratory, starts the witness, exchanges keys, starts both
    /// axd and waits until they see each other.
    ///
    /// # Errors
    /// What of that failed, with the log of the program at fault.
    pub fn new(spec: SiteSpec) -> Result<Site> {
        let builds = spec.builds;
        for build in builds {
            build.product()?;
        }
        let dir = tempfile::Builder::new()
            .prefix("ax")
            .tempdir()
            .map_err(Error::os("make a folder for the site"))?;
        // A host sees the mounts there are when it is switched on.
        let disks = match spec.disks {
            true => Some([
                power::disk(dir.path(), "a")?,
                power::disk(dir.path(), "b")?,
                power::disk(dir.path(), "w")?,
            ]),
            false => None,
        };
        let lab = Lab::new(spec.lab)?;
        let mut site = Site {
            witness: None,
            second: None,
            axd: [None, None],
            machines: [("a", "a"), ("b", "b")],
            lab,
            builds,
            spec,
            disks,
            dir,
            keep: false,
        };
        for side in [Side::A, Side::B] {
            site.make_dir(&site.data_dir(side))?;
            let config = site.config_text(side);
            site.write(&site.config(side), &config)?;
        }
        if site.spec.witness {
            site.make_dir(&site.dir.path().join("w"))?;
            let text = format!(
                "name = \"witness\"\ndata_dir = {:?}\nlisten = \"0.0.0.0:{WITNESS_PORT}\"\n\
                 security = \"{}\"\n",
                site.dir.path().join("w"),
                site.security()
            );
            site.write(&site.witness_config(), &text)?;
        }
        if site.spec.mtls {
            site.pair()?;
        }
        site.start_witness()?;
        site.start_axd(Side::A)?;
        site.start_axd(Side::B)?;
        Ok(site)
    }

    /// The folder everything of this site is in: one folder per host and all logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Keeps the folder after the site is gone, for a look at the logs, and says where it is.
    pub fn keep_dir(&mut self) -> PathBuf {
        self.keep = true;
        self.dir.disable_cleanup(true);
        self.dir.path().to_path_buf()
    }

    /// The host of a side.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.lab.a,
            Side::B => &self.lab.b,
        }
    }

    /// Where a side's axd keeps everything.
    pub fn data_dir(&self, side: Side) -> PathBuf {
        self.dir.path().join(self.folder(side))
    }

    /// A side's axd.toml.
    pub fn config(&self, side: Side) -> PathBuf {
        self.dir.path().join(format!("{}.toml", self.folder(side)))
    }

    fn folder(&self, side: Side) -> &'static str {
        self.machines[side as usize].1
    }

    /// The name of a side's host, as it is now.
    fn name(&self, side: Side) -> &'static str {
        self.machines[side as usize].0
    }

    /// The witness's configuration.
    pub fn witness_config(&self) -> PathBuf {
        self.dir.path().join("w.toml")
    }

    /// A side's running axd.
    pub fn axd(&mut self, side: Side) -> Option<&mut Daemon> {
        self.axd[side as usize].as_mut()
    }

    /// The running witness.
    pub fn witness(&mut self) -> Option<&mut Daemon> {
        self.witness.as_mut()
    }

    /// Puts another build in the place of a side's programs: what is started from now on, by hand or by
    /// another program of that build, is of it. What runs goes on.
    ///
    /// # Errors
    /// It can't be built.
    pub fn install(&mut self, side: Side, build: Build) -> Result<()> {
        build.product()?;
        self.builds[side as usize] = build;
        Ok(())
    }

    /// The same on the witness's host.
    ///
    /// # Errors
    /// As [`Site::install`].
    pub fn install_on_witness(&mut self, build: Build) -> Result<()> {
        build.product()?;
        self.builds[WITNESS] = build;
        Ok(())
    }

    /// `axd` of a build, on a host.
    fn axd_of(&self, host: &Host, build: Build) -> Result<Command> {
        let mut command = host.command(&build.product()?.axd);
        command.envs(build.variable());
        Ok(command)
    }

    /// Starts a side's axd, anew if one ran before, and waits until it takes orders.
    ///
    /// # Errors
    /// When it does not become ready; with its log.
    pub fn start_axd(&mut self, side: Side) -> Result<()> {
        let slot = &mut self.axd[side as usize];
        drop(slot.take());
        let config = self.config(side);
        self.wait_for_end(side, &config)?;
        let mut command = self.axd_of(self.host(side), self.builds[side as usize])?;
        command.arg("--config").arg(&config);
        command.env(ax_failpoint::VAR, self.orders(side));
        let name = format!("axd on host {}", side.name());
        let log = self
            .dir
            .path()
            .join(format!("{}-axd.log", self.folder(side)));
        let mut daemon = Daemon::start(name, command, log)?;
        let deadline = Instant::now() + READY;
        while !self
            .axvm(side)
            .arg("version")
            .output()
            .is_ok_and(|o| o.status.success())
        {
            if daemon.exit_status()?.is_some() || Instant::now() > deadline {
                return Err(Error::NotReady {
                    program: format!("axd on host {}", side.name()),
                    wanted: "an answer to axvm version".into(),
                    seconds: READY.as_secs(),
                    log: daemon.log(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.axd[side as usize] = Some(daemon);
        Ok(())
    }

    /// Waits until no axd of this configuration is left: one that was killed dies a moment after the
    /// process that passed its signals on.
    fn wait_for_end(&self, side: Side, config: &Path) -> Result<()> {
        let config = config.to_string_lossy();
        let deadline = Instant::now() + READY;
        let left = || {
            let all = self.host(side).processes();
            all.values().any(|line| line.contains(config.as_ref()))
        };
        while left() {
            if Instant::now() > deadline {
                return Err(Error::Product(format!(
                    "the axd before does not end on host {}",
                    side.name()
                )));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// `axvm` on a side's host, talking to that side's axd; arguments are to be added.
    pub fn axvm(&self, side: Side) -> Command {
        let product = self.builds[side as usize].product();
        // Built when it was installed.
        let program = product.map_or(Path::new("axvm"), |product| &product.axvm);
        let mut command = self.host(side).command(program);
        command
            .arg("--socket")
            .arg(self.socket(side))
            .stdin(Stdio::null());
        command
    }

    /// Runs `axvm` and returns what it printed.
    ///
    /// # Errors
    /// When it fails; with its standard error.
    pub fn run_axvm(&self, side: Side, args: &[&str]) -> Result<String> {
        let mut command = self.axvm(side);
        let output = command.args(args).output().map_err(Error::os("run axvm"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.failed(&format!("axvm {}", args.join(" ")), &output))
    }

    /// What `axvm -o json show` says of a VM.
    ///
    /// # Errors
    /// When axvm fails, or its answer is no JSON.
    pub fn show(&self, side: Side, vm: &str) -> Result<Value> {
        let text = self.run_axvm(side, &["-o", "json", "show", vm])?;
        serde_json::from_str(&text)
            .map_err(|e| Error::Product(format!("axvm -o json show printed no JSON ({e}): {text}")))
    }

    /// The side whose host runs a VM, if any does.
    ///
    /// # Errors
    /// When axvm fails.
    pub fn primary(&self, ask: Side, vm: &str) -> Result<Option<Side>> {
        let shown = self.show(ask, vm)?;
        let name = shown["primary"].as_str();
        Ok([Side::A, Side::B]
            .into_iter()
            .find(|side| Some(self.name(*side)) == name))
    }

    /// Every log there is, each under its name, for a message about a failure.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        collect_logs(self.dir.path(), &mut text);
        text
    }

    fn failed(&self, what: &str, output: &Output) -> Error {
        Error::Product(format!(
            "{what}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))
    }

    fn socket(&self, side: Side) -> PathBuf {
        self.dir.path().join(format!("{}.sock", self.folder(side)))
    }

    fn security(&self) -> &'static str {
        if self.spec.mtls { "mtls" } else { "plain" }
    }

    fn config_text(&self, side: Side) -> String {
        let (peer_ip, peer_link) = match side {
            Side::A => (addr::B, addr::link_b as fn(u8) -> _),
            Side::B => (addr::A, addr::link_a as fn(u8) -> _),
        };
        let own_link: fn(u8) -> _ = match side {
            Side::A => addr::link_a,
            Side::B => addr::link_b,
        };
        let lab = self.spec.lab;
        let links = 0..lab.links.saturating_add(lab.user_links);
        let mut peer = vec![format!("{peer_ip}:{AXD_PORT}")];
        peer.extend(
            links
                .clone()
                .map(|n| format!("{}:{AXD_PORT}", peer_link(n))),
        );
        let own: Vec<String> = links.map(|n| own_link(n).to_string()).collect();
        let mut text = format!(
            "name = {:?}\ndata_dir = {:?}\nsocket = {:?}\nlisten = \"0.0.0.0:{AXD_PORT}\"\n\
             security = {:?}\n{}{}\n\
             [peer]\nname = {:?}\naddresses = {peer:?}\n\n[link]\naddresses = {own:?}\n",
            self.name(side),
            self.data_dir(side),
            self.socket(side),
            self.security(),
            self.spec.extra,
            self.etcd_line(),
            self.name(side.other()),
        );
        if self.spec.witness {
            text.push_str(&format!(
                "\n[witness]\nname = \"witness\"\naddresses = [\"{}:{WITNESS_PORT}\"]\n",
                addr::WITNESS
            ));
        }
        text
    }

    fn make_dir(&self, path: &Path) -> Result<()> {
        fs::create_dir_all(path).map_err(Error::os(format!("make {}", path.display())))
    }

    fn write(&self, path: &Path, text: &str) -> Result<()> {
        fs::write(path, text).map_err(Error::os(format!("write {}", path.display())))
    }
}

fn collect_logs(dir: &Path, text: &mut String) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            collect_logs(&path, text);
        } else if name.ends_with(".log") || name == "log" {
            let bytes = fs::read(&path).unwrap_or_default();
            text.push_str(&format!("--- {} ---\n", path.display()));
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
}
