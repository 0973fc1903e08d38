//! What axd hands one `ax-vmm` process, and how they talk afterwards.
//!
//! axd writes a [`Spec`] as JSON and runs `ax-vmm --spec FILE`. The process listens on the Unix
//! socket [`Spec::control`]; whoever connects (axd, also one that has just been restarted) sends one
//! [`Request`] a line and reads one [`Reply`] a line. After [`Request::Subscribe`] the process
//! sends [`Event`]s, one a line, until the connection ends; after [`Request::Console`] the
//! connection carries raw console bytes both ways.
//!
//! The two may be of builds one wire version apart: axd is replaced while its guests' processes run on. So
//! whatever is new here has a default where it is absent, and what a reader does not know it passes over
//! ([`Phase::Other`], [`What::Other`]). A process refuses a request that it does not know, which then says
//! so ([`Status::wire`] tells axd what to expect).

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ax_wire::word::{Answer, Letter};
use ax_wire::{Generation, Incarnation, MachineId, Side};
use serde::{Deserialize, Serialize};

use crate::trace::{StatsReport, TraceReport};
use crate::vm::{Mode, Vm};

/// How a process begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// Boot the guest here.
    Boot,
    /// Build the machine and wait for a primary.
    Shadow,
}

/// How the link is secured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// Mutual TLS 1.3 with the identity and pinned peers kept in this folder.
    Mtls {
        /// Folder that holds `identity/` and `trusted/`.
        dir: PathBuf,
    },
    /// No encryption, no authentication: a private cable.
    Plain,
}

/// Who decides who may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arbiter {
    /// A witness.
    Witness {
        /// Its name, as paired.
        name: String,
        /// Where it listens.
        addresses: Vec<SocketAddr>,
    },
    /// An etcd cluster, asked over plain HTTP.
    Etcd {
        /// Its members' client addresses, in the order to be tried.
        members: Vec<SocketAddr>,
    },
    /// Nobody but an operator: a guest that lost its peer is held.
    Manual,
}

impl Arbiter {
    /// What an operator should know of it before a host fails; none when nothing has to be done then.
    pub fn warning(&self) -> Option<&'static str> {
        match self {
            Arbiter::Witness { .. } | Arbiter::Etcd { .. } => None,
            Arbiter::Manual => Some(
                "no witness and no etcd is configured: when a host is lost its guests are held until an operator \
                 says `axvm resume NAME --i-know-the-peer-is-dead` on the other one",
            ),
        }
    }
}

impl std::fmt::Display for Arbiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Arbiter::Witness { name, .. } => write!(f, "witness {name}"),
            Arbiter::Etcd { members } => {
                f.write_str("etcd")?;
                members.iter().try_for_each(|at| write!(f, " {at}"))
            }
            Arbiter::Manual => {
                f.write_str("manual: both hosts together, or an operator's word when one is lost")
            }
        }
    }
}

/// Times that decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Between two heartbeats, milliseconds.
    pub heartbeat_ms: u64,
    /// Silence after which the peer counts as dead, milliseconds.
    pub detect_ms: u64,
    /// No progress with work pending for so long is a failure, milliseconds.
    pub stall_ms: u64,
    /// How long an acknowledgement permits release (rule 24), milliseconds.
    pub permission_ms: u64,
    /// How long an acknowledgement lets a guest of mode `ha` show outputs, and how long the other host waits
    /// after its last one before it may start the guest (rule 28), milliseconds.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u64,
}

fn default_lease_ms() -> u64 {
    1000
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            heartbeat_ms: 10,
            detect_ms: 100,
            stall_ms: 1000,
            permission_ms: 5,
            lease_ms: default_lease_ms(),
        }
    }
}

