use std::time::Duration;

use barkeep_protocol::transport::TransportError;
use barkeep_protocol::wire::{Errno, WireError};
use thiserror::Error;

/// Why a request has no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers at the socket.
    #[error("can't connect: {0}")]
    Connect(Errno),
    /// The server speaks another version than it was offered.
    #[error("server speaks version {major}.{minor}")]
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// The session had ended before any of this request was sent: nothing was done, and it may be asked
    /// again in another session.
    #[error("the backend is gone")]
    Gone,
    /// The session ended before the answer came. Whether the backend has done it, nobody knows: it must
    /// not be asked again.
    #[error("the backend went away before it answered")]
    Lost,
    /// The backend is silent.
    #[error("no answer within {0:?}")]
    Deadline(Duration),
    /// The connection failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The backend refused this request; the session goes on.
    #[error("the backend refused: {0}")]
    Refused(Errno),
    /// A reply does not have the form that the protocol asks for.
    #[error("bad reply: {0}")]
    Malformed(#[from] WireError),
    /// The backend broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// The server did not offer this extension.
    #[error("the server does not offer {0}")]
    NotOffered(&'static str),
    /// The host refused a descriptor.
    #[error("descriptor: {0}")]
    Host(#[source] std::io::Error),
    /// What is asked for is beyond what the protocol can say.
    #[error("can't be asked: {0}")]
    Request(#[source] WireError),
    /// A transfer above what was negotiated.
    #[error("{0} bytes are more than one transfer takes")]
    TooLarge(usize),
}

impl ClientError {
    /// Whether nothing of the request has reached the backend, nor ever will.
    #[must_use]
    pub fn is_unsent(&self) -> bool {
        matches!(self, Self::Gone)
    }

    /// Whether nothing more can be asked on this connection.
    #[must_use]
    pub fn ends_session(&self) -> bool {
        match self {
            Self::Refused(_)
            | Self::NotOffered(_)
            | Self::TooLarge(_)
            | Self::Request(_)
            | Self::Host(_) => false,
            // The stream itself is intact, but this peer's words can't be trusted.
            Self::Malformed(_)
            | Self::Protocol(_)
            | Self::Connect(_)
            | Self::Version { .. }
            | Self::Gone
            | Self::Lost
            | Self::Deadline(_)
            | Self::Transport(_) => true,
        }
    }
}
