//! The clients, the same for every system: in the client's namespace of the laboratory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use testkit::client::{
    Oracle, Origin, Percentiles, Samples, Verdict, get, incr, ledger, port, udp,
};
use testkit::net::{GUEST, Lab};

use super::PATIENCE;
use crate::Error;

/// The program that asks by RESP.
pub const REDIS_BENCHMARK: &str = "redis-benchmark";
/// Left out at the start of a run: connections and address resolution.
const WARM_UP: Duration = Duration::from_millis(300);
/// How many pages the guest writes to, round and round, in a run that dirties memory: 32 MiB.
const DIRTY_PAGES: u32 = 8192;
/// How long redis-benchmark's speed is estimated; it takes a number of requests, not a time.
const ESTIMATE: Duration = Duration::from_millis(200);

/// Answer times of a run, and how many there were.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answers {
    /// Median, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Answers a second.
    pub per_s: f64,
}

/// What a failover was like from outside.
#[derive(Debug, Clone, Copy)]
pub struct Failover {
    /// Longest silence from the kill on, the worse of UDP echo and INCR, milliseconds.
    pub blackout_ms: f64,
    /// What the INCR client lost, saw twice, or had broken.
    pub verdict: Verdict,
}

/// Who asks.
pub struct Clients<'a> {
    lab: &'a Lab,
    origin: Origin,
    run: Duration,
}

impl<'a> Clients<'a> {
    /// Clients on this laboratory's client host, whose runs take so long.
    pub fn new(lab: &'a Lab, run: Duration) -> Clients<'a> {
        let origin = Origin::In(lab.client.net().clone());
        Clients { lab, origin, run }
    }

    /// Waits until the guest answers, and leaves it with a value to be read.
    pub fn warm_up(&self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(e) = self.command("PING") {
            if Instant::now() > deadline {
                return Err(e);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.redis("set", 1, 1).map(drop)
    }

    /// UDP echo, a request every millisecond.
    pub fn udp_echo(&self) -> Result<Answers, Error> {
        let oracle = udp::start(&self.origin, udp::UdpSpec::new(at(port::ECHO)))?;
        let report = self.let_run(oracle)?;
        answers(&report.samples, self.run)
    }

    /// Appends to the ledger in a closed loop.
    pub fn ledger(&self) -> Result<Answers, Error> {
        let spec = ledger::LedgerSpec::new(at(port::LEDGER), "peers");
        let report = self.let_run(ledger::start(&self.origin, spec)?)?;
        answers(&report.samples, self.run)
    }

    /// GET in a closed loop while the guest makes so many page writes a second.
    pub fn dirty(&self, rate: u32) -> Result<Answers, Error> {
        self.command(&format!("DIRTY {DIRTY_PAGES} {rate} 64"))?;
        let spec = get::GetSpec::new(at(port::RESP), "peers");
        let report = get::start(&self.origin, spec).map_err(Error::from);
        let report = report.and_then(|oracle| self.let_run(oracle));
        self.command("DIRTY 0 1 64")?;
        answers(&report?.samples, self.run)
    }

    fn let_run<R: Send + 'static>(&self, oracle: Oracle<R>) -> Result<R, Error> {
        oracle.wait_for_answers(1, PATIENCE)?;
        std::thread::sleep(WARM_UP + self.run);
        Ok(oracle.stop()?)
    }

    /// redis-benchmark's GET or SET, for about the time of a run.
    pub fn redis_benchmark(&self, what: &str, clients: u32) -> Result<Answers, Error> {
        // A few show the order of magnitude: where every answer waits for a checkpoint, many would take minutes.
        let few = u64::from(clients.max(5)) * 2;
        let mut answers = self.redis(what, clients, few)?;
        for time in [ESTIMATE, self.run] {
            let requests = (answers.per_s * time.as_secs_f64()) as u64;
            answers = self.redis(what, clients, requests.max(few))?;
        }
        Ok(answers)
    }

    fn redis(&self, what: &str, clients: u32, requests: u64) -> Result<Answers, Error> {
        let mut command = self.lab.client.command(REDIS_BENCHMARK);
        command.args(["-h", &GUEST.to_string(), "-d", "64", "--csv", "-t", what]);
        command.args(["-c", &clients.to_string(), "-n", &requests.to_string()]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| Error::Failed(format!("start {REDIS_BENCHMARK}: {e}")))?;
        let ended = end_within(&mut child, self.run * 3 + Duration::from_secs(10));
        let mut said = String::new();
        if let Some(mut out) = child.stdout.take() {
            // What it printed before it was ended is judged below.
            let _ = out.read_to_string(&mut said);
        }
        match ended {
            true => csv(&said),
            false => Err(Error::Failed(format!(
                "{REDIS_BENCHMARK} -t {what} -c {clients} -n {requests} did not end"
            ))),
        }
    }

    /// One command to the guest's control service, and its answer.
    pub fn command(&self, line: &str) -> Result<String, Error> {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&at(port::CONTROL), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(format!("{line}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer.trim_end().to_string())
        };
        match self.lab.client.run(ask)? {
            Ok(answer) if !answer.is_empty() && !answer.starts_with("ERR") => Ok(answer),
            Ok(answer) => Err(Error::Failed(format!("{line}: the guest says {answer:?}"))),
            Err(e) => Err(Error::Failed(format!("{line} to the guest: {e}"))),
        }
    }

    /// Asks while `kill` ends the host the guest runs on, and until it is answered again.
    pub fn failover(
        &self,
        kill: impl FnOnce() -> Result<Instant, Error>,
    ) -> Result<Failover, Error> {
        let udp = udp::start(&self.origin, udp::UdpSpec::new(at(port::ECHO)))?;
        let spec = incr::IncrSpec {
            patience: Duration::from_secs(10),
            ..incr::IncrSpec::new(at(port::RESP), "peers")
        };
        let incr = incr::start(&self.origin, spec)?;
        udp.wait_for_answers(1, PATIENCE)?;
        incr.wait_for_answers(1, PATIENCE)?;
        std::thread::sleep(WARM_UP + Duration::from_secs(1));
        let before = (udp.answers(), incr.answers());
        let killed = kill()?;
        let answered = udp
            .wait_for_answers(before.0 + 100, PATIENCE)
            .and_then(|()| incr.wait_for_answers(before.1 + 10, PATIENCE));
        std::thread::sleep(Duration::from_millis(500));
        let (incr, udp) = (incr.stop()?, udp.stop()?);
        answered?;
        let gap = |samples: &Samples| samples.longest_gap(Some(killed)).ms();
        Ok(Failover {
            blackout_ms: gap(&udp.samples).max(gap(&incr.samples)),
            verdict: incr.verdict,
        })
    }
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from((GUEST, port))
}

fn answers(samples: &Samples, run: Duration) -> Result<Answers, Error> {
    let from = samples.started() + WARM_UP;
    let times = samples.latencies_between(from, from + run);
    if times.is_empty() {
        return Err(Error::Failed("no request was answered".into()));
    }
    let p = Percentiles::of(times);
    Ok(Answers {
        p50_us: p.p50,
        p99_us: p.p99,
        per_s: p.count as f64 / run.as_secs_f64(),
    })
}

/// Whether it ended by itself within so long a time; it has ended either way.
fn end_within(child: &mut Child, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) | Err(_) => break,
        }
    }
    // Gone already is as good.
    let _ = child.kill();
    let _ = child.wait();
    false
}

