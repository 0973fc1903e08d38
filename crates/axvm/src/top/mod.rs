//! `axvm top`: a VM's epochs, live.
//!
//! One thread asks axd once a second, so that a host that does not answer holds up no key; the other draws and
//! listens. [`view`]: what is shown, a pure function of what was heard.

mod view;

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use ax_api::host::{Code, Reply, Request, VmReport};
use ax_api::trace::StatsReport;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use crate::cli::Output;
use crate::client::{Client, Failure};
use crate::show::Show;
use crate::stats;
use view::View;

/// Between two questions.
const EVERY: Duration = Duration::from_secs(1);

/// Longest time until what was heard is drawn.
const LOOK: Duration = Duration::from_millis(100);

/// What axd said, at one time.
struct Heard {
    vm: Result<VmReport, Failure>,
    stats: Result<StatsReport, Failure>,
}

fn ask(client: &Client, name: &str) -> Heard {
    // It prints nothing meanwhile: neither question has lines that are not the last.
    let silent = Show::new(Output::Json);
    let request = Request::Show {
        name: name.to_owned(),
    };
    let vm = match client.ask(&request, &silent) {
        Ok(Reply::Vm { vm }) => Ok(*vm),
        Ok(other) => Err(Failure::unexpected(&other)),
        Err(failure) => Err(failure),
    };
    Heard {
        vm,
        stats: stats::ask(client, &silent, name),
    }
}

fn listen(client: &Client, name: &str, tell: &Sender<Heard>) {
    while tell.send(ask(client, name)).is_ok() {
        std::thread::sleep(EVERY);
    }
}

/// Gives the terminal back as it was, whatever ends this.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        // Of a terminal that is gone there is nothing to give back.
        let _ = ratatui::try_restore();
    }
}

/// What came from the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Typed {
    Nothing,
    /// A key, or another size.
    Something,
    /// It is gone: reading events from it would never end, and there is nobody to tell.
    Gone,
}

/// Waits a moment for what comes.
fn typed() -> std::io::Result<Typed> {
    let stdin = std::io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let wait = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
    match poll(&mut fds, wait) {
        Ok(0) => Ok(Typed::Nothing),
        Ok(_) => {
            let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
            let mut found = fds.iter().filter_map(PollFd::revents);
            match found.any(|flags| flags.intersects(gone)) {
                true => Ok(Typed::Gone),
                false => Ok(Typed::Something),
            }
        }
        // The signal of another size.
        Err(Errno::EINTR) => Ok(Typed::Something),
        Err(e) => Err(e.into()),
    }
}

fn leaves(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && (ctrl_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}

/// Shows the VM `name` until the user leaves.
///
/// # Errors
/// There is no terminal, no such VM, or axd can't be reached at the beginning.
pub fn run(client: &Client, name: &str, output: Output) -> Result<(), Failure> {
    let terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if output.is_json() || !terminal {
        return Err(Failure::new(
            Code::Usage,
            format!(
                "`axvm top` needs a terminal to draw on; `axvm stats {name} --seconds 1` prints the same figures"
            ),
        ));
    }
    let first = ask(client, name);
    let mut view = View::new(name, first.vm?);
    view.heard(first.stats.map_err(|failure| failure.why));
    let (tell, news) = channel();
    let (client, vm) = (client.clone(), name.to_owned());
    std::thread::spawn(move || listen(&client, &vm, &tell));

    let failed = |e: std::io::Error| Failure::new(Code::Failed, format!("the terminal: {e}"));
    let restore = Restore;
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let mut drawn = false;
    loop {
        if !drawn {
            terminal.draw(|frame| view.draw(frame)).map_err(failed)?;
            drawn = true;
        }
        let came = typed().map_err(failed)?;
        if came == Typed::Gone {
            // Its destructor would complain to what is gone.
            std::mem::forget(terminal);
            return Ok(());
        }
        if came == Typed::Something && event::poll(Duration::ZERO).map_err(failed)? {
            if leaves(&event::read().map_err(failed)?) {
                break;
            }
            // It may be another size now.
            drawn = false;
        }
        for heard in news.try_iter() {
            drawn = false;
            match heard.vm {
                Ok(vm) => view.is(vm),
                Err(failure) => view.is_not_told(failure.why),
            }
            view.heard(heard.stats.map_err(|failure| failure.why));
        }
    }
    drop(restore);
    Ok(())
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::KeyEvent;

    use super::*;

    #[test]
    fn q_escape_and_control_c_leave_and_nothing_else_does() {
        let key = |code, modifiers| Event::Key(KeyEvent::new(code, modifiers));
        let none = KeyModifiers::NONE;
        assert!(leaves(&key(KeyCode::Char('q'), none)));
        assert!(leaves(&key(KeyCode::Esc, none)));
        assert!(leaves(&key(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        assert!(!leaves(&key(KeyCode::Char('c'), none)));
        assert!(!leaves(&Event::Resize(80, 24)));
    }
}
