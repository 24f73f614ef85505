//! MSI-X: registers, table, Pending Bit Array, delivery.

use super::*;

const CONTROL: usize = EVERYTHING_MSIX + spec::msix::MESSAGE_CONTROL;
const ENABLE: u16 = spec::msix::CONTROL_ENABLE;
const FUNCTION_MASK: u16 = spec::msix::CONTROL_FUNCTION_MASK;
const VECTORS: u16 = 70;

/// Bus mastering on, MSI-X enabled, all vectors unmasked.
fn unmasked() -> Function {
    let mut function = everything();
    let _ = command(&mut function, Command::BUS_MASTER);
    let _ = write16(&mut function, CONTROL, ENABLE);
    for vector in 0..VECTORS {
        let _ = mask(&mut function, vector, false);
    }
    function
}

fn mask(function: &mut Function, vector: u16, masked: bool) -> Effects {
    function.msix_table_write(vector_control(vector), &[masked.into()])
}

fn vector_control(vector: u16) -> u64 {
    u64::from(vector) * 16 + 12
}

fn table(function: &Function) -> Vec<u8> {
    let mut data = vec![0; usize::from(VECTORS) * 16];
    function.msix_table_read(0, &mut data);
    data
}

fn pending(function: &Function) -> [u64; 2] {
    let mut data = [0; 16];
    function.msix_pending_read(0, &mut data);
    [&data[..8], &data[8..]].map(|word| u64::from_le_bytes(word.try_into().unwrap()))
}

fn delivered(effects: &Effects) -> Vec<u16> {
    effects.msix.deliver.iter().collect()
}

fn at(bar: BarIndex, offset: u64) -> BarOffset {
    BarOffset { bar, offset }
}

#[test]
fn the_capability_says_where_the_structures_are() {
    let mut function = everything();
    for (offset, power_on, written) in [
        (EVERYTHING_MSIX, 0x0045_6c11, 0xc045_6c11),
        (EVERYTHING_MSIX + spec::msix::TABLE, 0x1801, 0x1801),
        (EVERYTHING_MSIX + spec::msix::PENDING, 0x1c61, 0x1c61),
    ] {
        assert_eq!(read32(&function, offset), power_on, "{offset:#x}");
        let _ = write32(&mut function, offset, u32::MAX);
        assert_eq!(read32(&function, offset), written, "{offset:#x}");
    }
}

#[test]
fn structures_that_cannot_be_are_refused() {
    use BarIndex as I;
    let most = MsixVectors::new(2048).unwrap();
    let one = MsixVectors::new(1).unwrap();
    let large = vec![memory32(I::BAR0, 0x1_0000), io(I::BAR1, 256), memory64(I::BAR2, 1 << 33)];
    let cases = [
        (one, at(I::BAR0, 0), at(I::BAR0, 16), None),
        (one, at(I::BAR0, 8), at(I::BAR0, 0), None),
        (one, at(I::BAR0, 0xfff0), at(I::BAR2, 0xffff_fff8), None),
        (most, at(I::BAR0, 0x8000), at(I::BAR0, 0x7f00), None),
        (one, at(I::BAR1, 0), at(I::BAR0, 0), Some(SpecError::MsixNoMemoryBar { bar: I::BAR1 })),
        (one, at(I::BAR0, 0), at(I::BAR3, 0), Some(SpecError::MsixNoMemoryBar { bar: I::BAR3 })),
        (one, at(I::BAR0, 4), at(I::BAR0, 64), Some(SpecError::MsixMisplaced { offset: 4 })),
        (
            one,
            at(I::BAR2, 1 << 32),
            at(I::BAR0, 0),
            Some(SpecError::MsixMisplaced { offset: 1 << 32 }),
        ),
        (
            one,
            at(I::BAR0, 0xfff8),
            at(I::BAR0, 0),
            Some(SpecError::MsixOutsideBar { bar: I::BAR0, end: 0x1_0008 }),
        ),
        (
            most,
            at(I::BAR0, 0),
            at(I::BAR0, 0xff08),
            Some(SpecError::MsixOutsideBar { bar: I::BAR0, end: 0x1_0008 }),
        ),
        (
            one,
            at(I::BAR0, 0),
            at(I::BAR0, u64::MAX - 7),
            Some(SpecError::MsixMisplaced { offset: u64::MAX - 7 }),
        ),
        (one, at(I::BAR0, 0), at(I::BAR0, 8), Some(SpecError::MsixOverlap)),
        (most, at(I::BAR0, 0), at(I::BAR0, 0x7ff8), Some(SpecError::MsixOverlap)),
    ];
    for (vectors, table, pending, error) in cases {
        let msix = Some(MsixSpec { vectors, table, pending });
        let spec = FunctionSpec { bars: large.clone(), msix, ..FunctionSpec::new(IDS) };
        assert_eq!(Function::new(spec).err(), error, "{msix:?}");
    }
    for (count, possible) in [(0, false), (1, true), (2048, true), (2049, false)] {
        assert_eq!(MsixVectors::new(count).is_some(), possible, "{count} vectors");
    }
}