/// Everything one `ax-vmm` process needs to begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The VM.
    pub vm: Vm,
    /// How to begin.
    pub start: Start,
    /// This host's name.
    pub host: String,
    /// The other host's name; none on a host that has no peer (mode `none` only).
    pub peer: Option<String>,
    /// Unix socket this process listens on; one left by a dead process is replaced.
    pub control: PathBuf,
    /// Folder for what must outlive the process: dirty-region maps, generation.
    pub state_dir: PathBuf,
    /// Local addresses of the dedicated link; the process listens on a free port of each.
    pub link: Vec<IpAddr>,
    /// How the link is secured.
    pub security: Security,
    /// Who decides who may run.
    pub arbiter: Arbiter,
    /// Who decides in its place when both sides have lost it.
    #[serde(default)]
    pub standby: Option<Arbiter>,
    /// Where the other host's axd listens.
    #[serde(default)]
    pub peer_axd: Vec<SocketAddr>,
    /// Which side of the pair this host is; by the hosts' names where it is not said.
    #[serde(default)]
    pub side: Option<Side>,
    /// Which machine this host is.
    #[serde(default)]
    pub machine: Option<MachineId>,
    /// An operator starts the VM from a copy that is not current, because the current one was lost with a
    /// host that was replaced.
    #[serde(default)]
    pub accept_loss: bool,
    /// Times that decide.
    pub timing: Timing,
}

/// What a process is for, right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs the guest (or holds it paused).
    Primary,
    /// Receives epochs.
    Shadow,
}

/// Where a process is in the pair's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Phase {
    /// Building the machine.
    Starting,
    /// Shadow: waits for a primary.
    Waiting,
    /// Initial copy; the guest runs unprotected.
    Syncing {
        /// Bytes copied.
        done: u64,
        /// Bytes known to be copied in all.
        total: u64,
    },
    /// Outputs held until the arbiter has granted protection (rule 22).
    Entering,
    /// Fault tolerant.
    Protected,
    /// Runs alone by the arbiter's grant; no protection.
    Alone,
    /// Runs alone, as defined (mode `none`).
    Unprotected,
    /// May not run or show outputs until this is answered; says whom it waits for.
    Held {
        /// Whom or what it waits for, in words.
        waits_for: String,
    },
    /// On its way from one side to the other: the old primary until the other runs, the new one until it does.
    FailingOver,
    /// Paused by the operator.
    Paused,
    /// About to exit.
    Ending,
    /// One that the reader's build does not know.
    #[serde(other)]
    Other,
}

/// What a process says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's name.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// Newest wire version its build speaks.
    #[serde(default = "crate::first_wire")]
    pub wire: u16,
    /// This run of it.
    pub incarnation: Incarnation,
    /// What it is for.
    pub role: Role,
    /// Where it is.
    pub phase: Phase,
    /// What an operator must hear of, whatever the phase.
    #[serde(default)]
    pub warning: Option<String>,
    /// Of a process that runs a guest: which disk of its host fails, and how.
    #[serde(default)]
    pub disk_fails: Option<String>,
    /// A request of the guest waits for that disk.
    #[serde(default)]
    pub disk_holds: bool,
    /// Who decides for it, and who is to or stands by, in words; empty where no third party does.
    #[serde(default)]
    pub arbiter: String,
    /// How long the copy under way will take, at its speed so far, seconds; none without one, or too early
    /// to tell.
    #[serde(default)]
    pub sync_left_s: Option<u64>,
    /// Protection it aims at.
    pub mode: Mode,
    /// Generation it runs under.
    pub generation: Generation,
    /// Where a primary can reach this process.
    pub listen: Vec<SocketAddr>,
    /// Last epoch committed.
    pub epoch: u64,
    /// Epochs per second, last second.
    pub epochs_per_second: f64,
    /// Pause per epoch, median and 99th percentile of the last five seconds, microseconds.
    pub pause_us: [u64; 2],
    /// What a pause consists of, medians likewise.
    #[serde(default)]
    pub pause_parts_us: PauseParts,
    /// What the latest initial copy to a shadow took for the disks.
    #[serde(default)]
    pub disk_sync: DiskSync,
    /// From the end of a capture to its commit, likewise.
    pub commit_us: [u64; 2],
    /// Writing an epoch to the link, likewise.
    #[serde(default)]
    pub ship_us: [u64; 2],
    /// Pages per epoch, likewise.
    pub pages: [u64; 2],
    /// Bytes of epochs written to the link a second, over the last five seconds.
    #[serde(default)]
    pub link_bytes_per_second: u64,
    /// Age of the oldest held output, microseconds; 0 with none.
    pub oldest_held_us: u64,
    /// The paths to the other side, while there is one.
    #[serde(default)]
    pub paths: Vec<PathReport>,
}

