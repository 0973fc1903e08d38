//! Definitions on disk: `vms/NAME/vm.toml`, the same on both hosts.
//!
//! Each carries a change counter. Where the hosts differ the newer one wins, a tombstone like any
//! other, so what was undefined while the other host was away stays so.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use ax_api::host::{Code, Definition};
use ax_api::vm::Vm;
use parking_lot::Mutex;

use crate::config::check_name;
use crate::define;
use crate::failure::Failure;

/// Most definitions, tombstones included, that one host keeps.
const MOST: usize = 4096;

/// All definitions this host knows.
pub struct Store {
    host: String,
    vms: PathBuf,
    known: Mutex<BTreeMap<String, Definition>>,
}

/// Writes a file so that a crash leaves the old content or the new.
///
/// # Errors
/// The system's.
pub fn write_atomic(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir)?;
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    std::fs::File::open(dir)?.sync_all()
}

impl Store {
    /// Reads what is there. A definition that cannot be read is left alone and reported in the second
    /// value; the other host's copy may replace it.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(host: &str, vms: PathBuf) -> Result<(Store, Vec<String>), Failure> {
        let doing =
            |e: &std::io::Error| Failure::io(format!("definitions in {}", vms.display()), e);
        std::fs::create_dir_all(&vms).map_err(|e| doing(&e))?;
        let mut known = BTreeMap::new();
        let mut unreadable = vec![];
        for entry in std::fs::read_dir(&vms).map_err(|e| doing(&e))? {
            let path = entry.map_err(|e| doing(&e))?.path().join("vm.toml");
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => {
                    unreadable.push(format!("{}: {e}", path.display()));
                    continue;
                }
            };
            let read = toml::from_str::<Definition>(&text)
                .map_err(|e| e.to_string())
                .and_then(|d| checked(d).map_err(|f| f.why));
            match read {
                Ok(definition) => {
                    known.insert(definition.name.clone(), definition);
                }
                Err(why) => unreadable.push(format!("{}: {why}", path.display())),
            }
        }
        let store = Store {
            host: host.to_owned(),
            vms,
            known: Mutex::new(known),
        };
        Ok((store, unreadable))
    }

    /// All definitions, tombstones included.
    pub fn all(&self) -> Vec<Definition> {
        self.known.lock().values().cloned().collect()
    }

    /// All VMs, by name.
    pub fn vms(&self) -> Vec<Vm> {
        let known = self.known.lock();
        known.values().filter_map(|d| d.vm.clone()).collect()
    }

    /// One definition.
    ///
    /// # Errors
    /// No VM has this name.
    pub fn get(&self, name: &str) -> Result<Definition, Failure> {
        match self.known.lock().get(name) {
            Some(d) if d.vm.is_some() => Ok(d.clone()),
            _ => Err(Failure::new(
                Code::NoSuchVm,
                format!("no VM is called {name:?}; `axvm list` shows those that are"),
            )),
        }
    }

    /// The VM of this name.
    ///
    /// # Errors
    /// No VM has this name.
    pub fn vm(&self, name: &str) -> Result<Vm, Failure> {
        let known = self.known.lock();
        match known.get(name).and_then(|d| d.vm.clone()) {
            Some(vm) => Ok(vm),
            None => {
                drop(known);
                self.get(name).and_then(|d| {
                    d.vm.ok_or_else(|| Failure::new(Code::NoSuchVm, "the VM was just undefined"))
                })
            }
        }
    }

    /// Makes a change of this host's own: a new definition, or none any more. Durable on return.
    ///
    /// # Errors
    /// The definition is bad or cannot be written; nothing has changed.
    pub fn change(&self, name: &str, vm: Option<Vm>) -> Result<Definition, Failure> {
        let mut known = self.known.lock();
        let change = known.get(name).map_or(0, |d| d.change).saturating_add(1);
        let definition = checked(Definition {
            name: name.to_owned(),
            change,
            by: self.host.clone(),
            vm,
        })?;
        self.write(&mut known, definition.clone())?;
        Ok(definition)
    }

    /// Takes the other host's definition if it is newer; whether it was.
    ///
    /// # Errors
    /// The definition is bad or cannot be written; nothing has changed.
    pub fn take(&self, definition: Definition) -> Result<bool, Failure> {
        let definition = checked(definition)?;
        let mut known = self.known.lock();
        match known.get(&definition.name) {
            Some(mine) if !definition.newer_than(mine) => Ok(false),
            _ => {
                self.write(&mut known, definition)?;
                Ok(true)
            }
        }
    }

    fn write(
        &self,
        known: &mut BTreeMap<String, Definition>,
        definition: Definition,
    ) -> Result<(), Failure> {
        if known.len() >= MOST && !known.contains_key(&definition.name) {
            return Err(Failure::new(
                Code::Failed,
                format!("there are {MOST} definitions already, undefined ones included"),
            ));
        }
        let path = self.vms.join(&definition.name).join("vm.toml");
        let text = toml::to_string(&definition).map_err(|e| {
            Failure::new(
                Code::Usage,
                format!("definition of {}: {e}", definition.name),
            )
        })?;
        write_atomic(&path, text.as_bytes())
            .map_err(|e| Failure::io(format!("writing {}", path.display()), &e))?;
        known.insert(definition.name.clone(), definition);
        Ok(())
    }
}

