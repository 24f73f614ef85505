//! What the supervisor and a worker say to each other.
//!
//! A pair of connected sockets that keep messages apart. A message is a frame of fixed size and at
//! most one descriptor. Both ends are the same binary, since a worker is started from the file that
//! the supervisor runs: the frames need no version.
//!
//! The worker's end is its standard input. What it has sent is the kernel's from then on, and the
//! supervisor reads it even when the worker has ended.

mod channel;
mod supervisor_end;
#[cfg(test)]
mod tests;
mod worker_end;

pub use supervisor_end::{FromWorker, SupervisorLink, ToWorker};
pub use worker_end::{FunctionHolder, Held, Order, Report, WorkerLink};

use rustix::io::Errno;
use thiserror::Error;

use crate::state::{FdKey, PreviousEnd};

/// Why a link can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LinkError {
    /// The other end has gone, and everything that it said has been read.
    #[error("the other end has gone")]
    Closed,
    /// A frame that nobody sends, or one without its descriptor.
    #[error("garbled frame")]
    Garbled,
    /// The kernel refused.
    #[error("{0}")]
    System(#[from] Errno),
}

/// A message without its descriptor: what it is about, of which function, and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    kind: Kind,
    function: u16,
    number: u64,
}

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    // From the supervisor.
    /// The function's state memory goes with it.
    State,
    /// The client's socket goes with it.
    Client,
    /// The descriptor with this key goes with it.
    Fd,
    /// That was all that is held. How many descriptors may be held for each function; and, in the place
    /// of a function, how the last worker ended.
    Begin,
    Ping,
    Drain,
    Stop,
    // From the worker.
    Ready,
    Pong,
    SessionEnded,
    Drained,
    /// A descriptor to hold under this key goes with it.
    Store,
    Forget,
}

impl Frame {
    const SIZE: usize = 16;

    fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.function.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.number.to_ne_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Self, LinkError> {
        let bytes: &[u8; Self::SIZE] = bytes.try_into().map_err(|_| LinkError::Garbled)?;
        let [kind, _, function @ .., _, _, _, _] = bytes.first_chunk::<8>().expect("16 bytes");
        let number = bytes.last_chunk().expect("16 bytes");
        Ok(Self {
            kind: Kind::parse(*kind)?,
            function: u16::from_ne_bytes(*function),
            number: u64::from_ne_bytes(*number),
        })
    }

    fn key(&self) -> FdKey {
        FdKey(self.number)
    }
}

/// As a frame has it.
const ENDS: [PreviousEnd; 3] =
    [PreviousEnd::Orderly, PreviousEnd::ByItself, PreviousEnd::FromOutside];

impl Kind {
    const ALL: [Self; 13] = [
        Self::State,
        Self::Client,
        Self::Fd,
        Self::Begin,
        Self::Ping,
        Self::Drain,
        Self::Stop,
        Self::Ready,
        Self::Pong,
        Self::SessionEnded,
        Self::Drained,
        Self::Store,
        Self::Forget,
    ];

    fn parse(byte: u8) -> Result<Self, LinkError> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte).ok_or(LinkError::Garbled)
    }
}
