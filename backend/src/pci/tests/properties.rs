//! What holds for every function and every sequence of operations.

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn no_write_changes_a_read_only_bit(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..48),
        writes in prop::collection::vec(write(), 0..16),
    ) {
        let mut function = Function::new(spec).unwrap();
        let power_on = image(&function);
        let volatile = bits(&function, |register| register.volatile);
        let writable = bits(&function, |register| register.read_write);
        let clearable = bits(&function, |register| register.write_one_to_clear);
        let covered = bits(&function, |_| u32::MAX);
        let pending = bits(&function, |register| match register.name {
            "Pending Bits" => u32::MAX,
            _ => 0,
        });
        for operation in operations {
            let _ = operation.apply(&mut function);
        }
        for Write { offset, data } in writes {
            let before = image(&function);
            let reset = function.config_write(offset, &data).reset.is_some();
            for (at, (now, then)) in image(&function).iter().zip(&before).enumerate() {
                // Whatever happened, what nothing changes is as it was at power-on.
                let constant = !(writable[at] | volatile[at]);
                prop_assert_eq!((now ^ power_on[at]) & constant, 0, "at {:#x}", at);
                prop_assert!(covered[at] != 0 || *now == 0, "reserved at {:#x}", at);
                // A message that may go out is no longer pending: the function did that.
                let read_only = !(writable[at] | clearable[at] | pending[at]);
                prop_assert!(reset || (now ^ then) & read_only == 0, "at {:#x}", at);
                prop_assert_eq!(now & !then & pending[at], 0, "pending at {:#x}", at);
            }
        }
    }

    #[test]
    fn no_write_of_a_table_changes_a_reserved_bit(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..64),
    ) {
        let mut function = Function::new(spec).unwrap();
        for operation in operations {
            let _ = operation.apply(&mut function);
        }
        for entry in table(&function).chunks(16) {
            prop_assert_eq!((entry[0] & 0b11, entry[12] & !1, &entry[13..]), (0, 0, &[0; 3][..]));
        }
        let vectors = function.spec().msix.map_or(0, |msix| msix.vectors.count());
        for (at, byte) in pending(&function).into_iter().enumerate() {
            let there = usize::from(vectors).saturating_sub(8 * at).min(8);
            prop_assert_eq!(u16::from(byte) >> there, 0, "byte {} of {} vectors", at, vectors);
        }
    }

    #[test]
    fn a_write_only_ever_clears_a_write_one_to_clear_bit(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..64),
        Write { offset, data } in write(),
    ) {
        let mut function = Function::new(spec).unwrap();
        for operation in operations {
            let _ = operation.apply(&mut function);
        }
        let clearable = bits(&function, |register| register.write_one_to_clear);
        let before = image(&function);
        let effects = function.config_write(offset, &data);
        let after = image(&function);
        for at in 0..before.len() {
            let value = at.checked_sub(offset).and_then(|at| data.get(at)).copied().unwrap_or(0);
            let cleared = before[at] & clearable[at] & !after[at];
            prop_assert_eq!(after[at] & clearable[at] & !before[at], 0, "set at {:#x}", at);
            if effects.reset.is_none() {
                prop_assert_eq!(cleared, before[at] & clearable[at] & value, "at {:#x}", at);
            }
        }
    }

    #[test]
    fn effects_and_epoch_say_what_changed_and_nothing_else(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..64),
    ) {
        let mut function = Function::new(spec).unwrap();
        for operation in operations {
            let before = function.clone();
            let (effects, intx) = operation.apply(&mut function);

            let decode = before.decode() != function.decode();
            let moved = function
                .bars()
                .zip(before.bars())
                .filter(|(now, then)| now.address != then.address)
                .map(|(now, _)| now.index)
                .collect::<BarSet>();
            prop_assert_eq!(effects.decode, decode.then(|| function.decode()));
            prop_assert_eq!(effects.bars_moved, moved);
            let rom_moved = before.rom().map(|rom| rom.address) != function.rom().map(|rom| rom.address);
            prop_assert_eq!(effects.rom_moved, rom_moved);
            let step = u64::from(decode || !moved.is_empty() || rom_moved);
            prop_assert_eq!(function.epoch(), before.epoch() + step);

            let line = (before.intx_line() != function.intx_line()).then(|| function.intx_line());
            prop_assert_eq!(effects.intx.or(intx), line);
            let bus_master =
                (before.bus_master() != function.bus_master()).then(|| function.bus_master());
            prop_assert_eq!(effects.bus_master, bus_master);
            let enabled =
                (before.msi_enabled() != function.msi_enabled()).then(|| function.msi_enabled());
            prop_assert_eq!(effects.msi.enabled, enabled);
            let enabled =
                (before.msix_enabled() != function.msix_enabled()).then(|| function.msix_enabled());
            prop_assert_eq!(effects.msix.enabled, enabled);
            prop_assert!(!(function.msi_enabled() && function.msix_enabled()));
            // What was delivered was pending, and is no longer.
            let (was, is) = (pending(&before), pending(&function));
            for vector in effects.msix.deliver.iter() {
                let bit = |bytes: &[u8]| bytes[usize::from(vector / 8)] & 1 << (vector % 8) != 0;
                prop_assert!(bit(&was) && !bit(&is), "vector {}", vector);
            }
            let power =
                (before.power_state() != function.power_state()).then(|| function.power_state());
            prop_assert_eq!(effects.power, power);
        }
    }

    #[test]
    fn a_reset_returns_to_the_power_on_image(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..64),
        kind in reset_kind(),
    ) {
        let mut function = Function::new(spec.clone()).unwrap();
        let power_on = image(&function);
        for operation in operations {
            let _ = operation.apply(&mut function);
        }
        let retained = bits(&function, |register| match kind {
            ResetKind::Device => 0,
            ResetKind::Hot => register.sticky,
            ResetKind::Soft | ResetKind::FunctionLevel => register.sticky | register.reset_retains,
        });
        let before = image(&function);
        let effects = function.reset(kind);
        prop_assert_eq!(effects.reset, Some(kind));
        for (at, &byte) in image(&function).iter().enumerate() {
            let expected = before[at] & retained[at] | power_on[at] & !retained[at];
            prop_assert_eq!(byte, expected, "at {:#x}", at);
        }
        let fresh = Function::new(spec).unwrap();
        prop_assert_eq!(table(&function), table(&fresh));
        prop_assert_eq!(pending(&function), pending(&fresh));
        prop_assert!(!function.intx_line());
        prop_assert_eq!(function.decode(), fresh.decode());
    }

    #[test]
    fn a_wide_access_is_its_bytes_in_ascending_order(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..32),
        Write { offset, data } in write(),
    ) {
        let mut wide = Function::new(spec).unwrap();
        for operation in operations {
            let _ = operation.apply(&mut wide);
        }
        let mut narrow = wide.clone();

        let effects = wide.config_write(offset, &data);
        let mut reset = None;
        let mut delivered = MsiVectorSet::EMPTY;
        let mut vectors = Vec::new();
        for (at, &byte) in data.iter().enumerate() {
            let effects = narrow.config_write(offset.saturating_add(at), &[byte]);
            delivered = delivered.union(effects.msi.deliver);
            vectors.extend(effects.msix.deliver.iter());
            reset = reset.max(effects.reset);
        }
        prop_assert_eq!(image(&wide), image(&narrow));
        prop_assert_eq!(effects.reset, reset);
        if reset.is_none() {
            prop_assert_eq!(effects.msi.deliver, delivered);
            vectors.sort_unstable();
            prop_assert_eq!(effects.msix.deliver.iter().collect::<Vec<_>>(), vectors);
        }

        let mut whole = vec![0; data.len()];
        wide.config_read(offset, &mut whole);
        let bytes = (0..data.len()).map(|at| read8(&wide, offset.saturating_add(at)));
        prop_assert_eq!(whole, bytes.collect::<Vec<_>>());
    }

    #[test]
    fn a_wide_access_to_a_table_is_its_bytes_in_ascending_order(
        spec in function_spec(),
        operations in prop::collection::vec(operation(), 0..32),
        Write { offset, data } in table_write(),
    ) {
        let mut wide = Function::new(spec).unwrap();
        for operation in operations {
            let _ = operation.apply(&mut wide);
        }
        let mut narrow = wide.clone();
        let offset = offset as u64;
        let effects = wide.msix_table_write(offset, &data);
        let mut vectors = Vec::new();
        for (at, &byte) in (offset..).zip(&data) {
            vectors.extend(narrow.msix_table_write(at, &[byte]).msix.deliver.iter());
        }
        prop_assert_eq!(effects.msix.deliver.iter().collect::<Vec<_>>(), vectors);
        prop_assert_eq!(table(&wide), table(&narrow));
        prop_assert_eq!(pending(&wide), pending(&narrow));

        let (mut block, mut pending_block) = (vec![0; data.len()], vec![0; data.len()]);
        wide.msix_table_read(offset, &mut block);
        wide.msix_pending_read(offset % 32, &mut pending_block);
        for at in 0..data.len() {
            let mut byte = [0];
            wide.msix_table_read(offset + at as u64, &mut byte);
            prop_assert_eq!(block[at], byte[0]);
            wide.msix_pending_read(offset % 32 + at as u64, &mut byte);
            prop_assert_eq!(pending_block[at], byte[0]);
        }
    }

    #[test]
    fn pieces_cover_an_access_and_each_byte_has_one_owner(
        spec in function_spec(),
        bar in prop::sample::select(BarIndex::ALL.to_vec()),
        offset in prop_oneof![0..0x3000_u64, any::<u64>()],
        length in 0..0x900_usize,
    ) {
        let function = Function::new(spec).unwrap();
        let size = function.bar(bar).map_or(0, |bar| bar.size);
        let mut covered = 0;
        let mut before = None;
        for BarPiece { owner, offset: start, data } in function.bar_pieces(bar, offset, length) {
            prop_assert_eq!(data.start, covered);
            prop_assert!(!data.is_empty() && before != Some(owner));
            covered = data.end;
            before = Some(owner);
            for (at, byte) in data.enumerate() {
                let alone: Vec<_> = function.bar_pieces(bar, offset + byte as u64, 1).collect();
                let piece = BarPiece { owner, offset: start + at as u64, data: 0..1 };
                prop_assert_eq!(alone, [piece]);
            }
        }
        let inside = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        prop_assert_eq!(covered, length.min(inside));
    }

    #[test]
    fn a_page_may_be_mapped_if_all_of_it_is_the_devices(
        spec in function_spec(),
        bar in prop::sample::select(BarIndex::ALL.to_vec()),
    ) {
        let function = Function::new(spec).unwrap();
        let areas = function.mappable_areas(bar);
        let memory = function.bar(bar).filter(|bar| bar.kind != BarKind::Io);
        let size = memory.map_or(0, |bar| bar.size);
        for page in (0..size.min(0x2_0000)).step_by(4096) {
            let pieces: Vec<_> = function.bar_pieces(bar, page, 4096).collect();
            let whole = [BarPiece { owner: BarOwner::Device, offset: page, data: 0..4096 }];
            let mapped = areas.iter().any(|area| area.contains(&page));
            prop_assert_eq!(mapped, pieces == whole, "{:#x}", page);
        }
        for pair in areas.windows(2) {
            prop_assert!(pair[0].end < pair[1].start, "apart and in order");
        }
        for area in areas {
            prop_assert_eq!((area.start % 4096, area.end % 4096), (0, 0));
            prop_assert!(area.start < area.end && area.end <= size);
        }
    }

    #[test]
    fn a_restored_function_goes_on_like_the_one_that_was_saved(
        spec in function_spec(),
        before in prop::collection::vec(operation(), 0..48),
        after in prop::collection::vec(operation(), 0..16),
    ) {
        let mut saved = Function::new(spec.clone()).unwrap();
        for operation in before {
            let _ = operation.apply(&mut saved);
        }
        let mut restored = Function::new(spec).unwrap();
        let fresh = restored.clone();
        let effects = restored.restore(&saved.save());
        let effects = effects.map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(effects.reset, None);
        prop_assert!(effects.msi.deliver.is_empty() && effects.msix.deliver.is_empty());
        prop_assert_eq!(effects.decode.is_some(), fresh.decode() != saved.decode());
        prop_assert_eq!(effects.intx.is_some(), fresh.intx_line() != saved.intx_line());
        prop_assert!(restored.epoch() >= saved.epoch());
        for operation in after {
            prop_assert_eq!(image(&restored), image(&saved));
            prop_assert_eq!(table(&restored), table(&saved));
            prop_assert_eq!(pending(&restored), pending(&saved));
            let effects = operation.clone().apply(&mut restored);
            prop_assert_eq!(effects, operation.apply(&mut saved));
        }
        prop_assert_eq!(image(&restored), image(&saved));
    }

    #[test]
    fn a_damaged_state_is_refused_or_one_that_a_function_can_be_in(
        spec in function_spec(),
        before in prop::collection::vec(operation(), 0..32),
        damage in prop::collection::vec((0..3, any::<prop::sample::Index>(), 0..8_u32), 1..4),
        after in prop::collection::vec(operation(), 0..16),
    ) {
        let mut function = Function::new(spec.clone()).unwrap();
        let power_on = image(&function);
        let changing = bits(&function, |register| register.read_write | register.volatile);
        for operation in before {
            let _ = operation.apply(&mut function);
        }
        let FunctionState::V1(mut state) = function.save();
        for (what, index, bit) in damage {
            match what {
                // In configuration space, where the registers are.
                0 => state.config[index.index(0x130.min(function.config_size()))] ^= 1 << bit,
                1 if !state.msix_table.is_empty() => {
                    let at = index.index(state.msix_table.len());
                    state.msix_table[at] ^= 1 << bit;
                }
                2 if !state.msix_pending.is_empty() => {
                    let at = index.index(state.msix_pending.len());
                    state.msix_pending[at] ^= 1 << (8 * bit);
                }
                _ => {}
            }
        }
        let mut restored = Function::new(spec.clone()).unwrap();
        let untouched = restored.save();
        if restored.restore(&FunctionState::V1(state)).is_err() {
            prop_assert_eq!(restored.save(), untouched);
            return Ok(());
        }
        for (at, (now, then)) in image(&restored).iter().zip(&power_on).enumerate() {
            prop_assert_eq!((now ^ then) & !changing[at], 0, "at {:#x}", at);
        }
        // Nothing it is asked to do from here on leads out of what can be saved and restored.
        for operation in after {
            let _ = operation.apply(&mut restored);
        }
        prop_assert!(Function::new(spec).unwrap().restore(&restored.save()).is_ok());
    }
}

