//! Command register, power state and resets: what the function claims, and what it tells of it.

use super::*;

const D0: u8 = 0b00;
const D1: u8 = 0b01;
const D2: u8 = 0b10;
const D3_HOT: u8 = 0b11;
const PMCSR: usize = PM + spec::power::PMCSR;
const DEVICE_CONTROL: usize = EXPRESS + spec::express::DEVICE_CONTROL;
const LINK_CONTROL: usize = EXPRESS + spec::express::LINK_CONTROL;

fn decode(memory: bool, io: bool) -> Option<Decode> {
    Some(Decode { memory, io, rom: false })
}

fn all_decoding(spec: FunctionSpec) -> Function {
    let mut function = Function::new(spec).unwrap();
    let _ = command(&mut function, Command::IO_SPACE | Command::MEMORY_SPACE | Command::BUS_MASTER);
    function
}

#[test]
fn enable_no_op_disable_relocate() {
    struct Step {
        what: &'static str,
        offset: usize,
        data: &'static [u8],
        effects: Effects,
        epoch: u64,
        bar0: (bool, u64),
    }
    let none = Effects::default;
    let moved = || Effects { bars_moved: BarIndex::BAR0.into(), ..none() };
    let steps = [
        Step {
            what: "place while disabled",
            offset: 0x10,
            data: &[0, 0, 0, 0xe0],
            effects: moved(),
            epoch: 1,
            bar0: (false, 0xe000_0000),
        },
        Step {
            what: "enable memory",
            offset: 4,
            data: &[0b010],
            effects: Effects { decode: decode(true, false), ..none() },
            epoch: 2,
            bar0: (true, 0xe000_0000),
        },
        Step {
            what: "enable memory again",
            offset: 4,
            data: &[0b010, 0],
            effects: none(),
            epoch: 2,
            bar0: (true, 0xe000_0000),
        },
        Step {
            what: "set parity response only",
            offset: 4,
            data: &[0b0100_0010],
            effects: none(),
            epoch: 2,
            bar0: (true, 0xe000_0000),
        },
        Step {
            what: "write the same address",
            offset: 0x10,
            data: &[0, 0, 0, 0xe0],
            effects: none(),
            epoch: 2,
            bar0: (true, 0xe000_0000),
        },
        Step {
            what: "relocate while enabled, by one byte",
            offset: 0x12,
            data: &[0x10],
            effects: moved(),
            epoch: 3,
            bar0: (true, 0xe010_0000),
        },
        Step {
            what: "disable memory and enable I/O and bus mastering at once",
            offset: 4,
            data: &[0b101],
            effects: Effects { decode: decode(false, true), bus_master: Some(true), ..none() },
            epoch: 4,
            bar0: (false, 0xe010_0000),
        },
        Step {
            what: "disable everything",
            offset: 4,
            data: &[0],
            effects: Effects { decode: decode(false, false), bus_master: Some(false), ..none() },
            epoch: 5,
            bar0: (false, 0xe010_0000),
        },
    ];

    let mut function = full();
    for step in steps {
        let effects = function.config_write(step.offset, step.data);
        assert_eq!(effects, step.effects, "{}", step.what);
        assert_eq!(function.epoch(), step.epoch, "{}", step.what);
        let bar = function.bar(BarIndex::BAR0).unwrap();
        assert_eq!((function.claims(BarIndex::BAR0), bar.address), step.bar0, "{}", step.what);
    }
}

#[test]
fn one_write_over_command_and_bars_yields_one_answer() {
    let mut function = all_decoding(full_spec());
    let epoch = function.epoch();
    let mut header = [0; 0x14];
    function.config_read(4, &mut header);
    header[0] = 0; // Command: off
    header[0x0c..0x10].copy_from_slice(&0xd000_0000_u32.to_le_bytes()); // BAR 0
    let effects = function.config_write(4, &header);
    assert_eq!(
        effects,
        Effects {
            decode: decode(false, false),
            bus_master: Some(false),
            bars_moved: BarIndex::BAR0.into(),
            ..Effects::default()
        }
    );
    assert_eq!(function.epoch(), epoch + 1);
}

#[test]
fn command_bits_exist_only_for_what_the_function_has() {
    let base = FunctionSpec::new(IDS);
    let always = Command::BUS_MASTER | Command::PARITY_ERROR_RESPONSE | Command::SERR_ENABLE;
    let cases = [
        ("nothing", base.clone(), always),
        (
            "memory",
            FunctionSpec { bars: vec![memory32(BarIndex::BAR1, 16)], ..base.clone() },
            always | Command::MEMORY_SPACE,
        ),
        (
            "I/O",
            FunctionSpec { bars: vec![io(BarIndex::BAR5, 4)], ..base.clone() },
            always | Command::IO_SPACE,
        ),
        (
            "pin",
            FunctionSpec { interrupt_pin: Some(InterruptPin::D), ..base },
            always | Command::INTERRUPT_DISABLE,
        ),
        ("everything", full_spec(), Command::all()),
    ];
    for (what, spec, writable) in cases {
        let mut function = Function::new(spec).unwrap();
        let _ = write16(&mut function, spec::header::COMMAND, 0xffff);
        assert_eq!(read16(&function, spec::header::COMMAND), writable.bits(), "{what}");
    }
}

