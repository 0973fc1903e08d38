//! Disk images before a start: absent ones are made, others must have the defined size.
//!
//! axd only makes and measures them; `ax-vmm` opens them, under its lock.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ax_api::host::Code;
use ax_api::units::Bytes;
use ax_api::vm::Vm;

use crate::config::Config;
use crate::failure::Failure;

/// Marker beside a VM's state that disk `index` was made empty on this host, so nothing in it is in
/// sync with anything yet. Made before the image.
pub fn fresh_marker(config: &Config, vm: &str, index: usize) -> PathBuf {
    config
        .vm_dir(vm)
        .join("state")
        .join(format!("disk{index}.fresh"))
}

/// Makes the absent images of `vm` and checks the others. Returns what was made, markers included.
///
/// # Errors
/// An image has another size or cannot be made; what was made is removed again.
pub fn prepare(config: &Config, vm: &Vm) -> Result<Vec<PathBuf>, Failure> {
    let mut made = vec![];
    for (index, disk) in vm.disks.iter().enumerate() {
        let path = config.image_path(&disk.path);
        let marker = fresh_marker(config, &vm.name, index);
        if let Err(failure) = prepare_one(&path, disk.size, &marker, &mut made) {
            remove(&made);
            return Err(failure);
        }
    }
    Ok(made)
}

fn prepare_one(
    path: &Path,
    size: u64,
    marker: &Path,
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
            let mut make = || -> std::io::Result<()> {
                for dir in [marker.parent(), path.parent()].into_iter().flatten() {
                    std::fs::create_dir_all(dir)?;
                }
                std::fs::File::create(marker)?.sync_all()?;
                made.push(marker.to_path_buf());
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

/// Removes what [`prepare`] made, and nothing else.
pub fn remove(made: &[PathBuf]) {
    for path in made {
        if let Err(e) = std::fs::remove_file(path) {
            tracing::warn!("cannot remove {}: {e}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_api::vm::{Boot, DirtySource, Disk, Mode, Secondary};
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
    fn absent_images_are_made_sparse_and_marked_and_can_be_unmade() {
        let dir = tempfile::tempdir().unwrap();
        let config = host(dir.path());
        let vm = vm(&[Path::new("web.img")]);
        let made = prepare(&config, &vm).unwrap();
        let image = dir.path().join("images/web.img");
        assert_eq!(std::fs::metadata(&image).unwrap().len(), 1 << 20);
        assert!(fresh_marker(&config, "web", 0).exists());
        assert!(prepare(&config, &vm).unwrap().is_empty());
        remove(&made);
        assert!(!image.exists() && !fresh_marker(&config, "web", 0).exists());
    }

    #[test]
    fn an_image_of_another_size_is_refused_by_name_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let config = host(dir.path());
        let other = dir.path().join("other.img");
        std::fs::write(&other, b"precious").unwrap();
        let failure = prepare(&config, &vm(&[Path::new("web.img"), &other])).unwrap_err();
        assert_eq!(failure.code, Code::Image);
        assert!(failure.why.contains("other.img") && failure.why.contains("8 bytes"));
        assert!(!dir.path().join("images/web.img").exists());
        assert_eq!(std::fs::read(&other).unwrap(), b"precious");
    }
}
