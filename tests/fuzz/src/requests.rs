//! Requests that are nearly right.

use crate::Input;

/// Types of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Block { read_only: bool },
    Net,
    Entropy,
    Console,
}

/// A queue's table, and its length in descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub address: u64,
    pub size: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Behind the rings.
const HEADERS: u64 = 0x1400;
const DATA: u64 = 0x2000;

/// Writes a request of a device's type to a queue; its head.
pub fn write(
    kind: Kind,
    queue: u16,
    table: Table,
    input: &mut Input<'_>,
    mut write: impl FnMut(u64, &[u8]),
) -> u16 {
    let size = table.size;
    let head = u16::from(input.u8()) % size;
    let header = HEADERS + u64::from(head % 16) * 0x40;
    let length = u32::from(input.u8()) * 64 + u32::from(input.u8() & 3);
    let mut bytes = [0; 32];
    // Address, length, whether it is written.
    let parts: Vec<(u64, u32, bool)> = match kind {
        Kind::Block { .. } => {
            let kind = input.u8() % 16;
            bytes[0] = kind;
            bytes[8..10].copy_from_slice(&(input.u16() % 160).to_le_bytes());
            let reads = kind == 0 || kind == 8;
            let length = if length & 64 == 0 { length & !511 } else { length };
            if kind == 11 || kind == 13 {
                bytes[16] = input.u8() % 130;
                bytes[24] = input.u8() % 130;
                bytes[28] = input.u8() & 3;
                vec![(header, 16, false), (header + 16, 16, false), (header + 32, 1, true)]
            } else {
                vec![(header, 16, false), (DATA, length, reads), (header + 32, 1, true)]
            }
        }
        // The control queue is the last one of an odd number.
        Kind::Net if queue != 0 && queue.is_multiple_of(2) => {
            bytes[0] = input.u8() % 6;
            bytes[1] = input.u8() % 4;
            bytes[2..10].copy_from_slice(&[input.u8(), 0, 0, 0, input.u8(), 0, 0, input.u8()]);
            let data = u32::from(input.u8() % 12);
            vec![(header, 2, false), (header + 2, data, false), (header + 32, 1, true)]
        }
        Kind::Net if queue.is_multiple_of(2) => vec![(DATA, length + 12, true)],
        Kind::Net => {
            bytes[..10].copy_from_slice(&[
                input.u8() & 3,
                input.u8() & 7,
                input.u8(),
                0,
                input.u8(),
                input.u8() & 7,
                input.u8(),
                0,
                input.u8(),
                0,
            ]);
            vec![(header, 12, false), (DATA, length % 1600, false)]
        }
        Kind::Entropy => vec![(DATA, length, true)],
        Kind::Console => vec![(DATA, length, queue.is_multiple_of(2))],
    };
    write(header, &bytes);
    let count = u16::try_from(parts.len()).expect("a few");
    for (position, (address, length, written)) in (0..).zip(parts) {
        let index = (head + position) % size;
        let more = position + 1 < count;
        let flags = if more { NEXT } else { 0 } | if written { WRITE } else { 0 };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&((index + 1) % size).to_le_bytes());
        let place = table.address.wrapping_add(16 * u64::from(index));
        write(place, &bytes);
    }
    head
}
