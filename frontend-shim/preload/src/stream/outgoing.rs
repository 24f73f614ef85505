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
    /// A command that gets an answer, and its code.
    Asked(MessageId, u16),
    /// An answer, or a command without one.
    Told,
}

/// What a piece of the VMM's stream was about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) begun: Vec<Begun>,
    /// Something may have changed what the device decodes.
    pub(super) configured: Option<Configured>,
}

/// What the VMM's writes to configuration space are about, and whatever may be like one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Configured {
    /// BARs may be elsewhere.
    pub(super) moves: bool,
    /// Memory is enabled, behind whatever moved.
    pub(super) enables: bool,
}

/// Region index of configuration space.
const CONFIG: u32 = 7;
/// Where the data of a write begins, behind offset, region and count.
const DATA: usize = HEADER_SIZE + 16;
/// As much of a message as is looked at: no register of interest is longer than 8 bytes.
const LOOKED_AT: usize = DATA + 8;
/// Where COMMAND is, and its bit for memory (PCI 3.0, 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u8 = 1 << 1;
/// Where the BARs are (PCI 3.0, 6.2.5.1).
const BARS: std::ops::Range<u64> = 0x10..0x28;

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
    pub(super) fn pass(&mut self, count: usize, read: impl Fn(usize, &mut [u8]) -> bool) -> Passed {
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
        MessageKind::Command { no_reply: false } => Begun::Asked(header.id, header.command),
        _ => Begun::Told,
    });
    if let Some(new) = configured(&header, start) {
        let old = passed.configured.unwrap_or_default();
        let enables = new.enables || old.enables && !new.moves;
        passed.configured = Some(Configured { moves: old.moves || new.moves, enables });
    }
    match size(&header) - start.len() {
        0 => State::default(),
        left => State::Rest(left),
    }
}

fn configured(header: &Header, start: &[u8]) -> Option<Configured> {
    if !matches!(header.kind, MessageKind::Command { .. }) {
        return None;
    }
    match Command::try_from(header.command) {
        Ok(Command::RegionWrite) => {
            let (access, data) = start.get(HEADER_SIZE..)?.split_at_checked(DATA - HEADER_SIZE)?;
            let offset = u64::from_ne_bytes(*access.first_chunk()?);
            let region = u32::from_ne_bytes(*access.get(8..)?.first_chunk()?);
            if region != CONFIG {
                return None;
            }
            let count = header.body_size as usize + HEADER_SIZE - DATA;
            let end = offset.saturating_add(count as u64);
            let at = COMMAND.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
            let command = at.and_then(|at| data.get(at));
            Some(Configured {
                moves: offset < BARS.end && end > BARS.start,
                enables: command.is_some_and(|command| command & COMMAND_MEMORY != 0),
            })
        }
        Ok(Command::Reset | Command::RegionWriteMulti | Command::DeviceFeature) => {
            Some(Configured { moves: true, enables: false })
        }
        _ => None,
    }
}
