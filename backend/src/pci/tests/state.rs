//! Saving and restoring.

use super::*;

const MSIX_CONTROL: usize = EVERYTHING_MSIX + spec::msix::MESSAGE_CONTROL;
const MSI_MASK: usize = MSI + spec::msi::MASK;

/// A function in the middle of its work: placed, decoding, with a pending vector of each kind, an
/// asserted pin and a logged error.
fn busy() -> Function {
    let mut function = everything();
    let _ = write32(&mut function, 0x10, 0xe000_0000);
    let _ = write32(&mut function, spec::header::EXPANSION_ROM, 0xe100_0001);
    let _ = command(&mut function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    let _ = write16(&mut function, MSI + spec::msi::MESSAGE_CONTROL, 0x31);
    let _ = write8(&mut function, MSI_MASK, 0b100);
    assert_eq!(function.raise_msi(2), MsiOutcome::Pending);
    let _ = function.msix_table_write(0, &[0xa5; 64]);
    let _ = write16(&mut function, MSIX_CONTROL, spec::msix::CONTROL_ENABLE);
    assert_eq!(function.raise_msix(69), MsiOutcome::Pending);
    let _ = function.set_intx(true);
    let _ = function.record_unsupported_request(&request(RequestKind::MemoryWrite));
    function
}

fn v1(function: &Function) -> StateV1 {
    let FunctionState::V1(state) = function.save();
    state
}

fn restore(spec: FunctionSpec, state: StateV1) -> Result<Effects, StateError> {
    Function::new(spec).unwrap().restore(&FunctionState::V1(state))
}

#[test]
fn a_restored_function_is_the_one_that_was_saved() {
    let saved = busy();
    let bytes = postcard::to_allocvec(&saved.save()).unwrap();
    let state: FunctionState = postcard::from_bytes(&bytes).unwrap();
    let mut restored = everything();
    let effects = restored.restore(&state).unwrap();
    assert_eq!(
        effects,
        Effects {
            decode: Some(Decode { memory: true, io: false, rom: true }),
            bus_master: Some(true),
            bars_moved: BarIndex::BAR0.into(),
            rom_moved: true,
            msix: MsixEffects { enabled: Some(true), ..MsixEffects::default() },
            ..Effects::default()
        }
    );
    assert_eq!(image(&restored), image(&saved));
    assert_eq!(v1(&restored), StateV1 { epoch: restored.epoch(), ..v1(&saved) });
    assert!(restored.epoch() > saved.epoch(), "decode changed here, and the epoch never repeats");

    // What was pending is delivered by the same write.
    let unmask = |function: &mut Function| function.msix_table_write(69 * 16 + 12, &[0]);
    let effects = unmask(&mut restored);
    assert!(effects.msix.deliver.contains(69));
    assert_eq!(effects, unmask(&mut saved.clone()));
}

#[test]
fn a_table_that_reads_as_at_power_on_again_has_its_masks_once_restored() {
    let mut saved = everything();
    let _ = command(&mut saved, Command::MEMORY_SPACE | Command::BUS_MASTER);
    let _ = write16(&mut saved, MSIX_CONTROL, spec::msix::CONTROL_ENABLE);
    let mask = |function: &mut Function, bit| function.msix_table_write(12, &[bit]);
    let _ = mask(&mut saved, 0);
    let _ = mask(&mut saved, 1);
    assert_eq!(saved.raise_msix(0), MsiOutcome::Pending);
    let mut restored = everything();
    let _ = restored.restore(&saved.save()).unwrap();
    assert_eq!(restored.raise_msix(1), MsiOutcome::Pending);
    assert!(mask(&mut restored, 0).msix.deliver.contains(0));
}

#[test]
fn restoring_what_a_function_already_is_changes_nothing() {
    let mut function = busy();
    let epoch = function.epoch();
    let state = function.save();
    assert_eq!(function.restore(&state), Ok(Effects::default()));
    assert_eq!((function.epoch(), function.save()), (epoch, state));
}

#[test]
fn the_state_of_another_kind_of_function_is_refused() {
    let spec = everything_spec();
    let change = |change: fn(&mut FunctionSpec)| {
        let mut spec = spec.clone();
        change(&mut spec);
        spec
    };
    let others = [
        (0x02, change(|spec| spec.ids.device += 1)),
        (0x2c, change(|spec| spec.ids.subsystem_vendor += 1)),
        (0x10, change(|spec| spec.bars[0].size *= 2)),
        (0x18, change(|spec| spec.bars[1].kind = BarKind::Memory64 { prefetchable: false })),
        (0x04, change(|spec| spec.interrupt_pin = None)),
        (0x30, change(|spec| spec.rom = Some(RomSpec { size: 0x800 }))),
        (0x4a, change(|spec| spec.msi.as_mut().unwrap().vectors = MsiVectors::One)),
        (0x62, change(|spec| spec.msix.as_mut().unwrap().vectors = MsixVectors::new(69).unwrap())),
        (0x64, change(|spec| spec.msix.as_mut().unwrap().table.offset = 0)),
        (0x44, change(|spec| spec.power = Some(PowerSpec { no_soft_reset: false }))),
        (0x70, change(|spec| spec.express.as_mut().unwrap().function_level_reset = false)),
        (0x76, change(|spec| spec.express.as_mut().unwrap().aer = false)),
        (0xb2, change(|spec| spec.vendor[0].bytes.truncate(6))),
        (0xb7, change(|spec| spec.vendor[1].bytes[0].read_write = 0xff)),
    ];
    for (offset, other) in others {
        let error = match offset {
            // The length of the capability differs first.
            0xb2 => StateError::OtherRegisters { offset: 0xaa },
            _ => StateError::OtherRegisters { offset },
        };
        let theirs = v1(&Function::new(other.clone()).unwrap());
        assert_eq!(restore(spec.clone(), theirs), Err(error), "{offset:#x}");
        let ours = v1(&Function::new(spec.clone()).unwrap());
        assert_eq!(restore(other, ours), Err(error), "{offset:#x}, the other way");
    }

    let always = FunctionSpec { decode: Decoding::Always, ..spec.clone() };
    let state = v1(&Function::new(always).unwrap());
    assert_eq!(restore(spec.clone(), state), Err(StateError::OtherDecoding));

    // One list of registers the start of the other.
    let mut state = v1(&everything());
    let last = state.layout.pop().unwrap();
    assert!(matches!(restore(spec.clone(), state), Err(StateError::OtherRegisters { .. })));
    let mut state = v1(&everything());
    state.layout.push(last);
    assert!(matches!(restore(spec, state), Err(StateError::OtherRegisters { .. })));
}

#[test]
fn values_that_nothing_leads_to_are_refused() {
    type Change = fn(&mut StateV1);
    let config = |offset| StateError::Config { offset };
    let control = AER + spec::aer::CAPABILITIES_AND_CONTROL;
    let cases: &[(&str, Change, StateError)] = &[
        ("another Vendor ID", |state| state.config[0] ^= 1, config(0)),
        ("a reserved byte", |state| state.config[0x28] = 1, config(0x28)),
        ("a reserved bit of Command", |state| state.config[4] |= 8, config(4)),
        ("a BAR's type", |state| state.config[0x10] |= 8, config(0x10)),
        ("an error that is never recorded", |state| state.config[7] |= 0x80, config(7)),
        ("a vendor's constant", |state| state.config[EVERYTHING_VENDOR + 4] ^= 1, config(0xac)),
        ("extended space", |state| state.config[0xfff] = 1, config(0xfff)),
        ("space that ends early", |state| state.config.truncate(256), config(256)),
        ("no space", |state| state.config.clear(), config(0)),
        ("space that goes on", |state| state.config.push(0), config(4096)),
        ("D1", |state| state.config[PM + 4] |= 1, config(PM + 4)),
        ("D2", |state| state.config[PM + 4] |= 2, config(PM + 4)),
        ("a pointer to another error", |state| state.config[AER + 0x18] = 4, config(control)),
        (
            "an MSI vector pending that was not granted",
            |state| {
                state.config[MSI + 2] = 0x01 | state.config[MSI + 2] & 0x8f;
                state.config[MSI + 0x14] = 0x80;
            },
            config(MSI + 0x14),
        ),
        (
            "an MSI vector pending that nothing holds back",
            |state| {
                state.config[MSIX_CONTROL + 1] = 0;
                state.config[MSI_MASK] = 0;
            },
            config(MSI + 0x14),
        ),
        ("a short table", |state| state.msix_table.truncate(69 * 16), StateError::Msix),
        ("a long table", |state| state.msix_table.push(0), StateError::Msix),
        ("a reserved bit of a table", |state| state.msix_table[13] = 1, StateError::Msix),
        ("an unaligned message address", |state| state.msix_table[0] |= 1, StateError::Msix),
        ("no pending bits", |state| state.msix_pending.clear(), StateError::Msix),
        ("too many pending bits", |state| state.msix_pending.push(0), StateError::Msix),
        ("vector 70 pending", |state| state.msix_pending[1] |= 1 << 6, StateError::Msix),
        (
            "a vector pending that nothing holds back",
            |state| state.msix_table[69 * 16 + 12] = 0,
            StateError::Msix,
        ),
    ];
    for (what, change, error) in cases {
        let mut state = v1(&busy());
        change(&mut state);
        let mut function = everything();
        let before = function.save();
        assert_eq!(function.restore(&FunctionState::V1(state)), Err(*error), "{what}");
        assert_eq!(function.save(), before, "{what}: the function is as it was");
    }

    let mut state = v1(&full());
    state.msix_pending.push(0);
    assert_eq!(restore(full_spec(), state), Err(StateError::Msix), "without MSI-X");
}

#[test]
fn the_epoch_goes_on_from_the_larger_one() {
    let mut state = v1(&busy());
    state.epoch = 1000;
    let mut function = everything();
    let _ = function.restore(&FunctionState::V1(state.clone())).unwrap();
    assert_eq!(function.epoch(), 1001, "decode changed");
    state.epoch = 3;
    assert_eq!(function.restore(&FunctionState::V1(state.clone())), Ok(Effects::default()));
    assert_eq!(function.epoch(), 1001);

    // A number that no function reaches overflows nothing.
    state.epoch = u64::MAX;
    let _ = everything().restore(&FunctionState::V1(state)).unwrap();
}
