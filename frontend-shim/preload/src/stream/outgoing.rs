//! What the VMM has sent: where its messages end, and which answers it waits for.

use barkeep_protocol::wire::limits::HEADER_SIZE;
use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind};

/// Follows the VMM's bytes. Between two messages, and only there, others may be sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Outgoing {
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// In the first bytes of a message: these.
    Start(Vec<u8>),
    /// So many bytes of a message are left.
    Rest(usize),
    /// These are no messages.
    Lost,
}

impl Default for State {
    fn default() -> Self {
        Self::Start(Vec::new())
    }
}

/// A message that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// A command that gets an answer.
    Asked(MessageId),
    /// An answer, or a command without one.
    Told,
}

/// What a piece of the VMM's stream was about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) begun: Vec<Begun>,
    /// Something may have changed what the device decodes.
    pub(super) configures: bool,
}

/// Region index of the configuration space.
const CONFIG: u32 = 7;
/// Header, offset and index of an access: as much of a message as is looked at.
const LOOKED_AT: usize = HEADER_SIZE + 12;

impl Outgoing {
    /// Whether the VMM's next byte begins a message.
    pub(super) fn at_boundary(&self) -> bool {
        matches!(&self.state, State::Start(start) if start.is_empty())
    }

    pub(super) fn is_lost(&self) -> bool {
        matches!(self.state, State::Lost)
    }

    /// The VMM sends `count` more bytes, of which `read` reads some from a place in them on, and says
    /// whether it could.
    pub(super) fn pass(
        &mut self,
        count: usize,
        read: impl Fn(usize, &mut [u8]) -> bool,
    ) -> Passed {
        let mut passed = Passed::default();
        let mut at = 0;
        while at < count {
            match &mut self.state {
                State::Lost => break,
                State::Rest(left) => {
                    let some = (count - at).min(*left);
                    at += some;
                    *left -= some;
                    if *left == 0 {
                        self.state = State::default();
                    }
                }
                State::Start(start) => {
                    let wanted = wanted(start);
                    let had = start.len();
                    let some = (count - at).min(wanted - had);
                    start.resize(had + some, 0);
                    if !read(at, &mut start[had..]) {
                        self.state = State::Lost;
                        break;
                    }
                    at += some;
                    if start.len() == wanted {
                        self.state = begin(start, &mut passed);
                    }
                }
            }
        }
        passed
    }
}

/// How much of a message is looked at, as far as is known.
fn wanted(start: &[u8]) -> usize {
    let header = start.first_chunk().and_then(|header| Header::parse(header).ok());
    header.map_or(HEADER_SIZE, |header| size(&header).min(LOOKED_AT))
}

/// Of the whole message, in bytes.
fn size(header: &Header) -> usize {
    header.body_size as usize + HEADER_SIZE
}

fn begin(start: &[u8], passed: &mut Passed) -> State {
    let Some(Ok(header)) = start.first_chunk().map(Header::parse) else { return State::Lost };
    let wanted = size(&header).min(LOOKED_AT);
    if start.len() < wanted {
        return State::Start(start.to_vec());
    }
    passed.begun.push(match header.kind {
        MessageKind::Command { no_reply: false } => Begun::Asked(header.id),
        _ => Begun::Told,
    });
    passed.configures |= configures(&header, start);
    match size(&header) - start.len() {
        0 => State::default(),
        left => State::Rest(left),
    }
}

fn configures(header: &Header, start: &[u8]) -> bool {
    if !matches!(header.kind, MessageKind::Command { .. }) {
        return false;
    }
    match Command::try_from(header.command) {
        Ok(Command::RegionWrite) => {
            let region = start.get(HEADER_SIZE + 8..LOOKED_AT).and_then(<[u8]>::first_chunk);
            region.is_some_and(|region| u32::from_ne_bytes(*region) == CONFIG)
        }
        Ok(Command::Reset | Command::RegionWriteMulti | Command::DeviceFeature) => true,
        _ => false,
    }
}
