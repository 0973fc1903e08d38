//! Words and options of the command line.

use std::path::PathBuf;

use ax_api::host::STOP_TIMEOUT_S;
use ax_api::units::Bytes;
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  axvm start web --probe --memory 256M --disk web.img,size=1G --net tap=tap0 --cmdline ip=10.0.0.5/24
  axvm start db --kernel /boot/vmlinuz --initrd /boot/initrd --cmdline 'console=ttyS0' --cpus 2
  axvm list --check || page-someone
  axvm failover web
  axvm set-mode web none
  axvm host maintenance on && poweroff
  axvm console web
  axvm top web

Exit codes:
  0   done
  1   failed; the message says what
  2   wrong usage, definition or configuration
  3   not possible on this host (no usable KVM)
  4   list --check: something is unprotected, held or unknown
  5   no such VM
  6   axd cannot be reached
  7   the VM is not in a state for that
  8   the other host does not answer or refused
  9   a disk image is missing, in use or of another size
  10  a tap, address or port cannot be used
  11  not enough memory
  12  the arbiter refused or cannot be reached
  13  stopped, but the guest did not shut itself down in time";

/// Fault-tolerant virtual machines: start, watch, move, stop.
#[derive(Debug, Parser)]
#[command(name = "axvm", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    /// axd's socket [default: $AX_SOCKET, or /run/axd/axd.sock].
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How to print; perfetto (for ui.perfetto.dev) is for `axvm trace` alone.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
    Perfetto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// A shadow on the other host takes over at the last committed epoch.
    Ft,
    /// Restarted on the other host; its disks are mirrored, its memory is not.
    Ha,
    /// Local only.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReturnArg {
    /// An operator, by `axvm failover`.
    Manual,
    /// axd, by planned failover, once the host protects the VM again.
    Auto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DirtyArg {
    /// What costs less here.
    Auto,
    /// KVM's dirty ring.
    Ring,
    /// KVM's dirty bitmap.
    Bitmap,
}

/// What a VM is.
#[derive(Debug, Default, Args)]
pub struct VmArgs {
    /// Read the VM from a TOML file; no other option describes it then.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["mode", "probe", "kernel", "initrd",
        "cmdline", "memory", "cpus", "disk", "net", "dirty", "verify_every"])]
    pub config: Option<PathBuf>,
    /// How well it is protected [default: ft].
    #[arg(long, value_enum, value_name = "MODE")]
    pub mode: Option<ModeArg>,
    /// Boot the embedded probe guest.
    #[arg(long, conflicts_with_all = ["kernel", "initrd"])]
    pub probe: bool,
    /// Boot this kernel: an ELF with a PVH note, or a Linux bzImage.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line, for the probe guest too (ip=10.0.0.5/24).
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Memory [default: 256M].
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// Virtual CPUs, 1 to 8 [default: 1].
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// A disk: a raw image, by path, or by bare name in axd's own image folder. With a size an
    /// absent one is made. Repeatable.
    #[arg(
        long,
        value_name = "PATH[,size=SIZE][,ro][,secondary=sync][,on_error=report]"
    )]
    pub disk: Vec<String>,
    /// A network device on a tap interface. The guest leaves checksums and the cutting of large segments to the
    /// host, unless one of the hosts is too old for it, or offload=off. Repeatable.
    #[arg(long, value_name = "tap=NAME[,mac=MAC][,offload=off]")]
    pub net: Vec<String>,
    /// Where dirty pages are learned from [default: auto].
    #[arg(long, value_enum, value_name = "SOURCE")]
    pub dirty: Option<DirtyArg>,
    /// Check the shadow's whole memory with every N-th epoch (slow).
    #[arg(long, value_name = "N")]
    pub verify_every: Option<u32>,
}

/// Which epochs.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// The VM's name.
    pub name: String,
    /// The last COUNT epochs [default: 20]; 4096 are remembered.
    #[arg(short = 'n', long, value_name = "COUNT", conflicts_with = "seconds",
        value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub count: Option<u64>,
    /// Those of the next S seconds.
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: Option<u64>,
    /// Each as it comes, one a line, until Ctrl-C or for --seconds.
    #[arg(short, long)]
    pub follow: bool,
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Both hosts: what runs there, and whether they answer.
    List,
    /// All about one host.
    Show {
        /// Its name; the one asked when absent.
        host: Option<String>,
    },
    /// Take a host out of service: moves its VMs to the other and says when it is safe to power off.
    ///
    /// `off` puts it back: shadows come back by themselves, and what was moved away by planned failover
    /// returns once it is protected again.
    Maintenance {
        /// Out of service, or back.
        state: OnOff,
        /// The host; the one asked when absent.
        host: Option<String>,
    },
    /// Empty this host because it is about to be shut down: what axd-drain.service does.
    ///
    /// Its VMs are moved to the other host; one that can't be moved is stopped in order and, with
    /// autostart, comes up at the next boot, when this is over by itself.
    Drain {
        /// How long it may take, seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 300,
            value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
    },
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM here; describe it too if it is not defined yet.
    ///
    /// Waits until it is as protected as its mode says. If that fails, nothing is left of the start.
    Start {
        /// Its name.
        name: String,
        #[command(flatten)]
        vm: Box<VmArgs>,
        /// Do not wait for protection.
        #[arg(long)]
        no_wait: bool,
        /// Start it unprotected if the other host does not answer.
        #[arg(long)]
        alone_ok: bool,
        /// Start it from this host's older copy: the current one was lost with a host that was replaced.
        #[arg(long)]
        accept_loss: bool,
    },
    /// Define a VM without starting it, or change one that does not run.
    Define {
        /// Its name; may be left to --config.
        name: Option<String>,
        #[command(flatten)]
        vm: Box<VmArgs>,
    },
    /// Forget a VM that does not run. Its images stay.
    Undefine {
        /// Its name.
        name: String,
    },
    /// Start a VM when its host boots, or not.
    Autostart {
        /// Its name.
        name: String,
        state: OnOff,
    },
    /// Say on which host a VM is to run when both are there.
    ///
    /// It does not move now. After a failover, once that host protects it again, `axvm failover` takes it back;
    /// with `--return auto` it goes back by itself.
    Prefer {
        /// Its name.
        name: String,
        /// The host.
        #[arg(required_unless_present = "none")]
        host: Option<String>,
        /// Who takes it back there.
        #[arg(long = "return", value_enum, value_name = "HOW", default_value_t = ReturnArg::Manual)]
        back: ReturnArg,
        /// It has no preferred host.
        #[arg(long, conflicts_with_all = ["host", "back"])]
        none: bool,
    },
    /// Stop a VM: its guest is asked to shut itself down, by its power button, and stopped all the same if it does not.
    ///
    /// Either way both sides know that it ended and how. A guest that does not listen to its power button, or is
    /// paused, is stopped at once. Exit code 13 says that a guest which was asked did not shut itself down in time.
    #[command(after_help = "\
