//! A stand-in for `ax-vmm` in axd's tests: it speaks the same control protocol and keeps the same
//! phases, with a guest that is only a console that echoes. Built as an example so that it is a
//! program of its own, as the real one is.
//!
//! `quirks` in the VM's command line make it misbehave: `fail-boot=CODE`, `fail-shadow=CODE`,
//! `never-protect`, `hold`, `late-grant`, `no-answer`, `slow-sync`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may panic"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::exit;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ax_api::host::StartFailure;
use ax_api::process::{
    Event, Phase, PromotionParts, Reply, Request, Role, Spec, Start, Status, What,
};
use ax_api::vm::{Boot, Mode};
use ax_wire::{Generation, Incarnation};

struct State {
    status: Status,
    events: Vec<Event>,
    console: Vec<u8>,
    peer: Option<TcpStream>,
}

struct Fake {
    spec: Spec,
    quirks: String,
    state: Mutex<State>,
    changed: Condvar,
}

impl Fake {
    fn tell(&self, state: &mut State, what: What) {
        let seq = state.events.len() as u64 + 1;
        state.events.push(Event {
            seq,
            at_ms: 1,
            what,
        });
        self.changed.notify_all();
    }

    fn enter(&self, role: Role, phase: Phase, generation: u64) {
        let mut state = self.state.lock().unwrap();
        state.status.role = role;
        state.status.phase = phase.clone();
        state.status.generation = Generation(generation);
        let generation = Generation(generation);
        self.tell(
            &mut state,
            What::Phase {
                role,
                phase,
                generation,
            },
        );
    }

    fn generation(&self) -> u64 {
        self.state.lock().unwrap().status.generation.0
    }

    fn end(&self, clean: bool) -> ! {
        let why = "stopped".to_owned();
        {
            let mut state = self.state.lock().unwrap();
            self.tell(&mut state, What::Ended { why, clean });
        }
        std::thread::sleep(Duration::from_millis(50));
        exit(0);
    }

    /// Primary: copies "everything" to the shadow and is protected by it.
    fn protect(self: &Arc<Self>, addresses: &[SocketAddr]) {
        let Some(mut stream) = addresses.iter().find_map(|a| TcpStream::connect(a).ok()) else {
            self.enter(Role::Primary, Phase::Alone, 1);
            return;
        };
        self.state.lock().unwrap().peer = stream.try_clone().ok();
        let steps = if self.quirks.contains("slow-sync") {
            50
        } else {
            3
        };
        for step in 0..steps {
            let (done, total) = (step << 20, steps << 20);
            self.enter(Role::Primary, Phase::Syncing { done, total }, 1);
            std::thread::sleep(Duration::from_millis(30));
        }
        if self.quirks.contains("never-protect") {
            self.enter(Role::Primary, Phase::Alone, 1);
            return;
        }
        stream.write_all(b"p").unwrap();
        self.enter(Role::Primary, Phase::Protected, 2);
        let me = self.clone();
        std::thread::spawn(move || me.watch(stream));
    }

    /// Either side: waits for what the peer says, or for its end.
    fn watch(self: &Arc<Self>, stream: TcpStream) {
        let mut said = [0; 1];
        let mut stream = stream;
        loop {
            match std::io::Read::read(&mut stream, &mut said) {
                Ok(1) if said[0] == b'p' => self.enter(Role::Shadow, Phase::Protected, 2),
                Ok(1) if said[0] == b's' => self.end(true),
                Ok(1) if said[0] == b'f' => {
                    let (role, generation) = (Role::Primary, self.generation() + 1);
                    self.enter(role, Phase::Protected, generation);
                }
                _ => break,
            }
        }
        let (was, generation) = {
            let state = self.state.lock().unwrap();
            (state.status.role, state.status.generation.0 + 1)
        };
        if generation < 3 {
            exit(0);
        }
        {
            let how = "death-notice".to_owned();
            let mut state = self.state.lock().unwrap();
            self.tell(&mut state, What::PeerLost { how });
        }
        self.enter(Role::Primary, Phase::Alone, generation);
        if was == Role::Shadow {
            let mut state = self.state.lock().unwrap();
            let (epoch, took_us) = (7, 1000);
            let parts_us = PromotionParts::default();
            let promoted = What::Promoted {
                epoch,
                took_us,
                parts_us,
            };
            self.tell(&mut state, promoted);
        }
    }

