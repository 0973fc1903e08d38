//! RESP, the protocol of Redis clients: reading requests, writing replies.

use alloc::vec::Vec;
use core::fmt::Write as _;
use core::ops::Range;

/// Most arguments of one command.
pub const MAX_ARGS: usize = 4096;
/// Most bytes of one argument.
pub const MAX_BULK: usize = 64 * 1024;
/// Most bytes of one whole command.
pub const MAX_COMMAND: usize = 256 * 1024;
const MAX_INLINE: usize = 8 * 1024;

/// What the bytes at the front of a connection's input are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// A command of this many bytes; its arguments (none for an empty line) are in `args`.
    Complete(usize),
    /// The beginning of a command.
    Incomplete,
    /// Not RESP, or beyond the limits: answer the text and close.
    Invalid(&'static str),
}

/// Reads one command (array of bulk strings, or inline) from the front of `input`; `args` gets
/// the places of its arguments.
pub fn parse(input: &[u8], args: &mut Vec<Range<usize>>) -> Parsed {
    args.clear();
    match input.first() {
        None => Parsed::Incomplete,
        Some(b'*') => parse_array(input, args),
        Some(_) => parse_inline(input, args),
    }
}

fn parse_inline(input: &[u8], args: &mut Vec<Range<usize>>) -> Parsed {
    let Some(end) = input.iter().take(MAX_INLINE).position(|b| *b == b'\n') else {
        return if input.len() >= MAX_INLINE {
            Parsed::Invalid("ERR Protocol error: too big inline request")
        } else {
            Parsed::Incomplete
        };
    };
    let mut start = None;
    for (i, b) in input[..=end].iter().enumerate() {
        match (start, b.is_ascii_whitespace()) {
            (None, false) => start = Some(i),
            (Some(s), true) => {
                args.push(s..i);
                start = None;
            }
            _ => {}
        }
    }
    Parsed::Complete(end + 1)
}

fn parse_array(input: &[u8], args: &mut Vec<Range<usize>>) -> Parsed {
    let mut at = 1;
    let count = match line_number(input, &mut at) {
        Ok(n) if n <= MAX_ARGS => n,
        Ok(_) | Err(Parsed::Invalid(_)) => {
            return Parsed::Invalid("ERR Protocol error: invalid multibulk length");
        }
        Err(other) => return other,
    };
    for _ in 0..count {
        match input.get(at) {
            None => return Parsed::Incomplete,
            Some(b'$') => at += 1,
            Some(_) => return Parsed::Invalid("ERR Protocol error: expected '$'"),
        }
        let len = match line_number(input, &mut at) {
            Ok(n) if n <= MAX_BULK => n,
            Ok(_) | Err(Parsed::Invalid(_)) => {
                return Parsed::Invalid("ERR Protocol error: invalid bulk length");
            }
            Err(other) => return other,
        };
        if at + len + 2 > MAX_COMMAND {
            return Parsed::Invalid("ERR Protocol error: command too big");
        }
        match input.get(at + len..at + len + 2) {
            None => return Parsed::Incomplete,
            Some(b"\r\n") => args.push(at..at + len),
            Some(_) => return Parsed::Invalid("ERR Protocol error: bulk without its end"),
        }
        at += len + 2;
    }
    Parsed::Complete(at)
}

/// Digits up to CR LF at `at`, which moves behind them.
fn line_number(input: &[u8], at: &mut usize) -> Result<usize, Parsed> {
    const MAX_DIGITS: usize = 10;
    let mut n = 0usize;
    for (i, b) in input[*at..].iter().enumerate() {
        match b {
            b'0'..=b'9' if i < MAX_DIGITS => n = n * 10 + usize::from(b - b'0'),
            b'\r' if i > 0 => {
                return match input.get(*at + i + 1) {
                    None => Err(Parsed::Incomplete),
                    Some(b'\n') => {
                        *at += i + 2;
                        Ok(n)
                    }
                    Some(_) => Err(Parsed::Invalid("")),
                };
            }
            _ => return Err(Parsed::Invalid("")),
        }
    }
    Err(Parsed::Incomplete)
}

