use vm_memory::GuestMemory;

use super::config::MacAddress;
use super::spec::{control, feature};
use crate::devices::virtio::{Buffers, QueueError};

/// A request of the control queue (5.1.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// What to receive. Nothing is filtered here: "the device MAY" deliver more (5.1.6.5.1, 5.1.6.5.2).
    Filter,
    /// The device's own address.
    SetMac(MacAddress),
    /// So many pairs of queues are used.
    SetPairs(u16),
}

/// Class and command.
const HEAD: u64 = 2;

impl Command {
    /// Reads a request; `None` for one that is malformed, or that the features don't allow.
    pub(super) fn read<M: GuestMemory>(
        memory: &M,
        buffers: &Buffers,
        features: u64,
        max_pairs: u16,
    ) -> Result<Option<Self>, QueueError> {
        let Some(len) = buffers.len().checked_sub(HEAD) else {
            return Ok(None);
        };
        let [class, command] = read(memory, buffers, 0)?;
        let allowed = |feature| features & feature != 0;
        Ok(match (class, command) {
            (control::RX, control::RX_PROMISC | control::RX_ALLMULTI)
                if allowed(feature::CTRL_RX) && len == 1 =>
            {
                Some(Self::Filter)
            }
            (control::MAC, control::MAC_TABLE_SET) if allowed(feature::CTRL_RX) => {
                two_tables(memory, buffers)?.then_some(Self::Filter)
            }
            (control::MAC, control::MAC_ADDR_SET)
                if allowed(feature::CTRL_MAC_ADDR) && len == 6 =>
            {
                MacAddress::new(read(memory, buffers, HEAD)?).map(Self::SetMac)
            }
            (control::MQ, control::MQ_VQ_PAIRS_SET) if allowed(feature::MQ) && len == 2 => {
                let pairs = u16::from_le_bytes(read(memory, buffers, HEAD)?);
                (1..=max_pairs).contains(&pairs).then_some(Self::SetPairs(pairs))
            }
            _ => None,
        })
    }
}

/// Whether a request has two tables of addresses and nothing else.
fn two_tables<M: GuestMemory>(memory: &M, buffers: &Buffers) -> Result<bool, QueueError> {
    let mut offset = HEAD;
    for _ in 0..2 {
        if buffers.len() < offset + 4 {
            return Ok(false);
        }
        let entries = u32::from_le_bytes(read(memory, buffers, offset)?);
        offset += 4 + 6 * u64::from(entries);
    }
    Ok(buffers.len() == offset)
}

fn read<M: GuestMemory, const N: usize>(
    memory: &M,
    buffers: &Buffers,
    offset: u64,
) -> Result<[u8; N], QueueError> {
    let mut bytes = [0; N];
    buffers.read(memory, offset, &mut bytes)?;
    Ok(bytes)
}