/// A definition from disk or from the other host, if it may be worked with.
fn checked(definition: Definition) -> Result<Definition, Failure> {
    check_name(&definition.name).map_err(|why| {
        Failure::new(Code::Usage, format!("VM name {:?}: {why}", definition.name))
    })?;
    if let Some(vm) = &definition.vm {
        define::check(vm)?;
        if vm.name != definition.name {
            return Err(Failure::new(
                Code::Usage,
                format!("definition of {} holds VM {}", definition.name, vm.name),
            ));
        }
    }
    Ok(definition)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ax_api::vm::{Boot, DirtySource, Mode, Nic};
    use ax_wire::PairId;

    fn vm(name: &str) -> Vm {
        Vm {
            name: name.into(),
            pair: PairId([3; 16]),
            mode: Mode::Ft,
            memory: 64 << 20,
            cpus: 1,
            boot: Boot::Kernel {
                kernel: "/boot/k".into(),
                initrd: None,
                cmdline: "quiet \"x\"".into(),
            },
            disks: vec![],
            nics: vec![Nic {
                tap: "t".into(),
                mac: [0x52, 0x54, 0, 1, 2, 3],
                offload: true,
            }],
            autostart: true,
            dirty: DirtySource::Bitmap,
            verify_every: Some(3),
            preferred: Some(ax_api::vm::Preferred {
                host: "a".into(),
                back: ax_api::vm::Return::Auto,
            }),
        }
    }

    #[test]
    fn definitions_survive_a_restart_and_so_do_tombstones() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open("a", dir.path().into()).unwrap();
        store.change("web", Some(vm("web"))).unwrap();
        store.change("old", Some(vm("old"))).unwrap();
        store.change("old", None).unwrap();
        let (again, unreadable) = Store::open("a", dir.path().into()).unwrap();
        assert!(unreadable.is_empty(), "{unreadable:?}");
        assert_eq!(again.all(), store.all());
        assert_eq!(again.vm("web").unwrap(), vm("web"));
        assert_eq!(again.vm("old").unwrap_err().code, Code::NoSuchVm);
    }

    #[test]
    fn both_hosts_end_with_the_newest_whatever_the_order() {
        let (da, db) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (a, _) = Store::open("a", da.path().into()).unwrap();
        let (b, _) = Store::open("b", db.path().into()).unwrap();
        a.change("web", Some(vm("web"))).unwrap();
        a.all()
            .into_iter()
            .for_each(|d| assert!(b.take(d).unwrap()));
        // Apart from each other: a undefines, b changes twice.
        a.change("web", None).unwrap();
        let mut other = vm("web");
        other.cpus = 2;
        b.change("web", Some(other.clone())).unwrap();
        other.cpus = 4;
        b.change("web", Some(other.clone())).unwrap();
        let (from_a, from_b) = (a.all(), b.all());
        for d in from_b {
            a.take(d).unwrap();
        }
        for d in from_a {
            assert!(!b.take(d).unwrap());
        }
        assert_eq!(a.all(), b.all());
        assert_eq!(a.vm("web").unwrap().cpus, 4);
    }

    #[test]
    fn a_hostile_or_broken_definition_is_refused_and_a_broken_file_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open("a", dir.path().into()).unwrap();
        for name in ["../../etc/x", "", "A", "web"] {
            let mut hostile = vm("web");
            hostile.cpus = 200;
            let definition = Definition {
                name: name.into(),
                change: u64::MAX,
                by: "b".into(),
                vm: Some(hostile),
            };
            assert_eq!(store.take(definition).unwrap_err().code, Code::Usage);
        }
        assert!(store.all().is_empty());
        std::fs::create_dir_all(dir.path().join("bad")).unwrap();
        std::fs::write(dir.path().join("bad/vm.toml"), "name = 7").unwrap();
        let (store, unreadable) = Store::open("a", dir.path().into()).unwrap();
        assert!(store.all().is_empty());
        assert!(unreadable[0].contains("bad/vm.toml"));
    }
}
