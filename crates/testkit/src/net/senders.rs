//! Who sends for the guest, and whether two ever do at once (rule 24).
//!
//! What comes out of a tap is what the VM's process on that host has written: the guest's frames and
//! announcements. The kernel says when, so a capture that comes late says nothing wrong. A process that takes
//! over announces the guest first (rule 14): from that frame on the other one has to be silent.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, cmsg_space, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;

use super::capture::{instruction, packet_socket};
use super::{Host, Lab};
use crate::{Error, Result, panic_text};

const RARP: u16 = 0x8035;
/// The type's place in a frame, and its end: no more of it is looked at.
const HEADER: usize = 14;
/// Most frames kept of one host.
const MOST: usize = 1_000_000;
/// For a capture that does not get the processor for a while, bytes.
const BUFFER: usize = 8 << 20;
/// After such a silence of the one that sent, a guest that sends on the other host without announcing itself
/// has been booted there.
const BOOT: Duration = Duration::from_millis(300);

/// A frame on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sent {
    /// When, since 1970.
    pub at: Duration,
    /// From the first host (a), or from the second.
    pub first: bool,
    /// Tells the network where the guest is now.
    pub announces: bool,
}

/// Frames of the one that no longer was to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Late {
    /// From the first host, or from the second.
    pub first: bool,
    /// How many.
    pub frames: usize,
    /// How long after the other's first frame the last of them came.
    pub by: Duration,
}

/// Frames sent by one host after the other had begun to, by turns of who sends. `sent` is in order of time.
///
/// Rule 24 leaves one way to send too late: to be stopped between the check of a frame's permission and its
/// write. That is one frame in a turn.
pub fn late(sent: &[Sent]) -> Vec<Late> {
    let mut found: Vec<Late> = Vec::new();
    let Some(begin) = sent.first() else {
        return found;
    };
    let (mut holder, mut began, mut last) = (begin.first, begin.at, begin.at);
    let mut told = false;
    for frame in sent {
        if frame.first == holder {
            last = frame.at;
        } else if frame.announces || frame.at.saturating_sub(last) > BOOT {
            (holder, began, last, told) = (frame.first, frame.at, frame.at, false);
        } else {
            if !told {
                told = true;
                found.push(Late {
                    first: frame.first,
                    frames: 0,
                    by: Duration::ZERO,
                });
            }
            if let Some(late) = found.last_mut() {
                late.frames += 1;
                late.by = frame.at.saturating_sub(began);
            }
        }
    }
    found
}

/// A running watch of both hosts' taps.
#[derive(Debug)]
pub struct Senders {
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Sent>>>,
}

/// Passes what comes out of the interface, not what goes into it.
fn outgoing() -> Vec<libc::sock_filter> {
    let kind = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    vec![
        instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, kind),
        instruction(equal, 1, u32::from(libc::PACKET_OUTGOING)),
        instruction(answer, 0, HEADER as u32),
        instruction(answer, 0, 0),
    ]
}

fn socket(host: &Host, tap: &str) -> Result<OwnedFd> {
    let what = format!("watch {tap} of host {}", host.name());
    let open = || {
        let socket = packet_socket(tap, outgoing())?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
        Ok(socket)
    };
    host.run(open)?.map_err(Error::os(what))
}

/// The next frame: its type, and when it came; none when none is there yet.
fn next(socket: &OwnedFd) -> std::result::Result<(u16, TimeSpec), Errno> {
    let mut header = [0; HEADER];
    let mut extra = vec![0; cmsg_space::<TimeSpec>()];
    let mut into = [IoSliceMut::new(&mut header)];
    let got = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut into,
        Some(&mut extra),
        MsgFlags::empty(),
    )?;
    let at = got.cmsgs()?.find_map(|extra| match extra {
        ControlMessageOwned::ScmTimestampns(at) => Some(at),
        _ => None,
    });
    let at = at.ok_or(Errno::ENOMSG)?;
    Ok((u16::from_be_bytes([header[12], header[13]]), at))
}

impl Senders {
    /// Watches this tap of both hosts of a lab from the return on.
    ///
    /// # Errors
    /// No such tap, or the kernel refuses.
    pub fn start(lab: &Lab, tap: &str) -> Result<Senders> {
        let ending = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (host, first) in [(&lab.a, true), (&lab.b, false)] {
            let socket = socket(host, tap)?;
            let over = Arc::clone(&ending);
            let watch = move || {
                let mut sent = Vec::new();
                loop {
                    // Looked at before reading, so that what came before the end is taken.
                    let last = over.load(Ordering::Acquire);
                    match next(&socket) {
                        Ok((ethertype, at)) if sent.len() < MOST => sent.push(Sent {
                            at: Duration::from(at),
                            first,
                            announces: ethertype == RARP,
                        }),
                        Err(Errno::EAGAIN) if last => return sent,
                        Ok(_) | Err(_) => {}
                    }
                }
            };
            let thread = std::thread::Builder::new().name("senders".into());
            threads.push(thread.spawn(watch).map_err(Error::os("watch a tap"))?);
        }
        Ok(Senders { ending, threads })
    }

    /// Ends the watch, and gives what was sent, in order of time.
    ///
    /// # Errors
    /// A watching thread panicked.
    pub fn stop(self) -> Result<Vec<Sent>> {
        self.ending.store(true, Ordering::Release);
        let mut all = Vec::new();
        for thread in self.threads {
            let sent = thread.join();
            all.extend(sent.map_err(|p| Error::Panicked(panic_text(&*p)))?);
        }
        all.sort();
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(at_ms: u64, first: bool) -> Sent {
        Sent {
            at: Duration::from_millis(at_ms),
            first,
            announces: false,
        }
    }

    fn announced(at_ms: u64, first: bool) -> Sent {
        Sent {
            announces: true,
            ..sent(at_ms, first)
        }
    }

    #[test]
    fn one_after_the_other_is_as_it_should_be() {
        let there = [
            sent(0, true),
            sent(5, true),
            announced(20, false),
            sent(21, false),
        ];
        let and_back = [announced(40, true), sent(41, true)];
        assert_eq!(late(&[&there[..], &and_back].concat()), []);
        assert_eq!(
            late(&[sent(0, true), sent(1000, false), sent(1001, false)]),
            []
        );
        assert_eq!(late(&[]), []);
    }

    #[test]
    fn who_sends_after_the_other_has_begun_is_found() {
        let overlapping = [
            sent(0, true),
            announced(20, false),
            sent(21, true),
            sent(22, false),
            sent(30, true),
        ];
        let expected = Late {
            first: true,
            frames: 2,
            by: Duration::from_millis(10),
        };
        assert_eq!(late(&overlapping), [expected]);
        // Also one that goes on announcing itself.
        let both = [
            announced(0, true),
            announced(20, false),
            announced(21, true),
            sent(22, false),
        ];
        assert_eq!(late(&both).len(), 1);
    }
}
