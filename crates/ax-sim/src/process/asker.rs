//! The arbiter, asked until it answers.

use ax_sync::sim;
use ax_sync::{Condvar, Mutex};
use ax_wire::record::Request;

use crate::net::Mailbox;
use crate::universe::{Question, Running, Universe, place};

use super::{AGAIN, Input};

#[derive(Default)]
struct Asking {
    question: Option<(u64, Option<Request>)>,
    number: u64,
}

/// Asks the arbiter until answered, in a thread of its own.
#[derive(Default)]
pub(super) struct Asker {
    asking: Mutex<Asking>,
    news: Condvar,
}

impl Asker {
    pub(super) fn ask(&self, request: Option<Request>) {
        let mut asking = self.asking.lock();
        asking.number += 1;
        asking.question = Some((asking.number, request));
        self.news.notify_all();
    }

    pub(super) fn run(&self, universe: &Universe, mine: &Running) {
        let at = place(mine.me.side as usize);
        let reply = Mailbox::new(&universe.net, at);
        let Some(here) = sim::current() else { return };
        loop {
            let mut asking = self.asking.lock();
            let (number, request) = match asking.question {
                Some(question) => question,
                None => {
                    self.news.wait(&mut asking);
                    continue;
                }
            };
            drop(asking);
            let question = Question {
                from: at,
                request,
                number,
                reply: reply.clone(),
            };
            let late = here.below(4) / 3 * here.below(20_000_000);
            universe.questions.send_late(at, question, late);
            let until = here.now() + AGAIN;
            while let Some((of, answer)) = reply.receive(until) {
                if of == number {
                    self.asking.lock().question = None;
                    let change = request.map(|request| request.change);
                    mine.inbox.tell(Input::Heard(change, answer));
                    break;
                }
            }
        }
    }
}
