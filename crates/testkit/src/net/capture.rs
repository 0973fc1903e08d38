//! Frames as one interface of a test host sees them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::NetNs;
use crate::{Error, Result, panic_text};

/// Most frames kept; a test that needs more filters better.
const MOST: usize = 100_000;

/// How often the end is looked for, while no frame comes.
pub(super) const TICK: libc::timeval = libc::timeval {
    tv_sec: 0,
    tv_usec: 20_000,
};

/// How long frames that came before the end are taken, while others come.
const DRAIN: Duration = Duration::from_millis(500);

/// A frame and when it came.
pub type Captured = (Instant, Vec<u8>);

/// A running capture of one interface.
#[derive(Debug)]
pub struct Capture {
    ending: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Captured>>,
}

/// One step of a program for the kernel; a comparison that holds leaves out `jt` steps.
pub(super) fn instruction(code: u32, jt: usize, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: jt as u8,
        jf: 0,
        k,
    }
}

/// A program for the kernel that passes frames of these types only: what a busy host does not look
/// at in time would push them out of the socket.
fn filter(ethertypes: &[u16]) -> Vec<libc::sock_filter> {
    let mut program = vec![instruction(
        libc::BPF_LD | libc::BPF_H | libc::BPF_ABS,
        0,
        12,
    )];
    for (n, ethertype) in ethertypes.iter().enumerate() {
        // Over the rest of the comparisons and the refusal.
        let onward = ethertypes.len() - n;
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(instruction(equal, onward, u32::from(*ethertype)));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0));
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, u32::MAX));
    program
}

fn set_option<T>(socket: &OwnedFd, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: `value` is a valid value of the size given, and outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A packet socket (packet(7)) for those frames of the calling thread's `interface` that a program for the
/// kernel passes.
pub(super) fn packet_socket(
    interface: &str,
    mut program: Vec<libc::sock_filter>,
) -> io::Result<OwnedFd> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    // Of no protocol yet: nothing comes in before the filter is there.
    // SAFETY: takes no pointers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor has just been made and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let attached = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    set_option(&socket, libc::SO_ATTACH_FILTER, &attached)?;
    set_option(&socket, libc::SO_RCVTIMEO, &TICK)?;
    // SAFETY: `sockaddr_ll` is plain data for which all-zero is a valid value.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    at.sll_ifindex = index as i32;
    let size = size_of_val(&at) as libc::socklen_t;
    // SAFETY: `at` is a valid address of `size` bytes that outlives the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), size) };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

impl Capture {
    /// Captures the frames of `interface` in `net` that are of one of these types and `wanted` says true
    /// to, from the return on.
    ///
    /// # Errors
    /// No such interface, or the kernel refuses.
    pub fn start(
        net: &NetNs,
        interface: &str,
        ethertypes: &[u16],
        wanted: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> Result<Capture> {
        let what = format!("capture frames of {interface} of {}", net.name());
        let socket = net
            .run(|| packet_socket(interface, filter(ethertypes)))?
            .map_err(Error::os(what.clone()))?;
        let ending = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ending);
        let capture = move || {
            let mut found = Vec::new();
            let mut buffer = vec![0; 1 << 16];
            let mut ended: Option<Instant> = None;
            loop {
                // Looked at before reading, so that what came before the end is taken.
                let last = over.load(Ordering::Acquire);
                // Frames that never cease must not keep it.
                if last && ended.get_or_insert_with(Instant::now).elapsed() > DRAIN {
                    return found;
                }
                // SAFETY: the buffer is writable for its length.
                let n = unsafe {
                    libc::recv(
                        socket.as_raw_fd(),
                        buffer.as_mut_ptr().cast(),
                        buffer.len(),
                        0,
                    )
                };
                match usize::try_from(n).ok().and_then(|n| buffer.get(..n)) {
                    Some(frame) if wanted(frame) && found.len() < MOST => {
                        found.push((Instant::now(), frame.to_vec()));
                    }
                    Some(_) => {}
                    None if last => return found,
                    None => {}
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(capture)
            .map_err(Error::os(what))?;
        Ok(Capture { ending, thread })
    }

    /// Ends the capture, and gives what came, in order.
    ///
    /// # Errors
    /// `wanted` panicked.
    pub fn stop(self) -> Result<Vec<Captured>> {
        self.ending.store(true, Ordering::Release);
        let found = self.thread.join();
        found.map_err(|p| Error::Panicked(panic_text(&*p)))
    }
}
