//! State that outlives the process: what another process needs to go on in this one's place.
//!
//! It lies in a memory file that somebody else holds as well. A process can be killed between any two
//! instructions, but what it has stored is there, in the order in which it was stored: no write is
//! ever lost or moved, since the memory is the kernel's and not a disk's. So every change is made of
//! single stores of which each leaves a state that another process can go on from.
//!
//! A [`Journal`] makes a transaction of each thing that a process does: it takes a message
//! ([`Stream::take`]), says what it is about to do ([`Journal::begin`]), does it in memory of its own,
//! and makes all that came of it true at once ([`Journal::commit`]): what is saved of the function, that
//! the message is done, and what is to be sent. What is sent ([`Stream::send`]) and what is taken is
//! counted by the kernel within the system call. Whoever goes on ([`Journal::recover`]) therefore does
//! nothing twice that others have seen, and leaves nothing out.

mod activity;
mod checksum;
mod crash;
mod file;
mod journal;
mod layout;
mod memory;
mod outbox;
mod page;
mod progress;
mod record;
mod scratch;
mod sections;
mod socket;
mod stream;
#[cfg(test)]
mod tests;

pub use activity::{Activity, PreviousEnd, Toll};
#[cfg(feature = "failpoints")]
pub use crash::process::log_crash_points;
pub use file::{StateError, StateFile};
pub use journal::{Commit, Journal, Recovered};
pub use layout::MAX_FRAME;
pub use outbox::{Flush, Frame, MAX_FRAME_KEYS, MAX_FRAMES};
pub use page::{Heirs, SharedPage};
pub use scratch::Scratch;
pub use sections::SectionError;
pub use socket::Peeked;
pub use stream::{MAX_MESSAGE_KEYS, Stream, TooManyKeys};

#[cfg(test)]
pub(crate) use crash::plan;

use std::io;
use std::os::fd::BorrowedFd;

/// Names a descriptor that somebody holds for us. Never used twice for a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FdKey(pub u64);

/// Whoever holds descriptors for a process that may die at any moment, and gives them to the next
/// one.
pub trait Holder: Send {
    /// Has a descriptor held under a key. When this returns, it is safe: whatever happens to this
    /// process, the next one gets it.
    ///
    /// # Errors
    /// When it can't be handed over: too many descriptors are on their way, or the holder has gone.
    fn store(&mut self, key: FdKey, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// It is not needed any more.
    fn forget(&mut self, key: FdKey);
}

/// A connection to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamId {
    /// On which it sends its requests.
    Client,
    /// On which it gets ours.
    Twin,
}

impl StreamId {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Client, Self::Twin];
}

/// A part of what is saved of a function. Each is saved as a whole, when it has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SectionId {
    /// What was negotiated with the peer, and what is under way with it.
    Session,
    /// What the peer has set up, but for its memory: interrupts.
    Wiring,
    /// The function's registers.
    Function,
    /// What lies behind them.
    Device,
    /// A part of the memory that the peer has shared.
    Windows(Part),
}

/// One of the parts of what is too much to be saved as a whole whenever a little of it changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Part(u8);

impl Part {
    /// All of them.
    pub const ALL: [Self; 16] = {
        let mut all = [Self(0); 16];
        let mut index = 0;
        while index < 16 {
            all[index as usize] = Self(index);
            index += 1;
        }
        all
    };

    /// Its place among them.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl SectionId {
    /// All of them.
    pub const ALL: [Self; 4 + Part::ALL.len()] = {
        let mut all = [Self::Session; 4 + Part::ALL.len()];
        (all[1], all[2], all[3]) = (Self::Wiring, Self::Function, Self::Device);
        let mut part = 0;
        while part < Part::ALL.len() {
            all[4 + part] = Self::Windows(Part::ALL[part]);
            part += 1;
        }
        all
    };

    /// Its place among them.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Session => 0,
            Self::Wiring => 1,
            Self::Function => 2,
            Self::Device => 3,
            Self::Windows(part) => 4 + part.index(),
        }
    }

    /// How long it may be, in bytes.
    #[must_use]
    pub const fn room(self) -> usize {
        match self {
            Self::Session => 64 << 10,
            // A message and some.
            Self::Wiring => 2 << 20,
            // Of as many windows as a peer may have, its share, of 46 bytes each at most.
            Self::Windows(_) => 4096 * 48,
            Self::Function => 128 << 10,
            Self::Device => 1 << 20,
        }
    }
}
