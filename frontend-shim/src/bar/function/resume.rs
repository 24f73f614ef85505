//! Another session takes the place of one that has ended.

use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::attach::{self, AttachError};
use super::config::{Capabilities, Registers};
use super::identity::Identity;
use super::session::{Outages, Session};
use super::{AttachedFunction, State};
use crate::bar::Backend;
use crate::bar::doorbells::Doorbells;
use crate::bar::mapping::BarMapping;
use crate::client::ClientError;
use crate::hypervisor::{Hypervisor, SlotId};
use crate::sync::Ordering;

/// Why a backend that answers again does not get its function back. The next attempt may succeed.
#[derive(Debug, thiserror::Error)]
pub enum ReconnectError {
    /// It can't be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What it serves can't be attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It serves another function: this is different.
    #[error("another function answers: its {0} differ")]
    Different(&'static str),
    /// The hypervisor does not let go of a slot or doorbell of the session before.
    #[error("a slot or doorbell of the last session is still there")]
    Slots,
    /// The session before is alive, or another one has taken its place already.
    #[error("the session has not ended")]
    Alive,
    /// No such function, or one that was attached without [`ClientOptions::reconnect`].
    ///
    /// [`ClientOptions::reconnect`]: crate::client::ClientOptions::reconnect
    #[error("the function was not attached to be reconnected")]
    NotWanted,
}

impl<B: Backend> AttachedFunction<B> {
    /// Remembers what the function is, so that [`resume`](Self::resume) can tell it from others.
    pub(crate) fn remember_identity(&mut self) -> Result<(), ClientError> {
        self.identity = Some(Identity::read(&*self.backend())?);
        Ok(())
    }

    /// Whether `backend` serves the same function as the sessions before.
    ///
    /// # Errors
    /// [`ReconnectError`] with what is different, or why it can't be asked.
    pub fn check_same(&self, backend: &B) -> Result<(), ReconnectError> {
        let Some(identity) = &self.identity else { return Ok(()) };
        match identity.difference(&Identity::read(backend)?) {
            None => Ok(()),
            Some(what) => Err(ReconnectError::Different(what)),
        }
    }

    /// Puts `backend`, of which [`check_same`](Self::check_same) says so, in the place of one whose session has ended: with its memory behind the slots and
    /// its doorbells, both as its own registers say. For a backend that was started again that means
    /// that the function has been reset: nothing decodes, BARs have no address, and the guest finds it so.
    /// Accesses that wait are done then.
    ///
    /// # Errors
    /// [`ReconnectError`]; nothing has changed then, and slots and doorbells are gone.
    pub fn resume(&self, hypervisor: &dyn Hypervisor, backend: B) -> Result<(), ReconnectError> {
        let last = self.session();
        let described = self.describe(&backend)?;
        let mut state = self.lock();
        if !self.sessions.is_current(&last) {
            return Err(ReconnectError::Alive);
        }
        // Before the memory of the new session can be where that of the last one was.
        self.note_end(hypervisor, &mut state, &last, "reconnecting", &ClientError::Gone);
        state.adopt(described)?;
        // Nothing decodes until the new session has said so. Whoever finds the session after this finds
        // these windows as well.
        self.publish(&state, |_| false);
        let session = self.sessions.replace(backend);
        self.protections.fetch_add(1, Ordering::Relaxed);
        self.synchronise_after_reset(hypervisor, &mut state);
        let outage = self.sessions.resume();
        if session.backend.is_dead() {
            self.note_end(hypervisor, &mut state, &session, "reconnecting", &ClientError::Gone);
        }
        drop(state);
        let socket = session.backend.name();
        let unsupported_requests = outage.unsupported_requests;
        info!(%socket, away = ?outage.away, unsupported_requests, "the backend is back");
        Ok(())
    }

    /// How often the backend was gone, and what became of accesses then.
    #[must_use]
    pub fn outages(&self) -> Outages {
        self.sessions.outages()
    }

    /// Nobody brings another session from now on: accesses that wait for one complete as Unsupported
    /// Request.
    pub fn stop_waiting(&self) {
        self.sessions.stop();
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.sessions.is_stopped()
    }

    /// Waits, at most until [`stop_waiting`](Self::stop_waiting); whether that was called.
    pub(crate) fn pause(&self, limit: Duration) -> bool {
        self.sessions.pause(limit)
    }

    /// The end of the session that was `backend`'s, as its attendant has learned of it.
    pub(crate) fn session_of_ended(&self, hypervisor: &dyn Hypervisor, backend: &Arc<B>) {
        let session = self.session();
        if Arc::ptr_eq(&session.backend, backend) {
            self.failed(hypervisor, &session, "attending", &ClientError::Gone);
        }
    }

    pub(super) fn session(&self) -> Arc<Session<B>> {
        self.sessions.current()
    }

    /// What a backend says about its BARs, with the slots that they have.
    fn describe(&self, backend: &B) -> Result<Described, ReconnectError> {
        let registers = Registers::read(backend)?;
        let numbers: Vec<SlotId> =
            self.lock().mappings.iter().flatten().flat_map(BarMapping::slots).collect();
        let mut left = numbers.into_iter();
        let mut too_many = false;
        let mut slots = || {
            left.next().unwrap_or_else(|| {
                too_many = true;
                SlotId(u32::MAX)
            })
        };
        let (bars, mappings) = attach::describe_bars(backend, &registers, &mut slots)?;
        if bars != self.bars || too_many || left.next().is_some() {
            return Err(ReconnectError::Different("BARs"));
        }
        if Capabilities::find(backend)? != self.capabilities {
            return Err(ReconnectError::Different("capabilities"));
        }
        let doorbells = attach::find_doorbells(backend, &bars)?;
        Ok(Described { mappings, doorbells })
    }
}

struct Described {
    mappings: [Option<BarMapping>; 6],
    doorbells: [Doorbells; 6],
}

impl State {
    /// Takes the memory and doorbells of another session for those of the last one, which nothing
    /// reaches any more.
    fn adopt(&mut self, described: Described) -> Result<(), ReconnectError> {
        let Described { mut mappings, doorbells } = described;
        let mapped = self.mappings.iter().flatten().any(|mapping| mapping.mapped_at().is_some());
        if mapped || self.doorbells.iter().any(Doorbells::is_connected) {
            return Err(ReconnectError::Slots);
        }
        let parts = |mapping: &Option<BarMapping>| -> Vec<_> {
            mapping.iter().flat_map(BarMapping::parts).collect()
        };
        if self.mappings.iter().map(parts).ne(mappings.iter().map(parts)) {
            return Err(ReconnectError::Different("mapped parts of BARs"));
        }
        for (new, old) in mappings.iter_mut().zip(&self.mappings) {
            if let (Some(new), Some(old)) = (new, old) {
                new.go_on_tracking(old);
            }
        }
        (self.mappings, self.doorbells) = (mappings, doorbells);
        self.vain_quarantines = 0;
        Ok(())
    }
}
