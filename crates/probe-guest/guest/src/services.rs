//! The services of the first network device, apart from ledger and control.

use alloc::vec::Vec;
use core::ops::Range;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::udp;

use crate::cpu::rdtsc;
use crate::keyspace::{After, Keyspace};
use crate::port;
use crate::resp::{self, Parsed, Reply};
use crate::stack::{Conn, Consumed, Stack, line};

/// Connections at a time, per service.
const RESP_CONNS: usize = 64;
const ECHO_CONNS: usize = 8;
const HTTP_CONNS: usize = 16;
/// See [`RESP_CONNS`].
pub const LEDGER_CONNS: usize = 32;
/// See [`RESP_CONNS`].
pub const CONTROL_CONNS: usize = 8;
const KIB: usize = 1024;
/// Answers beyond this wait until the client has read some.
const MAX_OUT: usize = 32 * KIB;

/// RESP, HTTP, echo, nonce.
pub struct Services {
    resp: Vec<Conn>,
    http: Vec<Conn>,
    echo: Vec<Conn>,
    udp_echo: SocketHandle,
    nonce: SocketHandle,
    /// Replies of the nonce oracle so far. It lives in guest memory and nowhere else, so two
    /// nonces under one count show that output of an uncommitted epoch has escaped.
    count: u64,
    keys: Keyspace,
    args: Vec<Range<usize>>,
    out: Vec<u8>,
}

impl Services {
    /// Opens the services' sockets; the keyspace may keep `limit` bytes.
    pub fn new(stack: &mut Stack, limit: usize) -> Self {
        Self {
            udp_echo: stack.udp(port::ECHO, 32, 32 * KIB),
            nonce: stack.udp(port::NONCE, 32, 2 * KIB),
            resp: stack.tcp(port::RESP, RESP_CONNS, 8 * KIB, 8 * KIB),
            http: stack.tcp(port::HTTP, HTTP_CONNS, 2 * KIB, 2 * KIB),
            echo: stack.tcp(port::ECHO, ECHO_CONNS, 8 * KIB, 8 * KIB),
            count: 0,
            keys: Keyspace::new(limit),
            args: Vec::with_capacity(64),
            out: Vec::with_capacity(MAX_OUT),
        }
    }

    /// Serves what has come in; true if anything happened.
    pub fn poll(&mut self, sockets: &mut SocketSet<'static>) -> bool {
        let mut active = udp_echo(sockets, self.udp_echo);
        active |= self.nonce(sockets);
        let Self {
            resp,
            http,
            echo,
            keys,
            args,
            out,
            ..
        } = self;
        for conn in resp {
            active |= conn.pump(sockets, out, |input, out| {
                serve_resp(keys, args, input, out)
            });
        }
        for conn in http {
            active |= conn.pump(sockets, out, serve_http);
        }
        for conn in echo {
            active |= conn.pump(sockets, out, |input, out| {
                out.extend_from_slice(input);
                Consumed {
                    bytes: input.len(),
                    close: false,
                    wait: false,
                }
            });
        }
        active
    }

    fn nonce(&mut self, sockets: &mut SocketSet<'static>) -> bool {
        let socket = sockets.get_mut::<udp::Socket>(self.nonce);
        let mut active = false;
        while socket.can_send() {
            let Ok((_, from)) = socket.recv() else { break };
            let mut reply = [0; 16];
            reply[..8].copy_from_slice(&self.count.to_le_bytes());
            reply[8..].copy_from_slice(&rdtsc().to_le_bytes());
            // An address that cannot be answered loses its answer, no more.
            if socket.send_slice(&reply, from.endpoint).is_ok() {
                self.count += 1;
            }
            active = true;
        }
        active
    }
}

/// Echoes UDP datagrams on `handle`.
pub fn udp_echo(sockets: &mut SocketSet<'static>, handle: SocketHandle) -> bool {
    let socket = sockets.get_mut::<udp::Socket>(handle);
    let mut active = false;
    let mut copy = [0; 1536];
    while socket.can_send() {
        let Ok((data, from)) = socket.recv() else {
            break;
        };
        if let Some(copy) = copy.get_mut(..data.len()) {
            copy.copy_from_slice(data);
            // As above.
            let _ = socket.send_slice(copy, from.endpoint);
        }
        active = true;
    }
    active
}

fn serve_resp(
    keys: &mut Keyspace,
    args: &mut Vec<Range<usize>>,
    input: &[u8],
    out: &mut Vec<u8>,
) -> Consumed {
    let mut at = 0;
    while out.len() < MAX_OUT {
        let rest = &input[at..];
        let used = match resp::parse(rest, args) {
            Parsed::Complete(n) => n,
            Parsed::Incomplete => break,
            Parsed::Invalid(text) => {
                Reply(out).error(text);
                return Consumed {
                    bytes: input.len(),
                    close: true,
                    wait: false,
                };
            }
        };
        let mut few: [&[u8]; 8] = [&[]; 8];
        let after = if let Some(few) = few.get_mut(..args.len()) {
            for (word, range) in few.iter_mut().zip(args.iter()) {
                *word = &rest[range.clone()];
            }
            keys.execute(few, out)
        } else {
            let many: Vec<&[u8]> = args.iter().map(|r| &rest[r.clone()]).collect();
            keys.execute(&many, out)
        };
        at += used;
        if after == After::Close {
            return Consumed {
                bytes: input.len(),
                close: true,
                wait: false,
            };
        }
    }
    Consumed {
        bytes: at,
        close: false,
        wait: false,
    }
}

fn serve_http(input: &[u8], out: &mut Vec<u8>) -> Consumed {
    const MAX_HEAD: usize = 8 * KIB;
    let Some(end) = input.windows(4).position(|w| w == b"\r\n\r\n") else {
        let close = input.len() > MAX_HEAD;
        if close {
            out.extend_from_slice(b"HTTP/1.1 431 Too Large\r\nContent-Length: 0\r\n\r\n");
        }
        return Consumed {
            bytes: if close { input.len() } else { 0 },
            close,
            wait: false,
        };
    };
    let head = &input[..end];
    let request = line(input, MAX_HEAD)
        .ok()
        .flatten()
        .map_or(&b""[..], |(text, _)| text);
    let mut words = request.split(|b| *b == b' ');
    let (method, path) = (words.next().unwrap_or(b""), words.next().unwrap_or(b""));
    let keep = request.ends_with(b"HTTP/1.1")
        && !head
            .split(|b| *b == b'\n')
            .any(|h| h.trim_ascii().eq_ignore_ascii_case(b"connection: close"));
    let answer: &[u8] = match (method, path) {
        (b"GET", b"/") => {
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nprobe-guest\n"
        }
        (b"HEAD", b"/") => {
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\n"
        }
        (b"GET" | b"HEAD", _) => b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        _ => b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n",
    };
    out.extend_from_slice(answer);
    // A body would be taken for the next request.
    let close = !keep || !matches!(method, b"GET" | b"HEAD");
    Consumed {
        bytes: end + 4,
        close,
        wait: false,
    }
}
