//! What the driver sees before it sends a request (5.2.3, 5.2.4).

/// Feature bits (5.2.3).
pub(super) mod feature {
    /// `seg_max` holds.
    pub(in super::super) const SEG_MAX: u64 = 1 << 2;
    /// The disk can't be written.
    pub(in super::super) const RO: u64 = 1 << 5;
    /// `blk_size` holds.
    pub(in super::super) const BLK_SIZE: u64 = 1 << 6;
    /// The driver flushes the cache itself.
    pub(in super::super) const FLUSH: u64 = 1 << 9;
    /// The topology holds.
    pub(in super::super) const TOPOLOGY: u64 = 1 << 10;
    /// The driver chooses the cache's mode.
    pub(in super::super) const CONFIG_WCE: u64 = 1 << 11;
    /// There are several queues.
    pub(in super::super) const MQ: u64 = 1 << 12;
    /// Sectors can be discarded.
    pub(in super::super) const DISCARD: u64 = 1 << 13;
    /// Sectors can be zeroed without data.
    pub(in super::super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// The unit of addresses in requests and configuration, in bytes.
pub(super) const SECTOR: u64 = 512;
/// The most segments of one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u32 = 16;
/// The most sectors of one segment of a discard: 1 GiB.
pub(super) const MAX_DISCARD: u32 = 1 << 21;
/// The most sectors of one segment of a write-zeroes: 64 MiB, which may have to be written.
pub(super) const MAX_WRITE_ZEROES: u32 = 1 << 17;

/// The size of the configuration in bytes, up to the fields of features that are not offered.
const SIZE: usize = 60;

/// Offsets of the fields that are not 0.
mod at {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const WRITEBACK: usize = 32;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Configuration {
    /// The disk's size in bytes, a multiple of the logical block's.
    pub(super) size: u64,
    /// The size of a logical block in bytes.
    pub(super) block_size: u32,
    /// The size of a physical block in bytes, at least that of a logical one.
    pub(super) physical_block_size: u32,
    pub(super) read_only: bool,
    pub(super) discard: bool,
    pub(super) queues: u16,
    /// The most descriptors of a request.
    pub(super) queue_size: u16,
    /// Whether writes are acknowledged before they are durable.
    pub(super) writeback: bool,
}

impl Configuration {
    /// The feature bits that are offered.
    pub(super) fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY;
        features |= feature::FLUSH | feature::CONFIG_WCE;
        if self.queues > 1 {
            features |= feature::MQ;
        }
        if self.read_only {
            return features | feature::RO;
        }
        if self.discard {
            features |= feature::DISCARD;
        }
        features | feature::WRITE_ZEROES
    }

    /// The bytes from `offset` on; `data` holds zeros.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    /// What a write makes of the mode of the cache, if it touches it.
    pub(super) fn written_mode(offset: u64, data: &[u8]) -> Option<bool> {
        let index = (at::WRITEBACK as u64).checked_sub(offset)?;
        data.get(usize::try_from(index).ok()?).map(|byte| *byte != 0)
    }

    fn bytes(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(at::CAPACITY, &(self.size / SECTOR).to_le_bytes());
        // The header and the status have a descriptor each.
        put(at::SEG_MAX, &(u32::from(self.queue_size) - 2).to_le_bytes());
        put(at::BLK_SIZE, &self.block_size.to_le_bytes());
        let blocks = self.physical_block_size / self.block_size;
        put(at::PHYSICAL_BLOCK_EXP, &[u8::try_from(blocks.ilog2()).unwrap_or(0)]);
        put(at::MIN_IO_SIZE, &u16::try_from(blocks).unwrap_or(0).to_le_bytes());
        put(at::WRITEBACK, &[u8::from(self.writeback)]);
        put(at::NUM_QUEUES, &self.queues.to_le_bytes());
        let features = self.features();
        let discard = features & feature::DISCARD != 0;
        if discard {
            let alignment = u64::from(self.physical_block_size) / SECTOR;
            put(at::MAX_DISCARD_SECTORS, &MAX_DISCARD.to_le_bytes());
            put(at::MAX_DISCARD_SEG, &MAX_SEGMENTS.to_le_bytes());
            put(at::DISCARD_SECTOR_ALIGNMENT, &u32::try_from(alignment).unwrap_or(0).to_le_bytes());
        }
        if features & feature::WRITE_ZEROES != 0 {
            put(at::MAX_WRITE_ZEROES_SECTORS, &MAX_WRITE_ZEROES.to_le_bytes());
            put(at::MAX_WRITE_ZEROES_SEG, &MAX_SEGMENTS.to_le_bytes());
            put(at::WRITE_ZEROES_MAY_UNMAP, &[u8::from(discard)]);
        }
        bytes
    }
}
