//! Debian's QEMU on a host of the laboratory: what every peer made of it has in common, and QEMU alone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::net::{GUEST, Host, Lab, LabSpec, addr};
use testkit::product::Daemon;

use super::qmp::Qmp;
use super::{Guest, MAC, PATIENCE};
use crate::Error;

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Size of the guest's disk.
const DISK_BYTES: u64 = 64 << 20;

/// A laboratory for one QEMU or two, and the files of its guest.
pub struct Place {
    /// The networks and hosts. The clocks of both hosts agree, as QEMU would have them.
    pub lab: Lab,
    dir: TempDir,
}

impl Place {
    /// Sets it up.
    pub fn new() -> Result<Place, Error> {
        let dir = tempfile::tempdir().map_err(|e| Error::Failed(format!("a folder: {e}")))?;
        let place = Place {
            lab: Lab::new(LabSpec {
                clocks_ahead: [Duration::ZERO; 4],
                ..LabSpec::default()
            })?,
            dir,
        };
        let image = place.file("image");
        std::fs::write(&image, probe_guest::ELF).map_err(|e| in_file(&image, e))?;
        Ok(place)
    }

    /// The path of a file.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A disk of zeroes as a raw image.
    pub fn raw_disk(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.file(name);
        let file = std::fs::File::create(&path).map_err(|e| in_file(&path, e))?;
        file.set_len(DISK_BYTES).map_err(|e| in_file(&path, e))?;
        Ok(path)
    }

    /// Starts QEMU on `host` with these words after the common ones.
    pub fn start(&self, host: &Host, guest: &Guest, more: &[String]) -> Result<Daemon, Error> {
        let mut command = host.command(PROGRAM);
        command.args(self.common(host.name(), guest)).args(more);
        let name = format!("{PROGRAM} on host {}", host.name());
        let log = self.file(&format!("{}.log", host.name()));
        Ok(Daemon::start(name, command, log)?)
    }

    /// The machine, which both sides of a pair must have alike, with its console in a file and a monitor.
    fn common(&self, host: &str, guest: &Guest) -> Vec<String> {
        let (cpus, path) = (guest.cpus, self.dir.path().display());
        let console = format!("file:{path}/{host}.console");
        let mut words = machine(guest);
        words.extend(
            [
                ["-kernel", &format!("{path}/image")],
                [
                    "-append",
                    &format!("ip={GUEST}/{} cpus={cpus} quiet", addr::LAN_PREFIX),
                ],
                ["-serial", &console],
                ["-qmp", &self.monitor(host, "")],
                ["-qmp", &self.monitor(host, "-agent")],
            ]
            .as_flattened()
            .iter()
            .map(ToString::to_string),
        );
        words
    }

    fn monitor(&self, host: &str, which: &str) -> String {
        let path = self.file(&format!("{host}{which}.qmp"));
        format!("unix:{},server=on,wait=off", path.display())
    }

    /// A host's QEMU, as soon as it listens.
    pub fn qmp(&self, host: &str) -> Result<Qmp, Error> {
        let path = self.file(&format!("{host}.qmp"));
        Qmp::connect(&path, PATIENCE).map_err(|e| self.with_log(host, e))
    }

    /// The same on a second connection, for the events.
    pub fn listen(&self, host: &str) -> Result<Qmp, Error> {
        Qmp::listen(&self.file(&format!("{host}-agent.qmp")), PATIENCE)
    }