#[test]
fn an_access_falls_into_pieces_where_its_owner_changes() {
    use BarOwner::{Device, MsixPending, MsixTable};
    let function = everything();
    let piece = |owner, offset, data| BarPiece { owner, offset, data };
    // The table is at 0x1800..0x1c60, the Pending Bit Array at 0x1c60..0x1c70, the end at 0x4000.
    let cases = [
        (0, 4, vec![piece(Device, 0, 0..4)]),
        (0x17fc, 4, vec![piece(Device, 0x17fc, 0..4)]),
        (0x17fe, 4, vec![piece(Device, 0x17fe, 0..2), piece(MsixTable, 0, 2..4)]),
        (0x1810, 8, vec![piece(MsixTable, 0x10, 0..8)]),
        (0x1c5c, 8, vec![piece(MsixTable, 0x45c, 0..4), piece(MsixPending, 0, 4..8)]),
        (0x1c6f, 2, vec![piece(MsixPending, 0xf, 0..1), piece(Device, 0x1c70, 1..2)]),
        (
            0x1000,
            0x3000,
            vec![
                piece(Device, 0x1000, 0..0x800),
                piece(MsixTable, 0, 0x800..0xc60),
                piece(MsixPending, 0, 0xc60..0xc70),
                piece(Device, 0x1c70, 0xc70..0x3000),
            ],
        ),
        (0x3ffc, 8, vec![piece(Device, 0x3ffc, 0..4)]),
        (0x4000, 8, vec![]),
        (u64::MAX - 1, 8, vec![]),
        (0x1800, 0, vec![]),
    ];
    for (offset, length, expected) in cases {
        let pieces: Vec<_> = function.bar_pieces(BarIndex::BAR1, offset, length).collect();
        assert_eq!(pieces, expected, "{length:#x} bytes at {offset:#x}");
    }
    for (bar, expected) in [
        (BarIndex::BAR0, vec![piece(Device, 0xffc, 0..4)]),
        (BarIndex::BAR3, vec![]),
        (BarIndex::BAR5, vec![]),
    ] {
        assert_eq!(function.bar_pieces(bar, 0xffc, 8).collect::<Vec<_>>(), expected, "{bar}");
    }
}

#[test]
fn whole_pages_without_structures_may_be_mapped() {
    let vectors = MsixVectors::new(128).unwrap();
    let cases = [
        // Table 0x800 bytes, Pending Bit Array 16; areas from and to.
        (0x4000, 0x0000, 0x0800, &[(0x1000, 0x4000)][..]),
        (0x4000, 0x3000, 0x3800, &[(0, 0x3000)]),
        (0x4000, 0x1000, 0x3000, &[(0, 0x1000), (0x2000, 0x3000)]),
        (0x4000, 0x2000, 0x0ff0, &[(0x1000, 0x2000), (0x3000, 0x4000)]),
        (0x4000, 0x1c00, 0x0ff8, &[(0x3000, 0x4000)]),
        (0x1000, 0x0000, 0x0800, &[]),
        (0x2000, 0x0000, 0x1ff0, &[]),
    ];
    for (size, table, pending, expected) in cases {
        let (table, pending) = (at(BarIndex::BAR0, table), at(BarIndex::BAR0, pending));
        let function = Function::new(FunctionSpec {
            bars: vec![memory32(BarIndex::BAR0, size)],
            msix: Some(MsixSpec { vectors, table, pending }),
            ..FunctionSpec::new(IDS)
        })
        .unwrap();
        let areas = function.mappable_areas(BarIndex::BAR0);
        let areas: Vec<_> = areas.into_iter().map(|area| (area.start, area.end)).collect();
        assert_eq!(areas, expected, "{table:?} {pending:?}");
    }

    let areas = |bar| full().mappable_areas(bar);
    let whole = 0..0x1000;
    assert_eq!(areas(BarIndex::BAR0), [whole], "without MSI-X, all of the BAR");
    assert_eq!(areas(BarIndex::BAR1), [], "there is none");
    assert_eq!(areas(BarIndex::BAR4), [], "ports");
    let small = FunctionSpec { bars: vec![memory32(BarIndex::BAR0, 2048)], ..full_spec() };
    assert_eq!(Function::new(small).unwrap().mappable_areas(BarIndex::BAR0), [], "half a page");
}

