//! What axvm asks axd, and what one axd asks the other.
//!
//! axvm connects to axd's Unix socket, sends one [`Request`] as a line of JSON and reads [`Reply`]
//! lines: any number of [`Reply::Progress`], [`Reply::Event`] and [`Reply::Alive`], then exactly one
//! that [`Reply::is_last`]. After [`Reply::Console`] the connection carries raw console bytes both ways.
//!
//! Between the hosts the same lines travel over the authenticated link, with [`PeerRequest`] as
//! the request; a peer asked to [`PeerRequest::Forward`] answers for itself and never forwards again.
//! That link settles on a wire version first, and a request that it lacks is not sent ([`ax_wire::version::Since`]). A new
//! field of a request or definition must be left out while it says nothing: an older build refuses it.

mod since;

use std::net::SocketAddr;
use std::path::PathBuf;

use ax_wire::word::{Answer, Letter};
use ax_wire::{Generation, Incarnation};
use serde::{Deserialize, Serialize};

use crate::process::What;
pub use crate::report::{HostReport, PeerReport, ProcessReport, State, VmReport};
use crate::trace::{StatsReport, TraceReport};
use crate::units::{Bytes, Mac};
use crate::vm::{Boot, DirtySource, Mode, OnError, Preferred, Secondary, Vm};

/// Longest line either side accepts, bytes.
pub const MAX_LINE: usize = 1 << 20;

/// Where axd listens and axvm looks, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/axd/axd.sock";

/// How long a guest that is to be stopped has to shut itself down once its power button is pressed, unless
/// told otherwise, seconds.
pub const STOP_TIMEOUT_S: u64 = 60;

fn stop_timeout_s() -> u64 {
    STOP_TIMEOUT_S
}

fn is_stop_timeout(seconds: &u64) -> bool {
    *seconds == STOP_TIMEOUT_S
}

/// A disk as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDisk {
    /// Path of the raw image, the same on both hosts.
    pub path: PathBuf,
    /// Its size. An absent image is made with it; without it the image must be there.
    #[serde(default)]
    pub size: Option<Bytes>,
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

/// A network device as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewNic {
    /// Name of the tap interface, on either host.
    pub tap: String,
    /// Its MAC address; one is made, and kept, when absent.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Whether the guest may leave checksums and the cutting of segments to the host, and the other way
    /// round; as it was when absent, and for a new one if both hosts can. Not written when absent: an axd
    /// from before this field refuses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload: Option<bool>,
}

/// A VM as a user asks for it: what axd fills in (identity, MACs, image sizes) may be missing.
/// This is the format of `axvm define --config vm.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// Its name: 1 to 63 of `a-z 0-9 -`. In a file it may be left to the command line.
    #[serde(default)]
    pub name: String,
    /// Its protection.
    pub mode: Mode,
    /// Guest RAM.
    pub memory: Bytes,
    /// Virtual CPUs, 1 to 8.
    pub cpus: u8,
    /// What it starts from.
    pub boot: Boot,
    /// Its disks, in the guest's order.
    #[serde(default)]
    pub disks: Vec<NewDisk>,
    /// Its network devices, in the guest's order.
    #[serde(default)]
    pub nics: Vec<NewNic>,
    /// Started by axd when the host boots.
    #[serde(default)]
    pub autostart: bool,
    /// Dirty page source.
    #[serde(default)]
    pub dirty: DirtySource,
    /// Ship a whole-RAM digest with every n-th epoch and check it on the shadow.
    #[serde(default)]
    pub verify_every: Option<u32>,
    /// Where it is to run when both hosts are there; as it was when absent.
    #[serde(default)]
    pub preferred: Option<Preferred>,
}

