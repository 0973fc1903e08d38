//! The data behind the RESP service, and its commands.
//!
//! Memory is bounded: what a client can make the guest keep is counted before it is
//! kept, and refused as Redis refuses it (`-OOM`).

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;

use crate::resp::Reply;

/// Counted per key or list element besides its bytes: allocator and tree overhead.
const OVERHEAD: usize = 64;
/// Most bytes of one string value; `APPEND` could grow it without end otherwise.
const MAX_VALUE: usize = 512 * 1024;
/// Most bytes of one reply.
const MAX_REPLY: usize = 1024 * 1024;

const OOM: &str = "OOM command not allowed when used memory > 'maxmemory'.";
const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";
const NOT_INTEGER: &str = "ERR value is not an integer or out of range";
const OVERFLOW: &str = "ERR increment or decrement would overflow";

enum Value {
    Text(Vec<u8>),
    List(VecDeque<Box<[u8]>>),
}

/// What the connection does after the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Goes on.
    Continue,
    /// Closes.
    Close,
}

/// All keys.
pub struct Keyspace {
    map: BTreeMap<Box<[u8]>, Value>,
    used: usize,
    limit: usize,
    commands: u64,
}

impl Keyspace {
    /// An empty keyspace that keeps at most `limit` bytes, overhead included.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self {
            map: BTreeMap::new(),
            used: 0,
            limit,
            commands: 0,
        }
    }

    /// Runs one command and appends its reply to `out`.
    pub fn execute(&mut self, args: &[&[u8]], out: &mut Vec<u8>) -> After {
        let mut reply = Reply(out);
        let Some((name, rest)) = args.split_first() else {
            return After::Continue;
        };
        self.commands += 1;
        let mut upper = [0u8; 16];
        let Some(upper) = upper.get_mut(..name.len()) else {
            reply.error("ERR unknown command");
            return After::Continue;
        };
        upper.copy_from_slice(name);
        upper.make_ascii_uppercase();
        match (&*upper, rest) {
            (b"PING", []) => reply.simple("PONG"),
            (b"PING" | b"ECHO", [text]) => reply.bulk(text),
            (b"SET", [key, value]) => self.set(&[(key, value)], &mut reply),
            (b"SET", [_, _, ..]) => reply.error("ERR syntax error"),
            (b"MSET", pairs) if !pairs.is_empty() && pairs.len().is_multiple_of(2) => {
                let pairs: Vec<_> = pairs
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|[k, v]| (*k, *v))
                    .collect();
                self.set(&pairs, &mut reply);
            }
            (b"GET", [key]) => match self.map.get(*key) {
                None => reply.null(),
                Some(Value::Text(text)) => reply.bulk(text),
                Some(Value::List(_)) => reply.error(WRONG_TYPE),
            },
            (b"MGET", keys) if !keys.is_empty() => self.mget(keys, &mut reply),
            (b"STRLEN", [key]) => match self.map.get(*key) {
                None => reply.integer(0),
                Some(Value::Text(text)) => reply.integer(text.len() as i64),
                Some(Value::List(_)) => reply.error(WRONG_TYPE),
            },
            (b"APPEND", [key, tail]) => self.append(key, tail, &mut reply),
            (b"INCR", [key]) => self.add(key, Some(1), &mut reply),
            (b"DECR", [key]) => self.add(key, Some(-1), &mut reply),
            (b"INCRBY", [key, by]) => self.add(key, integer(by), &mut reply),
            (b"DECRBY", [key, by]) => {
                self.add(key, integer(by).and_then(i64::checked_neg), &mut reply);
            }
            (b"DEL" | b"UNLINK", keys) if !keys.is_empty() => {
                let n = keys.iter().filter(|k| self.remove(k)).count();
                reply.integer(n as i64);
            }
            (b"EXISTS", keys) if !keys.is_empty() => {
                let n = keys.iter().filter(|k| self.map.contains_key(**k)).count();
                reply.integer(n as i64);
            }
            (b"TYPE", [key]) => reply.simple(match self.map.get(*key) {
                None => "none",
                Some(Value::Text(_)) => "string",
                Some(Value::List(_)) => "list",
            }),
            (b"LPUSH", [key, items @ ..]) if !items.is_empty() => {
                self.push(key, items, true, &mut reply);
            }
            (b"RPUSH", [key, items @ ..]) if !items.is_empty() => {
                self.push(key, items, false, &mut reply);
            }
            (b"LPOP", [key]) => self.pop(key, true, &mut reply),
            (b"RPOP", [key]) => self.pop(key, false, &mut reply),
            (b"LLEN", [key]) => match self.map.get(*key) {
                None => reply.integer(0),
                Some(Value::List(list)) => reply.integer(list.len() as i64),
                Some(Value::Text(_)) => reply.error(WRONG_TYPE),
            },
            (b"LRANGE", [key, first, last]) => match (integer(first), integer(last)) {
                (Some(first), Some(last)) => self.range(key, first, last, &mut reply),
                _ => reply.error(NOT_INTEGER),
            },
            (b"DBSIZE", []) => reply.integer(self.map.len() as i64),
            (b"FLUSHALL" | b"FLUSHDB", _) => {
                self.map.clear();
                self.used = 0;
                reply.simple("OK");
            }
            (b"SELECT", [b"0"]) | (b"CLIENT", [_, ..]) => reply.simple("OK"),
            (b"SELECT", [_]) => reply.error("ERR DB index is out of range"),
            (b"COMMAND", _) => reply.array(0),
            (b"CONFIG", [sub, names @ ..]) if sub.eq_ignore_ascii_case(b"get") => {
                self.config(names, &mut reply);
            }
            (b"CONFIG", [sub]) if sub.eq_ignore_ascii_case(b"resetstat") => reply.simple("OK"),
            (b"INFO", _) => reply.bulk(
                format!(
                    "# Server\r\nredis_version:7.0.0\r\nserver_name:probe-guest\r\n\
                     # Memory\r\nused_memory:{}\r\nmaxmemory:{}\r\n\
                     # Stats\r\ntotal_commands_processed:{}\r\n\
                     # Keyspace\r\ndb0:keys={},expires=0,avg_ttl=0\r\n",
                    self.used,
                    self.limit,
                    self.commands,
                    self.map.len()
                )
                .as_bytes(),
            ),
            (b"QUIT", _) => {
                reply.simple("OK");
                return After::Close;
            }
            (name, _) => {
                let name = core::str::from_utf8(name).unwrap_or("?");
                if KNOWN.contains(&name) {
                    let name = name.to_ascii_lowercase();
                    reply.error(&format!(
                        "ERR wrong number of arguments for '{name}' command"
                    ));
                } else {
                    reply.error(&format!("ERR unknown command '{name}'"));
                }
            }
        }
        After::Continue
    }

    fn fits(&self, more: usize) -> bool {
        self.used.saturating_add(more) <= self.limit
    }

    fn set(&mut self, pairs: &[(&[u8], &[u8])], reply: &mut Reply<'_>) {
        let cost: usize = pairs
            .iter()
            .map(|(k, v)| k.len() + v.len() + OVERHEAD)
            .sum();
        if !self.fits(cost) {
            return reply.error(OOM);
        }
        for (key, value) in pairs {
            match self.map.get_mut(*key) {
                // In place: no churn of guest pages.
                Some(Value::Text(text)) => {
                    self.used = self.used - text.len() + value.len();
                    text.clear();
                    text.extend_from_slice(value);
                }
                _ => {
                    self.remove(key);
                    self.used += key.len() + value.len() + OVERHEAD;
                    self.map.insert((*key).into(), Value::Text(value.to_vec()));
                }
            }
        }
        reply.simple("OK");
    }

    fn mget(&self, keys: &[&[u8]], reply: &mut Reply<'_>) {
        let values = || {
            keys.iter().map(|k| match self.map.get(*k) {
                Some(Value::Text(text)) => Some(&text[..]),
                _ => None,
            })
        };
        let size: usize = values().map(|v| v.map_or(0, <[u8]>::len) + 16).sum();
        if size > MAX_REPLY || reply.0.try_reserve(size).is_err() {
            return reply.error("ERR reply too big");
        }
        reply.array(keys.len());
        for value in values() {
            match value {
                Some(text) => reply.bulk(text),
                None => reply.null(),
            }
        }
    }

    fn append(&mut self, key: &[u8], tail: &[u8], reply: &mut Reply<'_>) {
        if !self.fits(key.len() + tail.len() + OVERHEAD) {
            return reply.error(OOM);
        }
        match self.map.get_mut(key) {
            Some(Value::List(_)) => reply.error(WRONG_TYPE),
            Some(Value::Text(text)) if text.len() + tail.len() > MAX_VALUE => {
                reply.error("ERR string exceeds maximum allowed size");
            }
            Some(Value::Text(text)) => {
                if text.try_reserve(tail.len()).is_err() {
                    return reply.error(OOM);
                }
                text.extend_from_slice(tail);
                self.used += tail.len();
                reply.integer(text.len() as i64);
            }
            None => {
                self.used += key.len() + tail.len() + OVERHEAD;
                self.map.insert(key.into(), Value::Text(tail.to_vec()));
                reply.integer(tail.len() as i64);
            }
        }
    }

    fn add(&mut self, key: &[u8], by: Option<i64>, reply: &mut Reply<'_>) {
        let Some(by) = by else {
            return reply.error(NOT_INTEGER);
        };
        let now = match self.map.get(key) {
            None => Some(0),
            Some(Value::Text(text)) => integer(text),
            Some(Value::List(_)) => return reply.error(WRONG_TYPE),
        };
        let Some(now) = now else {
            return reply.error(NOT_INTEGER);
        };
        let Some(sum) = now.checked_add(by) else {
            return reply.error(OVERFLOW);
        };
        let mut digits = Decimal::default();
        let digits = digits.write(sum);
        if let Some(Value::Text(text)) = self.map.get_mut(key) {
            self.used = self.used - text.len() + digits.len();
            text.clear();
            text.extend_from_slice(digits);
        } else {
            if !self.fits(key.len() + digits.len() + OVERHEAD) {
                return reply.error(OOM);
            }
            self.used += key.len() + digits.len() + OVERHEAD;
            self.map.insert(key.into(), Value::Text(digits.to_vec()));
        }
        reply.integer(sum);
    }

    fn push(&mut self, key: &[u8], items: &[&[u8]], front: bool, reply: &mut Reply<'_>) {
        let cost: usize = items.iter().map(|i| i.len() + OVERHEAD).sum();
        if !self.fits(cost + key.len() + OVERHEAD) {
            return reply.error(OOM);
        }
        if !self.map.contains_key(key) {
            self.used += key.len() + OVERHEAD;
            self.map.insert(key.into(), Value::List(VecDeque::new()));
        }
        match self.map.get_mut(key) {
            Some(Value::List(list)) => {
                if list.try_reserve(items.len()).is_err() {
                    return reply.error(OOM);
                }
                for item in items {
                    if front {
                        list.push_front((*item).into());
                    } else {
                        list.push_back((*item).into());
                    }
                }
                self.used += cost;
                reply.integer(list.len() as i64);
            }
            _ => reply.error(WRONG_TYPE),
        }
    }

    fn pop(&mut self, key: &[u8], front: bool, reply: &mut Reply<'_>) {
        let (item, empty) = match self.map.get_mut(key) {
            None => return reply.null(),
            Some(Value::Text(_)) => return reply.error(WRONG_TYPE),
            Some(Value::List(list)) => {
                let item = if front {
                    list.pop_front()
                } else {
                    list.pop_back()
                };
                (item, list.is_empty())
            }
        };
        match item {
            None => reply.null(),
            Some(item) => {
                self.used -= item.len() + OVERHEAD;
                reply.bulk(&item);
            }
        }
        if empty {
            self.remove(key);
        }
    }

    fn range(&self, key: &[u8], first: i64, last: i64, reply: &mut Reply<'_>) {
        let list = match self.map.get(key) {
            None => return reply.array(0),
            Some(Value::Text(_)) => return reply.error(WRONG_TYPE),
            Some(Value::List(list)) => list,
        };
        let len = list.len() as i64;
        let place = |i: i64| if i < 0 { i.saturating_add(len) } else { i };
        let (first, last) = (place(first).max(0), place(last).min(len - 1));
        if first > last {
            return reply.array(0);
        }
        let items = || list.range(first as usize..=last as usize);
        let size: usize = items().map(|i| i.len() + 16).sum();
        if size > MAX_REPLY || reply.0.try_reserve(size).is_err() {
            return reply.error("ERR reply too big");
        }
        reply.array(items().count());
        for item in items() {
            reply.bulk(item);
        }
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let Some(value) = self.map.remove(key) else {
            return false;
        };
        let inside = match value {
            Value::Text(text) => text.len(),
            Value::List(list) => list.iter().map(|i| i.len() + OVERHEAD).sum(),
        };
        self.used -= key.len() + inside + OVERHEAD;
        true
    }

    fn config(&self, names: &[&[u8]], reply: &mut Reply<'_>) {
        let mut limit = Decimal::default();
        let limit = limit.write(self.limit as i64);
        let known: [(&[u8], &[u8]); 3] = [
            (b"save", b""),
            (b"appendonly", b"no"),
            (b"maxmemory", limit),
        ];
        let asked = || known.iter().filter(|(k, _)| names.iter().any(|n| n == k));
        reply.array(asked().count() * 2);
        for (key, value) in asked() {
            reply.bulk(key);
            reply.bulk(value);
        }
    }
}

