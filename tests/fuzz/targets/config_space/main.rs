//! Software and the function itself at work on a function's registers: configuration space, the
//! MSI-X table and what the function records. No write of any width moves a read-only bit, the epoch
//! counts what changes decode and nothing else, what the function says of itself agrees with its
//! registers, and one that was restored goes on like the one that was saved.
#![no_main]

mod functions;
mod observed;
mod operation;

use barkeep_backend::pci::{BarIndex, BarKind, Decoding, Function, ResetKind, spec};
use barkeep_fuzz::Input;
use libfuzzer_sys::fuzz_target;

use self::observed::{Masks, Observed, differences};
use self::operation::{Operation, Outcome};

const MAX_RESTORES: u32 = 6;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut function = functions::function(input.u8());
    let masks = Masks::of(&function);
    let power_on = Observed::of(&function);
    let mut before = Observed::of(&function);
    // Restored from what the function was then, it lives on beside it.
    let mut restored: Option<Function> = None;
    let mut restores = 0;
    while !input.is_empty() {
        let Some(operation) = Operation::take(&mut input, &function) else {
            // It takes the time of many other operations.
            if restores < MAX_RESTORES {
                restored = Some(restore(&function, &before));
                restores += 1;
            }
            continue;
        };
        let outcome = operation.apply(&mut function);
        let now = Observed::of(&function);
        match &operation {
            Operation::ConfigWrite { offset, data } if outcome.effects.reset.is_none() => {
                check_config_write(*offset, data, &before, &now, &masks);
            }
            Operation::ConfigWrite { .. } => {}
            Operation::Reset(kind) => {
                check_reset(*kind, &outcome, &before, &now, &power_on, &masks)
            }
            operation => operation.check(&outcome, &function, &before, &now),
        }
        check_effects(&outcome, &before, &now);
        check(&function, &before, &now);
        if let Some(restored) = &mut restored {
            assert_eq!(operation.apply(restored), outcome, "{operation:?} once restored");
            assert_eq!(Observed::of(restored).registers(), now.registers(), "{operation:?}");
        }
        before = now;
    }
});

fn restore(function: &Function, now: &Observed) -> Function {
    let state = function.save();
    let mut restored = Function::new(function.spec().clone()).expect("it could exist before");
    let effects = restored.restore(&state).expect("a state that a function is in");
    assert_eq!(effects.reset, None);
    assert!(effects.msi.deliver.is_empty() && effects.msix.deliver.is_empty());
    assert_eq!(Observed::of(&restored).registers(), now.registers(), "restored");
    assert!(restored.epoch() >= function.epoch());
    restored
}

/// Only bits that were written have moved, and of those only the ones that software can move.
fn check_config_write(
    offset: usize,
    data: &[u8],
    before: &Observed,
    now: &Observed,
    masks: &Masks,
) {
    for (at, was, is) in differences(&before.image, &now.image) {
        let value = at.checked_sub(offset).and_then(|at| data.get(at)).copied();
        let may = value.map_or(0, |value| masks.writable[at] | masks.clearable[at] & value);
        assert_eq!((was ^ is) & !may & !masks.followers[at], 0, "at {at:#x}");
        assert_eq!(is & masks.clearable[at] & !was, 0, "set by a write at {at:#x}");
        assert_eq!(is & masks.followers[at] & !was, 0, "pending by a write at {at:#x}");
    }
    assert_eq!(now.table, before.table);
}

fn check_reset(
    kind: ResetKind,
    outcome: &Outcome,
    before: &Observed,
    now: &Observed,
    power_on: &Observed,
    masks: &Masks,
) {
    assert_eq!(outcome.effects.reset, Some(kind));
    for (at, is, was) in differences(&now.image, &power_on.image) {
        let retained = match kind {
            ResetKind::Device => 0,
            ResetKind::Hot => masks.sticky[at],
            ResetKind::Soft | ResetKind::FunctionLevel => masks.sticky[at] | masks.retained[at],
        };
        assert_eq!((is ^ was) & !retained, 0, "at {at:#x}");
        assert_eq!((is ^ before.image[at]) & retained, 0, "not as before at {at:#x}");
    }
    assert_eq!((&now.table, &now.pending), (&power_on.table, &power_on.pending));
    assert_eq!((now.decode, now.bus_master), (power_on.decode, power_on.bus_master));
    assert!(!now.intx);
}

/// Effects are the differences, and nothing else.
fn check_effects(outcome: &Outcome, before: &Observed, now: &Observed) {
    fn changed<T: PartialEq + Copy>(before: T, now: T) -> Option<T> {
        (before != now).then_some(now)
    }
    let effects = &outcome.effects;
    assert_eq!(effects.decode, changed(before.decode, now.decode));
    assert_eq!(effects.bus_master, changed(before.bus_master, now.bus_master));
    assert_eq!(effects.intx.or(outcome.intx), changed(before.intx, now.intx));
    assert_eq!(effects.msi.enabled, changed(before.msi, now.msi));
    assert_eq!(effects.msix.enabled, changed(before.msix, now.msix));
    assert_eq!(effects.power, changed(before.power, now.power));
    assert_eq!(effects.rom_moved, before.rom != now.rom);
    assert_eq!(effects.bars_moved.is_empty(), before.addresses == now.addresses);
    for vector in effects.msix.deliver.iter() {
        assert!(before.is_pending(vector) && !now.is_pending(vector), "vector {vector}");
    }
}

/// What holds between any two operations.
fn check(function: &Function, before: &Observed, now: &Observed) {
    let moved = before.addresses != now.addresses || before.rom != now.rom;
    let changed = moved || before.decode != now.decode;
    assert_eq!(now.epoch, before.epoch + u64::from(changed));
    for bar in function.bars() {
        assert_eq!(bar.address % bar.size, 0, "{}", bar.index);
        let io = bar.kind == BarKind::Io;
        assert_eq!(function.claims(bar.index), if io { now.decode.io } else { now.decode.memory });
    }
    for index in BarIndex::ALL {
        assert!(function.bar(index).is_some() || !function.claims(index));
    }
    if let Some(rom) = function.rom() {
        assert_eq!(rom.address % rom.size, 0);
    }
    assert_eq!(now.decode.rom, now.decode.memory && function.rom().is_some_and(|rom| rom.enabled));
    if function.spec().decode == Decoding::Strict {
        let command = now.image[spec::header::COMMAND];
        assert!(command & 0b010 != 0 || !now.decode.memory);
        assert!(command & 0b001 != 0 || !now.decode.io);
        assert!(command & 0b100 != 0 || !now.bus_master);
    }
    assert!(!(now.intx && (now.msi || now.msix)));
    assert!(!(now.msi && now.msix));
    now.check_msix(function);
    // What lies past the end is all ones.
    let mut end = [0; 8];
    function.config_read(now.image.len() - 4, &mut end);
    assert_eq!(end[4..], [0xff; 4]);
    assert_eq!(end[..4], now.image[now.image.len() - 4..]);
}