/// Configuration space as far as there are registers; the rest was looked at and reads 0.
fn image(function: &Function) -> Vec<u8> {
    let mut bytes = super::image(function);
    let rest = bytes.split_off(0x140.min(bytes.len()));
    assert_eq!(rest, vec![0; rest.len()], "reserved");
    bytes
}

/// The MSI-X table.
fn table(function: &Function) -> Vec<u8> {
    let length = function.spec().msix.map_or(0, |msix| msix.vectors.table_length());
    let mut data = vec![0; length];
    function.msix_table_read(0, &mut data);
    data
}

/// The Pending Bit Array.
fn pending(function: &Function) -> Vec<u8> {
    let length = function.spec().msix.map_or(0, |msix| msix.vectors.pending_length());
    let mut data = vec![0; length];
    function.msix_pending_read(0, &mut data);
    data
}

/// Per byte of configuration space, the bits that `mask` picks from its register.
fn bits(function: &Function, mask: impl Fn(&Register) -> u32) -> Vec<u8> {
    let mut bits = vec![0; function.config_size()];
    for register in function.registers() {
        let width = register.width.bytes();
        bits[register.offset..][..width].copy_from_slice(&mask(register).to_le_bytes()[..width]);
    }
    bits
}

#[derive(Clone, Debug)]
enum Operation {
    Write(Write),
    TableWrite(Write),
    Intx(bool),
    Msi(u8),
    Msix(u16),
    UnsupportedRequest(UnsupportedRequest),
    Reset(ResetKind),
}

