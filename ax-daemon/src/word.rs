//! What this host says to the other one about a pair's record, where no third party keeps it.
//!
//! The process of the pair answers if one lives; this axd only passes letter and answer on. Where none
//! lives, axd answers itself, from the same file, whose lock says that none does (decisions/0009).

use std::sync::Arc;
use std::time::Duration;

use ax_api::host::Code;
use ax_api::process::{Arbiter, Phase, Reply, Request};
use ax_api::vm::Mode;
use ax_arbiter::manual::{Manual, ManualError};
use ax_arbiter::word::Stance;
use ax_wire::word::{Answer, Letter, Said, Unwilling};

use crate::control::Connection;
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::process::Process;

/// How long a process may take to answer a letter. The writer waits little longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Nothing was changed; the writer asks again.
const UNABLE: Answer = Answer {
    known: None,
    said: Said::NotNow(Unwilling::Unable),
};

impl Daemon {
    /// Answers a letter of the other host's process of the VM `name`.
    ///
    /// # Errors
    /// There is no such VM here, or somebody else decides for it.
    pub async fn word(self: &Arc<Self>, name: &str, letter: Letter) -> Result<Answer, Failure> {
        let vm = self.store.vm(name)?;
        if self.config.arbiter != Arbiter::Manual {
            return Err(Failure::new(
                Code::Arbiter,
                format!(
                    "host {} is configured with {}, the other one without: give both the same",
                    self.config.name, self.config.arbiter
                ),
            ));
        }
        if vm.pair != letter.pair || vm.mode == Mode::None {
            return Err(Failure::new(
                Code::State,
                format!("{name} is another VM on host {}", self.config.name),
            ));
        }
        if let Some(process) = self.process(name) {
            let asked = async {
                let mut connection = Connection::open(&process.control).await?;
                let letter = Box::new(letter);
                connection.ask(&Request::Word { letter }, PATIENCE).await
            };
            match asked.await {
                Ok(Reply::Word { answer }) => return Ok(*answer),
                Ok(other) => tracing::warn!("{name} answered {other:?} to a letter"),
                // It may be gone, and axd about to hear of it.
                Err(e) => tracing::debug!("{name} does not answer a letter: {e}"),
            }
        }
        let dir = self.config.vm_dir(name).join("state");
        let side = self.config.side();
        let answered = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&dir).map_err(|source| ManualError::Io {
                path: dir.clone(),
                source,
            })?;
            let manual = Manual::open(&dir)?;
            manual.answer(side, || Stance::Empty, &letter)
        });
        match answered.await {
            Ok(Ok((answer, changed))) => {
                if changed.before != changed.now
                    && let Some(known) = changed.now
                {
                    self.events.note(
                        Some(name),
                        format!("agreed with the other host: {}", known.record),
                    );
                }
                Ok(answer)
            }
            // A process lives after all: it is starting, or ending.
            Ok(Err(ManualError::InUse(_))) => Ok(UNABLE),
            Ok(Err(error)) => Err(Failure::new(Code::Failed, error.to_string())),
            Err(e) => Err(Failure::new(Code::Failed, e.to_string())),
        }
    }
}

impl Daemon {
    /// What to tell of a process that waits for an operator's word: it is left, so that there is
    /// something to give the word to. None where nobody waits for one.
    pub async fn held_for_an_operator(&self, process: &Process) -> Option<String> {
        let status = process.status().await?;
        match status.phase {
            Phase::Held { waits_for } if self.config.arbiter == Arbiter::Manual => Some(format!(
                "{} is held on {}: waits for {waits_for}",
                process.name, self.config.name
            )),
            _ => None,
        }
    }
}
