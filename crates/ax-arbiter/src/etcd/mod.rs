//! An etcd cluster as arbiter: it keeps the records, this host decides by the same rules and writes only
//! if nothing has changed meanwhile.
//!
//! ```text
//! /ax/store                     this store's life: 16 random bytes, hexadecimal, written once by AX
//! /ax/pair/PAIR                 a pair's record, JSON
//! /ax/waiting/PAIR/SIDE         what one side has told, JSON; gone after some seconds (a lease)
//! ```
//!
//! Every answer is the outcome of one transaction that a quorum has seen: the read is linearizable, the
//! write compares the record's revision and the store's life. A cluster whose data were wiped has no
//! store key, gets a new one, and so is another arbiter: it grants nothing until both sides have
//! registered (rule 27).

mod http;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ax_wire::record::{Arbiter, Decision, Record, Request, WitnessId};
use ax_wire::{PairId, Side};
use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::client::AskError;
use crate::rules::{self, Registered, Registration, Standing, Told};
use crate::store::random;

/// Where AX keeps its things.
const PREFIX: &str = "/ax";
/// How long one side's registration waits for the other's, seconds ([`crate::Witness`] has the same).
const TOGETHER: u64 = 10;
/// The least time one member is given, if the deadline allows.
const ATTEMPT: Duration = Duration::from_millis(300);
/// Times a change is decided anew because another one came between.
const CONTENDED: usize = 16;

/// A cluster, asked for one pair's process.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<SocketAddr>,
    /// The member that answered last.
    last: usize,
    expected: Option<WitnessId>,
}

/// A pair as the cluster has it.
struct Found {
    /// The cluster's identity and its store's life.
    id: WitnessId,
    record: Option<Record>,
    /// The record's revision; 0 when there is none.
    revision: i64,
    /// What the other side has told lately.
    other: Option<Told>,
}

impl Etcd {
    /// A client of the cluster with these members. `expected` is the store that the pair's record
    /// names, if this host knows one.
    pub fn new(members: Vec<SocketAddr>, expected: Option<WitnessId>) -> Etcd {
        Etcd {
            members,
            last: 0,
            expected,
        }
    }

    /// Asks for a change, again and again until `deadline`.
    ///
    /// # Errors
    /// No answer; the outcome is unknown unless it is [`AskError::OtherWitness`].
    pub fn ask(&mut self, request: &Request, deadline: Instant) -> Result<Decision, AskError> {
        for _ in 0..CONTENDED {
            let found = self.find(request.pair, None, deadline)?;
            self.check(found.id)?;
            let me = Arbiter::Witness(found.id);
            let decision = rules::decide(me, found.record.as_ref(), request);
            let Decision::Granted(record) = decision else {
                return Ok(decision);
            };
            if self.write(request.pair, &found, &record, deadline)? {
                return Ok(decision);
            }
        }
        Err(unreachable("the record changes all the time"))
    }

    /// The record of a pair, if the cluster knows it.
    ///
    /// # Errors
    /// No answer.
    pub fn look(&mut self, pair: PairId, deadline: Instant) -> Result<Option<Record>, AskError> {
        let found = self.find(pair, None, deadline)?;
        self.check(found.id)?;
        Ok(found.record)
    }

    /// Tells the cluster what this side knows; repeat until it is [`Registered::Known`].
    ///
    /// # Errors
    /// No answer.
    pub fn register(
        &mut self,
        registration: &Registration,
        by_operator: bool,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        let registered = self.tell(registration, Standing::Registers, by_operator, deadline)?;
        if let Registered::Known(Record {
            arbiter: Arbiter::Witness(id),
            ..
        }) = registered
        {
            self.expected = Some(id);
        }
        Ok(registered)
    }

    /// Tells the cluster what this side knows of a pair that another arbiter decides for, or did.
    ///
    /// # Errors
    /// No answer.
    pub fn stand(
        &mut self,
        registration: &Registration,
        standing: Standing,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        self.tell(registration, standing, false, deadline)
    }

    /// The cluster's identity and its store's life.
    ///
    /// # Errors
    /// No answer.
    pub fn identify(&mut self, deadline: Instant) -> Result<WitnessId, AskError> {
        Ok(self.find(PairId([0; 16]), None, deadline)?.id)
    }

    /// From now on grants of this store count, and of no other.
    pub fn expect(&mut self, id: WitnessId) {
        self.expected = Some(id);
    }

    fn tell(
        &mut self,
        registration: &Registration,
        standing: Standing,
        by_operator: bool,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        let Registration {
            pair, side, record, ..
        } = *registration;
        let told = Told { record, standing };
        for _ in 0..CONTENDED {
            let found = self.find(pair, Some(side.other()), deadline)?;
            let me = Arbiter::Witness(found.id);
            if registration.is_replaced(found.record.as_ref()) {
                let known = found.record.unwrap_or(record);
                return Ok(Registered::Replaced { known });
            }
            let registered = rules::register(
                me,
                found.record.as_ref(),
                found.other.as_ref(),
                &told,
                by_operator,
            );
            match registered {
                Registered::Known(known) => {
                    let is_known = found.record == Some(known);
                    if is_known || self.write(pair, &found, &known, deadline)? {
                        return Ok(registered);
                    }
                }
                _ => {
                    self.wait_there(registration, &told, deadline)?;
                    return Ok(registered);
                }
            }
        }
        Err(unreachable("the record changes all the time"))
    }

    fn check(&self, found: WitnessId) -> Result<(), AskError> {
        match self.expected {
            Some(expected) if expected != found => Err(AskError::OtherWitness { expected, found }),
            _ => Ok(()),
        }
    }