    fn answer(self: &Arc<Self>, request: Request) -> Reply {
        let refused = |why: &str| Reply::Refused { why: why.into() };
        let role = self.state.lock().unwrap().status.role;
        match request {
            Request::Status => Reply::Status(Box::new(self.state.lock().unwrap().status.clone())),
            Request::Protect { .. }
                if self.quirks.contains("late-grant") && self.generation() == 0 =>
            {
                // Too early to take a shadow; a moment later it would not have been.
                self.enter(Role::Primary, Phase::Alone, 1);
                refused("this VM does not run alone")
            }
            Request::Protect { addresses, .. } if !self.quirks.contains("hold") => {
                let me = self.clone();
                std::thread::spawn(move || me.protect(&addresses));
                Reply::Done
            }
            Request::Pause => {
                let generation = self.generation();
                self.enter(Role::Primary, Phase::Paused, generation);
                Reply::Done
            }
            Request::Resume => {
                let phase = match self.spec.vm.mode {
                    Mode::None => Phase::Unprotected,
                    _ => Phase::Protected,
                };
                let generation = self.generation();
                self.enter(Role::Primary, phase, generation);
                Reply::Done
            }
            Request::PeerIsDead => {
                self.enter(Role::Primary, Phase::Alone, 9);
                Reply::Done
            }
            Request::Failover if role == Role::Primary => {
                let mut state = self.state.lock().unwrap();
                match &mut state.peer {
                    Some(peer) => {
                        peer.write_all(b"f").unwrap();
                        drop(state);
                        let generation = self.generation() + 1;
                        self.enter(Role::Shadow, Phase::Protected, generation);
                        Reply::Done
                    }
                    None => refused("no shadow"),
                }
            }
            Request::PeerGone { incarnation } => {
                let text = format!("peer gone {}", incarnation.0);
                let mut state = self.state.lock().unwrap();
                self.tell(&mut state, What::Note { text });
                Reply::Done
            }
            Request::Reboot | Request::Protect { .. } => Reply::Done,
            _ => refused("not by the fake"),
        }
    }

    fn serve(self: &Arc<Self>, stream: UnixStream) {
        let mut from = BufReader::new(stream.try_clone().unwrap());
        let mut to = stream;
        let mut line = String::new();
        let say = |to: &mut UnixStream, reply: &Reply| {
            let mut line = serde_json::to_vec(reply).unwrap();
            line.push(b'\n');
            to.write_all(&line)
        };
        loop {
            line.clear();
            if from.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            match serde_json::from_str::<Request>(&line).unwrap() {
                Request::Quit | Request::GiveUp => exit(0),
                Request::Stop => {
                    if let Some(peer) = &mut self.state.lock().unwrap().peer {
                        let _ = peer.write_all(b"s");
                    }
                    say(&mut to, &Reply::Done).unwrap();
                    self.end(true);
                }
                Request::Subscribe { since } => {
                    let mut next = usize::try_from(since.saturating_sub(1)).unwrap();
                    loop {
                        let mut state = self.state.lock().unwrap();
                        while state.events.len() <= next {
                            state = self.changed.wait(state).unwrap();
                        }
                        let mut line = serde_json::to_vec(&state.events[next]).unwrap();
                        drop(state);
                        line.push(b'\n');
                        if to.write_all(&line).is_err() {
                            return;
                        }
                        next += 1;
                    }
                }
                Request::Console { from: wanted } => {
                    let (offset, before) = {
                        let state = self.state.lock().unwrap();
                        let at = usize::try_from(wanted.unwrap_or(0)).unwrap();
                        let at = at.min(state.console.len());
                        (at as u64, state.console[at..].to_vec())
                    };
                    say(&mut to, &Reply::Console { offset }).unwrap();
                    to.write_all(&before).unwrap();
                    let mut bytes = [0; 256];
                    while let Ok(n) = std::io::Read::read(&mut from, &mut bytes) {
                        if n == 0 || to.write_all(&bytes[..n]).is_err() {
                            return;
                        }
                        self.state.lock().unwrap().console.extend(&bytes[..n]);
                    }
                    return;
                }
                request => {
                    let reply = self.answer(request);
                    say(&mut to, &reply).unwrap();
                }
            }
        }
    }
}