#[test]
fn after_a_reset_every_vector_is_masked_and_none_pending() {
    let mut used = unmasked();
    let _ = used.msix_table_write(0, &[0xff; 70 * 16]);
    let _ = mask(&mut used, 3, true);
    assert_eq!(used.raise_msix(3), MsiOutcome::Pending);
    for kind in [ResetKind::FunctionLevel, ResetKind::Soft, ResetKind::Hot, ResetKind::Device] {
        let mut function = used.clone();
        let effects = function.reset(kind);
        assert_eq!(effects.msix.enabled, Some(false));
        assert!(effects.msix.deliver.is_empty());
        for entry in table(&function).chunks(16) {
            assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        }
        assert_eq!(pending(&function), [0; 2]);
    }
}

#[test]
fn a_write_changes_the_bytes_it_covers_and_no_reserved_bit() {
    let mut all = everything();
    let _ = all.msix_table_write(0, &[0xff; 70 * 16]);
    let full_entry: [u8; 16] =
        [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
    for entry in table(&all).chunks(16) {
        assert_eq!(entry, full_entry);
    }

    for length in [1, 2, 3, 4, 7, 8, 16, 24] {
        for offset in 0..40_usize {
            let mut function = all.clone();
            let effects = function.msix_table_write(offset as u64, &vec![0; length]);
            assert_eq!(effects, Effects::default());
            let mut expected = table(&all);
            expected[offset..offset + length].fill(0);
            assert_eq!(table(&function), expected, "{length} bytes at {offset:#x}");
        }
    }
}

#[test]
fn past_the_end_of_the_structures_reads_are_all_ones_and_writes_are_dropped() {
    let mut function = everything();
    let end = 70 * 16;
    let before = table(&function);
    for offset in [end, end + 1, u64::MAX] {
        let _ = function.msix_table_write(offset, &[0; 8]);
        let mut data = [0; 8];
        function.msix_table_read(offset, &mut data);
        assert_eq!(data, [0xff; 8]);
        let mut data = [0; 8];
        function.msix_pending_read(offset, &mut data);
        assert_eq!(data, [0xff; 8]);
    }
    assert_eq!(table(&function), before);
    let mut data = [0xaa; 4];
    function.msix_table_read(end - 2, &mut data);
    assert_eq!(data, [0, 0, 0xff, 0xff]);
    let mut data = [0xaa; 4];
    function.msix_pending_read(14, &mut data);
    assert_eq!(data, [0, 0, 0xff, 0xff]);

    let mut without = full();
    assert_eq!(without.msix_table_write(0, &[0; 4]), Effects::default());
    let mut data = [0; 4];
    without.msix_table_read(0, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(without.raise_msix(0), MsiOutcome::Dropped);
}

#[test]
fn a_message_needs_msix_bus_mastering_d0_and_a_vector() {
    let mut function = unmasked();
    assert_eq!(function.raise_msix(0), MsiOutcome::Deliver);
    assert_eq!(function.raise_msix(69), MsiOutcome::Deliver);
    for vector in [70, 2048, u16::MAX] {
        assert_eq!(function.raise_msix(vector), MsiOutcome::Dropped);
    }
    let _ = command(&mut function, Command::empty());
    assert_eq!(function.raise_msix(0), MsiOutcome::Dropped, "no bus master");
    let _ = command(&mut function, Command::BUS_MASTER);
    let _ = write8(&mut function, PM + spec::power::PMCSR, 3);
    assert_eq!(function.raise_msix(0), MsiOutcome::Dropped, "D3hot");
    let _ = write8(&mut function, PM + spec::power::PMCSR, 0);
    let _ = write16(&mut function, CONTROL, 0);
    assert_eq!(function.raise_msix(0), MsiOutcome::Dropped, "disabled");
    assert_eq!(pending(&function), [0; 2]);
}

#[test]
fn a_masked_vector_is_pending_until_unmasked() {
    let mut function = unmasked();
    for vector in [0, 63, 64, 69] {
        let _ = mask(&mut function, vector, true);
        assert_eq!(function.raise_msix(vector), MsiOutcome::Pending);
        assert_eq!(function.raise_msix(vector), MsiOutcome::Pending);
    }
    assert_eq!(function.raise_msix(1), MsiOutcome::Deliver);
    assert_eq!(pending(&function), [1 << 63 | 1, 1 << 5 | 1]);

    assert_eq!(delivered(&mask(&mut function, 63, false)), [63]);
    assert_eq!(pending(&function), [1, 1 << 5 | 1]);
    assert_eq!(mask(&mut function, 63, false), Effects::default(), "delivered once");
    // A block over the whole table, vector 0 still masked.
    let mut entries = table(&function);
    entries[12] = 1;
    entries[64 * 16 + 12] = 0;
    entries[69 * 16 + 12] = 0;
    let effects = function.msix_table_write(0, &entries);
    assert_eq!(delivered(&effects), [64, 69]);
    assert!(effects.msix.deliver.contains(69) && !effects.msix.deliver.contains(0));
    assert!(!effects.is_empty());
    assert_eq!(pending(&function), [1, 0]);
}

#[test]
fn function_mask_holds_back_all_vectors() {
    let mut function = unmasked();
    let _ = write16(&mut function, CONTROL, ENABLE | FUNCTION_MASK);
    let _ = mask(&mut function, 5, true);
    for vector in [5, 6, 68] {
        assert_eq!(function.raise_msix(vector), MsiOutcome::Pending);
    }
    assert!(mask(&mut function, 6, false).is_empty(), "the function is masked");
    // One byte of Message Control.
    let effects = write8(&mut function, CONTROL + 1, 0x80);
    assert_eq!(delivered(&effects), [6, 68]);
    assert_eq!(effects.msix.enabled, None);
    assert_eq!(pending(&function), [1 << 5, 0]);
}

#[test]
fn pending_vectors_wait_for_enable_bus_mastering_and_d0() {
    let hold = |function: &mut Function| {
        let _ = write16(function, CONTROL, ENABLE | FUNCTION_MASK);
        assert_eq!(function.raise_msix(7), MsiOutcome::Pending);
    };

    let mut function = unmasked();
    hold(&mut function);
    let off = write16(&mut function, CONTROL, 0);
    assert_eq!((off.msix.enabled, delivered(&off)), (Some(false), vec![]));
    let on = write16(&mut function, CONTROL, ENABLE);
    assert_eq!((on.msix.enabled, delivered(&on)), (Some(true), vec![7]));

    hold(&mut function);
    let _ = command(&mut function, Command::empty());
    assert!(write16(&mut function, CONTROL, ENABLE).msix.deliver.is_empty());
    assert!(mask(&mut function, 7, false).msix.deliver.is_empty());
    assert_eq!(delivered(&command(&mut function, Command::BUS_MASTER)), [7]);

    hold(&mut function);
    let _ = write8(&mut function, PM + spec::power::PMCSR, 3);
    assert!(write16(&mut function, CONTROL, ENABLE).msix.deliver.is_empty());
    assert_eq!(delivered(&write8(&mut function, PM + spec::power::PMCSR, 0)), [7]);
}

#[test]
fn msix_takes_the_pin_away_and_wins_over_msi() {
    let msi_control = MSI + spec::msi::MESSAGE_CONTROL;
    let mut function = unmasked();
    let _ = write16(&mut function, CONTROL, 0);
    let _ = function.set_intx(true);
    assert!(function.intx_line());
    let on = write16(&mut function, CONTROL, ENABLE);
    assert_eq!((on.intx, on.msix.enabled), (Some(false), Some(true)));

    let both = write16(&mut function, msi_control, spec::msi::CONTROL_ENABLE);
    assert_eq!(both, Effects::default(), "MSI enabled behind MSI-X's back changes nothing");
    assert_eq!(function.raise_msi(0), MsiOutcome::Dropped);
    assert_eq!(function.raise_msix(0), MsiOutcome::Deliver);
    assert_eq!((function.msi_enabled(), function.msi_vectors()), (false, 0));
    assert_eq!(read16(&function, msi_control) & 1, 1, "reads back as written");

    let msi = write16(&mut function, CONTROL, 0);
    assert_eq!((msi.msi.enabled, msi.msix.enabled), (Some(true), Some(false)));
    assert_eq!((msi.intx, function.raise_msi(0)), (None, MsiOutcome::Deliver));
}

#[test]
fn a_vector_let_out_by_the_write_that_resets_is_dropped() {
    let mut function = unmasked();
    let _ = write16(&mut function, CONTROL, ENABLE | FUNCTION_MASK);
    assert_eq!(function.raise_msix(0), MsiOutcome::Pending);
    // From Message Control to Initiate FLR, which is last.
    let end = EVERYTHING_EXPRESS + spec::express::DEVICE_CONTROL + 2;
    let mut data = vec![0; end - CONTROL];
    data[1] = 0x80;
    *data.last_mut().unwrap() = 0x80;
    let effects = function.config_write(CONTROL, &data);
    assert_eq!(effects.reset, Some(ResetKind::FunctionLevel));
    assert!(effects.msix.deliver.is_empty());
}

#[test]
fn all_2048_vectors_can_be_delivered_at_once() {
    let mut function = Function::new(FunctionSpec {
        bars: vec![memory32(BarIndex::BAR0, 0x1_0000)],
        msix: Some(MsixSpec {
            vectors: MsixVectors::new(2048).unwrap(),
            table: at(BarIndex::BAR0, 0),
            pending: at(BarIndex::BAR0, 0x8000),
        }),
        ..FunctionSpec::new(IDS)
    })
    .unwrap();
    let _ = command(&mut function, Command::BUS_MASTER);
    let _ = write16(&mut function, 0x42, ENABLE);
    let _ = function.msix_table_write(0, &[4]);
    for vector in 0..2048 {
        assert_eq!(function.raise_msix(vector), MsiOutcome::Pending);
    }
    let effects = function.msix_table_write(0, &[0; 0x8000]);
    assert_eq!(delivered(&effects), (0..2048).collect::<Vec<_>>());
}

#[test]
fn masks_of_a_table_that_nobody_programs_do_not_count() {
    let mut function = Function::new(FunctionSpec {
        bars: vec![memory32(BarIndex::BAR0, 0x1000)],
        msix: Some(MsixSpec {
            vectors: MsixVectors::new(2).unwrap(),
            table: at(BarIndex::BAR0, 0),
            pending: at(BarIndex::BAR0, 0x800),
        }),
        ..FunctionSpec::new(IDS)
    })
    .unwrap();
    let enable = |function: &mut Function| {
        let _ = command(function, Command::BUS_MASTER);
        let _ = write16(function, 0x42, ENABLE);
    };
    enable(&mut function);
    assert_eq!(function.raise_msix(0), MsiOutcome::Deliver);
    // To write what is there already programs nothing.
    let _ = function.msix_table_write(12, &[1]);
    assert_eq!(function.raise_msix(0), MsiOutcome::Deliver);
    let _ = function.msix_table_write(16, &[4]);
    assert_eq!(function.raise_msix(0), MsiOutcome::Pending);
    let state = function.save();
    let mut other = Function::new(function.spec().clone()).unwrap();
    let _ = other.restore(&state).unwrap();
    assert_eq!(other.raise_msix(1), MsiOutcome::Pending, "the state tells");
    let _ = function.reset(ResetKind::Device);
    enable(&mut function);
    assert_eq!(function.raise_msix(0), MsiOutcome::Deliver);
}

#[test]
fn a_function_knows_which_messages_would_go_out() {
    type Change = fn(&mut Function) -> Effects;
    let changes: [(Change, [bool; 2]); 5] = [
        (|function| mask(function, 3, true), [false, true]),
        (|function| mask(function, 3, false), [true, true]),
        (|function| write16(function, CONTROL, ENABLE | FUNCTION_MASK), [false, false]),
        (|function| write16(function, CONTROL, ENABLE), [true, true]),
        (|function| command(function, Command::empty()), [false, false]),
    ];
    let mut function = unmasked();
    for (change, expected) in changes {
        let _ = change(&mut function);
        assert_eq!([3, 4].map(|vector| function.msix_delivers(vector)), expected);
        assert_eq!(function.can_send_msix(), expected[1]);
        // Knowing it leaves nothing pending.
        assert_eq!(pending(&function), [0; 2]);
    }
    assert!(!unmasked().msix_delivers(VECTORS));
}

/// Whoever delivers in the function's place asks before, and must get the answer that raising gives.
#[test]
fn an_interrupt_is_foretold_to_be_delivered_exactly_when_it_would_be() {
    type Change = fn(&mut Function);
    let rows: &[(&str, Change)] = &[
        ("as it is", |_| {}),
        ("a masked vector", |function| drop(mask(function, 3, true))),
        ("another vector is masked", |function| drop(mask(function, 4, true))),
        ("the function is masked", |function| {
            drop(write16(function, CONTROL, ENABLE | FUNCTION_MASK));
        }),
        ("disabled", |function| drop(write16(function, CONTROL, 0))),
        ("no bus master", |function| drop(command(function, Command::empty()))),
        ("reset", |function| drop(function.reset(ResetKind::Device))),
    ];
    for (name, change) in rows {
        let mut function = unmasked();
        change(&mut function);
        let foretold = function.msix_delivers(3);
        assert_eq!(foretold, function.raise_msix(3) == MsiOutcome::Deliver, "{name}");
    }
    assert!(unmasked().msix_delivers(VECTORS - 1));
    assert!(!unmasked().msix_delivers(VECTORS), "there is no such vector");
}