/// One path between the two processes of a pair: a dedicated link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// The shadow's address on it.
    pub address: IpAddr,
    /// How it is.
    pub state: PathState,
    /// The epoch stream goes over it.
    pub carries: bool,
    /// A connection waits there for the stream to go over it.
    pub ready: bool,
}

/// How a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathState {
    /// Nothing has come by it yet.
    New,
    /// Heartbeats come and go.
    Up,
    /// It worked and does not now.
    Lost,
}

impl std::fmt::Display for PathReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match self.state {
            PathState::New => "not up yet",
            PathState::Up => "up",
            PathState::Lost => "LOST",
        };
        write!(f, "{}: {state}", self.address)?;
        if self.carries {
            f.write_str(", carries the epochs")?;
        } else if self.ready {
            f.write_str(", ready to")?;
        }
        Ok(())
    }
}

/// What finding and sending the blocks of the disks took that differ, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSync {
    /// Whose content was compared: all, or what the dirty-region maps name.
    pub compared: u64,
    /// That travelled, either way.
    pub moved: u64,
}

/// The parts of a pause in their order, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseParts {
    /// First kick to every vCPU parked and every device quiet.
    pub park: u64,
    /// Saving the machine's state.
    pub save: u64,
    /// Learning which pages are dirty, and protecting them again.
    pub harvest: u64,
    /// Copying the dirty pages.
    pub copy: u64,
    /// Closing the epoch's outputs and disk writes.
    pub close: u64,
    /// Letting devices and vCPUs go, to the last vCPU running again.
    pub resume: u64,
}

/// The parts of a promotion after a loss in their order, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromotionParts {
    /// From the notice to every acknowledged epoch applied and durable on the disks here.
    pub apply: u64,
    /// Restoring the machine.
    pub restore: u64,
    /// What is left then of the time in which the other side may still show outputs (rule 24).
    pub permission: u64,
    /// Asking the arbiter, and writing its grant down.
    pub grant: u64,
    /// Writing the new generation beside the disks.
    pub disks: u64,
    /// Opening the taps, starting devices and vCPUs.
    pub start: u64,
    /// Announcing the guest, and letting out what is due.
    pub release: u64,
}

/// A question or order to an `ax-vmm` process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Request {
    /// Who and where are you? Answered by [`Reply::Status`].
    Status,
    /// Send events from number `since` on (0: all that are remembered).
    Subscribe {
        /// First event wanted.
        since: u64,
    },
    /// Primary: protect yourself by the shadow that listens there.
    Protect {
        /// The shadow's addresses.
        addresses: Vec<SocketAddr>,
        /// The shadow's run.
        incarnation: Incarnation,
    },
    /// Stop the vCPUs; protection goes on.
    Pause,
    /// Let them go on.
    Resume,
    /// Primary: press the guest's power button. Answered by [`Reply::Button`], at once; a guest that shuts
    /// itself down then ends as it would by itself.
    PowerButton,
    /// Orderly stop (rule 26), answered when the record says so and just before the exit.
    Stop,
    /// Reset the machine as its button would.
    Reboot,
    /// Primary: planned failover (rule 25); answered when the other side runs or it was refused.
    Failover,
    /// Primary: be protected like this from now on; answered when the guest runs alone by the arbiter's
    /// grant, or runs unprotected, and so is ready for it.
    SetMode {
        /// How.
        mode: Mode,
    },
    /// Shadow: the start that this was for has failed; end, unless you are in sync, and so may be the last
    /// copy of a guest whose primary is gone.
    GiveUp,
    /// End at once, without a record: as a crash, but on purpose.
    Quit,
    /// The operator's word (manual arbitration): the peer is dead, go on.
    PeerIsDead,
    /// The configuration names this arbiter from now on: change to it as soon as the other side is ready
    /// (rule 27).
    Arbiter {
        /// Who shall decide.
        arbiter: Box<Arbiter>,
        /// Who decides in its place when both sides have lost it.
        standby: Option<Box<Arbiter>>,
    },
    /// The other host is this one from now on: the configuration says so, or another machine has taken
    /// its place.
    Peer {
        /// Its name.
        name: String,
        /// Where its axd listens.
        addresses: Vec<SocketAddr>,
        /// Which machine has taken the place of another, if one has.
        machine: Option<MachineId>,
    },
    /// The other host writes about the pair's record. Answered by [`Reply::Word`].
    Word {
        /// What it writes.
        letter: Box<Letter>,
    },
    /// The axd of the other host confirms that the peer process is gone.
    PeerGone {
        /// Which run of it.
        incarnation: Incarnation,
    },
    /// Turn this connection into the console, from stream offset `from` on (none: from what is
    /// remembered). Answered by [`Reply::Console`], then raw bytes both ways.
    Console {
        /// First byte wanted, counted from the guest's first byte, across failovers (rule 8).
        from: Option<u64>,
    },
    /// Primary: records of your last epochs. Answered by [`Reply::Trace`].
    Trace {
        /// First record wanted, from 1.
        since: u64,
        /// Most of them; there are never more than [`MOST_RECORDS`](crate::trace::MOST_RECORDS).
        most: u32,
    },
    /// Primary: what you have counted of your epochs. Answered by [`Reply::Stats`].
    Stats,
}