impl Operation {
    fn apply(self, function: &mut Function) -> (Effects, Option<bool>) {
        match self {
            Self::Write(Write { offset, data }) => (function.config_write(offset, &data), None),
            Self::TableWrite(Write { offset, data }) => {
                (function.msix_table_write(offset as u64, &data), None)
            }
            Self::Intx(asserted) => (Effects::default(), function.set_intx(asserted)),
            Self::Msi(vector) => {
                let _ = function.raise_msi(vector);
                (Effects::default(), None)
            }
            Self::Msix(vector) => {
                let _ = function.raise_msix(vector);
                (Effects::default(), None)
            }
            Self::UnsupportedRequest(request) => {
                function.record_unsupported_request(&request);
                (Effects::default(), None)
            }
            Self::Reset(kind) => (function.reset(kind), None),
        }
    }
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        12 => write().prop_map(Operation::Write),
        4 => table_write().prop_map(Operation::TableWrite),
        2 => any::<bool>().prop_map(Operation::Intx),
        2 => (0..34_u8).prop_map(Operation::Msi),
        3 => (0..140_u16).prop_map(Operation::Msix),
        2 => unsupported_request().prop_map(Operation::UnsupportedRequest),
        1 => reset_kind().prop_map(Operation::Reset),
    ]
}

