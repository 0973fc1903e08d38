//! The probe guest, with disks, moved at random moments: it ends with the same memory and disk digests
//! as one that never moved.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{BITMAP, Collected, RING, Random, eventually, ram, state};
use parking_lot::Mutex;
use vmm::devices::DeviceSet;
use vmm::ports::{Disk, Power};
use vmm::{
    BootConfig, DirtyTracking, HostCaps, Image, Machine, MachineConfig, MachineHandle, NicConfig,
    Ports, Press,
};

const MEMORY: u64 = 32 << 20;
const DISK: usize = 4 << 20;

/// A disk in memory. Moving a guest moves a copy of what the guest has been told is written.
struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryDisk {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(MemoryDisk {
            bytes: Mutex::new(bytes),
        })
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        DISK as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        out.copy_from_slice(&self.bytes.lock()[at..at + out.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        self.bytes.lock()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_completed(&self, _: u64, _: &[u8]) {}

    fn flush_completed(&self) {}
}

/// A machine with everything outside it that moves along.
struct Guest {
    machine: Machine,
    disk: Arc<MemoryDisk>,
    outputs: Arc<Collected>,
    config: MachineConfig,
    caps: HostCaps,
    marks: AtomicUsize,
}

impl Guest {
    fn config(vcpus: u8, dirty: DirtyTracking) -> MachineConfig {
        MachineConfig {
            memory: MEMORY,
            vcpus,
            nics: vec![NicConfig {
                mac: [2, 0, 0, 0, 0, 1],
                offload: true,
            }],
            rng: true,
            dirty,
            boot: BootConfig {
                kernel: Some(Image::Embedded(probe_guest::ELF)),
                initrd: None,
                cmdline: "ip=10.77.0.10/24 quiet".into(),
            },
        }
    }

    fn machine(
        caps: &HostCaps,
        config: &MachineConfig,
        disk: &Arc<MemoryDisk>,
        outputs: &Arc<Collected>,
    ) -> Machine {
        let ports = Ports {
            outputs: Arc::clone(outputs) as _,
            disks: vec![Arc::clone(disk) as _],
        };
        Machine::with_caps(config.clone(), ports, caps.clone()).unwrap()
    }

    fn boot(caps: &HostCaps, vcpus: u8, dirty: DirtyTracking) -> Guest {
        let (config, outputs) = (Guest::config(vcpus, dirty), Arc::default());
        let disk = MemoryDisk::new(vec![0; DISK]);
        let mut machine = Guest::machine(caps, &config, &disk, &outputs);
        machine.boot().unwrap();
        machine.start().unwrap();
        let guest = Guest {
            machine,
            disk,
            outputs,
            config,
            caps: caps.clone(),
            marks: AtomicUsize::new(0),
        };
        guest.line_after("probe-guest ready");
        guest
    }

    fn moved(mut self) -> Guest {
        self.machine.pause().unwrap();
        let (saved, memory) = (state(&self.machine), ram(&self.machine));
        // The old one's worker may still write: what it writes, the new one writes again.
        let disk = MemoryDisk::new(self.disk.bytes.lock().clone());
        drop(self.machine);
        let mut machine = Guest::machine(&self.caps, &self.config, &disk, &self.outputs);
        machine.write_pages(0, &memory).unwrap();
        machine.restore(&saved, Duration::from_millis(2)).unwrap();
        machine.promote_fixups().unwrap();
        machine.start().unwrap();
        Guest {
            machine,
            disk,
            ..self
        }
    }

    fn handle(&self) -> MachineHandle {
        self.machine.handle()
    }

    fn type_line(&self, line: &str) {
        let handle = self.handle();
        for byte in format!("{line}\n").bytes() {
            eventually("the console takes input", || {
                handle.console_in(&[byte]) == 1
            });
        }
    }

    /// Everything on the console so far.
    fn console(&self) -> String {
        String::from_utf8_lossy(&self.outputs.console.lock()).replace('\r', "")
    }

    /// The whole lines on the console that follow `mark`, once there is one.
    fn line_after(&self, mark: &str) -> String {
        let mut line = None;
        eventually(mark, || {
            let console = self.console();
            line = console
                .split_once(mark)
                .and_then(|(_, rest)| rest.split_once('\n'))
                .map(|(l, _)| l.to_owned());
            line.is_some()
        });
        line.unwrap()
    }

    /// Types a command; its answer. A mark echoed before tells it from everything earlier.
    fn ask(&self, command: &str) -> String {
        let mark = format!("mark-{}\n", self.marks.fetch_add(1, Ordering::Relaxed));
        self.type_line(&format!("echo {}", mark.trim()));
        eventually("an echo", || self.console().contains(&mark));
        self.type_line(command);
        self.line_after(&mark)
    }
}

/// Does WORK number `round`, with something done to the guest again and again until it is finished;
/// then the digests of memory and disk.
fn work(
    mut guest: Guest,
    round: u64,
    mut disturb: impl FnMut(Guest) -> Guest,
) -> (Guest, [String; 2]) {
    assert_eq!(guest.ask(&format!("work {round} {STEPS}")), "OK");
    while !guest.ask("workstatus").starts_with("done") {
        guest = disturb(guest);
    }
    let digests = [guest.ask("hash"), guest.ask("diskhash")];
    (guest, digests)
}

const STEPS: u64 = 20_000;

#[test]
fn two_hundred_moves_leave_hash_and_diskhash_as_if_undisturbed() {
    let caps = require_kvm!();
    let mut random = Random(1234);
    let mut moves = 0;
    let mut moved = Vec::new();
    let mut guest = Guest::boot(&caps, 2, BITMAP);
    while moves < 200 {
        let done;
        (guest, done) = work(guest, moved.len() as u64, |mut guest| {
            for _ in 0..5 {
                random.nap(4000);
                guest = guest.moved();
                moves += 1;
            }
            guest
        });
        moved.push(done);
    }
    let mut guest = Guest::boot(&caps, 2, BITMAP);
    for (round, moved) in moved.into_iter().enumerate() {
        let undisturbed;
        (guest, undisturbed) = work(guest, round as u64, |guest| guest);
        assert_eq!(moved, undisturbed, "round {round}");
    }
}

#[test]
fn console_lines_come_exactly_once_across_moves() {
    let caps = require_kvm!();
    let mut guest = Guest::boot(&caps, 1, RING);
    let began = guest.outputs.console.lock().len();
    guest.type_line("count 2000");
    let want: String = "OK\n".to_owned() + &(0..2000).map(|n| format!("{n}\n")).collect::<String>();
    let outputs = Arc::clone(&guest.outputs);
    let text = || String::from_utf8_lossy(&outputs.console.lock()[began..]).replace('\r', "");
    let mut random = Random(9);
    while !text().ends_with("1999\n") {
        random.nap(3000);
        guest = guest.moved();
    }
    let got = text();
    let differ = got.bytes().zip(want.bytes()).position(|(a, b)| a != b);
    assert!(
        got == want,
        "{} bytes, not {}; first difference at {differ:?}",
        got.len(),
        want.len()
    );
}

#[test]
fn poweroff_reboot_and_crash_reach_the_outside() {
    let caps = require_kvm!();
    let mut guest = Guest::boot(&caps, 2, BITMAP);
    guest.ask("reboot");
    eventually("reboot", || guest.machine.power() == Some(Power::Reset));
    guest.machine.reset().unwrap();
    guest.machine.resume().unwrap();
    eventually("ready again", || {
        guest.console().matches("probe-guest ready").count() == 2
    });
    guest.ask("crash");
    eventually("crash", || guest.machine.power() == Some(Power::Crash));
    guest.machine.reset().unwrap();
    guest.machine.resume().unwrap();
    eventually("ready again", || {
        guest.console().matches("probe-guest ready").count() == 3
    });
    guest.ask("poweroff");
    eventually("poweroff", || guest.machine.power() == Some(Power::Off));
    assert_eq!(
        *guest.outputs.power.lock(),
        [Power::Reset, Power::Crash, Power::Off]
    );
}

/// Whether the guest has seen a press by then or not: it follows it once, in the machine that it is in.
#[test]
fn a_pressed_power_button_is_followed_though_the_guest_is_moved_in_the_middle() {
    let caps = require_kvm!();
    let mut random = Random(11);
    let mut guest = Guest::boot(&caps, 2, BITMAP);
    assert_eq!(guest.machine.press_power_button(), Press::NobodyListens);
    for round in 0..20 {
        assert_eq!(guest.ask("button reboot"), "OK");
        assert_eq!(guest.machine.press_power_button(), Press::Pressed);
        random.nap(100);
        guest = guest.moved();
        eventually("reset", || guest.machine.power() == Some(Power::Reset));
        assert_eq!(guest.outputs.power.lock().len(), round + 1);
        guest.machine.reset().unwrap();
        assert_eq!(guest.machine.press_power_button(), Press::StandsStill);
        guest.machine.resume().unwrap();
        eventually("ready again", || {
            guest.console().matches("probe-guest ready").count() == round + 2
        });
        assert_eq!(guest.machine.press_power_button(), Press::NobodyListens);
    }
    assert_eq!(guest.ask("button ignore"), "OK");
    for _ in 0..3 {
        assert_eq!(guest.machine.press_power_button(), Press::Pressed);
        assert_eq!(guest.ask("ping"), "PONG");
    }
    assert_eq!(guest.ask("button poweroff"), "OK");
    assert_eq!(guest.machine.press_power_button(), Press::Pressed);
    eventually("off", || guest.machine.power() == Some(Power::Off));
}

/// Devices' writes are in the harvest too: disk reads into guest memory while epochs go on.
#[test]
fn epochs_with_disk_traffic_are_exact() {
    let caps = require_kvm!();
    for how in [BITMAP, DirtyTracking::Ring { entries: 4096 }] {
        let mut guest = Guest::boot(&caps, 2, how);
        guest.machine.track_dirty(true).unwrap();
        guest.ask("work 7 1000000000");
        guest.machine.pause().unwrap();
        let mut dirty = Vec::new();
        guest.machine.harvest(&mut dirty).unwrap();
        let mut shadow = ram(&guest.machine);
        guest.machine.resume().unwrap();
        let mut random = Random(5);
        for epoch in 0..150 {
            random.nap(3000);
            guest.machine.pause().unwrap();
            state(&guest.machine);
            guest.machine.harvest(&mut dirty).unwrap();
            for page in &dirty {
                let at = *page as usize * 4096;
                guest
                    .machine
                    .read_pages(*page, &mut shadow[at..at + 4096])
                    .unwrap();
            }
            let now = ram(&guest.machine);
            let missed: Vec<usize> = (0..now.len() / 4096)
                .filter(|p| now[p * 4096..][..4096] != shadow[p * 4096..][..4096])
                .collect();
            assert!(
                missed.is_empty(),
                "epoch {epoch}: pages missed: {missed:x?}"
            );
            guest.machine.resume().unwrap();
        }
        let stats = guest.handle().stats();
        assert!(stats.io_exits > 0, "{stats:?}");
    }
}

/// The devices are reachable by their owner, for wake-ups.
#[test]
fn the_handle_gives_the_devices() {
    let caps = require_kvm!();
    let guest = Guest::boot(&caps, 1, BITMAP);
    let handle = guest.handle();
    let devices: &DeviceSet = handle.devices();
    assert!(devices.rx_wakeup(0).is_some() && devices.rx_wakeup(1).is_none());
    assert_eq!(handle.rx_delivered(0), 0);
}
