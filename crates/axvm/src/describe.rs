//! From options, or a file, to a VM.

use std::path::{Path, PathBuf};

use ax_api::host::{Code, NewDisk, NewNic, NewVm};
use ax_api::units::Bytes;
use ax_api::vm::{Boot, DirtySource, Mode, OnError, Preferred, Return, Secondary};

use crate::cli::{DirtyArg, ModeArg, ReturnArg, VmArgs};
use crate::client::Failure;

const DEFAULT_MEMORY: Bytes = Bytes(256 << 20);

/// The VM the options describe; none if they describe none.
pub fn optional(name: &str, args: &VmArgs) -> Result<Option<NewVm>, Failure> {
    if let Some(file) = &args.config {
        return from_file(Some(name), file).map(Some);
    }
    if !args.probe && args.kernel.is_none() {
        let described = args.mode.is_some()
            || args.cmdline.is_some()
            || args.memory.is_some()
            || args.cpus.is_some()
            || !args.disk.is_empty()
            || !args.net.is_empty()
            || args.dirty.is_some()
            || args.verify_every.is_some();
        if described {
            return Err(usage(
                "say what to boot as well: --probe, or --kernel FILE, or --config FILE",
            ));
        }
        return Ok(None);
    }
    from_options(name, args).map(Some)
}

/// The VM the options describe.
pub fn required(name: Option<&str>, args: &VmArgs) -> Result<NewVm, Failure> {
    if let Some(file) = &args.config {
        return from_file(name, file);
    }
    let name = name.ok_or_else(|| usage("name the VM, as in `axvm define web --probe`"))?;
    optional(name, args)?
        .ok_or_else(|| usage("say what to boot: --probe, or --kernel FILE, or --config FILE"))
}

fn usage(why: impl Into<String>) -> Failure {
    Failure::new(Code::Usage, why)
}

fn from_file(name: Option<&str>, file: &Path) -> Result<NewVm, Failure> {
    let text =
        std::fs::read_to_string(file).map_err(|e| usage(format!("{}: {e}", file.display())))?;
    let mut vm: NewVm = toml::from_str(&text)
        .map_err(|e| usage(format!("{}: {}", file.display(), e.to_string().trim_end())))?;
    match name {
        Some(name) if vm.name.is_empty() => vm.name = name.to_owned(),
        Some(name) if vm.name != name => {
            return Err(usage(format!(
                "{} describes {}, not {name}",
                file.display(),
                vm.name
            )));
        }
        Some(_) => {}
        None if vm.name.is_empty() => {
            return Err(usage(format!(
                "{} names no VM: add name = \"...\"",
                file.display()
            )));
        }
        None => {}
    }
    let base = file.parent().unwrap_or(Path::new(""));
    let base = if base.as_os_str().is_empty() {
        Path::new(".")
    } else {
        base
    };
    for disk in &mut vm.disks {
        disk.path = image(base, &disk.path)?;
    }
    if let Boot::Kernel { kernel, initrd, .. } = &mut vm.boot {
        *kernel = absolute(&base.join(&*kernel))?;
        if let Some(initrd) = initrd {
            *initrd = absolute(&base.join(&*initrd))?;
        }
    }
    Ok(vm)
}

fn from_options(name: &str, args: &VmArgs) -> Result<NewVm, Failure> {
    let cmdline = args.cmdline.clone().unwrap_or_default();
    let boot = match &args.kernel {
        None => Boot::Probe { cmdline },
        Some(kernel) => Boot::Kernel {
            kernel: absolute(kernel)?,
            initrd: args.initrd.as_deref().map(absolute).transpose()?,
            cmdline,
        },
    };
    Ok(NewVm {
        name: name.to_owned(),
        mode: match args.mode {
            None => Mode::Ft,
            Some(named) => mode(named),
        },
        memory: args.memory.unwrap_or(DEFAULT_MEMORY),
        cpus: args.cpus.unwrap_or(1),
        boot,
        disks: args
            .disk
            .iter()
            .map(|d| disk(d))
            .collect::<Result<_, _>>()?,
        nics: args.net.iter().map(|n| nic(n)).collect::<Result<_, _>>()?,
        autostart: false,
        dirty: match args.dirty {
            None | Some(DirtyArg::Auto) => DirtySource::Auto,
            Some(DirtyArg::Ring) => DirtySource::Ring,
            Some(DirtyArg::Bitmap) => DirtySource::Bitmap,
        },
        verify_every: args.verify_every,
        preferred: None,
    })
}

/// `PATH[,size=SIZE][,ro][,secondary=sync|async][,on_error=hold|report]`
fn disk(text: &str) -> Result<NewDisk, Failure> {
    let bad = |why: String| usage(format!("--disk {text}: {why}"));
    let mut words = text.split(',');
    let path = words.next().unwrap_or_default();
    if path.is_empty() {
        return Err(bad("begins with the image's path".to_owned()));
    }
    let mut disk = NewDisk {
        path: image(Path::new("."), Path::new(path))?,
        size: None,
        read_only: false,
        secondary: Secondary::default(),
        on_error: OnError::default(),
    };
    for word in words {
        match word.split_once('=') {
            Some(("size", size)) => {
                disk.size = Some(size.parse().map_err(|e| bad(format!("{e}")))?);
            }
            Some(("secondary", "sync")) => disk.secondary = Secondary::Sync,
            Some(("secondary", "async")) => disk.secondary = Secondary::Async,
            Some(("on_error", "hold")) => disk.on_error = OnError::Hold,
            Some(("on_error", "report")) => disk.on_error = OnError::Report,
            None if word == "ro" => disk.read_only = true,
            _ => {
                return Err(bad(format!(
                    "`{word}` is not known: size=SIZE, ro, secondary=sync, secondary=async, on_error=hold, \
                     on_error=report"
                )));
            }
        }
    }
    Ok(disk)
}

