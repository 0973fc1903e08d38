//! Disk images before a start: absent ones are made, others must have the defined size.
//!
//! axd only makes and measures them; `ax-vmm` opens them, under its lock.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ax_api::host::Code;
use ax_api::process::Start;
use ax_api::units::Bytes;
use ax_api::vm::{Mode, Vm};
use ax_disk::Meta;
use ax_wire::PairId;

use crate::config::Config;
use crate::failure::{Failure, chain};

/// What `ax-vmm` knows durably of disk `index` here: it is there once the VM has had that disk on this host.
fn facts(config: &Config, vm: &str, index: usize) -> PathBuf {
    let state = config.vm_dir(vm).join("state");
    state.join(format!("disk{index}.meta"))
}

/// Makes the absent images of `vm` and checks the others. Returns what was made, with the files that are about
/// it alone.
///
/// A guest is not booted from an image made in the place of one that is gone (I4): its copy on the other
/// host may be all there is, and would be overwritten.
///
/// # Errors
/// An image has another size, cannot be made, or is gone; what was made is removed again.
pub fn prepare(config: &Config, vm: &Vm, start: Start) -> Result<Vec<PathBuf>, Failure> {
    let mut made = vec![];
    for (index, disk) in vm.disks.iter().enumerate() {
        let path = config.image_path(&disk.path);
        let facts = facts(config, &vm.name, index);
        let prepared = match start == Start::Boot && facts.exists() && is_absent(&path) {
            true => Err(gone(&path, &facts, vm)),
            false => prepare_one(&path, disk.size, (vm.pair, &facts), &mut made),
        };
        if let Err(failure) = prepared {
            remove(&made);
            return Err(failure);
        }
    }
    Ok(made)
}

fn is_absent(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

fn gone(path: &Path, facts: &Path, vm: &Vm) -> Failure {
    let elsewhere = match vm.mode {
        Mode::None => "",
        Mode::Ft | Mode::Ha => " or start it on the other host, from where it is copied here,",
    };
    let why = format!(
        "disk image {} is gone, and {} had its data in it: put it back,{elsewhere} or, for an empty \
         disk in its place, remove {} first",
        path.display(),
        vm.name,
        facts.display()
    );
    Failure::new(Code::Image, why)
}

fn prepare_one(
    path: &Path,
    size: u64,
    (pair, facts): (PairId, &Path),
    made: &mut Vec<PathBuf>,
) -> Result<(), Failure> {
    let image =
        |why: String| Failure::new(Code::Image, format!("disk image {}: {why}", path.display()));
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => Ok(()),
        Ok(found) if !found.is_file() => Err(image("is no file".to_owned())),
        Ok(found) if found.len() != size => Err(image(format!(
            "has {} bytes, the definition says {} ({}); move it away, or define the VM with its size",
            found.len(),
            size,
            Bytes(size)
        ))),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // First: whatever happens next, the guest is not booted from an empty image (I4).
            match facts.exists() {
                true => Meta::disown(facts, pair, size)
                    .map_err(|e| image(format!("cannot be made: {}", chain(&e))))?,
                false => made.push(facts.to_path_buf()),
            }
            let mut make = || -> std::io::Result<()> {
                for dir in [facts.parent(), path.parent()].into_iter().flatten() {
                    std::fs::create_dir_all(dir)?;
                }
                let file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(path)?;
                made.push(path.to_path_buf());
                file.set_len(size)?;
                file.sync_all()
            };
            make().map_err(|e| image(format!("cannot be made: {e}")))
        }
        Err(e) => Err(image(e.to_string())),
    }
}

/// Removes what [`prepare`] made, and nothing else; images before the facts that tell of them.
pub fn remove(made: &[PathBuf]) {
    for path in made.iter().rev() {
        match std::fs::remove_file(path) {
            // Facts are written by a process that may not have come to that.
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {e}", path.display());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_api::vm::{Boot, DirtySource, Disk, Secondary};
    use ax_disk::Image;
    use ax_wire::PairId;

    fn host(dir: &Path) -> Config {
        let text = format!("name = \"a\"\ndata_dir = \"{}\"", dir.display());
        crate::config::parse(&text, Path::new("t"), 1).unwrap()
    }

    fn vm(paths: &[&Path]) -> Vm {
        let disk = |path: &&Path| Disk {
            path: path.to_path_buf(),
            size: 1 << 20,
            read_only: false,
            secondary: Secondary::Async,
            on_error: Default::default(),
        };
        Vm {
            name: "web".into(),
            pair: PairId([1; 16]),
            mode: Mode::Ft,
            memory: 64 << 20,
            cpus: 1,
            boot: Boot::Probe {
                cmdline: String::new(),
            },
            disks: paths.iter().map(disk).collect(),
            nics: vec![],
            autostart: false,
            dirty: DirtySource::Auto,
            verify_every: None,
            preferred: None,
        }
    }

    #[test]
    fn absent_images_are_made_sparse_and_can_be_unmade_with_what_is_known_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let config = host(dir.path());
        let vm = vm(&[Path::new("web.img")]);
        let made = prepare(&config, &vm, Start::Boot).unwrap();
        let image = dir.path().join("images/web.img");
        assert_eq!(std::fs::metadata(&image).unwrap().len(), 1 << 20);
        assert!(prepare(&config, &vm, Start::Boot).unwrap().is_empty());
        std::fs::write(facts(&config, "web", 0), b"of the start").unwrap();
        remove(&made);
        assert!(!image.exists() && !facts(&config, "web", 0).exists());
    }

    #[test]
    fn an_image_of_another_size_is_refused_by_name_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let config = host(dir.path());
        let other = dir.path().join("other.img");
        std::fs::write(&other, b"precious").unwrap();
        let failure =
            prepare(&config, &vm(&[Path::new("web.img"), &other]), Start::Boot).unwrap_err();
        assert_eq!(failure.code, Code::Image);
        assert!(failure.why.contains("other.img") && failure.why.contains("8 bytes"));
        assert!(!dir.path().join("images/web.img").exists());
        assert_eq!(std::fs::read(&other).unwrap(), b"precious");
    }

    #[test]
    fn a_guest_is_not_booted_in_the_place_of_an_image_that_is_gone_but_may_be_copied_there() {
        let dir = tempfile::tempdir().unwrap();
        let config = host(dir.path());
        let vm = vm(&[Path::new("web.img")]);
        prepare(&config, &vm, Start::Boot).unwrap();
        let (image, facts) = (dir.path().join("images/web.img"), facts(&config, "web", 0));
        let open = || Image::open(&image, &facts, vm.pair, 1 << 20, false).unwrap();
        open().require_consistent().unwrap();
        std::fs::remove_file(&image).unwrap();
        let failure = prepare(&config, &vm, Start::Boot).unwrap_err();
        assert_eq!(failure.code, Code::Image);
        for named in [&image, &facts] {
            let named = named.display().to_string();
            assert!(failure.why.contains(&named), "{}", failure.why);
        }
        assert!(!image.exists());
        // A copy that comes to nothing leaves no image.
        remove(&prepare(&config, &vm, Start::Shadow).unwrap());
        prepare(&config, &vm, Start::Boot).unwrap_err();
        // axd dies right here, nobody copies anything: what is there is found, and not booted.
        prepare(&config, &vm, Start::Shadow).unwrap();
        assert!(prepare(&config, &vm, Start::Boot).unwrap().is_empty());
        open().require_consistent().unwrap_err();
    }
}