#[test]
fn claims_follow_the_space_of_the_bar() {
    let mut function = full();
    for (bits, memory, io) in [
        (Command::empty(), false, false),
        (Command::MEMORY_SPACE, true, false),
        (Command::IO_SPACE, false, true),
        (Command::MEMORY_SPACE | Command::IO_SPACE, true, true),
    ] {
        let _ = command(&mut function, bits);
        let claims = BarIndex::ALL.map(|index| function.claims(index));
        // BAR 1 and 5 are not there, BAR 3 is the upper half of BAR 2.
        assert_eq!(claims, [memory, false, memory, false, io, false], "{bits:?}");
    }
}

#[test]
fn d3hot_stops_decode_bus_mastering_and_intx_and_d0_resumes_them() {
    let mut function = all_decoding(full_spec());
    let _ = write32(&mut function, 0x10, 0xe000_0000);
    let _ = function.set_intx(true);

    let effects = write8(&mut function, PMCSR, D3_HOT);
    assert_eq!(
        effects,
        Effects {
            decode: decode(false, false),
            bus_master: Some(false),
            intx: Some(false),
            power: Some(PowerState::D3Hot),
            ..Effects::default()
        }
    );
    assert!(!function.claims(BarIndex::BAR0));
    assert_eq!(read32(&function, 0x10), 0xe000_0000, "configuration space stays accessible");
    assert_eq!(command(&mut function, Command::all()), Effects::default(), "enables have to wait");
    let _ = command(&mut function, Command::MEMORY_SPACE);

    let effects = write8(&mut function, PMCSR, D0);
    assert_eq!(
        effects,
        Effects {
            decode: decode(true, false),
            intx: Some(true),
            power: Some(PowerState::D0),
            ..Effects::default()
        }
    );
}

#[test]
fn power_states_the_function_does_not_have_are_ignored() {
    for (initial, state) in [(D0, PowerState::D0), (D3_HOT, PowerState::D3Hot)] {
        for unsupported in [D1, D2] {
            let mut function = all_decoding(full_spec());
            let _ = write8(&mut function, PMCSR, initial);
            let effects = write8(&mut function, PMCSR, unsupported);
            assert_eq!(effects, Effects::default());
            assert_eq!(function.power_state(), state);
            assert_eq!(read8(&function, PMCSR) & 0b11, initial);
        }
    }
}

#[test]
fn leaving_d3hot_resets_a_function_that_does_not_keep_its_context() {
    let spec = FunctionSpec { power: Some(PowerSpec { no_soft_reset: false }), ..full_spec() };
    let power_on = image(&Function::new(spec.clone()).unwrap());
    let mut function = all_decoding(spec);
    let _ = write32(&mut function, 0x10, 0xe000_0000);
    let _ = write8(&mut function, PMCSR, D3_HOT);
    let epoch = function.epoch();

    let effects = write8(&mut function, PMCSR, D0);
    assert_eq!(
        effects,
        Effects {
            bars_moved: BarIndex::BAR0.into(),
            power: Some(PowerState::D0),
            reset: Some(ResetKind::Soft),
            ..Effects::default()
        }
    );
    assert_eq!(function.epoch(), epoch + 1);
    assert_eq!(image(&function), power_on);
}

#[test]
fn a_long_write_goes_on_after_the_reset_it_causes() {
    let spec = FunctionSpec { power: Some(PowerSpec { no_soft_reset: false }), ..full_spec() };
    let mut function = Function::new(spec).unwrap();
    let _ = write8(&mut function, PMCSR, D3_HOT);

    // From PMCSR to the message address, one request per doubleword.
    let mut data = [0; 12];
    data[8..].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
    assert_eq!(function.config_write(PMCSR, &data).reset, Some(ResetKind::Soft));
    assert_eq!(read32(&function, MSI + spec::msi::MESSAGE_ADDRESS), 0xfee0_0000);
}

#[test]
fn initiate_flr_resets_within_the_write() {
    let mut function = all_decoding(full_spec());
    let _ = write32(&mut function, 0x10, 0xe000_0000);
    let _ = function.set_intx(true);
    let _ = write16(&mut function, LINK_CONTROL, 0xffff);

    let effects = write16(&mut function, DEVICE_CONTROL, DeviceControl::INITIATE_FLR.bits());
    assert_eq!(
        effects,
        Effects {
            decode: decode(false, false),
            bus_master: Some(false),
            bars_moved: BarIndex::BAR0.into(),
            intx: Some(false),
            reset: Some(ResetKind::FunctionLevel),
            ..Effects::default()
        }
    );
    assert_eq!(read16(&function, LINK_CONTROL), spec::express::LINK_CONTROL_WRITABLE);
    let _ = write16(&mut function, LINK_CONTROL, 0);
    assert_eq!(image(&function), image(&full()), "and the reset bit reads 0");
}