    /// Waits until the guest says on its console that its services are up.
    pub fn wait_for_guest(&self, host: &str) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        let console = self.file(&format!("{host}.console"));
        while !std::fs::read_to_string(&console)
            .is_ok_and(|text| text.contains("probe-guest ready"))
        {
            if Instant::now() > deadline {
                let silent = Error::Failed("the guest does not boot on QEMU".into());
                return Err(self.with_log(host, silent));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// An error with what QEMU printed.
    pub fn with_log(&self, host: &str, error: Error) -> Error {
        let log = std::fs::read_to_string(self.file(&format!("{host}.log"))).unwrap_or_default();
        Error::Failed(format!("{error}\n{log}").trim_end().into())
    }

    /// Empty qcow2 images, made by QEMU itself: `qemu-img` is in another package.
    pub fn qcow2_disks(&self, paths: &[PathBuf]) -> Result<(), Error> {
        let mut command = self.lab.b.command(PROGRAM);
        command.args(["-M", "none", "-nodefaults", "-display", "none", "-qmp"]);
        command.arg(self.monitor("maker", ""));
        let _qemu = Daemon::start("qemu that makes disks", command, self.file("maker.log"))?;
        let mut qmp = self.qmp("maker")?;
        for (n, path) in paths.iter().enumerate() {
            let node = format!("disk{n}");
            let file = json!({"driver": "file", "filename": path, "size": 0});
            create(&mut qmp, &format!("file{n}"), file)?;
            let opened = json!({"driver": "file", "filename": path, "node-name": node});
            qmp.run("blockdev-add", opened)?;
            let format = json!({"driver": "qcow2", "file": node, "size": DISK_BYTES});
            create(&mut qmp, &format!("format{n}"), format)?;
        }
        Ok(())
    }
}

/// The machine's words.
pub fn machine(guest: &Guest) -> Vec<String> {
    let words = [
        // Without ACPI it names its devices on the guest's command line.
        ["-M", "microvm,acpi=off,auto-kernel-cmdline=on,accel=kvm"],
        ["-cpu", "host,-arch-capabilities"],
        ["-global", "virtio-mmio.force-legacy=false"],
        ["-smp", &guest.cpus.to_string()],
        ["-m", &guest.memory],
        ["-display", "none"],
    ];
    let mut words: Vec<String> = words
        .as_flattened()
        .iter()
        .map(ToString::to_string)
        .collect();
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into));
    words
}

/// The network card, by the tap of the host.
pub fn card() -> Vec<String> {
    let words = [
        // The guest asks for no offload, so a header for it would only be copied about.
        [
            "-netdev",
            "tap,id=hn0,ifname=axtap0,script=no,downscript=no,vhost=off,vnet_hdr=off",
        ],
        [
            "-device",
            &format!("virtio-net-device,netdev=hn0,mac={MAC}"),
        ],
    ];
    words
        .as_flattened()
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// Makes one image and waits for the job.
fn create(qmp: &mut Qmp, job: &str, options: Value) -> Result<(), Error> {
    qmp.run(
        "blockdev-create",
        json!({"job-id": job, "options": options}),
    )?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = qmp.run("query-jobs", Value::Null)?;
        let ours = jobs
            .as_array()
            .into_iter()
            .flatten()
            .find(|j| j["id"] == job);
        match ours {
            Some(done) if done["status"] == "concluded" => {
                if let Some(why) = done["error"].as_str() {
                    return Err(Error::Failed(format!("QEMU makes no disk: {why}")));
                }
                break;
            }
            _ if Instant::now() > deadline => {
                return Err(Error::Failed(format!("QEMU makes no disk: {jobs}")));
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    qmp.run("job-dismiss", json!({"id": job})).map(drop)
}

fn in_file(path: &Path, e: std::io::Error) -> Error {
    Error::Failed(format!("{}: {e}", path.display()))
}

/// The guest on QEMU alone.
pub struct Plain {
    /// First, so that it ends before its files do.
    _qemu: Daemon,
    /// Where it runs: on host a.
    pub place: Place,
}

impl Plain {
    /// Starts it, and waits until it serves.
    pub fn start(guest: &Guest) -> Result<Plain, Error> {
        let place = Place::new()?;
        let mut words = card();
        words.extend(Plain::disk(&place.raw_disk("disk.img")?));
        let qemu = place.start(&place.lab.a, guest, &words)?;
        place.wait_for_guest("a")?;
        Ok(Plain { _qemu: qemu, place })
    }

    fn disk(image: &Path) -> [String; 4] {
        let drive = format!("if=none,id=disk,format=raw,file={}", image.display());
        let device = "virtio-blk-device,drive=disk";
        ["-drive".into(), drive, "-device".into(), device.into()]
    }

    /// How it is set, for the reader.
    pub fn settings(guest: &Guest) -> Vec<String> {
        let mut words = machine(guest);
        words.extend(card());
        words.extend(Plain::disk(Path::new("disk.img")));
        vec![format!("{PROGRAM} {}", words.join(" "))]
    }
}
