//! What a guest does to a function, and what becomes of it while its backend is gone.

use std::sync::Arc;

use barkeep_protocol::wire::PciRegion;
use tracing::{debug, error, warn};

use super::config::{self, ConfigChange};
use super::session::{Patience, Session};
use super::{AttachedFunction, State, SuspendOrder};
use crate::bar::doorbells::Doorbells;
use crate::bar::{AddressSpace, Backend, BarWindow};
use crate::client::ClientError;
use crate::hypervisor::Hypervisor;
use crate::sync::Ordering;

/// An access was forwarded, or is Unsupported Request without having been.
enum Done {
    Forwarded,
    UnsupportedRequest,
}

impl<B: Backend> AttachedFunction<B> {
    /// Reads configuration space. A backend that does not answer reads as all ones, like a function
    /// that is not there.
    pub fn config_read(&self, hypervisor: &dyn Hypervisor, offset: u16, data: &mut [u8]) {
        let region = PciRegion::Config.index();
        let read = self.until_settled(hypervisor, "configuration read", || {
            let session = self.session();
            let result = session.backend.region_read(region, offset.into(), data);
            (session, result)
        });
        if read.is_err() {
            data.fill(0xff);
        }
    }

    /// Writes configuration space, and follows what the write does to the BARs: memory slots are
    /// gone before a write that stops decode is forwarded, and back before one that starts it
    /// returns.
    pub fn config_write(&self, hypervisor: &dyn Hypervisor, offset: u16, data: &[u8]) {
        // A write that nobody takes is dropped.
        let _ = self.until_settled(hypervisor, "configuration write", || {
            // Held across the request: a fault on another vCPU waits until slots and decode agree. Not
            // while it waits for another session, which needs the lock to begin.
            let mut state = self.lock();
            let session = self.session();
            let result = self.write_config(hypervisor, &mut state, &session, offset, data);
            (session, result)
        });
    }

    /// Reads from a BAR. Where no live backend answers, `data` is all ones: an Unsupported Request.
    pub fn bar_read(
        &self,
        hypervisor: &dyn Hypervisor,
        window: &BarWindow,
        offset: u64,
        data: &mut [u8],
    ) {
        let read = self.access(hypervisor, window, "read", |backend| {
            backend.region_read(window.bar.into(), offset, data)
        });
        match read {
            Err(_) | Ok(Done::UnsupportedRequest) => data.fill(0xff),
            Ok(Done::Forwarded) => {
                if self.is_lost(window) && data.iter().any(|byte| *byte != 0xff) {
                    // Somebody answers again.
                    self.recheck(hypervisor);
                }
            }
        }
    }

    /// Writes to a BAR. Where no live backend takes it, the write is dropped.
    pub fn bar_write(
        &self,
        hypervisor: &dyn Hypervisor,
        window: &BarWindow,
        offset: u64,
        data: &[u8],
    ) {
        let written = self.access(hypervisor, window, "write", |backend| {
            backend.region_write(window.bar.into(), offset, data)
        });
        match written {
            Ok(Done::UnsupportedRequest) => return,
            Ok(Done::Forwarded) => {
                if self.is_lost(window) && self.answers_again(window.bar) {
                    self.recheck(hypervisor);
                }
            }
            // Nobody knows whether it was done.
            Err(_) => {}
        }
        if self.tracks_writes.load(Ordering::Relaxed) {
            self.note_write(window.bar, offset, data.len());
        }
    }

    /// Takes every memory slot of a function away whose backend has gone, and says so, unless an
    /// access has been the first to notice. The last session is over then, also if it lived.
    pub fn session_ended(&self, hypervisor: &dyn Hypervisor) {
        let session = self.session();
        session.backend.give_up();
        self.failed(hypervisor, &session, "attending", &ClientError::Gone);
    }

    /// Has a live backend that claims the window do an access.
    fn access(
        &self,
        hypervisor: &dyn Hypervisor,
        window: &BarWindow,
        what: &str,
        mut access: impl FnMut(&B) -> Result<(), ClientError>,
    ) -> Result<Done, ClientError> {
        self.until_settled(hypervisor, what, || {
            let session = self.session();
            if !self.forwards_to(hypervisor, &session, window) {
                return (session, Ok(Done::UnsupportedRequest));
            }
            let result = access(&session.backend);
            (session, result.map(|()| Done::Forwarded))
        })
    }

    /// Makes an attempt, and others in the sessions that follow as long as nothing of it was sent and
    /// the access may wait.
    fn until_settled<T>(
        &self,
        hypervisor: &dyn Hypervisor,
        what: &str,
        mut attempt: impl FnMut() -> (Arc<Session<B>>, Result<T, ClientError>),
    ) -> Result<T, ClientError> {
        let mut patience = Patience::default();
        loop {
            let (session, result) = attempt();
            let error = match result {
                Err(error) => error,
                Ok(done) => {
                    if patience.has_waited() {
                        self.sessions.count_resumed();
                    }
                    return Ok(done);
                }
            };
            self.failed(hypervisor, &session, what, &error);
            if !error.ends_session() {
                return Err(error);
            }
            // What was sent may have been done: it is never done again.
            if !error.is_unsent() || !self.sessions.await_next(&session, &mut patience) {
                self.sessions.count_unsupported_request();
                return Err(error);
            }
        }
    }

