//! The server's own commands: DMA_READ and DMA_WRITE.
//!
//! They are sent after the reply to the request that caused them: QEMU answers nothing while it waits
//! for a reply, and would wait for ever.

use barkeep_protocol::transport::Sender;
use barkeep_protocol::wire::{
    Command, DmaLayout, DmaTransfer, Errno, Header, MessageId, MessageKind,
};
use serde::{Deserialize, Serialize};

use super::peer::Peer;
use super::served::Served;
use crate::devices::{MemoryMessage, Payload, Ticket};
use crate::dma::{DmaError, Iova};

/// Commands that may wait for their answers. A client that never answers gets no further ones.
const MAX_OUTSTANDING: usize = 16;

/// What was sent and is not answered yet, and how this client lays such messages out.
#[derive(Debug, Default)]
pub(super) struct Commands {
    outstanding: Vec<Outstanding>,
    /// Commands of a predecessor, whose answers mean nothing any more: by id and number.
    late: Vec<(MessageId, u16)>,
    next_id: u16,
    layout: Layout,
}

/// Some versions of QEMU expect the data of a DMA_WRITE 4 bytes earlier than the specification says,
/// and nothing in a message tells: data at the wrong place would be taken. But their reply to a
/// DMA_WRITE has no payload, where the specification has one. So the first command to a client that
/// looks like QEMU is a write of nothing, which all versions accept, and its reply tells. Nobody else
/// is asked: libvfio-user's sample client waits for data that is not to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Layout {
    #[default]
    Unknown,
    Asked(MessageId, DmaTransfer),
    Known(DmaLayout),
}

/// Commands as they outlive the process: what was asked, but not by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedCommands {
    next_id: u16,
    layout: SavedLayout,
    /// Commands without an answer, by id and number.
    waiting: Vec<(u16, u16)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum SavedLayout {
    #[default]
    Unknown,
    Asked {
        id: u16,
        address: u64,
    },
    Spec,
    Qemu,
}

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    id: MessageId,
    ticket: Ticket,
    kind: Kind,
    transfer: DmaTransfer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

impl Kind {
    fn command(self) -> Command {
        match self {
            Self::Read => Command::DmaRead,
            Self::Write => Command::DmaWrite,
        }
    }
}

impl Commands {
    /// What a successor has to know. It begins the function's transfers anew, so the answers to what
    /// was asked here are only to be told from answers to nothing.
    pub(super) fn save(&self) -> SavedCommands {
        let layout = match self.layout {
            Layout::Unknown => SavedLayout::Unknown,
            Layout::Asked(id, nothing) => SavedLayout::Asked { id: id.0, address: nothing.address },
            Layout::Known(DmaLayout::Spec) => SavedLayout::Spec,
            Layout::Known(DmaLayout::Qemu) => SavedLayout::Qemu,
        };
        let outstanding = self.outstanding.iter().map(|it| (it.id.0, it.kind.command().code()));
        let late = self.late.iter().map(|(id, command)| (id.0, *command));
        SavedCommands { next_id: self.next_id, layout, waiting: late.chain(outstanding).collect() }
    }

    /// Those of a predecessor.
    pub(super) fn restored(saved: SavedCommands) -> Self {
        let layout = match saved.layout {
            SavedLayout::Unknown => Layout::Unknown,
            SavedLayout::Asked { id, address } => {
                Layout::Asked(MessageId(id), DmaTransfer { address, count: 0 })
            }
            SavedLayout::Spec => Layout::Known(DmaLayout::Spec),
            SavedLayout::Qemu => Layout::Known(DmaLayout::Qemu),
        };
        let late = saved.waiting.into_iter().map(|(id, command)| (MessageId(id), command));
        Self { outstanding: Vec::new(), late: late.collect(), next_id: saved.next_id, layout }
    }

    /// Queues what the function wants to ask.
    pub(super) fn send(&mut self, function: &mut dyn Served, peer: Peer, sender: &mut Sender) {
        while self.send_one(function, peer, sender) {}
    }

    /// Queues one message, if one may be sent. Returns whether there is one.
    pub(super) fn send_one(
        &mut self,
        function: &mut dyn Served,
        peer: Peer,
        sender: &mut Sender,
    ) -> bool {
        if !self.have_room() {
            return false;
        }
        let Some(address) = function.next_address() else { return false };
        let layout = match (self.layout, peer.dma_layout) {
            (Layout::Known(layout), _) => layout,
            (Layout::Unknown, DmaLayout::Spec) => DmaLayout::Spec,
            (Layout::Unknown, DmaLayout::Qemu) => {
                self.ask_for_layout(address, sender);
                return true;
            }
            (Layout::Asked(..), _) => return false,
        };
        self.layout = Layout::Known(layout);
        let Some(message) = function.next_message(peer.transfer_size) else { return false };
        self.send_message(message, layout, sender);
        true
    }

