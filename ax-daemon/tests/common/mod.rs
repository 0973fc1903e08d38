//! Two axds on this machine, 127.0.0.1 and 127.0.0.2, with the stand-in for `ax-vmm`.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ax_api::host::{Code, HostEvent, HostWhat, NewDisk, NewVm, Reply, Request, State, VmReport};
use ax_api::units::Bytes;
use ax_api::vm::{Boot, DirtySource, Mode, Secondary};

/// The longest anything here may take; reached only when something is wrong.
pub const LONG: Duration = Duration::from_secs(40);

pub fn axd_program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_axd"))
}

pub fn stand_in() -> PathBuf {
    let axd = PathBuf::from(env!("CARGO_BIN_EXE_axd"));
    let path = axd.parent().unwrap().join("examples/stand-in-vmm");
    assert!(path.exists(), "{} is not built", path.display());
    path
}

/// A TCP port nobody listens on, on any loopback address.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// One host: its folder, its configuration and its axd, if that runs.
pub struct Host {
    pub name: String,
    pub dir: PathBuf,
    pub axd: Option<Child>,
}

impl Host {
    pub fn socket(&self) -> PathBuf {
        self.dir.join("axd.sock")
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("axd.toml")
    }

    pub fn start(&mut self) {
        assert!(self.axd.is_none());
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("axd.log"))
            .unwrap();
        let mut child = axd_program()
            .arg("--config")
            .arg(self.config())
            .env("AX_VMM", stand_in())
            .stdin(Stdio::null())
            .env("NO_COLOR", "1")
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert!(line.contains("ready"), "{line:?}: {}", self.log());
        self.axd = Some(child);
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("axd.log")).unwrap_or_default()
    }

    /// SIGKILL to axd.
    pub fn kill(&mut self) {
        let mut axd = self.axd.take().unwrap();
        axd.kill().unwrap();
        axd.wait().unwrap();
    }

    /// One request; all lines of the answer.
    pub fn ask_all(&self, request: &Request) -> Vec<Reply> {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut line = serde_json::to_string(request).unwrap();
        line.push('\n');
        stream.write_all(line.as_bytes()).unwrap();
        let mut replies = vec![];
        for line in BufReader::new(stream).lines() {
            let reply: Reply = serde_json::from_str(&line.unwrap()).unwrap();
            let last = reply.is_last();
            replies.push(reply);
            if last {
                return replies;
            }
        }
        panic!("no last line to {request:?}: {replies:?}");
    }

    pub fn ask(&self, request: &Request) -> Reply {
        self.ask_all(request).pop().unwrap()
    }

    /// A request that must be done.
    pub fn done(&self, request: &Request) -> String {
        match self.ask(request) {
            Reply::Done { text } => text,
            other => panic!("{request:?} on {}: {other:?}\n{}", self.name, self.log()),
        }
    }

    /// A request that must fail.
    pub fn fails(&self, request: &Request) -> (Code, String) {
        match self.ask(request) {
            Reply::Failed { code, why } => (code, why),
            other => panic!("{request:?} did not fail: {other:?}"),
        }
    }

    pub fn show(&self, name: &str) -> VmReport {
        match self.ask(&Request::Show { name: name.into() }) {
            Reply::Vm { vm } => *vm,
            other => panic!("{other:?}"),
        }
    }

    pub fn list(&self) -> Vec<VmReport> {
        match self.ask(&Request::List) {
            Reply::Vms { vms, .. } => vms,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the VM is seen in a state.
    pub fn until(&self, name: &str, state: State) -> VmReport {
        let deadline = Instant::now() + LONG;
        loop {
            let report = self.show(name);
            if report.state == state {
                return report;
            }
            let seen = (report.state, &report.note);
            assert!(
                Instant::now() < deadline,
                "{seen:?}, not {state:?}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until this host has heard of a VM.
    pub fn until_known(&self, name: &str) {
        let deadline = Instant::now() + LONG;
        while !self.list().iter().any(|r| r.vm.name == name) {
            assert!(
                Instant::now() < deadline,
                "{name} is not known on {}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn events(&self) -> Vec<HostEvent> {
        let request = Request::Events {
            vm: None,
            follow: false,
            both_hosts: false,
        };
        let events = self.ask_all(&request).into_iter();
        events
            .filter_map(|reply| match reply {
                Reply::Event { event } => Some(event),
                _ => None,
            })
            .collect()
    }

    pub fn notes(&self) -> Vec<String> {
        let events = self.events().into_iter();
        events
            .filter_map(|event| match event.what {
                HostWhat::Note { text } => Some(text),
                _ => None,
            })
            .collect()
    }

    /// Processes of this host that run a specification of its own.
    pub fn vmm_pids(&self) -> Vec<i32> {
        let vms = self.dir.join("vms");
        let running = ax_daemon::process::running_specs(&vms).into_iter();
        running.map(|(pid, _)| pid).collect()
    }

    /// Nothing of a VM is left: no process, no socket, no mark of a start.
    pub fn assert_clean(&self, name: &str) {
        assert_eq!(self.vmm_pids(), Vec::<i32>::new(), "processes are left");
        let run = std::fs::read_dir(self.dir.join("run")).unwrap();
        let left: Vec<_> = run.map(|e| e.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
        let starting = self.dir.join("vms").join(name).join("starting");
        assert!(!starting.exists(), "the mark of a start is left");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut axd) = self.axd.take() {
            let _ = axd.kill();
            let _ = axd.wait();
        }
        for pid in self.vmm_pids() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}", self.name, self.log());
        }
    }
}

/// Two hosts that know each other, with mutual TLS.
pub struct Pair {
    pub a: Host,
    pub b: Host,
    dir: tempfile::TempDir,
}

impl Pair {
    /// Configured and paired; no axd runs yet.
    pub fn new() -> Pair {
        Pair::with("")
    }

    pub fn with(extra: &str) -> Pair {
        let dir = tempfile::Builder::new().prefix("ax").tempdir().unwrap();
        let ports = [free_port(), free_port()];
        let host = |i: usize, name: &str, peer: &str| {
            let own = dir.path().join(name);
            std::fs::create_dir_all(&own).unwrap();
            let text = format!(
                "name = \"{name}\"\ndata_dir = {own:?}\nsocket = \"{}\"\nlisten = \"127.0.0.{}:{}\"\n{extra}\n\
                 [peer]\nname = \"{peer}\"\naddresses = [\"127.0.0.{}:{}\"]\n\n\
                 [link]\naddresses = [\"127.0.0.{}\"]\n",
                own.join("axd.sock").display(),
                i + 1,
                ports[i],
                2 - i,
                ports[1 - i],
                i + 1,
            );
            std::fs::write(own.join("axd.toml"), text).unwrap();
            Host {
                name: name.into(),
                dir: own,
                axd: None,
            }
        };
        let pair = Pair {
            a: host(0, "a", "b"),
            b: host(1, "b", "a"),
            dir,
        };
        if !extra.contains("plain") {
            exchange_keys(&pair.a.config(), &pair.b.config());
        }
        pair
    }

    /// Both axds run, with an arbiter that is a third party (which a stand-in never asks).
    pub fn running() -> Pair {
        let mut pair = Pair::with("etcd = [\"http://127.0.0.1:1\"]");
        pair.a.start();
        pair.b.start();
        pair
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// `axd pair` on both sides.
pub fn exchange_keys(printing: &Path, using: &Path) {
    let mut waiting = axd_program()
        .args(["pair", "--listen", &format!("127.0.0.1:{}", free_port())])
        .arg("--config")
        .arg(printing)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(waiting.stdout.take().unwrap()).lines();
    let token = lines
        .by_ref()
        .find_map(|line| {
            let line = line.unwrap();
            let (_, token) = line.split_once("--token ")?;
            Some(token.to_owned())
        })
        .unwrap();
    let used = axd_program()
        .args(["pair", "--token", &token, "--config"])
        .arg(using)
        .output()
        .unwrap();
    assert!(used.status.success(), "{used:?}");
    for line in lines {
        line.unwrap();
    }
    assert!(waiting.wait().unwrap().success());
}

/// A VM as a user asks for it; `quirks` go to the stand-in.
pub fn vm(name: &str, mode: Mode, quirks: &str) -> NewVm {
    NewVm {
        name: name.into(),
        mode,
        memory: Bytes(64 << 20),
        cpus: 1,
        boot: Boot::Probe {
            cmdline: quirks.into(),
        },
        disks: vec![],
        nics: vec![],
        autostart: false,
        dirty: DirtySource::Auto,
        verify_every: None,
        preferred: None,
    }
}

pub fn with_disk(mut vm: NewVm, path: impl Into<PathBuf>, size: Option<u64>) -> NewVm {
    vm.disks.push(NewDisk {
        path: path.into(),
        size: size.map(Bytes),
        read_only: false,
        secondary: Secondary::Async,
        on_error: Default::default(),
    });
    vm
}

pub fn start(vm: NewVm) -> Request {
    Request::Start {
        name: vm.name.clone(),
        define: Some(Box::new(vm)),
        wait: true,
        alone_ok: false,
        accept_loss: false,
    }
}

pub fn start_known(name: &str) -> Request {
    Request::Start {
        name: name.into(),
        define: None,
        wait: true,
        alone_ok: false,
        accept_loss: false,
    }
}
