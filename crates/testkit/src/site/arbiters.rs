//! Who decides: a witness, a second one, an etcd.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{
    ETCD_PORT, READY, SECOND_WITNESS, SECOND_WITNESS_PORT, Side, Site, WITNESS, WITNESS_PORT,
};
use crate::net::addr;
use crate::product::Daemon;
use crate::{Error, Result};

impl Site {
    /// Starts the witness, anew if one ran before; nothing to do for a site without.
    ///
    /// # Errors
    /// When it does not listen in time; with its log.
    pub fn start_witness(&mut self) -> Result<()> {
        if self.spec.etcd {
            return self.start_etcd();
        }
        if !self.spec.witness {
            return Ok(());
        }
        drop(self.witness.take());
        let config = self.witness_config();
        let mut command = self.axd_of(&self.lab.witness, self.builds[WITNESS])?;
        command.args(["witness".as_ref(), "--config".as_ref(), config.as_os_str()]);
        let log = self.dir.path().join("witness-axd.log");
        self.witness = Some(Daemon::start("axd on host witness", command, log)?);
        self.wait_for_witness("axd witness", WITNESS_PORT)
    }

    /// Starts a second witness, `witness2`, with a store of its own, beside the first one. For sites without
    /// mutual TLS: it has no keys.
    ///
    /// # Errors
    /// When it does not listen in time; with its log.
    pub fn start_second_witness(&mut self) -> Result<()> {
        drop(self.second.take());
        let dir = self.dir.path().join("w2");
        self.make_dir(&dir)?;
        let args = [
            "witness".as_ref(),
            "--name".as_ref(),
            "witness2".as_ref(),
            "--plain".as_ref(),
            "--data-dir".as_ref(),
            dir.as_os_str(),
            "--listen".as_ref(),
            SECOND_WITNESS.as_ref(),
        ];
        let logs = self.dir.path().join("second");
        self.make_dir(&logs)?;
        let mut command = self.axd_of(&self.lab.witness, self.builds[WITNESS])?;
        command.args(args);
        let log = logs.join("witness-axd.log");
        let daemon = Daemon::start("second axd on host witness", command, log)?;
        let port = SECOND_WITNESS_PORT;
        self.second = Some(daemon);
        self.wait_for_witness("the second axd witness", port)
    }

    /// The folder with the first witness's store.
    pub fn witness_store(&self) -> PathBuf {
        self.dir.path().join("w").join("witness")
    }

    /// Writes into both hosts' configurations, in place of the first witness, the second one as the
    /// witness, or as the one that stands by. An axd reads it when it is started anew.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn name_second_witness(&self, as_standby: bool) -> Result<()> {
        for side in [Side::A, Side::B] {
            let text = self.config_text(side);
            let at = text.find("\n[witness]").unwrap_or(text.len());
            let (rest, first) = text.split_at(at);
            let (first, kind) = match as_standby {
                true => (first, "standby"),
                false => ("", "witness"),
            };
            let second = format!(
                "\n[{kind}]\nname = \"witness2\"\naddresses = [\"{}:{SECOND_WITNESS_PORT}\"]\n",
                addr::WITNESS
            );
            self.write(&self.config(side), &format!("{rest}{first}{second}"))?;
        }
        Ok(())
    }

    /// Waits until what was started in the witness's place listens.
    pub(super) fn wait_for_witness(&mut self, program: &str, port: u16) -> Result<()> {
        let target = (addr::WITNESS, port).into();
        let deadline = Instant::now() + READY;
        let answers =
            || std::net::TcpStream::connect_timeout(&target, Duration::from_millis(200)).is_ok();
        while !self.lab.client.run(answers)? {
            let second = port == SECOND_WITNESS_PORT;
            let daemon = if second {
                &mut self.second
            } else {
                &mut self.witness
            };
            let ended = match daemon {
                Some(daemon) => daemon.exit_status()?.is_some(),
                None => true,
            };
            if ended || Instant::now() > deadline {
                return Err(Error::NotReady {
                    program: program.into(),
                    wanted: format!("an open port {port}"),
                    seconds: READY.as_secs(),
                    log: daemon.as_ref().map_or(String::new(), Daemon::log),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts etcd on the witness's host, anew if one ran before, with the data it had.
    pub(super) fn start_etcd(&mut self) -> Result<()> {
        drop(self.witness.take());
        let data = self.dir.path().join("etcd");
        let (client, peer) = (
            format!("http://{}:{ETCD_PORT}", addr::WITNESS),
            format!("http://{}:2380", addr::WITNESS),
        );
        let mut command = self.lab.witness.command(Path::new("etcd"));
        command
            .args(["--name", "t", "--logger", "zap", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(&data)
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("t={peer}")]);
        let log = self.dir.path().join("etcd.log");
        let daemon = Daemon::start("etcd", command, log)?;
        self.witness = Some(daemon);
        self.wait_for_witness("etcd", ETCD_PORT)
    }

    pub(super) fn etcd_line(&self) -> String {
        match self.spec.etcd {
            true => format!("etcd = [\"http://{}:{ETCD_PORT}\"]\n", addr::WITNESS),
            false => String::new(),
        }
    }
}
