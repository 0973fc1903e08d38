//! From what a user asks for to a definition: identity, MACs and image sizes filled in, limits checked.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ax_api::host::{Code, NewVm};
use ax_api::vm::{Boot, Disk, Nic, Vm};
use ax_wire::PairId;

use crate::config::{Config, check_name};
use crate::failure::Failure;

const PAGE: u64 = 4096;
const LEAST_MEMORY: u64 = 16 << 20;
const MOST_MEMORY: u64 = 1 << 40;
const MOST_DISK: u64 = 1 << 50;
const MOST_DEVICES: usize = 16;
const MOST_CMDLINE: usize = 2048;
/// IFNAMSIZ less its terminating zero.
const MOST_TAP: usize = 15;

/// Random bytes of the system.
///
/// # Errors
/// The system has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| {
        Failure::new(
            Code::Failed,
            format!("no random numbers from the system: {e}"),
        )
    })?;
    Ok(bytes)
}

/// The definition of `new`. What it leaves open is taken from `known`, its present definition, or made.
/// `offload` is why network devices can't have offloads, if they can't.
///
/// # Errors
/// A limit is broken, an image without a size is not there, or an offload is asked for that can't be.
pub fn resolve(
    new: &NewVm,
    known: Option<&Vm>,
    config: &Config,
    offload: &Result<(), String>,
) -> Result<Vm, Failure> {
    let mut disks = Vec::with_capacity(new.disks.len());
    for disk in &new.disks {
        let before = known.and_then(|vm| vm.disks.iter().find(|d| d.path == disk.path));
        let size = match (disk.size, before) {
            (Some(size), _) => size.0,
            (None, Some(before)) => before.size,
            (None, None) => {
                size_of(&config.image_path(&disk.path)).map_err(|f| f.at(&config.name))?
            }
        };
        disks.push(Disk {
            path: disk.path.clone(),
            size,
            read_only: disk.read_only,
            secondary: disk.secondary,
            on_error: disk.on_error,
        });
    }
    let mut nics = Vec::with_capacity(new.nics.len());
    for (i, nic) in new.nics.iter().enumerate() {
        let before = known.and_then(|vm| vm.nics.get(i));
        let offload = match (nic.offload, before, offload) {
            (Some(true), _, Err(why)) => {
                let why = format!("tap {}: no offload: {why}", nic.tap);
                return Err(Failure::new(Code::Usage, why));
            }
            (Some(asked), ..) => asked,
            (None, Some(before), _) => before.offload,
            (None, None, can) => can.is_ok(),
        };
        let mac = match (nic.mac, before) {
            (Some(mac), _) => mac.0,
            (None, Some(before)) => before.mac,
            (None, None) => {
                let [a, b, c] = random()?;
                [0x52, 0x54, 0x00, a, b, c]
            }
        };
        nics.push(Nic {
            tap: nic.tap.clone(),
            mac,
            offload,
        });
    }
    let vm = Vm {
        name: new.name.clone(),
        pair: match known {
            Some(vm) => vm.pair,
            None => PairId(random()?),
        },
        mode: new.mode,
        memory: new.memory.0,
        cpus: new.cpus,
        boot: new.boot.clone(),
        disks,
        nics,
        autostart: new.autostart,
        dirty: new.dirty,
        verify_every: new.verify_every,
        preferred: match &new.preferred {
            Some(preferred) => Some(preferred.clone()),
            None => known.and_then(|vm| vm.preferred.clone()),
        },
    };
    if let Some(preferred) = &new.preferred {
        check_host(&preferred.host, config)?;
    }
    check(&vm)?;
    Ok(vm)
}

/// Whether a host is one of this pair.
///
/// # Errors
/// It is not.
pub fn check_host(host: &str, config: &Config) -> Result<(), Failure> {
    let peer = config.peer.as_ref().map(|peer| peer.name.as_str());
    if host == config.name || Some(host) == peer {
        return Ok(());
    }
    let hosts = match peer {
        Some(peer) => format!("{} and {peer}", config.name),
        None => config.name.clone(),
    };
    let why = format!("no host of this pair is called {host:?}: there is {hosts}");
    Err(Failure::new(Code::Usage, why))
}

fn size_of(path: &Path) -> Result<u64, Failure> {
    match std::fs::metadata(path) {
        Ok(m) => Ok(m.len()),
        Err(e) => Err(Failure::new(
            Code::Image,
            format!(
                "disk image {}: {e}; give its path on this host, or a size (size=1G) to have it made",
                path.display()
            ),
        )),
    }
}

