//! Which machine this host is, and which one it is paired with: what a name alone does not say.
//!
//! A side of a pair is fixed by the hosts' names when they first meet, and kept in `partner.json` from then on:
//! a machine that takes the other one's place may have another name. `machine.id` is made with the data
//! folder, so a machine whose folder is lost is another machine.

use std::path::Path;

use ax_api::host::Code;
use ax_wire::{MachineId, PairId, Side};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::define;
use crate::failure::Failure;
use crate::store::write_atomic;

const MACHINE: &str = "machine.id";
const PARTNER: &str = "partner.json";

/// The other host of this one's pairs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partner {
    /// Its name.
    pub name: String,
    /// Which side this host is.
    pub side: Side,
    /// Which machine it is, where it has taken another's place.
    #[serde(default)]
    pub machine: Option<MachineId>,
    /// Names of the hosts that were replaced.
    #[serde(default)]
    pub replaced: Vec<String>,
}

/// Which machine this is; made at first use.
///
/// # Errors
/// The file can't be read or written, or is not what was written.
pub fn machine(data_dir: &Path) -> Result<MachineId, Failure> {
    let path = data_dir.join(MACHINE);
    let failed = |e: &std::io::Error| Failure::io(path.display().to_string(), e);
    match std::fs::read_to_string(&path) {
        Ok(text) => match text.trim().parse::<PairId>() {
            Ok(id) => Ok(MachineId(id.0)),
            Err(_) => Err(Failure::new(
                Code::Failed,
                format!(
                    "{}: 32 hexadecimal digits were written there and are not any more; without them this \
                     machine is another one to its pairs: put the file back from a backup, or have the other \
                     host replace this one (`axd pair --replace`)",
                    path.display()
                ),
            )),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let id = MachineId(define::random()?);
            write_atomic(&path, format!("{id}\n").as_bytes()).map_err(|e| failed(&e))?;
            Ok(id)
        }
        Err(e) => Err(failed(&e)),
    }
}

/// The other host, as far as this one has met it.
///
/// # Errors
/// The file can't be read, or is not what was written.
pub fn load(data_dir: &Path) -> Result<Option<Partner>, Failure> {
    let path = data_dir.join(PARTNER);
    let failed = |e: &std::io::Error| Failure::io(path.display().to_string(), e);
    match std::fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(partner) => Ok(Some(partner)),
            Err(e) => Err(failed(&std::io::Error::other(e))),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(&e)),
    }
}

/// Writes down, durably, which host is the other one.
///
/// # Errors
/// The file can't be written.
pub fn keep(data_dir: &Path, partner: &Partner) -> Result<(), Failure> {
    let path = data_dir.join(PARTNER);
    let failed = |e: &std::io::Error| Failure::io(path.display().to_string(), e);
    let json = serde_json::to_vec(partner).map_err(|e| failed(&std::io::Error::other(e)))?;
    write_atomic(&path, &json).map_err(|e| failed(&e))
}

/// The partner that `config` names, as it is met for the first time.
fn first_met(config: &Config) -> Option<Partner> {
    let peer = config.peer.as_ref()?;
    Some(Partner {
        name: peer.name.clone(),
        side: Side::of(&config.name, &peer.name),
        machine: None,
        replaced: vec![],
    })
}

/// The present one: what is written down, or what `config` names.
///
/// # Errors
/// As [`load`].
pub fn present(config: &Config) -> Result<Option<Partner>, Failure> {
    Ok(load(&config.data_dir)?.or_else(|| first_met(config)))
}

/// Tells `config` which machine and side this host is, and writes down its partner if it has just met it.
///
/// # Errors
/// The configuration names another host than the one that this host's VMs are paired with.
pub fn settle(config: &mut Config, has_vms: bool) -> Result<(), Failure> {
    config.machine = Some(machine(&config.data_dir)?);
    let Some(named) = first_met(config) else {
        return Ok(());
    };
    let known = load(&config.data_dir)?;
    let partner = match known {
        Some(known) if known.name == named.name => known,
        Some(known) if has_vms => {
            return Err(Failure::new(
                Code::Usage,
                format!(
                    "[peer] names {}, but the VMs of this host are paired with {}: if {} is gone for good, \
                     `axd pair --replace {}` has the new machine take its place; else set [peer] back",
                    named.name, known.name, known.name, known.name
                ),
            ));
        }
        _ => {
            keep(&config.data_dir, &named)?;
            named
        }
    };
    config.side = Some(partner.side);
    config.partner_machine = partner.machine;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path, name: &str, peer: &str) -> Config {
        let text = format!(
            "name = {name:?}\ndata_dir = {dir:?}\npeer = {{ name = {peer:?}, addresses = [\"10.0.0.2:1\"] }}\n\
             link = {{ addresses = [\"10.9.0.1\"] }}"
        );
        crate::config::parse(&text, Path::new("t"), 1).unwrap()
    }

    #[test]
    fn a_machine_is_the_same_for_as_long_as_its_data_folder_is() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = machine(one.path()).unwrap();
        assert_eq!(machine(one.path()).unwrap(), id);
        assert_ne!(machine(two.path()).unwrap(), id);
        std::fs::write(one.path().join(MACHINE), "x").unwrap();
        let failure = machine(one.path()).unwrap_err();
        assert!(failure.why.contains("--replace"), "{failure}");
    }

    /// I4: sides follow from names, so another name must not turn a host into the other side.
    #[test]
    fn another_name_in_the_configuration_is_no_other_side() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = config(dir.path(), "b", "a");
        settle(&mut first, false).unwrap();
        assert_eq!(first.side(), Side::B);
        let failure = settle(&mut config(dir.path(), "b", "c"), true).unwrap_err();
        assert_eq!(failure.code, Code::Usage);
        assert!(failure.why.contains("--replace a"), "{failure}");
        let replaced = Partner {
            name: "c".into(),
            side: Side::B,
            machine: Some(MachineId([1; 16])),
            replaced: vec!["a".into()],
        };
        keep(dir.path(), &replaced).unwrap();
        let mut now = config(dir.path(), "b", "c");
        assert_eq!(now.side(), Side::A, "what the names alone would say");
        settle(&mut now, true).unwrap();
        assert_eq!(
            (now.side(), now.partner_machine),
            (Side::B, replaced.machine)
        );
    }

    #[test]
    fn without_vms_another_partner_is_just_another_partner() {
        let dir = tempfile::tempdir().unwrap();
        settle(&mut config(dir.path(), "b", "a"), false).unwrap();
        let mut other = config(dir.path(), "b", "c");
        settle(&mut other, false).unwrap();
        assert_eq!(other.side(), Side::A);
    }
}
