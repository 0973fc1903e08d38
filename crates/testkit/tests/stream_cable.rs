//! Each fault of the user-space cable does what it says, in its direction only.

#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use testkit::cable::{Fault, StreamCable, Way};
use testkit::client::Origin;

/// A cable to an echo service, and a connection through it.
fn cable() -> (StreamCable, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..len]).is_err() {
                    break;
                }
            }
        }
    });
    let cable = StreamCable::start(&Origin::Here, "127.0.0.1:0".parse().unwrap(), target).unwrap();
    let stream = TcpStream::connect(cable.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    (cable, stream)
}

fn echo(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_whole_cable_passes_everything() {
    let (cable, mut stream) = cable();
    assert_eq!(echo(&mut stream, b"hello").unwrap(), b"hello");
    assert_eq!(cable.passed(Way::Forward), 5);
}

#[test]
fn held_bytes_wait_and_are_not_lost() {
    let (cable, mut stream) = cable();
    cable.set(Way::Back, Fault::Hold);
    stream.write_all(b"held").unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let mut answer = [0; 4];
    let kind = stream.read(&mut answer).unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut));
    assert_eq!(cable.passed(Way::Forward), 4, "only the way back is held");
    cable.set(Way::Back, Fault::None);
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"held");
}

#[test]
fn a_delay_delays() {
    let (cable, mut stream) = cable();
    let delay = Duration::from_millis(60);
    cable.set(Way::Forward, Fault::Delay(delay));
    let began = Instant::now();
    assert_eq!(echo(&mut stream, b"late").unwrap(), b"late");
    assert!(began.elapsed() >= delay);
}

#[test]
fn one_bit_is_flipped_where_asked() {
    let (cable, mut stream) = cable();
    cable.set(Way::Forward, Fault::CorruptAfter(7));
    assert_eq!(echo(&mut stream, b"0123").unwrap(), b"0123");
    assert_eq!(
        echo(&mut stream, b"4567").unwrap(),
        [b'4', b'5', b'6', b'7' ^ 0x10]
    );
    assert_eq!(echo(&mut stream, b"89").unwrap(), b"89");
}

#[test]
fn a_truncated_stream_ends_in_the_middle() {
    let (cable, mut stream) = cable();
    cable.set(Way::Back, Fault::TruncateAfter(6));
    assert_eq!(echo(&mut stream, b"0123").unwrap(), b"0123");
    stream.write_all(b"4567").unwrap();
    let mut rest = Vec::new();
    // Ended by FIN or RST.
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest, b"45");
}

#[test]
fn severing_ends_connections_and_lets_new_ones_in() {
    let (cable, mut stream) = cable();
    assert_eq!(echo(&mut stream, b"one").unwrap(), b"one");
    cable.sever();
    assert!(echo(&mut stream, b"two").is_err());
    let mut again = TcpStream::connect(cable.address()).unwrap();
    // The echo service serves one after the other: the first has ended.
    assert_eq!(echo(&mut again, b"three").unwrap(), b"three");
}