Examples:
  axvm stop web                 a minute to shut down, then it is stopped
  axvm stop db --timeout 600    ten minutes
  axvm stop web --timeout 0     not asked, but in order
  axvm stop web --force         its processes are ended, as by a crash")]
    Stop {
        /// Its name.
        name: String,
        /// How long its guest has to shut itself down, seconds; 0: it is not asked.
        #[arg(long, value_name = "SECONDS", default_value_t = STOP_TIMEOUT_S, conflicts_with = "force",
            value_parser = clap::value_parser!(u64).range(..=86_400))]
        timeout: u64,
        /// End its processes at once, on both hosts, without a record.
        #[arg(long)]
        force: bool,
    },
    /// Reset a VM as its button would.
    Reboot {
        /// Its name.
        name: String,
    },
    /// Stop a VM's CPUs; protection goes on.
    Pause {
        /// Its name.
        name: String,
    },
    /// Let a paused or held VM go on.
    Resume {
        /// Its name.
        name: String,
        /// Your word that the other host is dead. If it is not, the VM runs twice.
        #[arg(long)]
        i_know_the_peer_is_dead: bool,
    },
    /// All VMs of both hosts.
    List {
        /// Exit with 4 if anything is unprotected, held or unknown.
        #[arg(long)]
        check: bool,
    },
    /// All about one VM.
    Show {
        /// Its name.
        name: String,
    },
    /// A VM's serial console; Ctrl-] leaves it. Goes on across failovers.
    Console {
        /// Its name.
        name: String,
    },
    /// Planned failover: the other host takes over, nothing is lost.
    Failover {
        /// Its name.
        name: String,
    },
    /// Change how a VM is protected, while it runs.
    ///
    /// Waits until it is as protected as that. If that fails the VM is as it was. Of a VM that does not
    /// run: from its next start on. `set-mode NAME ft` of one that lost its shadow looks for a new one now.
    SetMode {
        /// Its name.
        name: String,
        /// How it is to be protected.
        #[arg(value_enum)]
        mode: ModeArg,
        /// Do not wait for protection.
        #[arg(long)]
        no_wait: bool,
    },
    /// The hosts of the pair.
    Host {
        #[command(subcommand)]
        what: HostCommand,
    },
    /// Simulated fault: SIGKILL to the process that runs the VM.
    Kill {
        /// Its name.
        name: String,
        /// Kill the process on this host, primary or shadow.
        #[arg(long, value_name = "HOST")]
        host: Option<String>,
    },
    /// What happened, on both hosts.
    Events {
        /// Only this VM's.
        name: Option<String>,
        /// Go on with those to come.
        #[arg(short, long)]
        follow: bool,
        /// Only this host's.
        #[arg(long)]
        this_host: bool,
    },
    /// A VM's epochs, live: how often, how long the guest stands still, how long outputs wait. 'q' leaves.
    ///
    /// Figures are of the last second. It follows the VM from host to host. Needs a terminal; `axvm stats` is for
    /// programs.
    Top {
        /// Its name.
        name: String,
    },
    /// A VM's epochs one by one: why each ended, when each step of it was done, what it carried.
    ///
    /// Times in the table are microseconds. In JSON they are nanoseconds since the epoch's first kick (`began_ns`, of
    /// the host's CLOCK_BOOTTIME), and null for what has not happened. Exit code 7 says that there are none: nothing
    /// protects the VM.
    #[command(after_help = "\
Examples:
  axvm trace web                                     the last 20 epochs, as a table
  axvm trace web -f                                  each as it comes
  axvm trace web -n 1000 -o json                     the last 1000, for a program
  axvm trace web --seconds 10 -o perfetto > t.json   ten seconds, for https://ui.perfetto.dev")]
    Trace {
        #[command(flatten)]
        args: TraceArgs,
    },
    /// What was counted of a VM's epochs since its present shadow follows it: histograms, why epochs ended.
    ///
    /// Exit code 7 says that there is nothing: nothing protects the VM.
    #[command(after_help = "\
Examples:
  axvm stats web                  a table of percentiles
  axvm stats web --seconds 10     of the next ten seconds alone
  axvm stats web -o json          every bucket: [largest value, count], times in nanoseconds")]
    Stats {
        /// Its name.
        name: String,
        /// Only what is counted in the next S seconds.
        #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: Option<u64>,
    },
    /// Versions of axvm and axd.
    Version,
    /// Print shell completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}
