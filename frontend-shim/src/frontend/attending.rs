//! Who attends to backends while no request is under way: notices their end, and connects again.

use std::time::{Duration, Instant};

use super::Frontend;
use crate::bar::{Backend, ReconnectError};
use crate::client::Attended;

/// What has become of a function's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// It has ended. The function has no memory slots and no doorbells any more.
    Gone,
    /// Another one has begun. Unless the backend has kept its state, the function has been reset.
    Back {
        /// Time since the end was noticed.
        away: Duration,
    },
}

/// Time between attempts to connect: the first is made at once.
#[derive(Debug, Default)]
struct BackOff(Duration);

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A session that ends earlier than this does not count as a success.
const LASTING: Duration = Duration::from_secs(1);

impl BackOff {
    fn next(&mut self) -> Duration {
        let next = (self.0 * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        std::mem::replace(&mut self.0, next)
    }
}

impl Frontend {
    /// Attends to the backend of a function: serves the backend's own commands, learns at once when its
    /// session ends, and then takes its memory out of the guest. From then on the function answers as
    /// [`DeadBackend`](crate::client::DeadBackend) says, mapped BARs as well.
    ///
    /// For a thread of the VMM for each function. Without one, a backend that has gone is noticed at
    /// the next access that is forwarded to it. A function that was attached with
    /// [`ClientOptions::reconnect`](crate::client::ClientOptions::reconnect) is connected again as soon
    /// as its backend answers, and attended to further, until
    /// [`stop_attending`](Self::stop_attending): then it returns [`Attended::Stopped`]. Others are left
    /// with [`Attended::Ended`], and no access to them waits any more.
    pub fn attend(&self, function: usize) -> Attended {
        self.attend_with(function, &mut |_| {})
    }

    /// As [`attend`](Self::attend), and tells what becomes of the session.
    pub fn attend_with(&self, function: usize, tell: &mut dyn FnMut(SessionEvent)) -> Attended {
        let Some(attached) = self.functions.get(function) else { return Attended::Stopped };
        let mut back_off = BackOff::default();
        loop {
            let (client, began) = (attached.client(), Instant::now());
            // Whoever stops it later than this finds the client of this round.
            if attached.is_given_up() {
                return Attended::Stopped;
            }
            match client.attendant().attend() {
                Attended::Ended => {}
                end => return end,
            }
            attached.session_of_ended(self.hypervisor.as_ref(), &client);
            let gone = Instant::now();
            tell(SessionEvent::Gone);
            if !client.options().reconnect {
                // Nobody brings another one.
                attached.stop_waiting();
                return Attended::Ended;
            }
            if gone - began >= LASTING {
                back_off = BackOff::default();
            }
            let mut told = false;
            loop {
                if attached.pause(back_off.next()) {
                    return Attended::Stopped;
                }
                match self.reconnect(function) {
                    // Somebody else has.
                    Ok(()) | Err(ReconnectError::Alive) => break,
                    Err(error) => {
                        let socket = client.path().display();
                        // Nobody at the socket is what is waited for. Anything else is told, once.
                        if is_absence(&error) || std::mem::replace(&mut told, true) {
                            tracing::debug!(%socket, "reconnecting: {error}");
                        } else {
                            tracing::warn!(%socket, "reconnecting: {error}; trying further");
                        }
                    }
                }
            }
            tell(SessionEvent::Back { away: gone.elapsed() });
        }
    }

    /// Has [`attend`](Self::attend) return for good. Accesses that wait for another session complete as
    /// Unsupported Request. An attempt to connect that is under way takes its deadline at most.
    pub fn stop_attending(&self, function: usize) {
        if let Some(attached) = self.functions.get(function) {
            attached.stop_waiting();
            attached.client().attendant().stop();
        }
    }

    /// Tries once to connect a function again whose session has ended: for VMMs with an event loop of
    /// their own, at intervals of their choice. It takes as long as the backend's answers, each at
    /// most the deadline of its connection.
    ///
    /// The backend must serve the same function: device, regions, interrupts and ids are compared before
    /// it is given anything. Then it gets what the sessions before had set up, see
    /// [`Client::rewire`](crate::client::Client::rewire), and the place of the last one.
    ///
    /// # Errors
    /// [`ReconnectError`]; the function is as it was then, and another attempt may succeed.
    pub fn reconnect(&self, function: usize) -> Result<(), ReconnectError> {
        let attached = self.functions.get(function).ok_or(ReconnectError::NotWanted)?;
        let last = attached.client();
        if !last.options().reconnect {
            return Err(ReconnectError::NotWanted);
        }
        if !last.is_dead() {
            return Err(ReconnectError::Alive);
        }
        let next = last.reconnect()?;
        attached.check_same(&next)?;
        next.rewire()?;
        self.resume(function, next)
    }
}

impl<B: Backend> Frontend<B> {
    /// Takes the memory of a function whose backend has gone out of the guest. For VMMs that learn of it
    /// in an event loop of their own, with an [`Attendant`](crate::client::Attendant), and before they
    /// try to connect again.
    pub fn session_ended(&self, function: usize) {
        if let Some(function) = self.functions.get(function) {
            function.session_ended(self.hypervisor.as_ref());
        }
    }
}

fn is_absence(error: &ReconnectError) -> bool {
    use crate::client::ClientError;
    matches!(
        error,
        ReconnectError::Client(
            ClientError::Connect(_)
                | ClientError::Gone
                | ClientError::Lost
                | ClientError::Deadline(_)
        )
    )
}
