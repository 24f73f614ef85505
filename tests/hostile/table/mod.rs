//! Rows of bytes and descriptors, each with what must come back: the language that `rows` is
//! written in.

pub(crate) mod descriptor;
pub(crate) mod play;
pub(crate) mod process;

use barkeep_tests::peer::message::{COMMAND, message};
use rustix::io::Errno;

pub(crate) use self::descriptor::Fd;

/// One way to be hostile, by name.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) start: Start,
    pub(crate) function: Function,
    pub(crate) script: Vec<Exchange>,
}

/// What the client and the backend have said to each other before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Nothing.
    Silent,
    /// A version without extensions.
    Plain,
    /// A version with every extension.
    Greeted,
}

/// Which of the backend's functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    Edu,
    /// `ivshmem,size=64K`
    Ivshmem,
}

/// What is sent, and what must come of it.
#[derive(Clone, Debug)]
pub(crate) struct Exchange {
    /// The bytes; those that are a message get an id of their own.
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<Fd>,
    pub(crate) expect: Expect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// A reply that reports success.
    Success,
    /// The same, with a payload of so many bytes.
    Payload(usize),
    /// An error reply.
    Fails(Errno),
    /// An error reply with whatever errno.
    Refused,
    /// A reply of either kind.
    Reply,
    /// An error reply, and the end of the session.
    FailsAndCloses(Errno),
    /// The end of the session without a word.
    Closes,
    /// Nothing, and the session goes on.
    Silence,
    /// Nothing, because the message has not ended.
    Waits,
}

impl Expect {
    /// Nothing of the session is left to look at.
    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::FailsAndCloses(_) | Self::Closes | Self::Waits)
    }
}

/// A row for a client of the edu that has negotiated everything.
pub(crate) fn row(name: impl Into<String>, script: impl Into<Vec<Exchange>>) -> Row {
    let (name, script) = (name.into(), script.into());
    Row { name, start: Start::Greeted, function: Function::Edu, script }
}

impl Row {
    /// Nothing has been said before.
    pub(crate) fn silent(self) -> Self {
        Self { start: Start::Silent, ..self }
    }

    /// No extension was negotiated.
    pub(crate) fn plain(self) -> Self {
        Self { start: Start::Plain, ..self }
    }

    /// For a client of the ivshmem.
    pub(crate) fn of_ivshmem(self) -> Self {
        Self { function: Function::Ivshmem, ..self }
    }
}

/// Something to send.
#[derive(Clone, Debug)]
pub(crate) struct Bytes {
    bytes: Vec<u8>,
    fds: Vec<Fd>,
}

/// A command.
pub(crate) fn msg(command: u16, body: impl AsRef<[u8]>) -> Bytes {
    flagged(command, COMMAND, body)
}

/// A message with flags of the row's choice.
pub(crate) fn flagged(command: u16, flags: u32, body: impl AsRef<[u8]>) -> Bytes {
    raw(message(0, command, flags, body.as_ref()))
}

/// Bytes that start as a header does, with an id.
pub(crate) fn raw(bytes: impl Into<Vec<u8>>) -> Bytes {
    Bytes { bytes: bytes.into(), fds: Vec::new() }
}

impl Bytes {
    /// With descriptors.
    pub(crate) fn with(self, fds: impl Into<Vec<Fd>>) -> Self {
        Self { fds: fds.into(), ..self }
    }

    pub(crate) fn expects(self, expect: Expect) -> Exchange {
        Exchange { bytes: self.bytes, fds: self.fds, expect }
    }

    pub(crate) fn succeeds(self) -> Exchange {
        self.expects(Expect::Success)
    }

    pub(crate) fn fails(self, errno: Errno) -> Exchange {
        self.expects(Expect::Fails(errno))
    }

    pub(crate) fn fails_and_closes(self) -> Exchange {
        self.expects(Expect::FailsAndCloses(Errno::INVAL))
    }

    pub(crate) fn gets_nothing(self) -> Exchange {
        self.expects(Expect::Silence)
    }
}

/// Rows of one refused message each.
pub(crate) fn refused<const N: usize>(
    command: u16,
    errno: Errno,
    bodies: [(&str, Vec<u8>); N],
) -> impl Iterator<Item = Row> {
    bodies.map(|(name, body)| row(name, [msg(command, body).fails(errno)])).into_iter()
}