    /// Reads everything about a pair at once, making the store's life if there is none.
    fn find(
        &mut self,
        pair: PairId,
        other: Option<Side>,
        deadline: Instant,
    ) -> Result<Found, AskError> {
        let waiting = waiting_key(pair, other.unwrap_or(Side::A));
        let keys = [store_key(), pair_key(pair), waiting];
        let reads: Vec<Value> = keys
            .iter()
            .map(|key| json!({"request_range": {"key": encode(key)}}))
            .collect();
        loop {
            let answer = self.call("/v3/kv/txn", &json!({"success": reads}), deadline)?;
            let entry = |at: usize| -> Option<&Value> {
                answer["responses"].get(at)?["response_range"]["kvs"].get(0)
            };
            let Some(store) = entry(0)
                .and_then(value)
                .and_then(|v| v.parse::<PairId>().ok())
            else {
                if entry(0).is_some() {
                    return Err(unreachable("its key /ax/store is not what AX wrote"));
                }
                self.begin_store(deadline)?;
                continue;
            };
            let cluster = number(&answer["header"]["cluster_id"]).to_be_bytes();
            let mut identity = *b"etcd\0\0\0\0\0\0\0\0\0\0\0\0";
            identity[8..].copy_from_slice(&cluster);
            let record = match entry(1) {
                None => None,
                Some(found) => Some(
                    value(found)
                        .and_then(|text| serde_json::from_str(&text).ok())
                        .ok_or_else(|| unreachable("its record of this pair is damaged"))?,
                ),
            };
            return Ok(Found {
                id: WitnessId {
                    identity,
                    store: store.0,
                },
                record,
                revision: entry(1).map_or(0, |found| number(&found["mod_revision"]) as i64),
                other: other
                    .and(entry(2))
                    .and_then(value)
                    .and_then(|text| serde_json::from_str(&text).ok()),
            });
        }
    }

    /// Makes the store's life, unless somebody else has by now.
    fn begin_store(&mut self, deadline: Instant) -> Result<(), AskError> {
        let life = random(std::path::Path::new("/dev/urandom"))
            .map_err(|e| unreachable(&format!("no randomness: {e}")))?;
        let key = encode(&store_key());
        let begin = json!({
            "compare": [{"key": key, "target": "CREATE", "create_revision": "0", "result": "EQUAL"}],
            "success": [{"request_put": {"key": key, "value": encode(&PairId(life).to_string())}}],
        });
        self.call("/v3/kv/txn", &begin, deadline).map(drop)
    }

    /// Writes a record in place of the one found; false when it has changed since.
    fn write(
        &mut self,
        pair: PairId,
        found: &Found,
        record: &Record,
        deadline: Instant,
    ) -> Result<bool, AskError> {
        let key = encode(&pair_key(pair));
        let text = serde_json::to_string(record)
            .map_err(|e| unreachable(&format!("a record that can't be written: {e}")))?;
        let write = json!({
            "compare": [
                {"key": key, "target": "MOD", "mod_revision": found.revision.to_string(),
                 "result": "EQUAL"},
                {"key": encode(&store_key()), "target": "VALUE",
                 "value": encode(&PairId(found.id.store).to_string()), "result": "EQUAL"},
            ],
            "success": [{"request_put": {"key": key, "value": encode(&text)}}],
        });
        let answer = self.call("/v3/kv/txn", &write, deadline)?;
        Ok(answer["succeeded"] == json!(true))
    }

    /// Leaves this side's registration there for a while.
    fn wait_there(
        &mut self,
        registration: &Registration,
        told: &Told,
        deadline: Instant,
    ) -> Result<(), AskError> {
        let lease = json!({"TTL": TOGETHER.to_string()});
        let lease = self.call("/v3/lease/grant", &lease, deadline)?;
        let text = serde_json::to_string(told)
            .map_err(|e| unreachable(&format!("a record that can't be written: {e}")))?;
        let put = json!({
            "key": encode(&waiting_key(registration.pair, registration.side)),
            "value": encode(&text),
            "lease": lease["ID"],
        });
        self.call("/v3/kv/put", &put, deadline).map(drop)
    }

    /// Asks one member after the other until one answers or the time is over.
    fn call(&mut self, path: &str, body: &Value, deadline: Instant) -> Result<Value, AskError> {
        let mut why = String::from("no time was left to ask");
        loop {
            let now = Instant::now();
            let Some(member) = self.members.get(self.last).copied() else {
                return Err(unreachable("no member is configured"));
            };
            if now >= deadline {
                return Err(unreachable(&why));
            }
            // A member that has fallen silent, or has no quorum, must leave time for the others.
            let attempt = ((deadline - now) / 2).max(ATTEMPT);
            match http::post(member, path, body, deadline.min(now + attempt)) {
                Ok(answer) => return Ok(answer),
                Err(error) => why = format!("etcd at {member}: {error}"),
            }
            self.last = (self.last + 1) % self.members.len();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn unreachable(last: &str) -> AskError {
    AskError::Unreachable { last: last.into() }
}

fn store_key() -> String {
    format!("{PREFIX}/store")
}

fn pair_key(pair: PairId) -> String {
    format!("{PREFIX}/pair/{pair}")
}

fn waiting_key(pair: PairId, side: Side) -> String {
    format!("{PREFIX}/waiting/{pair}/{side:?}")
}

fn encode(text: &str) -> String {
    BASE64.encode(text.as_bytes())
}

/// The value of a key, as text.
fn value(entry: &Value) -> Option<String> {
    let bytes = BASE64.decode(entry["value"].as_str()?.as_bytes()).ok()?;
    String::from_utf8(bytes).ok()
}

/// A 64-bit number, which the gateway writes as text.
fn number(value: &Value) -> u64 {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .unwrap_or_default()
}
