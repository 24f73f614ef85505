//! A session as a script: whole messages with a right header, or any bytes, with descriptors; and
//! what takes more than bytes to say, as answers to the server's own commands.
//!
//! ```text
//! script   := function:u8 step*            see below for the bits of function
//! step     := kind:u8 fd:u8{kind & 0xf} (message | raw)       if bits 6..4 of kind are 0 or 1
//!           | kind:u8 answer | migrate | truncate | hang up   if they are 2, 3, 4, 5
//! message  := command:u8 flags:u8 length:u16 body             if bit 7 of kind is clear
//! raw      := length:u16 bytes                                if it is set
//! answer   := how:u8 byte:u8
//! migrate  := at:u16 flip:u8
//! truncate := pages:u8
//! ```
//! A count of 15 descriptors means one more than a message may have, all of one kind. Commands from
//! 0x80 on are barkeep's extensions, from 0x8000 on. With 1 in bits 6..4 of kind, the twin socket is
//! meant, if there is one.

use crate::Input;

/// One thing that a client does.
#[derive(Clone, Debug)]
pub enum Step<'a> {
    /// It sends something.
    Send {
        /// Over the twin socket, if there is one.
        twin: bool,
        /// Kinds of descriptors, for whoever has some.
        fds: Vec<u8>,
        /// What goes with them.
        what: What<'a>,
    },
    /// It answers the oldest command of the server.
    Answer { how: How, byte: u8 },
    /// It moves the function's state out and in again, with one byte changed if `flip` is not 0.
    Migrate { at: u16, flip: u8 },
    /// It gives a file that it shared another length.
    Truncate { pages: u8 },
    /// It closes the twin socket.
    HangUp,
}

/// What goes with the descriptors.
#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// A message. `length` is what its header claims of the body, which may have ended early.
    Message { command: u16, flags: u8, length: u16, body: &'a [u8] },
    /// Bytes that may be anything.
    Raw(&'a [u8]),
}

/// How a command of the server is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum How {
    /// As the specification says.
    Spec,
    /// As QEMU does.
    Qemu,
    /// With an error.
    Error,
    /// Never.
    Never,
    /// With another id.
    OtherId,
    /// With another address.
    OtherAddress,
    /// Without its last byte.
    Short,
    /// With a descriptor.
    Descriptor,
}

impl How {
    /// By number.
    pub const ALL: [Self; 8] = [
        Self::Spec,
        Self::Qemu,
        Self::Error,
        Self::Never,
        Self::OtherId,
        Self::OtherAddress,
        Self::Short,
        Self::Descriptor,
    ];
}

const MANY: usize = 15;
const RAW: u8 = 0x80;
const WHAT_SHIFT: u32 = 4;
const WHAT: u8 = 7 << WHAT_SHIFT;
const TWIN: u8 = 1 << WHAT_SHIFT;
const ANSWER: u8 = 2 << WHAT_SHIFT;
const MIGRATE: u8 = 3 << WHAT_SHIFT;
const TRUNCATE: u8 = 4 << WHAT_SHIFT;
const HANG_UP: u8 = 5 << WHAT_SHIFT;

/// VERSION was negotiated before the script starts.
pub const GREETED: u8 = 0x80;
/// With a twin socket.
pub const WITH_TWIN: u8 = 0x40;
/// As QEMU negotiates.
pub const LIKE_QEMU: u8 = 0x20;
/// Each command of the server is answered at once.
pub const ANSWERS: u8 = 0x10;
/// Which device it is.
pub const DEVICE: u8 = 0x0f;

impl<'a> Step<'a> {
    /// Takes the next step, or `None` at the end.
    pub fn take(input: &mut Input<'a>) -> Option<Self> {
        if input.is_empty() {
            return None;
        }
        let kind = input.u8();
        Some(match kind & WHAT {
            ANSWER => {
                let how = How::ALL[usize::from(input.u8()) % How::ALL.len()];
                Self::Answer { how, byte: input.u8() }
            }
            MIGRATE => Self::Migrate { at: input.u16(), flip: input.u8() },
            TRUNCATE => Self::Truncate { pages: input.u8() },
            HANG_UP => Self::HangUp,
            twin => {
                let fds = match usize::from(kind & 0xf) {
                    MANY => vec![input.u8(); 17],
                    count => (0..count).map(|_| input.u8()).collect(),
                };
                let what = What::take(input, kind & RAW != 0);
                Self::Send { twin: twin == TWIN, fds, what }
            }
        })
    }
}

impl<'a> What<'a> {
    fn take(input: &mut Input<'a>, raw: bool) -> Self {
        if raw {
            let length = input.u16();
            return Self::Raw(input.bytes(length.into()));
        }
        let command = match input.u8() {
            extension @ 0x80.. => 0x8000 | u16::from(extension & 0x7f),
            command => command.into(),
        };
        let (flags, length) = (input.u8(), input.u16());
        Self::Message { command, flags, length, body: input.bytes(length.into()) }
    }
}

/// The bytes of a script, for the corpus.
#[derive(Clone, Debug)]
pub struct Script(Vec<u8>);

impl Script {
    #[must_use]
    pub fn new(function: u8) -> Self {
        Self(vec![function])
    }

    /// Appends a message.
    #[must_use]
    pub fn message(mut self, fds: &[u8], command: u16, flags: u8, body: &[u8]) -> Self {
        self.start(0, fds);
        let [low, high] = command.to_le_bytes();
        self.0.extend([low | high & 0x80, flags]);
        self.sized(body)
    }

    /// Appends bytes as they are.
    #[must_use]
    pub fn raw(mut self, fds: &[u8], bytes: &[u8]) -> Self {
        self.start(RAW, fds);
        self.sized(bytes)
    }

    /// Appends bytes over the twin socket.
    #[must_use]
    pub fn twin(mut self, fds: &[u8], bytes: &[u8]) -> Self {
        self.start(RAW | TWIN, fds);
        self.sized(bytes)
    }

    /// Appends an answer to the server.
    #[must_use]
    pub fn answer(mut self, how: How, byte: u8) -> Self {
        self.0.extend([ANSWER, how as u8, byte]);
        self
    }

    /// Appends a migration.
    #[must_use]
    pub fn migrate(mut self, at: u16, flip: u8) -> Self {
        let [low, high] = at.to_le_bytes();
        self.0.extend([MIGRATE, low, high, flip]);
        self
    }

    /// Appends a change of the shared file's length.
    #[must_use]
    pub fn truncate(mut self, pages: u8) -> Self {
        self.0.extend([TRUNCATE, pages]);
        self
    }

    /// Appends the end of the twin socket.
    #[must_use]
    pub fn hang_up(mut self) -> Self {
        self.0.push(HANG_UP);
        self
    }

    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.0
    }

    fn start(&mut self, kind: u8, fds: &[u8]) {
        assert!(fds.len() < MANY);
        self.0.push(kind | u8::try_from(fds.len()).expect("few"));
        self.0.extend(fds);
    }

    fn sized(mut self, bytes: &[u8]) -> Self {
        let length = u16::try_from(bytes.len()).expect("a seed is small");
        self.0.extend(length.to_le_bytes());
        self.0.extend(bytes);
        self
    }
}
