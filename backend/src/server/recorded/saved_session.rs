//! What a successor has to know of a client's connection.

use std::time::Instant;

use barkeep_protocol::wire::{BarkeepExtensions, DmaLayout};
use serde::{Deserialize, Serialize};

use crate::server::commands::{Commands, SavedCommands};
use crate::server::desk::{Desk, State};
use crate::server::peer::Peer;
use crate::state::{FdKey, Heirs};

/// A session as it outlives the process. Its streams are recorded apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct SavedSession {
    first: First,
    /// Behind it, where programs that know only the first do not look.
    later: Later,
}

/// What every version has recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct First {
    /// What was negotiated, once it is.
    peer: Option<SavedPeer>,
    twin: Twin,
    commands: SavedCommands,
}

/// What came later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Later {
    /// The extension was negotiated.
    decode_page: bool,
    /// The client has a page.
    has_page: bool,
}

/// The socket for our own commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Twin {
    /// The client did not want one: they go with everything else.
    #[default]
    None,
    /// Our end is held under this key.
    Open(u64),
    /// The client has closed it, and serves no commands any more.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPeer {
    memory_fault: bool,
    region_state: bool,
    transfer_size: u64,
    message_fds: u64,
    qemu_layout: bool,
}

impl SavedSession {
    pub(super) fn new(desk: &Desk, twin: Twin) -> Self {
        let peer = match &desk.state {
            State::Greeting(_) => None,
            State::Ready(peer) => Some(SavedPeer {
                memory_fault: peer.extensions.memory_fault,
                region_state: peer.extensions.region_state,
                transfer_size: peer.transfer_size as u64,
                message_fds: peer.message_fds as u64,
                qemu_layout: peer.dma_layout == DmaLayout::Qemu,
            }),
        };
        let later = match &desk.state {
            State::Greeting(_) => Later::default(),
            State::Ready(peer) => Later {
                decode_page: peer.extensions.decode_page,
                has_page: desk.page.file().is_some(),
            },
        };
        Self { first: First { peer, twin, commands: desk.commands.save() }, later }
    }

    /// As it was recorded, by this version or an earlier one. None if it is damaged.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (first, rest) = postcard::take_from_bytes(bytes).ok()?;
        let later =
            if rest.is_empty() { Later::default() } else { postcard::from_bytes(rest).ok()? };
        Some(Self { first, later })
    }

    pub(super) fn twin(&self) -> Twin {
        self.first.twin
    }

    /// Whether the client has a decode page.
    pub(super) fn has_page(&self) -> bool {
        self.later.has_page
    }

    /// The key of our end of the twin socket, if it is open.
    pub(super) fn twin_key(&self) -> Option<FdKey> {
        match self.first.twin {
            Twin::Open(key) => Some(FdKey(key)),
            Twin::None | Twin::Closed => None,
        }
    }

    /// The desk of the client that it tells of, who has until then to say VERSION if that is missing.
    pub(super) fn desk(self, handshake_deadline: Instant) -> Desk {
        let size = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        let Self { first: First { peer, twin: _, commands }, later } = self;
        let state = match peer {
            None => State::Greeting(handshake_deadline),
            Some(saved) => State::Ready(Peer {
                extensions: BarkeepExtensions {
                    memory_fault: saved.memory_fault,
                    region_state: saved.region_state,
                    decode_page: later.decode_page,
                },
                transfer_size: size(saved.transfer_size),
                message_fds: size(saved.message_fds),
                dma_layout: if saved.qemu_layout { DmaLayout::Qemu } else { DmaLayout::Spec },
            }),
        };
        Desk::new(state, Commands::restored(commands), Heirs::Holder)
    }
}