fn unsupported_request() -> impl Strategy<Value = UnsupportedRequest> {
    let kind = prop_oneof![
        Just(RequestKind::MemoryRead),
        Just(RequestKind::MemoryWrite),
        Just(RequestKind::IoRead),
        Just(RequestKind::IoWrite),
    ];
    (kind, any::<u64>(), 0..9000_usize).prop_map(|(kind, address, length)| UnsupportedRequest {
        kind,
        address,
        length,
    })
}

#[derive(Clone, Debug)]
struct Write {
    offset: usize,
    data: Vec<u8>,
}

/// Mostly where registers are, sometimes where they end, now and then far off.
fn write() -> impl Strategy<Value = Write> {
    let offset = prop_oneof![
        20 => 0..0xc0_usize,
        4 => Just(spec::header::COMMAND),
        // Where MSI and MSI-X are enabled, and Advanced Error Reporting, if nothing else is there.
        2 => prop::sample::select(vec![0x42_usize, 0x43, 0x4b, 0x5a, 0x63]),
        3 => 0x100..0x130_usize,
        2 => 0..4200_usize,
        1 => Just(usize::MAX - 2),
    ];
    (offset, bytes()).prop_map(|(offset, data)| Write { offset, data })
}

/// To the MSI-X table, mostly to its first entries.
fn table_write() -> impl Strategy<Value = Write> {
    let offset = prop_oneof![
        4 => 0..64_usize,
        // The mask bit of each vector.
        4 => (0..140_usize).prop_map(|vector| 16 * vector + 12),
        2 => 0..2200_usize,
        1 => Just(usize::MAX / 2),
    ];
    (offset, bytes()).prop_map(|(offset, data)| Write { offset, data })
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        2 => any::<u8>(),
        1 => Just(0),
        1 => Just(0xff),
        // The bits that decide most: decode, bus mastering, power state, MSI and MSI-X enable.
        2 => 0..8_u8,
        1 => Just(0x80),
    ];
    prop::collection::vec(byte, 0..=24)
}