/// Reads what `redis-benchmark --csv` prints: a line of names and one of values, milliseconds.
fn csv(said: &str) -> Result<Answers, Error> {
    let cells = |line: &str| -> Vec<String> {
        let cells = line.split(',');
        cells
            .map(|c| c.trim().trim_matches('"').to_string())
            .collect()
    };
    let lines: Vec<Vec<String>> = said.lines().map(cells).collect();
    let value = |name: &str| -> Option<f64> {
        let [.., names, values] = lines.as_slice() else {
            return None;
        };
        let column = names.iter().position(|n| n == name)?;
        values.get(column)?.parse().ok()
    };
    match (
        value("rps"),
        value("p50_latency_ms"),
        value("p99_latency_ms"),
    ) {
        (Some(per_s), Some(p50), Some(p99)) => Ok(Answers {
            p50_us: p50 * 1e3,
            p99_us: p99 * 1e3,
            per_s,
        }),
        _ => Err(Error::Failed(format!(
            "{REDIS_BENCHMARK} printed no figures (it must be of Redis 7 or later): {said:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_redis_benchmark_are_found_by_name() {
        let said = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\
                    \"p95_latency_ms\",\"p99_latency_ms\",\"max_latency_ms\"\n\
                    \"GET\",\"4655.49\",\"0.210\",\"0.080\",\"0.143\",\"0.175\",\"2.519\",\"23.343\"\n";
        let found = csv(said).unwrap();
        assert_eq!(found.per_s, 4655.49);
        assert!((found.p50_us - 143.0).abs() < 1e-6 && (found.p99_us - 2519.0).abs() < 1e-6);
        assert!(csv("").is_err());
        assert!(csv("Could not connect to Redis at 10.77.0.10:6379").is_err());
        let header_only = said.lines().next().unwrap();
        assert!(csv(header_only).is_err());
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let mut sleeper = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        assert!(!end_within(&mut sleeper, Duration::from_millis(20)));
        assert!(sleeper.try_wait().unwrap().is_some());
        let mut quick = std::process::Command::new("true").spawn().unwrap();
        assert!(end_within(&mut quick, Duration::from_secs(20)));
    }
}
