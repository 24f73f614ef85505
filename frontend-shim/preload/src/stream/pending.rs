//! Who waits for which answer: the VMM's commands, and our own.

use std::collections::HashMap;

use barkeep_protocol::wire::{BarkeepExtensions, Command, Header, MessageId, MessageKind};

use super::incoming::{Answer, Expected};
use super::outgoing::Begun;
use crate::device::Decode;

/// Commands that have no answer yet.
#[derive(Debug)]
pub(super) struct Pending {
    theirs: Ids,
    ours: HashMap<MessageId, Ask>,
    /// The VMM's that configure the device, and what it decoded before.
    configuring: Vec<(MessageId, Decode)>,
    /// The VMM's last id.
    last: MessageId,
    pub(super) greeting: Greeting,
    /// Nothing more is asked: the stream ends, or what passes in it is not understood.
    pub(super) closed: bool,
    /// The server has not answered in time, and nothing has come from it since.
    pub(super) silent: bool,
    /// One of our threads waits for the socket; the others wait to be told.
    pub(super) watched: bool,
}

/// How far the handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The answer to the VMM's VERSION, which has this id, has not come yet.
    Asked(MessageId),
    /// It has. `None`: the server is no barkeep.
    Answered(Option<BarkeepExtensions>),
}

#[derive(Debug)]
struct Ask {
    command: Command,
    state: AskState,
}

#[derive(Debug)]
enum AskState {
    Waiting,
    /// Nobody waits any more, but the answer may still come.
    Abandoned,
    Answered(Answer),
}

/// Far from any id that the VMM will use soon.
const FAR: u16 = 0x8000;
/// Of ours without an answer. A server that answers none of so many is not asked any more.
const MOST: usize = 64;

impl Pending {
    /// After a VERSION with this id.
    pub(super) fn new(hello: MessageId) -> Self {
        let mut theirs = Ids::default();
        theirs.insert(hello);
        Self {
            theirs,
            ours: HashMap::new(),
            configuring: Vec::new(),
            last: hello,
            greeting: Greeting::Asked(hello),
            closed: false,
            silent: false,
            watched: false,
        }
    }

    /// Whether the server may be asked something.
    pub(super) fn may_ask(&self) -> bool {
        !self.closed && !self.silent && self.ours.len() < MOST
    }

    /// Whether the VMM waits for nothing.
    pub(super) fn vmm_waits(&self) -> bool {
        !self.theirs.is_empty()
    }

    /// Whether an answer to us may still come.
    pub(super) fn owes_us(&self) -> bool {
        self.ours.values().any(|ask| !matches!(ask.state, AskState::Answered(_)))
    }

    /// The VMM is about to send this.
    pub(super) fn begins(&mut self, begun: Begun) {
        let Begun::Asked(id, command) = begun else { return };
        self.last = id;
        self.theirs.insert(id);
        // It comes round to an id of ours. The answer to us may still come, and is told by its command; where
        // that is the same, the VMM must have its own.
        let same =
            |ask: &Ask| matches!(ask.state, AskState::Abandoned) && ask.command.code() == command;
        if self.ours.get(&id).is_some_and(same) {
            self.ours.remove(&id);
        }
    }

    /// This one of the VMM's may change what the device decodes, so far this.
    pub(super) fn configures(&mut self, id: MessageId, before: Decode) {
        self.configuring.retain(|(other, _)| *other != id);
        if self.configuring.len() < MOST {
            self.configuring.push((id, before));
        }
    }

    /// What the device decoded before the VMM asked what this answers, if that may have changed it.
    pub(super) fn configured(&mut self, header: &Header) -> Option<Decode> {
        let MessageKind::Reply { .. } = header.kind else { return None };
        let at = self.configuring.iter().position(|(id, _)| *id == header.id)?;
        Some(self.configuring.swap_remove(at).1)
    }

    /// The VMM has an answer. Returns whether it was seen to ask.
    pub(super) fn answered(&mut self, header: &Header) -> bool {
        match header.kind {
            MessageKind::Reply { .. } => self.theirs.remove(header.id),
            MessageKind::Command { .. } => true,
        }
    }

    /// An id for a command of ours, which nobody else uses.
    pub(super) fn ask(&mut self, command: Command) -> Option<MessageId> {
        let free = |id: &MessageId| !self.theirs.contains(*id) && !self.ours.contains_key(id);
        let id = (0..FAR).map(|n| MessageId(self.last.0.wrapping_add(FAR + n))).find(free)?;
        self.ours.insert(id, Ask { command, state: AskState::Waiting });
        Some(id)
    }

    /// It was never sent.
    pub(super) fn forget(&mut self, id: MessageId) {
        self.ours.remove(&id);
    }

    /// Nobody waits for it any more.
    pub(super) fn abandon(&mut self, id: MessageId) {
        if let Some(ask) = self.ours.get_mut(&id) {
            ask.state = AskState::Abandoned;
        }
    }

    /// It has come.
    pub(super) fn deliver(&mut self, answer: Answer) {
        self.silent = false;
        let Some(ask) = self.ours.get_mut(&answer.id) else { return };
        if matches!(ask.state, AskState::Abandoned) {
            self.ours.remove(&answer.id);
        } else {
            ask.state = AskState::Answered(answer);
        }
    }

    /// The answer, if it has come.
    pub(super) fn take(&mut self, id: MessageId) -> Option<Answer> {
        if !matches!(self.ours.get(&id)?.state, AskState::Answered(_)) {
            return None;
        }
        match self.ours.remove(&id)?.state {
            AskState::Answered(answer) => Some(answer),
            _ => None,
        }
    }
}

impl Expected for Pending {
    fn is_ours(&self, header: &Header) -> bool {
        let MessageKind::Reply { .. } = header.kind else { return false };
        let Some(ask) = self.ours.get(&header.id) else { return false };
        if matches!(ask.state, AskState::Answered(_)) {
            return false;
        }
        // Where the VMM waits for the same id, the command tells.
        !self.theirs.contains(header.id) || header.command == ask.command.code()
    }

    fn is_welcome(&self, header: &Header) -> bool {
        matches!(header.kind, MessageKind::Reply { .. })
            && self.greeting == Greeting::Asked(header.id)
    }

    fn any(&self) -> bool {
        matches!(self.greeting, Greeting::Asked(_)) || self.owes_us()
    }
}

/// A set of message ids.
#[derive(Debug)]
struct Ids {
    words: Box<[u64; 1024]>,
    count: usize,
}

impl Default for Ids {
    fn default() -> Self {
        Self { words: Box::new([0; 1024]), count: 0 }
    }
}

impl Ids {
    fn insert(&mut self, id: MessageId) {
        if !self.contains(id) {
            self.words[Self::word(id)] |= Self::bit(id);
            self.count += 1;
        }
    }

    /// Returns whether it was there.
    fn remove(&mut self, id: MessageId) -> bool {
        let there = self.contains(id);
        if there {
            self.words[Self::word(id)] &= !Self::bit(id);
            self.count -= 1;
        }
        there
    }

    fn contains(&self, id: MessageId) -> bool {
        self.words[Self::word(id)] & Self::bit(id) != 0
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn word(id: MessageId) -> usize {
        usize::from(id.0 / 64)
    }

    fn bit(id: MessageId) -> u64 {
        1 << (id.0 % 64)
    }
}
