//! What holds for every function and every sequence of operations.

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn no_write_changes_a_read_only_bit(
        spec in function_spec(),
        writes in prop::collection::vec(write(), 0..64),
    ) {
        let mut function = Function::new(spec).unwrap();
        let power_on = image(&function);
        let writable = bits(&function, |register| register.read_write);
        for Write { offset, data } in writes {
            let _ = function.config_write(offset, &data);
        }
        for (offset, (now, then)) in image(&function).iter().zip(&power_on).enumerate() {
            // Bits that are cleared by writing were never set here, so they count as read-only.
            prop_assert_eq!((now ^ then) & !writable[offset], 0, "at {:#x}", offset);
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
            let step = u64::from(decode || !moved.is_empty());
            prop_assert_eq!(function.epoch(), before.epoch() + step);

            let line = (before.intx_line() != function.intx_line()).then(|| function.intx_line());
            prop_assert_eq!(effects.intx.or(intx), line);
            let bus_master =
                (before.bus_master() != function.bus_master()).then(|| function.bus_master());
            prop_assert_eq!(effects.bus_master, bus_master);
            let enabled =
                (before.msi_enabled() != function.msi_enabled()).then(|| function.msi_enabled());
            prop_assert_eq!(effects.msi.enabled, enabled);
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
        prop_assert!(!function.intx_line());
        prop_assert_eq!(function.decode(), Decode::default());
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
        for (at, &byte) in data.iter().enumerate() {
            let effects = narrow.config_write(offset.saturating_add(at), &[byte]);
            delivered = delivered.union(effects.msi.deliver);
            reset = reset.max(effects.reset);
        }
        prop_assert_eq!(image(&wide), image(&narrow));
        prop_assert_eq!(effects.reset, reset);
        if reset.is_none() {
            prop_assert_eq!(effects.msi.deliver, delivered);
        }

        let mut whole = vec![0; data.len()];
        wide.config_read(offset, &mut whole);
        let bytes = (0..data.len()).map(|at| read8(&wide, offset.saturating_add(at)));
        prop_assert_eq!(whole, bytes.collect::<Vec<_>>());
    }
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
    Intx(bool),
    Msi(u8),
    UnsupportedRequest(RequestKind),
    Reset(ResetKind),
}

impl Operation {
    fn apply(self, function: &mut Function) -> (Effects, Option<bool>) {
        match self {
            Self::Write(Write { offset, data }) => (function.config_write(offset, &data), None),
            Self::Intx(asserted) => (Effects::default(), function.set_intx(asserted)),
            Self::Msi(vector) => {
                let _ = function.raise_msi(vector);
                (Effects::default(), None)
            }
            Self::UnsupportedRequest(kind) => {
                function.record_unsupported_request(&request(kind));
                (Effects::default(), None)
            }
            Self::Reset(kind) => (function.reset(kind), None),
        }
    }
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        12 => write().prop_map(Operation::Write),
        2 => any::<bool>().prop_map(Operation::Intx),
        2 => (0..34_u8).prop_map(Operation::Msi),
        2 => prop_oneof![Just(RequestKind::MemoryWrite), Just(RequestKind::MemoryRead)]
            .prop_map(Operation::UnsupportedRequest),
        1 => reset_kind().prop_map(Operation::Reset),
    ]
}

#[derive(Clone, Debug)]
struct Write {
    offset: usize,
    data: Vec<u8>,
}

/// Mostly where registers are, sometimes where they end, now and then far off.
fn write() -> impl Strategy<Value = Write> {
    let offset = prop_oneof![
        20 => 0..0xa0_usize,
        4 => Just(spec::header::COMMAND),
        2 => 0..4200_usize,
        1 => Just(usize::MAX - 2),
    ];
    let byte = prop_oneof![
        2 => any::<u8>(),
        1 => Just(0),
        1 => Just(0xff),
        // The bits that decide most: decode, bus mastering, power state, MSI enable.
        2 => 0..8_u8,
    ];
    (offset, prop::collection::vec(byte, 0..=16)).prop_map(|(offset, data)| Write { offset, data })
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
    (
        prop::collection::vec(bar_spec(), 0..6),
        prop::option::of(Just(InterruptPin::B)),
        prop::option::of((vectors(), any::<bool>())),
        prop::option::of(any::<bool>()),
        prop::option::of(any::<bool>()),
    )
        .prop_map(|(candidates, interrupt_pin, msi, power, express)| {
            let mut spec = FunctionSpec {
                interrupt_pin,
                msi: msi
                    .map(|(vectors, per_vector_masking)| MsiSpec { vectors, per_vector_masking }),
                power: power.map(|no_soft_reset| PowerSpec { no_soft_reset }),
                express: express
                    .map(|function_level_reset| ExpressSpec { function_level_reset, aer: false }),
                ..FunctionSpec::new(IDS)
            };
            for bar in candidates {
                spec.bars.push(bar);
                if Function::new(spec.clone()).is_err() {
                    spec.bars.pop();
                }
            }
            spec
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