/// Appends replies to an output buffer.
pub struct Reply<'a>(pub &'a mut Vec<u8>);

impl Reply<'_> {
    /// `+text`
    pub fn simple(&mut self, text: &str) {
        self.line(b'+', format_args!("{text}"));
    }

    /// `-text`, with the error's code as its first word.
    pub fn error(&mut self, text: &str) {
        self.line(b'-', format_args!("{text}"));
    }

    /// `:n`
    pub fn integer(&mut self, n: i64) {
        self.line(b':', format_args!("{n}"));
    }

    /// A bulk string.
    pub fn bulk(&mut self, bytes: &[u8]) {
        self.line(b'$', format_args!("{}", bytes.len()));
        self.0.extend_from_slice(bytes);
        self.0.extend_from_slice(b"\r\n");
    }

    /// The null bulk string.
    pub fn null(&mut self) {
        self.0.extend_from_slice(b"$-1\r\n");
    }

    /// The head of an array of `n` replies.
    pub fn array(&mut self, n: usize) {
        self.line(b'*', format_args!("{n}"));
    }

    fn line(&mut self, kind: u8, text: core::fmt::Arguments<'_>) {
        struct Sink<'b>(&'b mut Vec<u8>);
        impl core::fmt::Write for Sink<'_> {
            fn write_str(&mut self, s: &str) -> core::fmt::Result {
                // A line break inside would end the reply early.
                self.0
                    .extend(s.bytes().map(|b| if b < b' ' { b' ' } else { b }));
                Ok(())
            }
        }
        self.0.push(kind);
        // Writing to memory does not fail.
        let _ = Sink(self.0).write_fmt(text);
        self.0.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(input: &[u8]) -> (Parsed, Vec<Vec<u8>>) {
        let mut args = Vec::new();
        let parsed = parse(input, &mut args);
        (
            parsed,
            args.into_iter().map(|r| input[r].to_vec()).collect(),
        )
    }

    #[test]
    fn reads_arrays_and_inline() {
        let input = b"*2\r\n$4\r\nECHO\r\n$3\r\na\r\n\r\n*1\r\n";
        assert_eq!(
            words(input),
            (
                Parsed::Complete(23),
                vec![b"ECHO".to_vec(), b"a\r\n".to_vec()]
            )
        );
        assert_eq!(
            words(b"GET  key\r\nrest"),
            (Parsed::Complete(10), vec![b"GET".to_vec(), b"key".to_vec()])
        );
        assert_eq!(words(b"\r\n"), (Parsed::Complete(2), vec![]));
        assert_eq!(words(b"*0\r\n"), (Parsed::Complete(4), vec![]));
    }

    #[test]
    fn every_prefix_is_incomplete() {
        let input = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$10\r\n0123456789\r\n";
        for n in 0..input.len() {
            assert_eq!(words(&input[..n]).0, Parsed::Incomplete, "{n}");
        }
        assert_eq!(words(input).0, Parsed::Complete(input.len()));
    }

    #[test]
    fn refuses_what_is_out_of_bounds() {
        for bad in [
            &b"*99999\r\n"[..],
            b"*-1\r\n",
            b"*1\r\n$99999999\r\n",
            b"*1\r\n$99999999999999999999\r\n",
            b"*1\r\n:4\r\n",
            b"*1\r\n$1\r\nxyz",
            b"*\r\n",
            b"*1\rx",
        ] {
            assert!(
                matches!(words(bad).0, Parsed::Invalid(_)),
                "{}",
                bad.escape_ascii()
            );
        }
        assert!(matches!(words(&[b'x'; 9000]).0, Parsed::Invalid(_)));
    }

    #[test]
    fn writes_replies() {
        let mut out = Vec::new();
        let mut r = Reply(&mut out);
        r.simple("OK");
        r.error("ERR a\r\nb");
        r.integer(-3);
        r.array(2);
        r.bulk(b"x\r\n");
        r.null();
        assert_eq!(
            out,
            b"+OK\r\n-ERR a  b\r\n:-3\r\n*2\r\n$3\r\nx\r\n\r\n$-1\r\n"
        );
    }
}