    /// Whether the client may be asked for something more.
    pub(super) fn have_room(&self) -> bool {
        self.outstanding.len() + self.late.len() < MAX_OUTSTANDING
    }

    /// Whether any of them waits for its answer.
    pub(super) fn are_waiting(&self) -> bool {
        !self.outstanding.is_empty()
    }

    /// Answers in the place of a client that serves no commands any more.
    pub(super) fn refuse(&mut self, function: &mut dyn Served) {
        let refused = |address: u64| DmaError::Refused { address, errno: Errno::PIPE };
        self.late.clear();
        for Outstanding { ticket, transfer, .. } in self.outstanding.drain(..) {
            function.answered(ticket, Err(refused(transfer.address)));
        }
        // A device may begin the next transfer whenever one fails; the rest waits for the next turn.
        for _ in 0..MAX_OUTSTANDING {
            let Some(address) = function.next_address() else { return };
            let Some(message) = function.next_message(usize::MAX) else { return };
            function.answered(message.ticket, Err(refused(address.0)));
        }
    }

    fn ask_for_layout(&mut self, address: Iova, sender: &mut Sender) {
        let id = self.take_id();
        let nothing = DmaTransfer { address: address.0, count: 0 };
        sender.command(id, Command::DmaWrite, false, Vec::new(), |body| {
            nothing.write_data(DmaLayout::Spec, body, |_| ());
        });
        self.layout = Layout::Asked(id, nothing);
    }

    fn send_message(&mut self, message: MemoryMessage, layout: DmaLayout, sender: &mut Sender) {
        let MemoryMessage { ticket, address, payload } = message;
        let id = self.take_id();
        let transfer = DmaTransfer { address: address.0, count: payload.len() as u64 };
        let kind = match &payload {
            Payload::Read(_) => {
                sender.command(id, Command::DmaRead, false, Vec::new(), |body| {
                    transfer.write_to(body)
                });
                Kind::Read
            }
            Payload::Write(data) => {
                sender.command(id, Command::DmaWrite, false, Vec::new(), |body| {
                    transfer.write_data(layout, body, |room| room.copy_from_slice(data));
                });
                Kind::Write
            }
        };
        self.outstanding.push(Outstanding { id, ticket, kind, transfer });
    }

    /// Takes a reply. `false` if nothing was asked that it could answer, or it is not an answer.
    pub(super) fn answered(
        &mut self,
        header: &Header,
        body: &[u8],
        function: &mut dyn Served,
    ) -> bool {
        let MessageKind::Reply { error } = header.kind else { return false };
        if let Layout::Asked(id, nothing) = self.layout
            && id == header.id
            && header.command == Command::DmaWrite.code()
        {
            // Only who looks like QEMU is asked, and what it refuses to tell is believed.
            let layout = match error {
                None => nothing.check_write_reply(body),
                Some(_) => Ok(DmaLayout::Qemu),
            };
            let Ok(layout) = layout else { return false };
            self.layout = Layout::Known(layout);
            return true;
        }
        if let Some(late) = self.late.iter().position(|it| *it == (header.id, header.command)) {
            self.late.swap_remove(late);
            return true;
        }
        let Layout::Known(layout) = self.layout else { return false };
        let matches = |outstanding: &Outstanding| {
            outstanding.id == header.id && outstanding.kind.command().code() == header.command
        };
        let Some(position) = self.outstanding.iter().position(matches) else { return false };
        let Outstanding { ticket, kind, transfer, .. } = self.outstanding.swap_remove(position);
        let refused = |errno: Errno| DmaError::Refused { address: transfer.address, errno };
        match (error, kind) {
            (Some(errno), _) => function.answered(ticket, Err(refused(errno))),
            (None, Kind::Read) => match transfer.parse_read_reply(body, layout) {
                Ok(reply) => function.answered(ticket, Ok(reply.data)),
                Err(_) => return false,
            },
            (None, Kind::Write) => match transfer.check_write_reply(body) {
                Ok(_) => function.answered(ticket, Ok(&[])),
                Err(_) => return false,
            },
        }
        true
    }

    /// Never the id of a command that waits.
    fn take_id(&mut self) -> MessageId {
        loop {
            let id = MessageId(self.next_id);
            self.next_id = self.next_id.wrapping_add(1);
            let late = self.late.iter().any(|(late, _)| *late == id);
            if !late && self.outstanding.iter().all(|outstanding| outstanding.id != id) {
                return id;
            }
        }
    }
}