const KNOWN: [&str; 30] = [
    "PING", "ECHO", "SET", "MSET", "GET", "MGET", "STRLEN", "APPEND", "INCR", "DECR", "INCRBY",
    "DECRBY", "DEL", "UNLINK", "EXISTS", "TYPE", "LPUSH", "RPUSH", "LPOP", "RPOP", "LLEN",
    "LRANGE", "DBSIZE", "FLUSHALL", "FLUSHDB", "SELECT", "CLIENT", "CONFIG", "INFO", "QUIT",
];

/// A decimal as Redis takes it: no sign but `-`, no leading zeros, no blanks.
fn integer(text: &[u8]) -> Option<i64> {
    let n: i64 = core::str::from_utf8(text).ok()?.parse().ok()?;
    (Decimal::default().write(n) == text).then_some(n)
}

/// Room for one decimal number, without an allocation.
#[derive(Default)]
struct Decimal([u8; 20]);

impl Decimal {
    fn write(&mut self, n: i64) -> &[u8] {
        let mut left = n.unsigned_abs();
        let mut at = self.0.len();
        loop {
            at -= 1;
            self.0[at] = b'0' + (left % 10) as u8;
            left /= 10;
            if left == 0 {
                break;
            }
        }
        if n < 0 {
            at -= 1;
            self.0[at] = b'-';
        }
        &self.0[at..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(k: &mut Keyspace, line: &str) -> std::string::String {
        let args: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        let mut out = Vec::new();
        k.execute(&args, &mut out);
        std::string::String::from_utf8(out).unwrap()
    }

    #[test]
    fn strings() {
        let k = &mut Keyspace::new(1 << 20);
        assert_eq!(run(k, "ping"), "+PONG\r\n");
        assert_eq!(run(k, "GET a"), "$-1\r\n");
        assert_eq!(run(k, "SET a 1"), "+OK\r\n");
        assert_eq!(run(k, "SET a 23"), "+OK\r\n");
        assert_eq!(run(k, "GET a"), "$2\r\n23\r\n");
        assert_eq!(run(k, "MSET b x c y"), "+OK\r\n");
        assert_eq!(
            run(k, "MGET a no c"),
            "*3\r\n$2\r\n23\r\n$-1\r\n$1\r\ny\r\n"
        );
        assert_eq!(run(k, "APPEND b yz"), ":3\r\n");
        assert_eq!(run(k, "DEL a b no"), ":2\r\n");
        assert_eq!(run(k, "DBSIZE"), ":1\r\n");
        assert_eq!(
            run(k, "GET"),
            "-ERR wrong number of arguments for 'get' command\r\n"
        );
        assert_eq!(run(k, "NOPE 1"), "-ERR unknown command 'NOPE'\r\n");
    }

    #[test]
    fn counters_overflow_and_reject_as_redis_does() {
        let k = &mut Keyspace::new(1 << 20);
        assert_eq!(run(k, "INCR n"), ":1\r\n");
        assert_eq!(run(k, "INCRBY n 41"), ":42\r\n");
        assert_eq!(run(k, "SET n 9223372036854775807"), "+OK\r\n");
        assert_eq!(
            run(k, "INCR n"),
            "-ERR increment or decrement would overflow\r\n"
        );
        assert_eq!(run(k, "SET n -9223372036854775808"), "+OK\r\n");
        assert_eq!(
            run(k, "DECR n"),
            "-ERR increment or decrement would overflow\r\n"
        );
        assert_eq!(run(k, "INCR n"), ":-9223372036854775807\r\n");
        for bad in ["x", "007", "+1", "1.0"] {
            run(k, &format!("SET n {bad}"));
            assert_eq!(
                run(k, "INCR n"),
                "-ERR value is not an integer or out of range\r\n"
            );
        }
    }

    #[test]
    fn lists() {
        let k = &mut Keyspace::new(1 << 20);
        assert_eq!(run(k, "LPUSH l a b"), ":2\r\n");
        assert_eq!(run(k, "RPUSH l c"), ":3\r\n");
        assert_eq!(
            run(k, "LRANGE l 0 -1"),
            "*3\r\n$1\r\nb\r\n$1\r\na\r\n$1\r\nc\r\n"
        );
        assert_eq!(
            run(k, "LRANGE l -9223372036854775808 0"),
            "*1\r\n$1\r\nb\r\n"
        );
        assert_eq!(run(k, "LRANGE l 5 9"), "*0\r\n");
        assert_eq!(run(k, "GET l"), std::format!("-{WRONG_TYPE}\r\n"));
        assert_eq!(run(k, "INCR l"), std::format!("-{WRONG_TYPE}\r\n"));
        assert_eq!(run(k, "LPOP l"), "$1\r\nb\r\n");
        assert_eq!(run(k, "RPOP l"), "$1\r\nc\r\n");
        assert_eq!(run(k, "LPOP l"), "$1\r\na\r\n");
        assert_eq!(run(k, "LPOP l"), "$-1\r\n");
        assert_eq!(run(k, "EXISTS l"), ":0\r\n");
        assert_eq!(k.used, 0);
    }

    #[test]
    fn memory_is_bounded_and_given_back() {
        let k = &mut Keyspace::new(4096);
        let mut kept = 0;
        while run(k, &format!("SET key{kept} 0123456789")) == "+OK\r\n" {
            kept += 1;
        }
        assert!((40..60).contains(&kept), "{kept}");
        run(k, "INCR c");
        for more in ["LPUSH l x", "INCR n", "APPEND n x", "MSET n x"] {
            assert!(run(k, more).starts_with("-OOM"), "{more}");
        }
        assert_eq!(run(k, "DEL key0"), ":1\r\n");
        assert_eq!(run(k, "SET key0 0123456789"), "+OK\r\n");
        run(k, "FLUSHALL");
        assert_eq!(k.used, 0);
    }

    #[test]
    fn what_clients_ask_at_start() {
        let k = &mut Keyspace::new(1 << 20);
        assert_eq!(run(k, "CONFIG GET save"), "*2\r\n$4\r\nsave\r\n$0\r\n\r\n");
        assert_eq!(run(k, "COMMAND DOCS"), "*0\r\n");
        assert!(run(k, "INFO").contains("redis_version"));
        let mut out = Vec::new();
        assert_eq!(k.execute(&[b"quit"], &mut out), After::Close);
    }
}
