//! Moves messages, and the file descriptors that travel with them, over a UNIX stream socket.
//!
//! [`Receiver`] and [`Sender`] hold the state of one direction each and never block by themselves:
//! on a non-blocking socket they stop where the socket does and go on there, on a blocking socket
//! with a timeout they return [`Received::Pending`] when it expires. In steady state neither of them
//! allocates: a message is borrowed from the receiver's buffer, and a reply is written into the
//! sender's.
//!
//! The two are all that knows about sockets. Another channel, such as rings in shared memory, finds
//! its place beside them: it hands out the same [`Received`] and takes the same replies.
#![forbid(unsafe_code)]

mod descriptors;
mod message;
mod receiver;
mod sender;

#[cfg(test)]
mod tests;

pub use message::{Frame, Message};
pub use receiver::{Received, Receiver};
pub use sender::{Flush, Sender};

use rustix::io::Errno;
use thiserror::Error;

use crate::wire::{HeaderError, MessageId};

/// The largest buffer that is kept between messages, in bytes. What a larger message needed is given
/// back after it: a process with hundreds of connections has no megabyte for each.
const KEPT_BUFFER: usize = 64 << 10;

/// Why a stream can't go on. The session ends; everything else is answered and survived.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The stream has lost its framing.
    #[error("framing lost: {error}")]
    Framing {
        /// The id of the message that can't be believed, for a farewell reply.
        id: MessageId,
        /// Its command number.
        command: u16,
        /// What is wrong with it.
        error: HeaderError,
    },
    /// The peer went away in the middle of a message.
    #[error("the peer closed the connection in the middle of a message")]
    Truncated,
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(Errno),
}
