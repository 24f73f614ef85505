//! A session as a script: whole messages with a right header, or any bytes, with descriptors.
//!
//! ```text
//! script  := function:u8 step*            bit 7 of function: VERSION was negotiated before
//! step    := kind:u8 fd:u8{kind & 0xf} (message | raw)
//! message := command:u8 flags:u8 length:u16 body      if bit 7 of kind is clear
//! raw     := length:u16 bytes                          if it is set
//! ```
//! A count of 15 descriptors means one more than a message may have, all of one kind. Commands from
//! 0x80 on are barkeep's extensions, from 0x8000 on.

use crate::Input;

/// One thing that a client sends.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// Kinds of descriptors, for whoever has some.
    pub fds: Vec<u8>,
    pub what: What<'a>,
}

/// What goes with the descriptors.
#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// A message. `length` is what its header claims of the body, which may have ended early.
    Message { command: u16, flags: u8, length: u16, body: &'a [u8] },
    /// Bytes that may be anything.
    Raw(&'a [u8]),
}

const MANY: usize = 15;
const RAW: u8 = 0x80;
/// VERSION was negotiated before the script starts.
pub const GREETED: u8 = 0x80;

impl<'a> Step<'a> {
    /// Takes the next step, or `None` at the end.
    pub fn take(input: &mut Input<'a>) -> Option<Self> {
        if input.is_empty() {
            return None;
        }
        let kind = input.u8();
        let fds = match usize::from(kind & 0xf) {
            MANY => vec![input.u8(); 17],
            count => (0..count).map(|_| input.u8()).collect(),
        };
        let what = if kind & RAW == 0 {
            let command = match input.u8() {
                extension @ 0x80.. => 0x8000 | u16::from(extension & 0x7f),
                command => command.into(),
            };
            let (flags, length) = (input.u8(), input.u16());
            What::Message { command, flags, length, body: input.bytes(length.into()) }
        } else {
            let length = input.u16();
            What::Raw(input.bytes(length.into()))
        };
        Some(Self { fds, what })
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
