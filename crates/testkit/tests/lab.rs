//! The laboratory is what it claims to be: hosts that die at once, cables that fail as asked,
//! clocks that disagree, and nothing left when its process is gone.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testkit::net::{Filter, FrameCable, Host, Lab, LabSpec, Shape, Toward, addr};
use testkit::require_lab;

const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough for a frame that was not stopped to arrive.
const QUIET: Duration = Duration::from_millis(150);

fn lab() -> Lab {
    Lab::new(LabSpec::default()).unwrap()
}

fn socket(host: &Host, ip: Ipv4Addr) -> UdpSocket {
    host.run(|| UdpSocket::bind((ip, 9_000)).unwrap()).unwrap()
}

/// Sends one datagram, numbered so that a late one is not taken for this one.
fn arrives(from: &UdpSocket, to: &UdpSocket, number: u32, patience: Duration) -> bool {
    let target: SocketAddr = to.local_addr().unwrap();
    // While the carrier is gone there is no route: that datagram does not arrive either.
    let _ = from.send_to(&number.to_le_bytes(), target);
    to.set_read_timeout(Some(patience)).unwrap();
    let mut bytes = [0; 4];
    loop {
        match to.recv_from(&mut bytes) {
            Ok(_) if u32::from_le_bytes(bytes) == number => return true,
            Ok(_) => continue,
            Err(e) => {
                assert!(
                    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
                    "{e}"
                );
                return false;
            }
        }
    }
}

#[test]
fn every_host_reaches_every_other() {
    require_lab!();
    let lab = lab();
    let sockets = [
        socket(&lab.a, addr::A),
        socket(&lab.b, addr::B),
        socket(&lab.witness, addr::WITNESS),
        socket(&lab.client, addr::CLIENT),
    ];
    for (i, from) in sockets.iter().enumerate() {
        for (j, to) in sockets.iter().enumerate() {
            let number = (i * 10 + j) as u32;
            assert!(
                arrives(from, to, number, PATIENCE),
                "{i} does not reach {j}"
            );
        }
    }
    let a = socket(&lab.a, addr::link_a(0));
    let b = socket(&lab.b, addr::link_b(0));
    assert!(arrives(&a, &b, 100, PATIENCE));
    assert!(arrives(&b, &a, 101, PATIENCE));
    // The dedicated link is nobody else's.
    assert!(!arrives(&sockets[3], &b, 102, QUIET));
}

#[test]
fn cables_fail_as_asked_and_mend() {
    require_lab!();
    let lab = lab();
    let cable = &lab.links[0];
    let a = socket(&lab.a, addr::link_a(0));
    let b = socket(&lab.b, addr::link_b(0));
    assert!(arrives(&a, &b, 1, PATIENCE));

    cable.silence(Toward::Second).unwrap();
    assert!(!arrives(&a, &b, 2, QUIET));
    assert!(
        arrives(&b, &a, 3, PATIENCE),
        "only one direction was to be silent"
    );
    cable.unsilence(Toward::Second).unwrap();
    assert!(arrives(&a, &b, 4, PATIENCE));

    cable.silence_both().unwrap();
    assert!(!arrives(&a, &b, 5, QUIET));
    assert!(!arrives(&b, &a, 6, QUIET));
    cable.mend().unwrap();
    assert!(arrives(&a, &b, 7, PATIENCE));

    cable.unplug().unwrap();
    assert!(!arrives(&a, &b, 8, QUIET));
    assert!(!arrives(&b, &a, 9, QUIET));
    cable.mend().unwrap();
    assert!(arrives(&a, &b, 10, PATIENCE));
    assert!(arrives(&b, &a, 11, PATIENCE));

    let client = socket(&lab.client, addr::CLIENT);
    let a = socket(&lab.a, addr::A);
    lab.uplinks.a.unplug().unwrap();
    assert!(!arrives(&client, &a, 12, QUIET));
    lab.uplinks.a.mend().unwrap();
    assert!(arrives(&client, &a, 13, PATIENCE));
}