/// Whether a definition, from whomever, is one axd works with.
///
/// # Errors
/// Which limit it breaks.
pub fn check(vm: &Vm) -> Result<(), Failure> {
    let bad = |what: String| {
        Err(Failure::new(
            Code::Usage,
            format!("VM {:?}: {what}", vm.name),
        ))
    };
    if let Err(why) = check_name(&vm.name) {
        return bad(why.to_owned());
    }
    if !(LEAST_MEMORY..=MOST_MEMORY).contains(&vm.memory) || !vm.memory.is_multiple_of(PAGE) {
        return bad(format!(
            "memory of {} bytes: must be 16M to 1T, a multiple of 4096",
            vm.memory
        ));
    }
    if !(1..=8).contains(&vm.cpus) {
        return bad(format!("{} vCPUs: must be 1 to 8", vm.cpus));
    }
    let (cmdline, files) = match &vm.boot {
        Boot::Probe { cmdline } => (cmdline, vec![]),
        Boot::Kernel {
            kernel,
            initrd,
            cmdline,
        } => (cmdline, initrd.iter().chain([kernel]).collect()),
    };
    if cmdline.len() > MOST_CMDLINE || cmdline.bytes().any(|b| b == 0 || b == b'\n') {
        return bad(format!(
            "the command line must be one line of at most {MOST_CMDLINE} bytes"
        ));
    }
    for file in files.into_iter().chain(vm.disks.iter().map(|d| &d.path)) {
        let is_disk = vm.disks.iter().any(|d| d.path == *file);
        if is_disk && is_bare_name(file) {
            continue;
        }
        if !file.is_absolute() || file.as_os_str().as_bytes().contains(&0) {
            return bad(format!(
                "{} must be an absolute path{}",
                file.display(),
                if is_disk {
                    ", or a file name without /"
                } else {
                    ""
                }
            ));
        }
    }
    if vm.disks.len() > MOST_DEVICES || vm.nics.len() > MOST_DEVICES {
        return bad(format!(
            "at most {MOST_DEVICES} disks and {MOST_DEVICES} NICs"
        ));
    }
    let mut seen = HashSet::new();
    for disk in &vm.disks {
        if disk.size == 0 || disk.size > MOST_DISK || !disk.size.is_multiple_of(512) {
            return bad(format!(
                "disk {} of {} bytes: the size must be a multiple of 512, not 0, at most 1P",
                disk.path.display(),
                disk.size
            ));
        }
        if !seen.insert(&disk.path) {
            return bad(format!("disk {} is named twice", disk.path.display()));
        }
    }
    let (mut taps, mut macs) = (HashSet::new(), HashSet::new());
    for nic in &vm.nics {
        let graphic = nic.tap.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if nic.tap.is_empty() || nic.tap.len() > MOST_TAP || !graphic {
            return bad(format!(
                "tap {:?}: an interface name has 1 to {MOST_TAP} characters, no space, no /",
                nic.tap
            ));
        }
        if !taps.insert(&nic.tap) || !macs.insert(nic.mac) {
            return bad(format!("tap {} or its MAC address is used twice", nic.tap));
        }
        if nic.mac[0] & 1 != 0 || nic.mac == [0; 6] {
            return bad(format!(
                "the MAC address of tap {} is no unicast one",
                nic.tap
            ));
        }
    }
    if let Some(preferred) = &vm.preferred
        && let Err(why) = check_name(&preferred.host)
    {
        return bad(format!("preferred host {:?}: {why}", preferred.host));
    }
    if vm.verify_every == Some(0) {
        return bad("verify_every must be at least 1".to_owned());
    }
    Ok(())
}

