//! What a host asks of a third party that keeps the records: a witness, or an etcd cluster.

use std::time::Instant;

use ax_wire::PairId;
use ax_wire::record::{Decision, Record, Request, WitnessId};

use crate::client::{AskError, Client};
use crate::etcd::Etcd;
use crate::rules::{Registered, Registration, Standing};

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

    /// Tells it what this side knows of a pair that another arbiter decides for, or did (rule 27).
    ///
    /// # Errors
    /// No answer.
    fn stand(
        &mut self,
        registration: &Registration,
        standing: Standing,
        deadline: Instant,
    ) -> Result<Registered, AskError>;

    /// Who it is, with which store.
    ///
    /// # Errors
    /// No answer.
    fn identify(&mut self, deadline: Instant) -> Result<WitnessId, AskError>;

    /// From now on its grants count if it is this one, with this store.
    fn expect(&mut self, id: WitnessId);

    /// False when it is known that it would not answer soon.
    fn is_near(&self) -> bool;
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

    fn stand(
        &mut self,
        registration: &Registration,
        standing: Standing,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        Client::stand(self, *registration, standing, deadline)
    }

    fn identify(&mut self, deadline: Instant) -> Result<WitnessId, AskError> {
        Client::identify(self, deadline)
    }

    fn expect(&mut self, id: WitnessId) {
        Client::expect(self, id);
    }

    fn is_near(&self) -> bool {
        self.is_warm()
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

    fn stand(
        &mut self,
        registration: &Registration,
        standing: Standing,
        deadline: Instant,
    ) -> Result<Registered, AskError> {
        Etcd::stand(self, registration, standing, deadline)
    }

    fn identify(&mut self, deadline: Instant) -> Result<WitnessId, AskError> {
        Etcd::identify(self, deadline)
    }

    fn expect(&mut self, id: WitnessId) {
        Etcd::expect(self, id);
    }

    fn is_near(&self) -> bool {
        true
    }
}