    fn write_config(
        &self,
        hypervisor: &dyn Hypervisor,
        state: &mut State,
        session: &Session<B>,
        offset: u16,
        data: &[u8],
    ) -> Result<(), ClientError> {
        match self.capabilities.change(offset, data) {
            ConfigChange::Unrelated => self.forward(session, offset, data),
            ConfigChange::Command(enables) if !enables.memory => {
                state.wanted = enables;
                let result = self.disable_memory(hypervisor, state, session, offset, data);
                state.enables = enables;
                self.lost.store(false, Ordering::Relaxed);
                self.publish(state, |_| true);
                result
            }
            ConfigChange::Command(enables) => {
                state.wanted = enables;
                let result = self.forward(session, offset, data);
                if result.is_ok() && !self.follows_decode(state) {
                    state.enables = enables;
                    self.publish(state, |_| true);
                } else {
                    self.synchronise(hypervisor, state);
                }
                result
            }
            ConfigChange::Reconfigures => {
                self.suspend_all(hypervisor, state);
                state.placed.write(&self.bars, offset, data);
                if let Some(enables) = config::enables_written(offset, data) {
                    state.wanted = enables;
                }
                let result = self.forward(session, offset, data);
                self.synchronise_after_reset(hypervisor, state);
                result
            }
        }
    }

    fn note_write(&self, bar: u8, offset: u64, len: usize) {
        if let Some(mapping) = &mut self.lock().mappings[usize::from(bar)] {
            mapping.note_write(offset, len as u64);
        }
    }

    /// Whether an access is the backend's to complete. A barkeep backend answers UR itself, and
    /// counts and records it; any other server may not look at the Command register at all.
    fn forwards_to(
        &self,
        hypervisor: &dyn Hypervisor,
        session: &Session<B>,
        window: &BarWindow,
    ) -> bool {
        // Its failure says how to go on.
        if session.backend.is_dead() {
            return true;
        }
        // What a BAR's address was in the session before is none of this one's.
        if session.number > 0 && !self.is_there(window) {
            return false;
        }
        window.decodes && session.number == 0
            || session.backend.extensions().region_state
            || self.decodes_now(hypervisor, window)
    }

    fn is_there(&self, window: &BarWindow) -> bool {
        let now = self.windows.find(window.space, window.start);
        now.is_some_and(|(now, _)| BarWindow { decodes: window.decodes, ..now } == *window)
    }

    fn is_lost(&self, window: &BarWindow) -> bool {
        window.space == AddressSpace::Memory && self.lost.load(Ordering::Relaxed)
    }

    /// Whether a window decodes now that did not when it was looked up. Asks if somebody else had
    /// stopped it.
    fn decodes_now(&self, hypervisor: &dyn Hypervisor, window: &BarWindow) -> bool {
        if self.is_lost(window) {
            self.recheck(hypervisor);
        }
        let now = self.windows.find(window.space, window.start);
        now.is_some_and(|(now, _)| now == BarWindow { decodes: true, ..*window })
    }

    fn answers_again(&self, bar: u8) -> bool {
        match self.backend().region_state(bar.into()) {
            Ok(state) => state.claimed(),
            // Then its registers have to tell.
            Err(ClientError::NotOffered(_)) => true,
            Err(_) => false,
        }
    }

    /// Whether there is something in the hypervisor that comes and goes with decode.
    fn follows_decode(&self, state: &State) -> bool {
        self.has_mapped_bars() || !state.doorbells.iter().all(Doorbells::is_empty)
    }

    fn disable_memory(
        &self,
        hypervisor: &dyn Hypervisor,
        state: &mut State,
        session: &Session<B>,
        offset: u16,
        data: &[u8],
    ) -> Result<(), ClientError> {
        state.memory_clears += 1;
        let slots_first = match self.suspend_order {
            SuspendOrder::SlotsFirst => true,
            SuspendOrder::BackingFirst | SuspendOrder::FaultsOnly => false,
            SuspendOrder::Alternate => !state.memory_clears.is_multiple_of(2),
        };
        if slots_first {
            self.suspend_all(hypervisor, state);
            return self.forward(session, offset, data);
        }
        self.bars.iter().for_each(|info| self.silence(hypervisor, state, info.bar));
        for mapping in state.mappings.iter_mut().flatten() {
            if let Err(failure) = mapping.refuse_access() {
                error!(function = self.index, "mprotect: {failure}");
            }
        }
        let result = self.forward(session, offset, data);
        if self.suspend_order != SuspendOrder::FaultsOnly {
            self.suspend_all(hypervisor, state);
        }
        result
    }

    /// Forwards a configuration write.
    fn forward(&self, session: &Session<B>, offset: u16, data: &[u8]) -> Result<(), ClientError> {
        session.backend.region_write(PciRegion::Config.index(), offset.into(), data)
    }

    /// A request that the backend did not complete. If it is gone, its memory must not stay mapped:
    /// all of the function answers UR now, not only what is trapped.
    pub(super) fn failed(
        &self,
        hypervisor: &dyn Hypervisor,
        session: &Session<B>,
        what: &str,
        error: &ClientError,
    ) {
        if error.ends_session() {
            self.note_end(hypervisor, &mut self.lock(), session, what, error);
        } else {
            self.report(session, what, error);
        }
    }

    /// The same, by who holds the lock.
    pub(super) fn note_end(
        &self,
        hypervisor: &dyn Hypervisor,
        state: &mut State,
        session: &Session<B>,
        what: &str,
        error: &ClientError,
    ) {
        self.report(session, what, error);
        // Somebody may be late with the news, and another session's slots be there by now.
        if self.sessions.is_current(session) {
            self.suspend_all(hypervisor, state);
        }
    }

    /// One line when a session dies. What follows is the same news again, at the guest's pace.
    pub(super) fn report(&self, session: &Session<B>, what: &str, error: &ClientError) {
        let socket = session.backend.name();
        if error.ends_session() && self.sessions.ended(session) {
            warn!(%socket, "{what}: {error}; the function answers as Unsupported Request");
        } else {
            debug!(%socket, "{what}: {error}");
        }
    }
}