fn reset_kind() -> impl Strategy<Value = ResetKind> {
    prop_oneof![
        Just(ResetKind::Soft),
        Just(ResetKind::FunctionLevel),
        Just(ResetKind::Hot),
        Just(ResetKind::Device),
    ]
}

fn function_spec() -> impl Strategy<Value = FunctionSpec> {
    let interrupts = (
        prop::option::of(Just(InterruptPin::B)),
        prop::option::of((vectors(), any::<bool>())),
        prop::option::of(msix_spec()),
    );
    let rest = (
        prop::option::of((11..=24_u32).prop_map(|log2| RomSpec { size: 1 << log2 })),
        prop::collection::vec(vendor_spec(), 0..3),
        prop_oneof![3 => Just(Decoding::Strict), 1 => Just(Decoding::Always)],
    );
    (
        prop::collection::vec(bar_spec(), 0..6),
        interrupts,
        prop::option::of(any::<bool>()),
        prop::option::of((any::<bool>(), any::<bool>())),
        rest,
    )
        .prop_map(|(candidates, (interrupt_pin, msi, msix), power, express, rest)| {
            let (rom, vendor, decode) = rest;
            let mut spec = FunctionSpec {
                interrupt_pin,
                msi: msi
                    .map(|(vectors, per_vector_masking)| MsiSpec { vectors, per_vector_masking }),
                power: power.map(|no_soft_reset| PowerSpec { no_soft_reset }),
                express: express
                    .map(|(function_level_reset, aer)| ExpressSpec { function_level_reset, aer }),
                rom,
                vendor,
                decode,
                ..FunctionSpec::new(IDS)
            };
            if let Some(msix) = msix {
                spec.bars.push(memory32(BarIndex::BAR1, 0x4000));
                spec.msix = Some(msix);
                if Function::new(spec.clone()).is_err() {
                    spec.msix = None;
                }
            }
            for bar in candidates {
                spec.bars.push(bar);
                if Function::new(spec.clone()).is_err() {
                    spec.bars.pop();
                }
            }
            spec
        })
}