#[test]
fn frames_through_user_space_fare_as_asked() {
    require_lab!();
    let lab = Lab::new(LabSpec {
        links: 0,
        ..LabSpec::default()
    })
    .unwrap();
    let cable = FrameCable::lay(&lab.a, &lab.b, 0, 42).unwrap();
    let a = socket(&lab.a, addr::link_a(0));
    let b = socket(&lab.b, addr::link_b(0));
    assert!(arrives(&a, &b, 1, PATIENCE));
    assert!(arrives(&b, &a, 2, PATIENCE));

    let delay = Duration::from_millis(40);
    cable.set(
        Toward::Second,
        Shape {
            delay,
            ..Shape::default()
        },
    );
    let began = Instant::now();
    assert!(arrives(&a, &b, 3, PATIENCE));
    assert!(began.elapsed() >= delay);

    // One datagram, told by its bytes, is dropped; its neighbours pass.
    let mark = 0x5ca1_ab1e_u32;
    let filter: Filter = Box::new(move |f| !f.windows(4).any(|w| w == mark.to_le_bytes()));
    cable.set(
        Toward::Second,
        Shape {
            filter: Some(filter),
            ..Shape::default()
        },
    );
    assert!(arrives(&a, &b, 4, PATIENCE));
    assert!(!arrives(&a, &b, mark, QUIET));
    assert!(arrives(&a, &b, 5, PATIENCE));
    assert!(
        arrives(&b, &a, mark, PATIENCE),
        "only one direction was filtered"
    );

    // Jitter reorders, repetition repeats, loss loses.
    let shape = |loss_per_mille, repeat_per_mille| Shape {
        jitter: Duration::from_millis(20),
        loss_per_mille,
        repeat_per_mille,
        ..Shape::default()
    };
    cable.set(Toward::Second, shape(0, 1000));
    let got = burst(&a, &b);
    assert_eq!(got.len(), 200, "each of 100 twice");
    assert!(!got.is_sorted());
    cable.set(Toward::Second, shape(500, 0));
    let got = burst(&a, &b);
    assert!((1..100).contains(&got.len()), "{} of 100", got.len());
}

/// Sends 100 numbered datagrams and returns those that come, until none does.
fn burst(from: &UdpSocket, to: &UdpSocket) -> Vec<u32> {
    for number in 1000..1100u32 {
        from.send_to(&number.to_le_bytes(), to.local_addr().unwrap())
            .unwrap();
    }
    to.set_read_timeout(Some(QUIET)).unwrap();
    let mut bytes = [0; 4];
    std::iter::from_fn(|| to.recv(&mut bytes).ok().map(|_| u32::from_le_bytes(bytes))).collect()
}

#[test]
fn taps_are_plugged_into_the_business_network() {
    require_lab!();
    let lab = lab();
    let tap = lab.a.run(|| attach("axtap0")).unwrap();
    let client = socket(&lab.client, addr::CLIENT);
    client.set_broadcast(true).unwrap();
    let mark = b"to every station";
    let mut frame = [0u8; 2048];
    // The bridge port becomes forwarding when the tap's carrier rises, which is a work item.
    for _ in 0..200 {
        client.send_to(mark, (Ipv4Addr::BROADCAST, 9_001)).unwrap();
        let mut poll = libc::pollfd {
            fd: tap.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, 50) } == 1 {
            let len = (&tap).read(&mut frame).unwrap();
            if frame[..len].windows(mark.len()).any(|w| w == mark) {
                return;
            }
        }
    }
    panic!("no broadcast came out of axtap0");
}

fn attach(name: &str) -> std::fs::File {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    // SAFETY: TUNSETIFF reads and writes one ifreq (40 bytes), which outlives the call.
    let rc = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    tun
}

/// Starts a daemon with a session of its own, which ignores what can be ignored.
fn start_daemon(host: &Host, seconds: &str) {
    let script = format!("trap '' HUP TERM; setsid sleep {seconds} & echo started");
    let mut shell = host
        .command("sh")
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(shell.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "started\n");
    assert!(shell.wait().unwrap().success());
}