/// How the refusal begins of a line that is no [`Request`], or none that the process's build knows.
pub const NO_REQUEST: &str = "not a request";

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "re")]
pub enum Reply {
    /// Done.
    Done,
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Console`]: the next byte on this connection is the one at `offset`. A reader
    /// that counts on from there and asks again after a failover sees each byte once.
    Console {
        /// Offset in the guest's whole console stream.
        offset: u64,
    },
    /// To [`Request::PowerButton`].
    Button {
        /// What came of it.
        press: Press,
    },
    /// To [`Request::Word`].
    Word {
        /// What this host says.
        answer: Box<Answer>,
    },
    /// To [`Request::Trace`].
    Trace(Box<TraceReport>),
    /// To [`Request::Stats`].
    Stats(Box<StatsReport>),
    /// Not done; nothing has changed.
    Refused {
        /// What was wrong and what to do.
        why: String,
    },
}

/// What came of a press of a guest's power button.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Press {
    /// The guest listens and is told.
    Pressed,
    /// The guest does not listen to its button: no driver has enabled its event.
    NobodyListens,
    /// The guest is paused, or on its way elsewhere: it can't answer.
    StandsStill,
}

/// Something that happened, worth telling an operator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Counts events of one process from 1.
    pub seq: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub enum What {
    /// A new phase, with the role and generation it has it in.
    Phase {
        /// What the process is for.
        role: Role,
        /// The phase.
        phase: Phase,
        /// The generation.
        generation: Generation,
    },
    /// The peer was lost.
    PeerLost {
        /// How it was noticed: `death-notice`, `silence`, `stall`, `link-error`.
        how: String,
    },
    /// Nothing of the peer comes by one of the paths to it; it is heard on another.
    PathLost {
        /// The shadow's address on it.
        address: IpAddr,
        /// How it was noticed: `silence`, `one-way` (the peer hears nothing of this side), `link-error`.
        how: String,
    },
    /// It works again.
    PathBack {
        /// The shadow's address on it.
        address: IpAddr,
    },
    /// A promotion is complete; the guest runs here.
    Promoted {
        /// Epoch it goes on from.
        epoch: u64,
        /// From the notice to its outputs leaving, microseconds; 0 after a planned failover.
        took_us: u64,
        /// What that consists of.
        #[serde(default)]
        parts_us: PromotionParts,
    },
    /// A disk of this host fails.
    DiskFails {
        /// Which, and how, in words.
        why: String,
    },
    /// It works again.
    DiskWorks {
        /// The image.
        disk: String,
    },
    /// The guest switched itself off, was stopped, or crashed; the process ends.
    Ended {
        /// Why, in words.
        why: String,
        /// True when the arbiter's record says cleanly stopped.
        clean: bool,
    },
    /// Anything else worth a line.
    Note {
        /// The line.
        text: String,
    },
    /// Something that the reader's build does not know.
    #[serde(other)]
    Other,
}