#[test]
fn initiate_flr_in_any_write_that_covers_it() {
    for (offset, data) in [
        (DEVICE_CONTROL + 1, &[0x80][..]),
        (DEVICE_CONTROL, &[0, 0x80, 0, 0]),
        (DEVICE_CONTROL - 3, &[0xff; 8]),
    ] {
        assert_eq!(full().config_write(offset, data).reset, Some(ResetKind::FunctionLevel));
    }
    for (offset, data) in
        [(DEVICE_CONTROL, &[0x80][..]), (DEVICE_CONTROL + 2, &[0x80, 0x80]), (DEVICE_CONTROL, &[])]
    {
        assert_eq!(full().config_write(offset, data).reset, None);
    }
}

#[test]
fn without_the_capability_the_flr_bit_does_nothing() {
    let mut function = Function::new(FunctionSpec {
        express: Some(ExpressSpec { function_level_reset: false, aer: false }),
        ..full_spec()
    })
    .unwrap();
    let effects = write16(&mut function, DEVICE_CONTROL, 0x8000);
    assert_eq!(effects, Effects::default());
    assert_eq!(read16(&function, DEVICE_CONTROL), 0);
}

#[test]
fn flr_wakes_a_function_from_d3hot() {
    let mut function = full();
    let _ = write8(&mut function, PMCSR, D3_HOT);
    let effects = write16(&mut function, DEVICE_CONTROL, 0x8000);
    assert_eq!(effects.power, Some(PowerState::D0));
}

#[test]
fn a_device_reset_also_forgets_the_link() {
    let mut function = full();
    let _ = write16(&mut function, LINK_CONTROL, 0xffff);
    let effects = function.reset(ResetKind::Device);
    assert_eq!(effects, Effects { reset: Some(ResetKind::Device), ..Effects::default() });
    assert_eq!(image(&function), image(&full()));
    assert_eq!(function.epoch(), 0, "nothing moved");
}

/// What a function has left after D3hot, with and without No_Soft_Reset (PM 3.2.4).
#[test]
fn what_d3hot_leaves_of_a_function() {
    let express = EVERYTHING_EXPRESS;
    let registers: [(&str, usize, u32, u32); 9] = [
        // What was written, and what a soft reset leaves of it.
        ("BAR 0", 0x10, 0xe000_0000, 0),
        ("BAR 2, upper half", 0x1c, 0x12, 0),
        ("expansion ROM", spec::header::EXPANSION_ROM, 0xe100_0001, 0),
        ("Command", spec::header::COMMAND, 0x0010_0006, 0x0010_0000),
        ("MSI address", MSI + spec::msi::MESSAGE_ADDRESS, 0xfee0_0000, 0),
        ("MSI-X control", EVERYTHING_MSIX, 0xc045_6c11, 0x0045_6c11),
        ("Device Control", express + 8, 0x0000_500f, 0x0000_2810),
        ("Link Control", express + 0x10, 0x0011_0040, 0x0011_0040),
        ("AER mask", AER + spec::aer::UNCORRECTABLE_MASK, 1 << 20, 1 << 20),
    ];
    for no_soft_reset in [true, false] {
        let spec = FunctionSpec { power: Some(PowerSpec { no_soft_reset }), ..everything_spec() };
        let mut function = Function::new(spec).unwrap();
        for (_, offset, value, _) in registers {
            let _ = write32(&mut function, offset, value);
        }
        let _ = function.msix_table_write(12, &[0]);
        let before = function.bar(BarIndex::BAR0).unwrap();
        let entered = write8(&mut function, PMCSR, D3_HOT);
        assert_eq!(entered.decode, decode(false, false));
        assert_eq!((entered.bars_moved, entered.rom_moved), (BarSet::EMPTY, false));
        assert_eq!(function.bar(BarIndex::BAR0), Some(before), "kept in D3hot");

        let left = write8(&mut function, PMCSR, D0);
        assert_eq!(left.reset, (!no_soft_reset).then_some(ResetKind::Soft));
        assert_eq!(left.rom_moved, !no_soft_reset);
        for (name, offset, value, reset) in registers {
            let expected = if no_soft_reset { value } else { reset };
            assert_eq!(read32(&function, offset), expected, "{name}, {no_soft_reset}");
        }
        let mut mask = [0];
        function.msix_table_read(12, &mut mask);
        assert_eq!(mask, [u8::from(!no_soft_reset)]);
    }
}

#[test]
fn there_is_no_power_management_event() {
    let mut function = everything();
    assert_eq!(read16(&function, PM + spec::power::PMC), 0x0003, "PME from no state, no D1, no D2");
    // PME_En and PME_Status.
    let _ = write8(&mut function, PMCSR + 1, 0xff);
    assert_eq!(read16(&function, PMCSR), 0x0008);
}
