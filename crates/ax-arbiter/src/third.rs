//! What a host asks of a third party that keeps the records: a witness, or an etcd cluster.

use std::time::Instant;

use ax_wire::PairId;
use ax_wire::record::{Decision, Record, Request};

use crate::client::{AskError, Client};
use crate::etcd::Etcd;
use crate::rules::{Registered, Registration};

/// A third party. Its answers are durable there before they are given.
pub trait ThirdParty: Send {
    /// Asks for a change, again and again until `deadline`.
    ///
    /// # Errors
    /// No answer: whether it was granted is unknown; ask again.
    fn ask(&mut self, request: &Request, deadline: Instant) -> Result<Decision, AskError>;

    /// The record of a pair, if it is known there.
    ///
    /// # Errors
    /// No answer.
    fn look(&mut self, pair: PairId, deadline: Instant) -> Result<Option<Record>, AskError>;

    /// Tells it what this side knows (rule 27); repeat until it is [`Registered::Known`].
    ///
    /// # Errors
    /// No answer.
    fn register(
        &mut self,
        registration: &Registration,
        deadline: Instant,
    ) -> Result<Registered, AskError>;
}

impl ThirdParty for Client {
    fn ask(&mut self, request: &Request, deadline: Instant) -> Result<Decision, AskError> {
        Client::ask(self, request, deadline)
    }

    fn look(&mut self, pair: PairId, deadline: Instant) -> Result<Option<Record>, AskError> {
        Client::look(self, pair, deadline)
    }

    fn register(
        &mut self,
        registration: &Registration,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        Client::register(self, *registration, false, deadline)
    }
}

impl ThirdParty for Etcd {
    fn ask(&mut self, request: &Request, deadline: Instant) -> Result<Decision, AskError> {
        Etcd::ask(self, request, deadline)
    }

    fn look(&mut self, pair: PairId, deadline: Instant) -> Result<Option<Record>, AskError> {
        Etcd::look(self, pair, deadline)
    }

    fn register(
        &mut self,
        registration: &Registration,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        Etcd::register(self, registration, false, deadline)
    }
}