/// A file name of one ordinary component: an image in axd's own folder.
fn is_bare_name(path: &Path) -> bool {
    let mut parts = path.components();
    matches!(parts.next(), Some(std::path::Component::Normal(name))
        if name.as_bytes() == path.as_os_str().as_bytes() && !name.as_bytes().contains(&0))
        && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_api::host::{NewDisk, NewNic};
    use ax_api::units::{Bytes, Mac};
    use ax_api::vm::{DirtySource, Secondary};

    fn new() -> NewVm {
        NewVm {
            name: "web".into(),
            mode: ax_api::vm::Mode::Ft,
            memory: Bytes(256 << 20),
            cpus: 2,
            boot: Boot::Probe {
                cmdline: "ip=10.0.0.1/24".into(),
            },
            disks: vec![NewDisk {
                path: "/d/web.img".into(),
                size: Some(Bytes(1 << 20)),
                read_only: false,
                secondary: Secondary::Async,
                on_error: Default::default(),
            }],
            nics: vec![NewNic {
                tap: "tap0".into(),
                mac: None,
                offload: None,
            }],
            autostart: false,
            dirty: DirtySource::Auto,
            verify_every: None,
            preferred: None,
        }
    }

    fn resolve(new: &NewVm, known: Option<&Vm>) -> Result<Vm, Failure> {
        let config =
            crate::config::parse("name = \"a\"\ndata_dir = \"/nowhere\"", Path::new("t"), 1);
        super::resolve(new, known, &config.unwrap(), &Ok(()))
    }

    #[test]
    fn offloads_are_there_if_both_hosts_can_and_stay_as_they_were() {
        let config =
            crate::config::parse("name = \"a\"\ndata_dir = \"/nowhere\"", Path::new("t"), 1);
        let config = config.unwrap();
        let old = Err("host b is too old".to_owned());
        let mut wanted = new();
        let of = |wanted: &NewVm, known, can| {
            super::resolve(wanted, known, &config, can).map(|vm| vm.nics[0].offload)
        };
        assert!(of(&wanted, None, &Ok(())).unwrap());
        assert!(!of(&wanted, None, &old).unwrap());
        let known = super::resolve(&wanted, None, &config, &old).unwrap();
        assert!(!of(&wanted, Some(&known), &Ok(())).unwrap());
        wanted.nics[0].offload = Some(true);
        assert!(of(&wanted, Some(&known), &Ok(())).unwrap());
        let refused = of(&wanted, None, &old).unwrap_err();
        assert_eq!(refused.code, Code::Usage);
        assert!(refused.why.contains("tap0") && refused.why.contains("host b is too old"));
        wanted.nics[0].offload = Some(false);
        assert!(!of(&wanted, None, &Ok(())).unwrap());
        // An axd from before them refuses a definition that says anything of them.
        let said = |vm: &Vm| toml::to_string(vm).unwrap().contains("offload");
        assert!(!said(&known));
        let can = super::resolve(&new(), None, &config, &Ok(())).unwrap();
        assert!(said(&can));
    }

    #[test]
    fn identity_and_mac_are_made_once_and_kept() {
        let first = resolve(&new(), None).unwrap();
        assert_eq!(first.nics[0].mac[..3], [0x52, 0x54, 0]);
        let other = resolve(&new(), None).unwrap();
        assert_ne!(first.pair, other.pair);
        let again = resolve(&new(), Some(&first)).unwrap();
        assert_eq!(again, first);
    }

    #[test]
    fn an_image_without_size_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.img");
        let mut wanted = new();
        wanted.disks[0].path = path.clone();
        wanted.disks[0].size = None;
        let failure = resolve(&wanted, None).unwrap_err();
        assert_eq!(failure.code, Code::Image);
        assert!(failure.why.contains("web.img") && failure.why.contains("size="));
        std::fs::write(&path, [0; 1024]).unwrap();
        assert_eq!(resolve(&wanted, None).unwrap().disks[0].size, 1024);
    }

    /// Every limit is enforced and named.
    #[test]
    fn bad_definitions_are_refused_by_name() {
        type Change = fn(&mut NewVm);
        let cases: &[(Change, &str)] = &[
            (|vm| vm.name = "../etc".into(), "a-z"),
            (|vm| vm.name = String::new(), "a-z"),
            (|vm| vm.name = "-x".into(), "a-z"),
            (|vm| vm.memory = Bytes(1 << 20), "memory"),
            (|vm| vm.memory = Bytes((256 << 20) + 1), "memory"),
            (|vm| vm.memory = Bytes(u64::MAX), "memory"),
            (|vm| vm.cpus = 0, "vCPUs"),
            (|vm| vm.cpus = 9, "vCPUs"),
            (|vm| vm.disks[0].size = Some(Bytes(0)), "512"),
            (|vm| vm.disks[0].size = Some(Bytes(1000)), "512"),
            (|vm| vm.disks[0].path = "rel/x.img".into(), "absolute"),
            (|vm| vm.disks[0].path = "..".into(), "absolute"),
            (|vm| vm.disks.push(vm.disks[0].clone()), "twice"),
            (|vm| vm.nics[0].tap = "a-very-long-tap-name".into(), "tap"),
            (|vm| vm.nics[0].tap = "a b".into(), "tap"),
            (
                |vm| vm.nics[0].mac = Some(Mac([1, 0, 0, 0, 0, 1])),
                "unicast",
            ),
            (|vm| vm.nics = vec![vm.nics[0].clone(); 17], "at most"),
            (|vm| vm.nics.push(vm.nics[0].clone()), "twice"),
            (|vm| vm.verify_every = Some(0), "verify_every"),
            (
                |vm| {
                    vm.preferred = Some(ax_api::vm::Preferred {
                        host: "elsewhere".into(),
                        back: ax_api::vm::Return::Auto,
                    });
                },
                "elsewhere",
            ),
            (
                |vm| {
                    vm.boot = Boot::Kernel {
                        kernel: "k".into(),
                        initrd: None,
                        cmdline: String::new(),
                    }
                },
                "absolute",
            ),
            (
                |vm| {
                    vm.boot = Boot::Probe {
                        cmdline: "a\nb".into(),
                    }
                },
                "one line",
            ),
        ];
        for (i, (change, word)) in cases.iter().enumerate() {
            let mut vm = new();
            change(&mut vm);
            let failure = resolve(&vm, None).unwrap_err();
            assert_eq!(failure.code, Code::Usage, "case {i}: {failure}");
            assert!(failure.why.contains(word), "case {i}: {failure}");
        }
    }
}
