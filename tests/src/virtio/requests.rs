//! Requests of the device types, as their sections lay them out.

use super::driver::Driver;
use super::memory::{DATA, HEADERS};
use super::queue::{Part, Used};

/// Block device (5.2).
pub mod blk {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const ALL: u64 = SIZE_MAX
        | SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES;

    pub const T_IN: u32 = 0;
    pub const T_OUT: u32 = 1;
    pub const T_FLUSH: u32 = 4;
    pub const T_GET_ID: u32 = 8;
    pub const T_DISCARD: u32 = 11;
    pub const T_WRITE_ZEROES: u32 = 13;

    pub const S_OK: u8 = 0;
    pub const S_IOERR: u8 = 1;
    pub const S_UNSUPP: u8 = 2;
    /// What no device writes.
    pub const S_NONE: u8 = 0xee;
    /// Sectors are of so many bytes, whatever the block size.
    pub const SECTOR: u64 = 512;
}

/// Network device (5.1).
pub mod net {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const MAC: u64 = 1 << 5;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    /// `struct virtio_net_hdr` with `num_buffers`.
    pub const HEADER: usize = 12;
}

/// Where a request has its small parts: one place for each number below 64 Ki.
#[must_use]
pub fn header_at(slot: usize) -> u64 {
    HEADERS + slot as u64 * 64
}

/// What a block request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlkData {
    /// Nothing.
    None,
    /// The device reads it: address and length.
    Out(u64, u32),
    /// The device writes it.
    In(u64, u32),
}

impl Driver {
    /// Makes a block request available; its head. Its status will be at [`blk_status`](Self::blk_status).
    pub fn send_blk(
        &mut self,
        queue: u16,
        slot: usize,
        kind: u32,
        sector: u64,
        data: BlkData,
    ) -> u16 {
        let header = header_at(slot);
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        bytes[16] = blk::S_NONE;
        self.memory.rings.write(header, &bytes);
        let (first, status) = (Part::Read(header, 16), Part::Write(header + 16, 1));
        match data {
            BlkData::None => self.send(queue, &[first, status]),
            BlkData::Out(address, length) => {
                self.send(queue, &[first, Part::Read(address, length), status])
            }
            BlkData::In(address, length) => {
                self.send(queue, &[first, Part::Write(address, length), status])
            }
        }
    }

    /// The status byte of the last request in a slot.
    #[must_use]
    pub fn blk_status(&self, slot: usize) -> u8 {
        self.memory.rings.bytes(header_at(slot) + 16, 1)[0]
    }

    /// Does a block request alone; its status.
    pub fn blk(&mut self, kind: u32, sector: u64, data: BlkData) -> u8 {
        self.send_blk(0, 0, kind, sector, data);
        self.next_used(0);
        self.blk_status(0)
    }

    /// Writes sectors and expects that it works.
    pub fn blk_write(&mut self, sector: u64, bytes: &[u8]) {
        self.memory.data.write(DATA, bytes);
        let length = u32::try_from(bytes.len()).expect("a test's write is small");
        assert_eq!(self.blk(blk::T_OUT, sector, BlkData::Out(DATA, length)), blk::S_OK);
    }

    /// Reads sectors and expects that it works.
    pub fn blk_read(&mut self, sector: u64, length: usize) -> Vec<u8> {
        let count = u32::try_from(length).expect("a test's read is small");
        assert_eq!(self.blk(blk::T_IN, sector, BlkData::In(DATA, count)), blk::S_OK);
        self.memory.data.bytes(DATA, length)
    }

    /// `struct virtio_blk_discard_write_zeroes` (5.2.6): discards, or writes zeroes; the status.
    pub fn blk_range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        self.memory.data.write(DATA, &bytes);
        self.blk(kind, 0, BlkData::Out(DATA, 16))
    }

    /// Capacity of a block device, in sectors of 512 bytes.
    #[must_use]
    pub fn blk_capacity(&self) -> u64 {
        u64::from_le_bytes(self.function.read(self.function.device, 0))
    }

    /// Sends bytes from a queue that transmits, and waits until they are taken.
    pub fn transmit(&mut self, queue: u16, parts: &[&[u8]]) -> Used {
        let mut at = DATA;
        let mut described = Vec::new();
        for part in parts {
            self.memory.data.write(at, part);
            let length = u32::try_from(part.len()).expect("a test's data is small");
            described.push(Part::Read(at, length));
            at += u64::from(length).next_multiple_of(64);
        }
        self.send(queue, &described);
        self.next_used(queue)
    }
}
