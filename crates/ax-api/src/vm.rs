//! What a user defines: one VM. Kept on both hosts, as TOML.

use std::path::PathBuf;

use ax_wire::PairId;
use serde::{Deserialize, Serialize};

/// How well a VM is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Fault tolerant: a shadow on the other host takes over at the last committed epoch.
    Ft,
    /// Restarted on the other host.
    Ha,
    /// Local only.
    None,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Ft => "ft",
            Mode::Ha => "ha",
            Mode::None => "none",
        })
    }
}

/// What the machine starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", deny_unknown_fields)]
pub enum Boot {
    /// The embedded probe guest.
    Probe {
        /// Its command line, e.g. `ip=10.77.0.10/24`; devices are added by the VMM.
        #[serde(default)]
        cmdline: String,
    },
    /// An ELF with a PVH note, or a Linux bzImage; which one is read from the file.
    Kernel {
        /// Path of the kernel, on this host.
        kernel: PathBuf,
        /// Path of the initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line; devices are added by the VMM.
        #[serde(default)]
        cmdline: String,
    },
}

/// When a guest's FLUSH is complete (rule 15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Secondary {
    /// Durable on the primary; on the secondary with its epoch, in memory first.
    #[default]
    Async,
    /// Durable on both hosts.
    Sync,
}

/// What becomes of a guest's request that the host's disk can't do, while the other host has no copy that
/// the guest could go on from (rule 19).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// It waits, and is tried again until the disk works.
    #[default]
    Hold,
    /// The guest gets an I/O error. A full disk is waited for all the same.
    Report,
}

impl OnError {
    /// True when it need not be written down: hosts of an earlier build read definitions, too.
    pub fn is_default(&self) -> bool {
        *self == OnError::default()
    }
}

/// One virtio-blk disk on a raw image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Path of the image, the same on both hosts.
    pub path: PathBuf,
    /// Size in bytes; the peer's image is made with it when absent.
    pub size: u64,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// When FLUSH is complete.
    #[serde(default)]
    pub secondary: Secondary,
    /// What becomes of a request that fails here and can't be done elsewhere.
    #[serde(default, skip_serializing_if = "OnError::is_default")]
    pub on_error: OnError,
}

/// One virtio-net device on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Name of the tap interface, on either host.
    pub tap: String,
    /// MAC address, stable for the VM's life.
    pub mac: [u8; 6],
    /// The guest may leave checksums and the cutting of segments to the host, and the other way round. Not
    /// written when it may not: an axd from before this field refuses it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offload: bool,
}

/// Where the dirty pages are learned from (rule 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtySource {
    /// What costs less here.
    #[default]
    Auto,
    /// KVM's dirty ring.
    Ring,
    /// KVM's dirty bitmap with manual protect.
    Bitmap,
}

/// Whether a VM that is protected by its preferred host again goes back to it by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Return {
    /// When an operator says so: nobody has looked yet at why that host failed.
    #[default]
    Manual,
    /// By itself, by planned failover.
    Auto,
}

/// Where a VM is to run when both hosts are there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preferred {
    /// The host's name.
    pub host: String,
    /// Whether it goes back there by itself.
    #[serde(default, rename = "return")]
    pub back: Return,
}

impl std::fmt::Display for Preferred {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let back = match self.back {
            Return::Manual => "returns by `axvm failover`",
            Return::Auto => "returns by itself",
        };
        write!(f, "{}, {back}", self.host)
    }
}

/// One VM, as defined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name: 1 to 63 of `a-z 0-9 -`, unique on both hosts.
    pub name: String,
    /// Its identity for life.
    #[serde(with = "pair_hex")]
    pub pair: PairId,
    /// Its protection.
    pub mode: Mode,
    /// Guest RAM, bytes, a multiple of 4096.
    pub memory: u64,
    /// Virtual CPUs, 1 to 8.
    pub cpus: u8,
    /// What it starts from.
    pub boot: Boot,
    /// Its disks, in the guest's order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Its network devices, in the guest's order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Started by axd when the host boots.
    #[serde(default)]
    pub autostart: bool,
    /// Dirty page source.
    #[serde(default)]
    pub dirty: DirtySource,
    /// Ship a whole-RAM digest with every n-th epoch and check it on the shadow.
    #[serde(default)]
    pub verify_every: Option<u32>,
    /// Where it is to run. Not written when there is none: an axd from before this field refuses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferred: Option<Preferred>,
}

/// The pair as 32 hexadecimal digits.
mod pair_hex {
    use ax_wire::PairId;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(pair: &PairId, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(pair)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<PairId, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
