use rustix::io::Errno;
use thiserror::Error;

/// A header that can't be believed: where the next message starts is unknown, so the session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// The size field is smaller than the header itself.
    #[error("message size {0} is smaller than its header")]
    Size(u32),
    /// The type bits are neither command nor reply.
    #[error("message type {0:#x} is neither command nor reply")]
    Type(u32),
}

/// A well-framed message whose content the protocol does not allow.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// The command number is in no version of the protocol.
    #[error("unknown command {0}")]
    UnknownCommand(u16),
    /// The command exists, but not from this side, or it is not implemented.
    #[error("command {0:?} is not supported here")]
    Unsupported(super::Command),
    /// The payload has the wrong length for its command.
    #[error("payload of {actual} bytes where {expected} are needed")]
    Length {
        /// What the command needs.
        expected: usize,
        /// What arrived.
        actual: usize,
    },
    /// The message is longer than this side accepts; its body was drained.
    #[error("message of {0} bytes is longer than the limit")]
    TooLong(u32),
    /// More file descriptors than announced in `max_msg_fds`, or than the command takes.
    #[error("too many file descriptors")]
    TooManyFds,
    /// An `argsz` that can't hold the fixed part of the answer.
    #[error("argsz {0} is too small")]
    ArgumentSize(u32),
    /// Flag bits that are unknown or that exclude each other.
    #[error("flags {0:#x} are not valid here")]
    Flags(u32),
    /// A transfer, or a bitmap, above `max_data_xfer_size`.
    #[error("transfer of {0} bytes is above max_data_xfer_size")]
    Transfer(u64),
    /// A count that does not go with the rest of the message.
    #[error("count {0} is not valid here")]
    Count(u64),
    /// A range that is empty where it must not be, or that ends behind the last address.
    #[error("{size:#x} bytes at {address:#x} are no range")]
    Range {
        /// First address.
        address: u64,
        /// Length in bytes.
        size: u64,
    },
    /// A page size that is no power of two.
    #[error("page size {0:#x} is no power of two")]
    PageSize(u64),
    /// A bitmap too small for its range.
    #[error("bitmap of {actual} bytes where {expected} are needed")]
    Bitmap {
        /// What the range needs.
        expected: u64,
        /// What there is room for.
        actual: u64,
    },
    /// A device feature that vfio-user does not have.
    #[error("unknown device feature {0}")]
    UnknownFeature(u16),
    /// No migration state, or none that can be asked for.
    #[error("migration state {0} is not valid here")]
    MigrationState(u32),
    /// An index into the file descriptors of the message that is not one of them.
    #[error("file descriptor {0} did not come with the message")]
    FdIndex(u64),
    /// A reply that speaks of something else than its command.
    #[error("the reply does not repeat its command")]
    Mismatch,
    /// The major version is not ours.
    #[error("protocol major version {0} is not spoken here")]
    MajorVersion(u16),
    /// The VERSION data is not the JSON that the protocol asks for.
    #[error("version data: {0}")]
    VersionData(String),
}

impl WireError {
    /// The errno of the error reply.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unsupported(_) => Errno::NOTSUP,
            // As VFIO: the specification names no errno for a feature that it has not.
            Self::UnknownFeature(_) => Errno::NOTTY,
            _ => Errno::INVAL,
        }
    }
}
