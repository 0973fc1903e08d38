//! `axd pair`: hosts and witness come to know each other, and a machine takes another's place.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{PAIRING_PORT, READY, Side, Site};
use crate::builds::Build;
use crate::net::{Host, addr};
use crate::product::Daemon;
use crate::{Error, Result};

impl Site {
    /// Puts another machine, called `name`, in a side's place: the host with an empty data folder, `folder`, and
    /// without any keys. Nothing of it runs, and both sides' configurations name it.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn put_another(
        &mut self,
        side: Side,
        name: &'static str,
        folder: &'static str,
    ) -> Result<()> {
        drop(self.axd[side as usize].take());
        self.machines[side as usize] = (name, folder);
        self.make_dir(&self.data_dir(side))?;
        for side in [Side::A, Side::B] {
            self.write(&self.config(side), &self.config_text(side))?;
        }
        Ok(())
    }

    /// Puts the machine with `folder` and `name` back in a side's place, as it was.
    pub fn put_back(&mut self, side: Side, name: &'static str, folder: &'static str) {
        drop(self.axd[side as usize].take());
        self.machines[side as usize] = (name, folder);
    }

    /// `axd pair --replace` on the other side's host, its token used on this side's machine.
    ///
    /// # Errors
    /// It was refused, or did not come about.
    pub fn replace(&self, side: Side, old: &str, more: &[&str]) -> Result<String> {
        let other = side.other();
        let ip = match other {
            Side::A => addr::A,
            Side::B => addr::B,
        };
        let (stays, comes) = (self.config(other), self.config(side));
        let more: Vec<&str> = ["--replace", old]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        let at = SocketAddr::from((ip, PAIRING_PORT));
        self.exchange_as(
            (self.host(other), self.builds[other as usize], &stays),
            at,
            (self.host(side), self.builds[side as usize], &comes),
            &more,
        )
    }

    /// A side's machine is paired with the witness, in place of `old` if that is named.
    ///
    /// # Errors
    /// It did not come about.
    pub fn pair_with_witness(&self, side: Side, old: Option<&str>) -> Result<()> {
        let (w, config) = (self.witness_config(), self.config(side));
        let more: Vec<&str> = old.into_iter().flat_map(|old| ["--replace", old]).collect();
        let at = SocketAddr::from((addr::WITNESS, PAIRING_PORT));
        let user = (
            self.host(side),
            self.builds[side as usize],
            config.as_path(),
        );
        let witness = (&self.lab.witness, self.builds[2], w.as_path());
        self.exchange_as(witness, at, user, &more).map(drop)
    }

    /// Keys between a and b, and of each with the witness, by `axd pair`.
    pub(super) fn pair(&self) -> Result<()> {
        let (a, b) = (self.config(Side::A), self.config(Side::B));
        let at = |ip| SocketAddr::from((ip, PAIRING_PORT));
        // Machines are paired once, by one build, whatever they run later.
        let [build, ..] = self.builds;
        let (a, b) = ((&self.lab.a, build, &*a), (&self.lab.b, build, &*b));
        self.exchange(a, at(addr::A), b)?;
        if self.spec.witness {
            let w = self.witness_config();
            let at = at(addr::WITNESS);
            let w = (&self.lab.witness, build, &*w);
            self.exchange(w, at, a)?;
            self.exchange(w, at, b)?;
        }
        Ok(())
    }

    /// One side prints a one-time token, the other uses it.
    pub(super) fn exchange(
        &self,
        listener: (&Host, Build, &Path),
        at: SocketAddr,
        user: (&Host, Build, &Path),
    ) -> Result<()> {
        self.exchange_as(listener, at, user, &[]).map(drop)
    }

    /// The same with more arguments on the printing side; what that said.
    pub(super) fn exchange_as(
        &self,
        listener: (&Host, Build, &Path),
        at: SocketAddr,
        user: (&Host, Build, &Path),
        more: &[&str],
    ) -> Result<String> {
        let pair = |(_, _, config): (&Host, Build, &Path)| {
            [
                "pair".into(),
                "--config".into(),
                config.as_os_str().to_os_string(),
            ]
        };
        let log = self
            .dir
            .path()
            .join(format!("pair-{}-{}.log", listener.0.name(), user.0.name()));
        // The token of an earlier time is not this one's.
        let _ = fs::remove_file(&log);
        let mut command = self.axd_of(listener.0, listener.1)?;
        command
            .args(pair(listener))
            .arg("--listen")
            .arg(at.to_string())
            .args(more);
        let mut waiting = Daemon::start("axd pair", command, log)?;
        let deadline = Instant::now() + READY;
        let token = loop {
            let ended = waiting.exit_status()?.is_some();
            if let Some(token) = token_in(&waiting.log()) {
                break token;
            }
            if ended || Instant::now() > deadline {
                return Err(Error::NotReady {
                    program: format!("axd pair on host {}", listener.0.name()),
                    wanted: "a token".into(),
                    seconds: READY.as_secs(),
                    log: waiting.log(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut command = self.axd_of(user.0, user.1)?;
        command
            .args(pair(user))
            .arg("--token")
            .arg(&token)
            .stdin(Stdio::null());
        let output = command.output().map_err(Error::os("run axd pair"))?;
        if !output.status.success() {
            return Err(self.failed(&format!("axd pair on host {}", user.0.name()), &output));
        }
        loop {
            match waiting.exit_status()? {
                Some(status) if status.success() => return Ok(waiting.log()),
                Some(_) => {
                    return Err(Error::Product(format!(
                        "axd pair on host {} failed:\n{}",
                        listener.0.name(),
                        waiting.log()
                    )));
                }
                None if Instant::now() > deadline => {
                    return Err(Error::NotReady {
                        program: format!("axd pair on host {}", listener.0.name()),
                        wanted: "its end".into(),
                        seconds: READY.as_secs(),
                        log: waiting.log(),
                    });
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// The token in what the listening `axd pair` prints, once it is there whole.
fn token_in(log: &str) -> Option<String> {
    let at = log.find("axpair-")?;
    let (token, _) = log[at..].split_once(char::is_whitespace)?;
    Some(token.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_taken_only_when_it_is_there_whole() {
        assert_eq!(token_in("waiting\n"), None);
        assert_eq!(
            token_in("On the other host: axd pair --token axpair-abc"),
            None
        );
        let whole = "On the other host: axd pair --token axpair-abcd\nThe token is good once";
        assert_eq!(token_in(whole).as_deref(), Some("axpair-abcd"));
    }
}
