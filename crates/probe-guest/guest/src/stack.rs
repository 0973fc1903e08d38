//! A network device with its TCP/IP stack, and the connections of its services.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

use crate::cmdline::Cidr;
use crate::cpu::rdtsc;
use crate::virtio::net::Net;

/// A device with its stack.
pub struct Stack {
    /// The device.
    pub device: Net,
    iface: Interface,
    /// All sockets on it.
    pub sockets: SocketSet<'static>,
}

fn instant(now: u64) -> Instant {
    Instant::from_micros((now / 1000) as i64)
}

impl Stack {
    /// Brings the device up.
    pub fn new(
        mut device: Net,
        cidr: Option<Cidr>,
        gateway: Option<core::net::Ipv4Addr>,
        now: u64,
    ) -> Self {
        let mut config = Config::new(EthernetAddress(device.mac).into());
        config.random_seed = rdtsc();
        let mut iface = Interface::new(config, &mut device, instant(now));
        if let Some(c) = cidr {
            iface.update_ip_addrs(|addrs| {
                // The list has room for one address at least.
                let _ = addrs.push(IpCidr::new(c.addr.into(), c.prefix));
            });
        }
        if let Some(gateway) = gateway {
            // Likewise for the first route.
            let _ = iface.routes_mut().add_default_ipv4_route(gateway);
        }
        Self {
            device,
            iface,
            sockets: SocketSet::new(vec![]),
        }
    }

    /// Adds a UDP socket bound to `port`.
    pub fn udp(&mut self, port: u16, packets: usize, bytes: usize) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; packets], vec![0; bytes]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        // Fails for port 0 and bound sockets only.
        let _ = socket.bind(port);
        self.sockets.add(socket)
    }

    /// Adds `count` TCP sockets listening on `port`: as many connections at a time.
    pub fn tcp(&mut self, port: u16, count: usize, rx: usize, tx: usize) -> Vec<Conn> {
        (0..count)
            .map(|_| {
                let buffer = |n| tcp::SocketBuffer::new(vec![0; n]);
                let mut socket = tcp::Socket::new(buffer(rx), buffer(tx));
                socket.set_nagle_enabled(false);
                // Answers are made between ingress and egress, so acknowledgements ride on
                // them without any delay.
                socket.set_ack_delay(None);
                Conn::new(self.sockets.add(socket), port)
            })
            .collect()
    }

    /// Takes in every frame that is there, up to a bound that lets other work have its turn.
    pub fn ingress(&mut self, now: u64) -> bool {
        let mut some = false;
        self.device.acknowledge();
        for _ in 0..128 {
            match self
                .iface
                .poll_ingress_single(instant(now), &mut self.device, &mut self.sockets)
            {
                PollIngressSingleResult::None => return some,
                _ => some = true,
            }
        }
        some
    }

    /// Sends what sockets have to send; one notification for all.
    pub fn egress(&mut self, now: u64) {
        while let smoltcp::iface::PollResult::SocketStateChanged =
            self.iface
                .poll_egress(instant(now), &mut self.device, &mut self.sockets)
        {}
        self.device.kick();
    }

    /// When the stack wants to be polled again (nanoseconds), if nothing comes before.
    pub fn deadline(&mut self, now: u64) -> Option<u64> {
        let delay = self.iface.poll_delay(instant(now), &self.sockets)?;
        Some(now + delay.total_micros() * 1000)
    }
}

/// One TCP connection of a service that answers requests in order.
pub struct Conn {
    handle: SocketHandle,
    port: u16,
    /// Told apart from earlier connections of the same socket.
    pub generation: u32,
    /// A request is being worked on elsewhere; its answer comes through [`Conn::answer`].
    pub waiting: bool,
    partial: Vec<u8>,
    unsent: Vec<u8>,
    closing: bool,
    live: bool,
}

/// What becomes of the input a service looked at.
pub struct Consumed {
    /// Bytes of requests dealt with.
    pub bytes: usize,
    /// Close once answers are out.
    pub close: bool,
    /// Stop reading until [`Conn::answer`].
    pub wait: bool,
}

/// Longest request whose end is not yet there.
const MAX_PARTIAL: usize = crate::resp::MAX_COMMAND + 4096;
/// Answers waiting to be sent stop the reading of further requests.
const MAX_UNSENT: usize = 64 * 1024;

impl Conn {
    fn new(handle: SocketHandle, port: u16) -> Self {
        Self {
            handle,
            port,
            generation: 0,
            waiting: false,
            partial: Vec::new(),
            unsent: Vec::new(),
            closing: false,
            live: false,
        }
    }

