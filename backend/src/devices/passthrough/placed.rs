//! Where the BARs of a device are, as its registers say.

use crate::pci::spec::bar;
use crate::pci::{Bar, BarIndex, BarKind};

/// Bytes of all Base Address registers.
pub(super) const LENGTH: usize = 4 * bar::COUNT;

/// The BARs that have a size, from their registers. None when nobody answers.
pub(super) fn bars(registers: &[u8; LENGTH], size: impl Fn(BarIndex) -> u64) -> Option<Vec<Bar>> {
    if registers.iter().all(|byte| *byte == 0xff) {
        return None;
    }
    let register = |index: usize| {
        let bytes = registers.chunks_exact(4).nth(index).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let placed = |index: BarIndex| {
        let size = size(index);
        let low = register(index.into());
        let (kind, address) = if low & bar::IO_SPACE != 0 {
            (BarKind::Io, u64::from(low & !0b11))
        } else {
            let prefetchable = low & bar::PREFETCHABLE != 0;
            let address = u64::from(low & !0b1111);
            if low & 0b110 == bar::MEMORY_64 {
                let high = register(usize::from(index) + 1);
                (BarKind::Memory64 { prefetchable }, u64::from(high) << 32 | address)
            } else {
                (BarKind::Memory32 { prefetchable }, address)
            }
        };
        (size > 0).then_some(Bar { index, kind, size, address })
    };
    Some(BarIndex::ALL.into_iter().filter_map(placed).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_tell_place_and_kind() {
        let words: [u32; 6] = [0xfebf_000c, 0x12, 0xe001, 0xfeb0_0000, 0xfea0_0008, 0];
        let registers: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let registers = registers.first_chunk().unwrap();
        let sizes = [0x1000, 0, 0x20, 0x2000, 0, 0];
        let bars = bars(registers, |index| sizes[usize::from(index)]).unwrap();
        let memory64 = BarKind::Memory64 { prefetchable: true };
        let memory32 = BarKind::Memory32 { prefetchable: false };
        let bar = |index, kind, size, address| Bar { index, kind, size, address };
        assert_eq!(
            bars,
            [
                bar(BarIndex::BAR0, memory64, 0x1000, 0x12_febf_0000),
                bar(BarIndex::BAR2, BarKind::Io, 0x20, 0xe000),
                bar(BarIndex::BAR3, memory32, 0x2000, 0xfeb0_0000),
            ]
        );
    }

    #[test]
    fn a_device_that_has_gone_has_no_registers() {
        assert_eq!(bars(&[0xff; LENGTH], |_| 0x1000), None);
    }
}
