//! Talking to the probe guest by hand, and looking at what is left of a VM.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use probe_guest::port;
use serde_json::Value;
use testkit::site::{Side, Site};

use super::{GUEST, PATIENCE, eventually};

/// Both hosts of a pair.
pub const SIDES: [Side; 2] = [Side::A, Side::B];
/// How long a guest that answers at all may take to.
const ANSWER: Duration = Duration::from_secs(5);

/// One TCP connection from the client's place to a guest, line by line.
pub struct Talk(BufReader<TcpStream>);

impl Talk {
    /// Connects; fails when nobody takes the connection within `patience`.
    pub fn open(
        site: &Site,
        guest: Ipv4Addr,
        port: u16,
        patience: Duration,
    ) -> std::io::Result<Talk> {
        let target: SocketAddr = (guest, port).into();
        let connect = || TcpStream::connect_timeout(&target, patience);
        let stream = site.lab.client.run(connect).unwrap()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Talk(BufReader::new(stream)))
    }

    /// How long an answer may take from now on.
    pub fn patience(&self, patience: Duration) {
        self.0.get_ref().set_read_timeout(Some(patience)).unwrap();
    }

    /// Sends one line without waiting for what comes of it.
    pub fn say(&mut self, line: &str) -> std::io::Result<()> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())
    }

    /// One line and the line it is answered with.
    pub fn ask(&mut self, line: &str) -> std::io::Result<String> {
        self.say(line)?;
        let mut answer = String::new();
        match self.0.by_ref().take(4096).read_line(&mut answer)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(answer.trim_end().to_string()),
        }
    }
}

/// One order to a guest's control service and its answer; an error when it does not answer.
pub fn control(site: &Site, guest: Ipv4Addr, line: &str) -> std::io::Result<String> {
    Talk::open(site, guest, port::CONTROL, ANSWER)?.ask(line)
}

/// An order to a guest's control service that ends its run: the answer may be held for ever.
pub fn last_order(site: &Site, guest: Ipv4Addr, line: &str) {
    let talk = Talk::open(site, guest, port::CONTROL, PATIENCE);
    talk.and_then(|mut talk| talk.say(line)).unwrap();
}

/// Whether the guest answers now.
pub fn answers(site: &Site, guest: Ipv4Addr) -> bool {
    let asked = Talk::open(site, guest, port::CONTROL, Duration::from_millis(500));
    asked
        .and_then(|mut talk| {
            talk.patience(Duration::from_secs(1));
            talk.ask("PING")
        })
        .is_ok_and(|answer| answer == "PONG")
}

/// Nanoseconds since the guest booted, as it counts them.
pub fn uptime(site: &Site, guest: Ipv4Addr) -> u64 {
    let answer = control(site, guest, "CLOCK").unwrap();
    let ns = answer.split(' ').find_map(|w| w.strip_prefix("ns="));
    ns.and_then(|ns| ns.parse().ok())
        .unwrap_or_else(|| panic!("no time in {answer:?}"))
}

/// A VM's state as `axvm` on `ask`'s host has it.
pub fn state(site: &Site, ask: Side, vm: &str) -> String {
    text(&site.show(ask, vm).unwrap()["state"])
}

/// A JSON string, without quotes.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_string()
}

/// Waits until a host says that a VM is in `wanted`.
pub fn until_state(site: &Site, ask: Side, vm: &str, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let shown = site.show(ask, vm);
        if shown.as_ref().is_ok_and(|s| s["state"] == wanted) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{vm} is not {wanted} for {}: {shown:?}\n{}",
            ask.name(),
            site.logs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The processes of VMs on a host, by this machine's process id, with their command lines.
pub fn vm_processes(site: &Site, side: Side) -> Vec<(u32, String)> {
    let all = site.host(side).processes().into_iter();
    all.filter(|(_, line)| line.contains(" --spec ")).collect()
}

/// Appends a record to the guest's ledger; its number.
pub fn append(site: &Site, record: &str) -> String {
    let mut ledger = Talk::open(site, GUEST, port::LEDGER, PATIENCE).unwrap();
    ledger.ask(&format!("APPEND {record}")).unwrap()
}

/// Reads a record of the guest's ledger.
pub fn read(site: &Site, number: &str) -> String {
    let mut ledger = Talk::open(site, GUEST, port::LEDGER, PATIENCE).unwrap();
    ledger.ask(&format!("READ {number}")).unwrap()
}

/// A VM's image on a host.
pub fn image(site: &Site, side: Side, name: &str) -> PathBuf {
    site.data_dir(side).join("images").join(name)
}

/// Both hosts say that the VM is stopped, nothing of it runs, and its images are equal.
pub fn assert_stopped(site: &Site, vm: &str, disk: &str) {
    for side in SIDES {
        until_state(site, side, vm, "stopped");
        eventually("its processes are gone", || {
            let its = format!("/vms/{vm}/");
            !vm_processes(site, side)
                .iter()
                .any(|(_, l)| l.contains(&its))
        });
    }
    let [a, b] = SIDES.map(|side| std::fs::read(image(site, side, disk)).unwrap());
    let differs = a.iter().zip(&b).position(|(a, b)| a != b);
    assert!(
        a.len() == b.len() && differs.is_none(),
        "the images of a stopped VM differ from byte {differs:?} on"
    );
}

/// `axvm` on a host: exit code, standard output, standard error.
pub fn axvm(site: &Site, side: Side, args: &[&str]) -> (i32, String, String) {
    let output = site.axvm(side).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}
