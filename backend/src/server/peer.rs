use barkeep_protocol::wire::{BarkeepExtensions, DmaLayout, Version};

/// What was negotiated with a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    /// barkeep's extensions that both sides have.
    pub(super) extensions: BarkeepExtensions,
    /// Bytes that one of our own commands may move: the client's `max_data_xfer_size`.
    pub(super) transfer_size: usize,
    /// Descriptors that it takes with one message.
    pub(super) message_fds: usize,
    /// How it seems to lay out messages with data of its memory.
    pub(super) dma_layout: DmaLayout,
}

impl Peer {
    /// From a client's proposal and our answer to it.
    pub(super) fn new(theirs: &Version, answer: &Version) -> Self {
        Self {
            extensions: answer.capabilities.barkeep.unwrap_or_default(),
            message_fds: theirs.capabilities.message_fds(),
            dma_layout: DmaLayout::expected_of(theirs),
            transfer_size: theirs.capabilities.data_xfer_size() as usize,
        }
    }
}