/// `tap=NAME[,mac=MAC][,offload=on|off]`
fn nic(text: &str) -> Result<NewNic, Failure> {
    let bad = |why: String| usage(format!("--net {text}: {why}"));
    let (mut tap, mut mac, mut offload) = (None, None, None);
    for word in text.split(',') {
        match word.split_once('=') {
            Some(("tap", name)) if !name.is_empty() => tap = Some(name.to_owned()),
            Some(("mac", text)) => mac = Some(text.parse().map_err(|e| bad(format!("{e}")))?),
            Some(("offload", "on")) => offload = Some(true),
            Some(("offload", "off")) => offload = Some(false),
            _ => {
                return Err(bad(format!(
                    "`{word}` is not known: tap=NAME, mac=MAC, offload=on, offload=off"
                )));
            }
        }
    }
    Ok(NewNic {
        tap: tap.ok_or_else(|| bad("names no tap: tap=NAME".to_owned()))?,
        mac,
        offload,
    })
}

/// A bare name stays one: an image in axd's own folder. Any other path is made absolute.
fn image(base: &Path, path: &Path) -> Result<PathBuf, Failure> {
    let bare = path.components().count() == 1 && !path.to_string_lossy().contains('/');
    let special = path == Path::new(".") || path == Path::new("..");
    if bare && !special {
        return Ok(path.to_path_buf());
    }
    absolute(&base.join(path))
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|e| usage(format!("{}: {e}", path.display())))
}

/// The mode that a word of the command line names.
pub fn mode(named: ModeArg) -> Mode {
    match named {
        ModeArg::Ft => Mode::Ft,
        ModeArg::Ha => Mode::Ha,
        ModeArg::None => Mode::None,
    }
}

/// Where a VM is to run, as the options say; none: no preference.
pub fn preferred(host: Option<String>, back: ReturnArg) -> Option<Preferred> {
    let back = match back {
        ReturnArg::Manual => Return::Manual,
        ReturnArg::Auto => Return::Auto,
    };
    host.map(|host| Preferred { host, back })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_nics_read_as_documented() {
        let d = disk("/d/web.img,size=1G,ro,secondary=sync").unwrap();
        assert_eq!(d.path, PathBuf::from("/d/web.img"));
        assert_eq!(d.size, Some(Bytes(1 << 30)));
        assert!(d.read_only && d.secondary == Secondary::Sync);
        assert_eq!(d.on_error, OnError::Hold);
        let reports = disk("x,on_error=report").unwrap();
        assert_eq!(reports.on_error, OnError::Report);
        assert_eq!(disk("web.img").unwrap().path, PathBuf::from("web.img"));
        assert!(disk("./web.img").unwrap().path.is_absolute());
        let n = nic("tap=tap0,mac=52:54:00:01:02:03").unwrap();
        assert_eq!(n.tap, "tap0");
        assert_eq!(n.mac.unwrap().to_string(), "52:54:00:01:02:03");
        for bad in [
            "",
            ",ro",
            "x,size=",
            "x,size=big",
            "x,rw",
            "x,secondary=maybe",
            "x,on_error=panic",
        ] {
            assert_eq!(disk(bad).unwrap_err().code, Code::Usage, "{bad:?}");
        }
        for bad in ["", "tap=", "tap0", "mac=52:54:00:01:02:03", "tap=t,mac=1"] {
            assert_eq!(nic(bad).unwrap_err().code, Code::Usage, "{bad:?}");
        }
    }

    #[test]
    fn a_file_describes_a_vm_and_its_paths_are_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm.toml");
        let text = "mode = \"ft\"\nmemory = \"1G\"\ncpus = 2\n\
            boot = { kind = \"kernel\", kernel = \"vmlinuz\", cmdline = \"quiet\" }\n\
            disks = [{ path = \"web.img\", size = \"2G\" }, { path = \"sub/x.img\" }]\n\
            nics = [{ tap = \"tap0\" }]\n";
        std::fs::write(&file, text).unwrap();
        let vm = from_file(Some("web"), &file).unwrap();
        assert_eq!((vm.name.as_str(), vm.memory), ("web", Bytes(1 << 30)));
        assert_eq!(vm.disks[0].path, PathBuf::from("web.img"));
        assert_eq!(vm.disks[1].path, dir.path().join("sub/x.img"));
        match vm.boot {
            Boot::Kernel { kernel, .. } => assert_eq!(kernel, dir.path().join("vmlinuz")),
            other => panic!("{other:?}"),
        }
        assert!(from_file(None, &file).unwrap_err().why.contains("name"));
        std::fs::write(&file, format!("{text}colour = 1\n")).unwrap();
        let failure = from_file(Some("web"), &file).unwrap_err();
        assert!(failure.why.contains("colour") && failure.why.contains("line 7"));
        std::fs::write(&file, format!("name = \"db\"\n{text}")).unwrap();
        assert!(
            from_file(Some("web"), &file)
                .unwrap_err()
                .why
                .contains("db")
        );
    }
}