#[test]
fn kill_all_takes_every_process_of_one_host_and_no_other() {
    require_lab!();
    let lab = lab();
    for _ in 0..5 {
        start_daemon(&lab.a, "1001");
    }
    start_daemon(&lab.b, "1002");
    let before = lab.a.processes();
    assert_eq!(
        before
            .values()
            .filter(|c| c.ends_with("sleep 1001"))
            .count(),
        5,
        "{before:?}"
    );

    let boot_id = |host: &Host| {
        let mut cat = host.command("cat");
        cat.arg("/proc/sys/kernel/random/boot_id")
            .output()
            .unwrap()
            .stdout
    };
    let booted = boot_id(&lab.a);
    assert_ne!(booted, boot_id(&lab.b));
    let report = lab.a.kill_all().unwrap();
    println!("5 daemons gone {:?} after SIGKILL", report.gone_after);
    assert!(lab.a.processes().is_empty());
    for pid in before.keys() {
        assert!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "{pid} survived"
        );
    }
    assert_eq!(lab.b.processes().len(), 1);
    let spawn = lab.a.command("true").status();
    assert_eq!(spawn.unwrap_err().raw_os_error(), Some(libc::ESRCH));
    assert!(lab.a.kill_all().is_err(), "it was off already");

    lab.a.power_on().unwrap();
    assert!(lab.a.command("true").status().unwrap().success());
    assert_ne!(boot_id(&lab.a), booted, "another boot");
    // The cables are still plugged in.
    let (a, client) = (socket(&lab.a, addr::A), socket(&lab.client, addr::CLIENT));
    assert!(arrives(&client, &a, 1, PATIENCE));
}

#[test]
fn commands_behave_as_ordinary_children() {
    require_lab!();
    let lab = lab();
    let run = |script: &str| lab.a.command("sh").args(["-c", script]).output().unwrap();
    assert_eq!(run("exit 7").status.code(), Some(7));
    assert_eq!(run("kill -9 $$").status.signal(), Some(libc::SIGKILL));
    assert_eq!(run("cat /proc/sys/kernel/hostname").stdout, b"a\n");
    let here = format!("{}\n", std::env::current_dir().unwrap().display());
    assert_eq!(String::from_utf8(run("pwd").stdout).unwrap(), here);
    // The host's /proc shows the host's own process ids.
    let own = run("read pid rest </proc/self/stat; test $pid = $$ && echo same");
    assert_eq!(own.stdout, b"same\n");
    let missing = lab.a.command("/no/such/program").spawn().unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);

    // Signals pass on, and killing the child kills what it stands for.
    let mut child = lab
        .a
        .command("sh")
        .args([
            "-c",
            "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    // SAFETY: a signal to a child of ours that has not been waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(9));

    let mut child = lab.a.command("sleep").arg("1003").spawn().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    for _ in 0..1000 {
        if lab.a.processes().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("killing the child left {:?}", lab.a.processes());
}

#[test]
fn no_two_hosts_agree_on_their_clocks() {
    require_lab!();
    let lab = lab();
    if !Path::new("/proc/self/ns/time").exists() {
        testkit::skip::report(
            "no time namespaces",
            "old kernel",
            &testkit::skip::test_name(),
        );
        return;
    }
    let uptime = |host: &Host| -> f64 {
        let text = host
            .command("cat")
            .arg("/proc/uptime")
            .output()
            .unwrap()
            .stdout;
        String::from_utf8(text)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    let (a, b, client) = (uptime(&lab.a), uptime(&lab.b), uptime(&lab.client));
    assert!(
        a - client > 86_400.0 && b - a > 86_400.0,
        "{a} {b} {client}"
    );
}

/// Not a test of its own: what `nothing_outlives_the_process` kills.
#[test]
#[ignore = "run by nothing_outlives_the_process"]
fn victim() {
    let lab = lab();
    start_daemon(&lab.a, "1004");
    let pid = loop {
        let all = lab.a.processes();
        if let Some((pid, _)) = all.iter().find(|(_, command)| *command == "sleep 1004") {
            break *pid;
        }
    };
    println!("{pid}");
    std::thread::sleep(Duration::from_secs(1000));
}

#[test]
fn nothing_outlives_the_process_that_made_it() {
    require_lab!();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid: u32 = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .find_map(|line| line.unwrap().parse().ok())
        .unwrap();
    let daemon = format!("/proc/{pid}");
    assert!(Path::new(&daemon).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    for _ in 0..1000 {
        if !Path::new(&daemon).exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the daemon survived its laboratory");
}