fn fail(code: i32, error: &str) -> ! {
    let failure = StartFailure {
        error: error.to_owned(),
        code,
    };
    eprintln!("{}", serde_json::to_string(&failure).unwrap());
    exit(code);
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some("--selfcheck") {
        println!(r#"{{"check":"kvm","ok":true,"detail":"fake"}}"#);
        println!(r#"{{"check":"dirty","ok":false,"detail":"a page was missed","code":3}}"#);
        exit(3);
    }
    let text = std::fs::read(Path::new(&args[2])).unwrap();
    let spec: Spec = serde_json::from_slice(&text).unwrap();
    let quirks = match &spec.vm.boot {
        Boot::Probe { cmdline } | Boot::Kernel { cmdline, .. } => cmdline.clone(),
    };
    let word = if spec.start == Start::Boot {
        "fail-boot="
    } else {
        "fail-shadow="
    };
    if let Some(rest) = quirks.split_whitespace().find_map(|q| q.strip_prefix(word)) {
        eprintln!("some log line");
        fail(rest.parse().unwrap(), "as told by its quirk");
    }
    for disk in &spec.vm.disks {
        match std::fs::metadata(&disk.path) {
            Ok(m) if m.len() == disk.size => {}
            _ => fail(
                4,
                &format!("disk image {} is not right", disk.path.display()),
            ),
        }
    }
    let control = UnixListener::bind(&spec.control).unwrap();
    let link = TcpListener::bind((
        spec.link.first().copied().unwrap_or([127, 0, 0, 1].into()),
        0,
    ));
    let link = link.unwrap();
    let role = match spec.start {
        Start::Boot => Role::Primary,
        Start::Shadow => Role::Shadow,
    };
    let incarnation = Incarnation(u64::from(std::process::id()));
    let fake = Arc::new(Fake {
        state: Mutex::new(State {
            status: Status {
                name: spec.vm.name.clone(),
                pid: std::process::id(),
                wire: ax_wire::Versions::ours().newest().number(),
                incarnation,
                role,
                phase: Phase::Starting,
                warning: None,
                disk_fails: None,
                disk_holds: false,
                arbiter: String::new(),
                sync_left_s: None,
                mode: spec.vm.mode,
                generation: Generation(0),
                listen: vec![],
                epoch: 0,
                epochs_per_second: 0.0,
                pause_us: [0; 2],
                pause_parts_us: Default::default(),
                disk_sync: Default::default(),
                commit_us: [0; 2],
                ship_us: [0; 2],
                pages: [0; 2],
                link_bytes_per_second: 0,
                oldest_held_us: 0,
                paths: Vec::new(),
            },
            events: vec![],
            console: vec![],
            peer: None,
        }),
        changed: Condvar::new(),
        quirks,
        spec,
    });
    let me = fake.clone();
    std::thread::spawn(move || {
        for stream in control.incoming() {
            let (me, stream) = (me.clone(), stream.unwrap());
            if me.quirks.contains("no-answer") && me.spec.start == Start::Boot {
                std::mem::forget(stream);
                continue;
            }
            std::thread::spawn(move || me.serve(stream));
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    match (fake.spec.start, fake.spec.vm.mode) {
        (Start::Boot, Mode::None) => fake.enter(Role::Primary, Phase::Unprotected, 0),
        (Start::Boot, _) if fake.quirks.contains("hold") || fake.quirks.contains("late-grant") => {
            let waits_for = "witness w".to_owned();
            fake.enter(Role::Primary, Phase::Held { waits_for }, 0);
        }
        (Start::Boot, _) => fake.enter(Role::Primary, Phase::Alone, 1),
        (Start::Shadow, _) => {
            fake.state.lock().unwrap().status.listen = vec![link.local_addr().unwrap()];
            fake.enter(Role::Shadow, Phase::Waiting, 0);
            let (stream, _) = link.accept().unwrap();
            fake.state.lock().unwrap().peer = stream.try_clone().ok();
            fake.watch(stream);
        }
    }
    loop {
        std::thread::park();
    }
}