/// A question or order to axd.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do", deny_unknown_fields)]
pub enum Request {
    /// Who are you, and is your peer there?
    Version,
    /// Define a VM, without starting it.
    Define {
        /// The VM.
        vm: Box<NewVm>,
    },
    /// Forget a VM that runs nowhere; its images stay.
    Undefine {
        /// Its name.
        name: String,
    },
    /// Start it when the host boots, or not.
    Autostart {
        /// Its name.
        name: String,
        /// Whether.
        on: bool,
    },
    /// Run it on this host when both are there, or on either.
    Prefer {
        /// Its name.
        name: String,
        /// Where; none for no preference.
        preferred: Option<Preferred>,
    },
    /// Start a VM here.
    Start {
        /// Its name.
        name: String,
        /// Define it first. If the name is known this must say the same as its definition.
        define: Option<Box<NewVm>>,
        /// Answer only when it is as protected as its mode says.
        wait: bool,
        /// Start it unprotected if the other host does not answer.
        alone_ok: bool,
        /// From the older copy of this host, where the current one was lost with a host that was replaced.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        accept_loss: bool,
    },
    /// Stop a VM in order (rule 26): its guest is asked by its power button first.
    Stop {
        /// Its name.
        name: String,
        /// End its processes at once, without a record.
        force: bool,
        /// How long its guest has to shut itself down, seconds; 0: it is not asked. Not written when it is the
        /// usual time: an axd from before this field refuses it.
        #[serde(default = "stop_timeout_s", skip_serializing_if = "is_stop_timeout")]
        timeout_s: u64,
    },
    /// Reset the machine.
    Reboot {
        /// Its name.
        name: String,
    },
    /// Stop its vCPUs.
    Pause {
        /// Its name.
        name: String,
    },
    /// Let them go on.
    Resume {
        /// Its name.
        name: String,
        /// The operator's word that the other host is dead.
        peer_is_dead: bool,
    },
    /// All VMs.
    List,
    /// One VM.
    Show {
        /// Its name.
        name: String,
    },
    /// Turn this connection into its console, wherever its primary is.
    Console {
        /// Its name.
        name: String,
        /// First byte wanted, counted from the guest's first (rule 8); none: what is remembered.
        from: Option<u64>,
    },
    /// Planned failover (rule 25).
    Failover {
        /// Its name.
        name: String,
    },
    /// Protect it like this from now on (rule 22), while it runs.
    SetMode {
        /// Its name.
        name: String,
        /// How.
        mode: Mode,
        /// Answer only when it is as protected as that.
        wait: bool,
    },
    /// The hosts of the pair.
    Hosts,
    /// Take a host out of service, or back into it.
    Maintenance {
        /// The host; the one asked when absent.
        host: Option<String>,
        /// Whether.
        on: bool,
    },
    /// This host is about to be shut down: move away or stop what runs here.
    Drain {
        /// How long that may take, seconds.
        timeout_s: u64,
    },
    /// Simulated fault: SIGKILL to one of its processes.
    Kill {
        /// Its name.
        name: String,
        /// The host whose process dies; the primary's when absent.
        host: Option<String>,
    },
    /// What happened.
    Events {
        /// Only this VM's.
        vm: Option<String>,
        /// Go on with those to come.
        follow: bool,
        /// The other host's too.
        both_hosts: bool,
    },
    /// Records of its last epochs, wherever its primary is. Answered by [`Reply::Trace`].
    Trace {
        /// Its name.
        name: String,
        /// First record wanted, from 1.
        since: u64,
        /// Most of them; there are never more than [`MOST_RECORDS`](crate::trace::MOST_RECORDS).
        most: u32,
    },
    /// What was counted of its epochs. Answered by [`Reply::Stats`].
    Stats {
        /// Its name.
        name: String,
    },
}

/// Why a request failed: the exit code of axvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Code {
    /// Something failed; the text says what.
    Failed = 1,
    /// Wrong usage, definition or configuration.
    Usage = 2,
    /// Not possible on this host (no usable KVM).
    NotHere = 3,
    /// `list --check`: something is unprotected or held.
    Unprotected = 4,
    /// No such VM.
    NoSuchVm = 5,
    /// axd cannot be reached.
    NoAxd = 6,
    /// The VM is not in a state for that: runs already, does not run, is being operated on.
    State = 7,
    /// The other host does not answer or refused.
    Peer = 8,
    /// An image is missing, in use, or has another size.
    Image = 9,
    /// A tap, address or port cannot be used.
    Network = 10,
    /// Not enough memory.
    Memory = 11,
    /// The arbiter refused or cannot be reached.
    Arbiter = 12,
    /// The VM is stopped in order, but its guest had been asked to shut itself down and did not in time.
    Forced = 13,
}

impl Code {
    /// The code as a process's exit status.
    pub fn exit(self) -> u8 {
        self as u8
    }

    /// What an `ax-vmm` that could not start meant by its exit status.
    pub fn of_process(status: i32) -> Code {
        match status {
            2 => Code::Usage,
            3 => Code::NotHere,
            4 => Code::Image,
            5 | 7 => Code::Network,
            6 => Code::Memory,
            // 9: the other side runs the VM, by the arbiter's grant.
            8 | 9 => Code::Arbiter,
            _ => Code::Failed,
        }
    }
}

/// The last line an `ax-vmm` that could not start writes to its stderr.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailure {
    /// What was wrong and what to do.
    pub error: String,
    /// Its exit status.
    pub code: i32,
}

/// Something that happened on a host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostEvent {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The host.
    pub host: String,
    /// The VM it is about.
    pub vm: Option<String>,
    /// What happened.
    pub what: HostWhat,
}

/// What happened on a host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum HostWhat {
    /// A process of a VM tells.
    Process {
        /// Which run of it.
        incarnation: Incarnation,
        /// Its number there.
        seq: u64,
        /// What.
        event: What,
    },
    /// A process of a VM has ended.
    Exited {
        /// Which run of it.
        incarnation: Incarnation,
        /// How, in words.
        how: String,
    },
    /// axd tells.
    Note {
        /// The line.
        text: String,
    },
    /// Something that the reader's build does not know.
    #[serde(other)]
    Other,
}

