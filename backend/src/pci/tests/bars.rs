//! Base Address registers: layout, sizing, placing.

use super::*;

fn with_bars(bars: Vec<BarSpec>) -> Result<Function, SpecError> {
    Function::new(FunctionSpec { bars, ..FunctionSpec::new(IDS) })
}

#[test]
fn sizing_reads_back_the_size_mask_whatever_decodes() {
    let cases: [(BarSpec, u32, u32); 9] = [
        (memory32(BarIndex::BAR0, 16), 0xffff_fff0, 0),
        (memory32(BarIndex::BAR4, 0x1000), 0xffff_f000, 0),
        (memory32(BarIndex::BAR5, 1 << 31), 0x8000_0000, 0),
        (
            BarSpec {
                index: BarIndex::BAR1,
                kind: BarKind::Memory32 { prefetchable: true },
                size: 0x100,
            },
            0xffff_ff08,
            0,
        ),
        (memory64(BarIndex::BAR0, 0x4000), 0xffff_c00c, 0xffff_ffff),
        (
            BarSpec {
                index: BarIndex::BAR4,
                kind: BarKind::Memory64 { prefetchable: false },
                size: 1 << 33,
            },
            0x0000_0004,
            0xffff_fffe,
        ),
        (memory64(BarIndex::BAR2, 1 << 63), 0x0000_000c, 0x8000_0000),
        (io(BarIndex::BAR2, 4), 0xffff_fffd, 0),
        (io(BarIndex::BAR3, 256), 0xffff_ff01, 0),
    ];
    for (bar, low, high) in cases {
        for enable in [Command::empty(), Command::MEMORY_SPACE | Command::IO_SPACE] {
            let mut function = with_bars(vec![bar]).unwrap();
            let _ = command(&mut function, enable);
            let offset = spec::header::BAR0 + 4 * usize::from(bar.index);
            let _ = function.config_write(offset, &[0xff; 4]);
            assert_eq!(read32(&function, offset), low, "{bar:?}");
            if let BarKind::Memory64 { .. } = bar.kind {
                let _ = function.config_write(offset + 4, &[0xff; 4]);
                assert_eq!(read32(&function, offset + 4), high, "{bar:?}");
            }
        }
    }
}

#[test]
fn registers_without_a_bar_read_zero() {
    let mut function = full();
    for offset in [0x14, 0x24, spec::header::EXPANSION_ROM] {
        let _ = function.config_write(offset, &[0xff; 4]);
        assert_eq!(read32(&function, offset), 0, "{offset:#x}");
    }
}

#[test]
fn partial_writes_merge() {
    let mut function = full();
    let _ = write32(&mut function, 0x10, 0xabcd_e000);
    let _ = write16(&mut function, 0x12, 0x1234);
    assert_eq!(function.bar(BarIndex::BAR0).unwrap().address, 0x1234_e000);
    let _ = write16(&mut function, 0x10, 0x5fff);
    assert_eq!(function.bar(BarIndex::BAR0).unwrap().address, 0x1234_5000);
    let _ = write8(&mut function, 0x13, 0xee);
    assert_eq!(function.bar(BarIndex::BAR0).unwrap().address, 0xee34_5000);
}

#[test]
fn both_halves_of_a_64_bit_bar_place_it() {
    let mut function =
        with_bars(vec![memory64(BarIndex::BAR2, 0x1000), memory32(BarIndex::BAR4, 16)]).unwrap();
    let low = write32(&mut function, 0x18, 0xc000_0000);
    let high = write32(&mut function, 0x1c, 0x0000_0012);
    for effects in [low, high] {
        assert_eq!(effects.bars_moved.iter().collect::<Vec<_>>(), [BarIndex::BAR2]);
    }
    let bar = function.bar(BarIndex::BAR2).unwrap();
    assert_eq!(bar.address, 0x12_c000_0000);
    assert_eq!(bar.last_address(), 0x12_c000_0fff);
    assert!(bar.contains(0x12_c000_0000) && bar.contains(0x12_c000_0fff));
    assert!(!bar.contains(0x12_bfff_ffff) && !bar.contains(0x12_c000_1000));
    assert_eq!(function.bar(BarIndex::BAR3), None);

    let _ = function.config_write(0x18, &0xfedc_ba98_7654_3210_u64.to_le_bytes());
    assert_eq!(function.bar(BarIndex::BAR2).unwrap().address, 0xfedc_ba98_7654_3000);
}

#[test]
fn a_bar_may_end_where_the_address_space_does() {
    let mut function = with_bars(vec![memory64(BarIndex::BAR0, 1 << 63)]).unwrap();
    let _ = function.config_write(0x10, &[0xff; 8]);
    let bar = function.bar(BarIndex::BAR0).unwrap();
    assert_eq!((bar.address, bar.last_address()), (1 << 63, u64::MAX));
}

#[test]
fn bars_that_cannot_be_are_refused() {
    use BarIndex as I;
    let cases = [
        (vec![memory32(I::BAR0, 0)], SpecError::BarSizeNotPowerOfTwo { index: I::BAR0, size: 0 }),
        (
            vec![memory64(I::BAR1, 0x3000)],
            SpecError::BarSizeNotPowerOfTwo { index: I::BAR1, size: 0x3000 },
        ),
        (
            vec![memory32(I::BAR0, 8)],
            SpecError::BarSizeOutOfRange { index: I::BAR0, size: 8, min: 16, max: 1 << 31 },
        ),
        (
            vec![memory32(I::BAR3, 1 << 32)],
            SpecError::BarSizeOutOfRange { index: I::BAR3, size: 1 << 32, min: 16, max: 1 << 31 },
        ),
        (
            vec![io(I::BAR0, 2)],
            SpecError::BarSizeOutOfRange { index: I::BAR0, size: 2, min: 4, max: 256 },
        ),
        (
            vec![io(I::BAR0, 512)],
            SpecError::BarSizeOutOfRange { index: I::BAR0, size: 512, min: 4, max: 256 },
        ),
        (vec![memory64(I::BAR5, 16)], SpecError::NoUpperHalf { index: I::BAR5 }),
        (vec![memory32(I::BAR2, 16), io(I::BAR2, 16)], SpecError::BarsOverlap { slot: I::BAR2 }),
        (
            vec![memory32(I::BAR3, 16), memory64(I::BAR2, 16)],
            SpecError::BarsOverlap { slot: I::BAR3 },
        ),
    ];
    for (bars, error) in cases {
        assert_eq!(with_bars(bars).err(), Some(error));
    }
}

#[test]
fn bar_numbers_end_at_five() {
    assert_eq!(BarIndex::try_from(5), Ok(BarIndex::BAR5));
    assert_eq!(BarIndex::try_from(6), Err(6));
    assert_eq!(BarIndex::new(u8::MAX), None);
    assert_eq!(BarIndex::ALL.map(BarIndex::get), [0, 1, 2, 3, 4, 5]);
}
