//! Raw console bytes: from the guest's process, here or on the other host, to whoever looks.

use std::sync::Arc;

use ax_api::host::Code;
use ax_api::process::{Reply, Request, Role};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::{self, Receiver, Sender};

use crate::control::{Connection, PATIENCE};
use crate::daemon::{Asker, Daemon};
use crate::failure::Failure;

/// Pieces under way in one direction.
const PIECES: usize = 16;

/// One end of a console: dropped, the other end learns of it.
pub struct Console {
    /// Bytes to the other end.
    pub to: Sender<Vec<u8>>,
    /// Bytes from the other end.
    pub from: Receiver<Vec<u8>>,
}

impl Console {
    /// Two ends of one console.
    pub fn pair() -> (Console, Console) {
        let (to_b, from_a) = mpsc::channel(PIECES);
        let (to_a, from_b) = mpsc::channel(PIECES);
        (
            Console {
                to: to_b,
                from: from_b,
            },
            Console {
                to: to_a,
                from: from_a,
            },
        )
    }

    /// Carries bytes between this end and a stream until either ends.
    pub async fn carry(
        mut self,
        mut input: impl AsyncRead + Unpin,
        mut output: impl AsyncWrite + Unpin,
    ) {
        let to = self.to;
        let inward = async {
            let mut bytes = [0; 4096];
            while let Ok(n) = input.read(&mut bytes).await {
                if n == 0 || to.send(bytes[..n].to_vec()).await.is_err() {
                    break;
                }
            }
        };
        let outward = async {
            while let Some(bytes) = self.from.recv().await {
                if output.write_all(&bytes).await.is_err() || output.flush().await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = inward => {}
            () = outward => {}
        }
    }
}

impl Daemon {
    /// Opens the console of a VM, wherever its primary is: the next byte's offset, and the bytes.
    ///
    /// # Errors
    /// There is no such VM, it does not run, or its host does not answer.
    pub async fn console(
        self: &Arc<Self>,
        name: &str,
        from: Option<u64>,
        asker: Asker,
    ) -> Result<(u64, Console), Failure> {
        self.store.vm(name)?;
        if let Some((process, Some(Role::Primary))) = self.local_role(name).await {
            let opened = async {
                let mut connection = Connection::open(&process.control).await?;
                let reply = connection.ask(&Request::Console { from }, PATIENCE).await?;
                Ok::<_, std::io::Error>((connection, reply))
            };
            return match opened.await {
                Ok((connection, Reply::Console { offset })) => {
                    let (ours, theirs) = Console::pair();
                    tokio::spawn(theirs.carry(connection.from, connection.to));
                    Ok((offset, ours))
                }
                Ok((_, Reply::Refused { why })) => Err(Failure::new(Code::State, why)),
                Ok(_) => Err(Failure::new(
                    Code::Failed,
                    "the VM's process gave an unexpected answer",
                )),
                Err(e) => Err(Failure::io("the VM's process does not answer", &e)),
            };
        }
        match (asker, &self.peer) {
            (Asker::User, Some(peer)) => peer.console(name, from).await,
            _ => Err(self.does_not_run(name)),
        }
    }

    /// The failure of an order to a VM without a primary.
    pub fn does_not_run(&self, name: &str) -> Failure {
        let why = match self.process(name) {
            Some(process) => format!(
                "nobody runs {name}; its process {} on {} is no primary",
                process.pid, self.config.name
            ),
            None => format!("{name} does not run; `axvm start {name}` starts it"),
        };
        Failure::new(Code::State, why)
    }
}