/// A line axd answers with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "re")]
pub enum Reply {
    /// Not last: what is being done.
    Progress {
        /// In words.
        text: String,
        /// Bytes done, of a long one.
        done: Option<u64>,
        /// Bytes in all.
        total: Option<u64>,
    },
    /// Not last: still at it.
    Alive,
    /// To [`Request::Events`]; not last.
    Event {
        /// The event.
        event: HostEvent,
    },
    /// Done.
    Done {
        /// A line for the user; may be empty.
        text: String,
    },
    /// To [`Request::Version`].
    Version {
        /// This host.
        host: String,
        /// axd's version.
        version: String,
        /// The other host.
        peer: Option<PeerReport>,
    },
    /// To [`Request::List`].
    Vms {
        /// All VMs, by name.
        vms: Vec<VmReport>,
        /// The other host.
        peer: Option<PeerReport>,
    },
    /// To [`Request::Hosts`].
    Hosts {
        /// The hosts, by name; of one that asks for the other, that one alone.
        hosts: Vec<HostReport>,
        /// Who decides who may run.
        arbiter: String,
    },
    /// To [`Request::Show`] and [`Request::Define`].
    Vm {
        /// The VM.
        vm: Box<VmReport>,
    },
    /// To [`Request::Console`]: raw bytes follow.
    Console {
        /// Offset of the next byte in the guest's whole console stream. A reader that counts on and
        /// asks again from there after a failover sees each byte once.
        offset: u64,
    },
    /// To [`Request::Trace`].
    Trace {
        /// The records.
        trace: Box<TraceReport>,
    },
    /// To [`Request::Stats`].
    Stats {
        /// The figures.
        stats: Box<StatsReport>,
    },
    /// Not done.
    Failed {
        /// What kind of failure.
        code: Code,
        /// What was wrong and what to do.
        why: String,
    },
    /// To [`PeerRequest::Sync`].
    Synced {
        /// All definitions of the answering host.
        definitions: Vec<Definition>,
    },
    /// To [`PeerRequest::Processes`].
    Processes {
        /// The answering host's.
        processes: Vec<ProcessReport>,
    },
    /// To [`PeerRequest::SpawnShadow`].
    Shadow {
        /// The shadow's run.
        incarnation: Incarnation,
        /// Where it listens.
        listen: Vec<SocketAddr>,
    },
    /// To [`PeerRequest::Word`].
    Word {
        /// What the answering host says.
        answer: Box<Answer>,
    },
    /// To [`PeerRequest::Fence`].
    Gone {
        /// The runs that are certainly over.
        incarnations: Vec<Incarnation>,
    },
}

impl Reply {
    /// Whether no further line follows (raw bytes may).
    pub fn is_last(&self) -> bool {
        !matches!(
            self,
            Reply::Progress { .. } | Reply::Alive | Reply::Event { .. }
        )
    }
}

/// A VM's definition, or the memory that there was one, as both hosts keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// The VM's name.
    pub name: String,
    /// Counts its changes; of two the greater is the newer, and wins.
    pub change: u64,
    /// Host that made the change; decides between equal counts.
    pub by: String,
    /// The VM; none once it is undefined.
    pub vm: Option<Vm>,
}

impl Definition {
    /// Whether this one replaces `other`.
    pub fn newer_than(&self, other: &Definition) -> bool {
        (self.change, &self.by) > (other.change, &other.by)
    }
}

/// What one axd asks the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "peer-do", deny_unknown_fields)]
pub enum PeerRequest {
    /// Who are you? Answered by [`Reply::Version`].
    Hello {
        /// The asking host.
        host: String,
    },
    /// Here are my definitions; take the newer ones and give me yours.
    Sync {
        /// All definitions of the asking host.
        definitions: Vec<Definition>,
    },
    /// Which processes run there?
    Processes,
    /// Take the definition, make absent images, and run a shadow. Answered when it waits for its
    /// primary; on failure nothing is left.
    SpawnShadow {
        /// The definition.
        definition: Box<Definition>,
        /// Names this start, for [`PeerRequest::Undo`].
        operation: u64,
    },
    /// A start has failed: end its shadow and remove the images made for it.
    Undo {
        /// The VM's name.
        name: String,
        /// The start.
        operation: u64,
        /// Leave a shadow that has come in sync: its guest goes on, and this may be the last copy of it.
        /// Otherwise nothing is to be left of the VM on either host.
        spare: bool,
    },
    /// A start has succeeded: keep what was made for it.
    Settle {
        /// The VM's name.
        name: String,
        /// The start.
        operation: u64,
    },
    /// The VM was stopped on purpose: it is not missed, and autostart leaves it alone.
    Stopped {
        /// The VM's name.
        name: String,
    },
    /// SIGKILL every process of the pair that runs under an older generation, and confirm
    /// (rule 24).
    Fence {
        /// The pair, in hexadecimal.
        pair: String,
        /// The generation the asking side was granted.
        generation: Generation,
    },
    /// A process of the asking host writes about a pair's record. Answered by [`Reply::Word`].
    Word {
        /// The VM's name.
        name: String,
        /// What it writes.
        letter: Box<Letter>,
    },
    /// Do this as if a user of yours had asked; do not forward it.
    Forward {
        /// The request.
        request: Request,
    },
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