    /// Gives the answer a waiting connection waits for.
    pub fn answer(&mut self, bytes: &[u8]) {
        self.unsent.extend_from_slice(bytes);
        self.waiting = false;
    }

    /// Moves the connection on: sends, reads, lets `serve` deal with whole requests at the front
    /// of the input and append answers to `out` (empty, reused). True if anything happened.
    pub fn pump(
        &mut self,
        sockets: &mut SocketSet<'static>,
        out: &mut Vec<u8>,
        mut serve: impl FnMut(&[u8], &mut Vec<u8>) -> Consumed,
    ) -> bool {
        let socket = sockets.get_mut::<tcp::Socket>(self.handle);
        match socket.state() {
            tcp::State::Listen => return false,
            tcp::State::Closed => {
                self.reset();
                // Fails for port 0 and open sockets only.
                let _ = socket.listen(self.port);
                return true;
            }
            // Both ends have said all they had to: the socket is of more use listening.
            tcp::State::TimeWait => {
                socket.abort();
                return true;
            }
            _ => {}
        }
        self.live = true;
        let mut active = self.send(socket);
        while !self.waiting && !self.closing && self.unsent.len() < MAX_UNSENT {
            let step = if self.partial.is_empty() {
                if !socket.can_recv() {
                    break;
                }
                // The usual case: requests served where the stack has put them.
                let partial = &mut self.partial;
                socket
                    .recv(|data| {
                        let done = serve(data, out);
                        if done.bytes == 0 && !done.close && !done.wait {
                            if partial.try_reserve(data.len()).is_ok() {
                                partial.extend_from_slice(data);
                                return (data.len(), None);
                            }
                            return (
                                data.len(),
                                Some(Consumed {
                                    bytes: 0,
                                    close: true,
                                    wait: false,
                                }),
                            );
                        }
                        (done.bytes.min(data.len()), Some(done))
                    })
                    .ok()
                    .flatten()
            } else {
                let before = self.partial.len();
                let fits = before < MAX_PARTIAL;
                let partial = &mut self.partial;
                // Larger than any request: nobody serves it.
                let full = !fits
                    || socket
                        .recv(|data| match partial.try_reserve(data.len()) {
                            Ok(()) => {
                                partial.extend_from_slice(data);
                                (data.len(), false)
                            }
                            Err(_) => (data.len(), true),
                        })
                        .unwrap_or(false);
                if full {
                    Some(Consumed {
                        bytes: 0,
                        close: true,
                        wait: false,
                    })
                } else {
                    let done = serve(&self.partial, out);
                    let n = done.bytes.min(self.partial.len());
                    self.partial.drain(..n);
                    if n == 0 && !done.close && !done.wait && self.partial.len() == before {
                        break;
                    }
                    Some(done)
                }
            };
            active = true;
            if let Some(done) = step {
                self.waiting |= done.wait;
                self.closing |= done.close;
            }
            if !out.is_empty() {
                if self.unsent.is_empty() {
                    let sent = socket.send_slice(out).unwrap_or(out.len());
                    self.unsent.extend_from_slice(&out[sent..]);
                } else {
                    self.unsent.extend_from_slice(out);
                }
                out.clear();
            }
        }
        let over = self.closing || !socket.may_recv() && !socket.can_recv() && !self.waiting;
        if over && self.unsent.is_empty() && socket.may_send() {
            socket.close();
            active = true;
        }
        active
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        if self.unsent.is_empty() {
            return false;
        }
        match socket.send_slice(&self.unsent) {
            Ok(0) => false,
            Ok(n) => {
                self.unsent.drain(..n);
                true
            }
            Err(_) => {
                self.unsent.clear();
                true
            }
        }
    }

    fn reset(&mut self) {
        if self.live {
            self.generation = self.generation.wrapping_add(1);
            (self.waiting, self.closing, self.live) = (false, false, false);
            // Large buffers go back to the heap.
            self.partial = Vec::new();
            self.unsent = Vec::new();
        }
    }
}

/// Finds a whole line at the front of `input`: its text and the bytes it takes, end included.
/// `Err` when it is longer than any line may be.
pub fn line(input: &[u8], max: usize) -> Result<Option<(&[u8], usize)>, ()> {
    match input.iter().position(|b| *b == b'\n') {
        Some(end) if end > max => Err(()),
        Some(end) => {
            let text = &input[..end];
            Ok(Some((text.strip_suffix(b"\r").unwrap_or(text), end + 1)))
        }
        None if input.len() > max => Err(()),
        None => Ok(None),
    }
}