/// In BAR 1 of 16 KiB.
fn msix_spec() -> impl Strategy<Value = MsixSpec> {
    let at = |offset: u64| BarOffset { bar: BarIndex::BAR1, offset: 8 * offset };
    (1..=130_u16, 0..0x500_u64, 0..0x7ff_u64).prop_map(move |(count, table, pending)| MsixSpec {
        vectors: MsixVectors::new(count).unwrap(),
        table: at(table),
        pending: at(pending),
    })
}

fn vendor_spec() -> impl Strategy<Value = VendorSpec> {
    let byte = (any::<u8>(), any::<u8>());
    let bytes = prop::collection::vec(byte, 0..12);
    bytes.prop_map(|bytes| VendorSpec {
        bytes: bytes
            .into_iter()
            .map(|(reset, read_write)| VendorByte { reset, read_write })
            .collect(),
    })
}

fn bar_spec() -> impl Strategy<Value = BarSpec> {
    let kind_and_size = prop_oneof![
        (any::<bool>(), 4..=31_u32)
            .prop_map(|(prefetchable, log2)| (BarKind::Memory32 { prefetchable }, log2)),
        (any::<bool>(), 4..=63_u32)
            .prop_map(|(prefetchable, log2)| (BarKind::Memory64 { prefetchable }, log2)),
        (2..=8_u32).prop_map(|log2| (BarKind::Io, log2)),
    ];
    (prop::sample::select(BarIndex::ALL.to_vec()), kind_and_size)
        .prop_map(|(index, (kind, log2))| BarSpec { index, kind, size: 1 << log2 })
}

fn vectors() -> impl Strategy<Value = MsiVectors> {
    prop_oneof![
        Just(MsiVectors::One),
        Just(MsiVectors::Two),
        Just(MsiVectors::Eight),
        Just(MsiVectors::ThirtyTwo),
    ]
}
