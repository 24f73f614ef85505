//! State that outlives the process: what another process needs to go on in this one's place.
//!
//! It lies in a memory file that somebody else holds as well. A process can be killed between any two
//! instructions, but what it has stored is there, in the order in which it was stored: no write is
//! ever lost or moved, since the memory is the kernel's and not a disk's. So every change is made of
//! single stores of which each leaves a state that another process can go on from.

mod memory;
mod scratch;

pub use scratch::Scratch;

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
