//! The expansion ROM, and capabilities of a vendor's own.

use super::*;

const ROM: usize = spec::header::EXPANSION_ROM;

fn rom_decode(rom: bool) -> Option<Decode> {
    Some(Decode { memory: true, io: false, rom })
}

#[test]
fn an_expansion_rom_is_sized_like_a_bar() {
    for (size, mask) in
        [(0x800, 0xffff_f801), (0x1_0000, 0xffff_0001), (0x100_0000, 0xff00_0001_u32)]
    {
        let rom = Some(RomSpec { size });
        let mut function = Function::new(FunctionSpec { rom, ..FunctionSpec::new(IDS) }).unwrap();
        let _ = write32(&mut function, ROM, u32::MAX);
        assert_eq!(read32(&function, ROM), mask);
        // With the enable bit off, as software sizes it (PCI 6.2.5.2).
        let _ = write32(&mut function, ROM, 0xffff_f800);
        assert_eq!(read32(&function, ROM), mask & !1);
    }
    for size in [0, 1, 0x400, 0x1800, 0x200_0000] {
        let rom = Some(RomSpec { size });
        let spec = FunctionSpec { rom, ..FunctionSpec::new(IDS) };
        assert_eq!(Function::new(spec).err(), Some(SpecError::RomSize { size }));
    }
    assert_eq!(full().rom(), None);
    assert!(!full().claims_rom());
}

#[test]
fn a_rom_needs_its_own_enable_memory_space_and_d0() {
    let mut function = everything();
    let placed = write32(&mut function, ROM, 0xfeb0_0000);
    assert_eq!(placed, Effects { rom_moved: true, ..Effects::default() });
    let _ = command(&mut function, Command::MEMORY_SPACE);
    assert!(!function.claims_rom());

    let epoch = function.epoch();
    let enabled = write8(&mut function, ROM, 1);
    assert_eq!(enabled, Effects { decode: rom_decode(true), ..Effects::default() });
    assert!(function.claims_rom());
    let rom = Rom { size: 0x1_0000, address: 0xfeb0_0000, enabled: true };
    assert_eq!(function.rom(), Some(rom));

    let moved = write16(&mut function, ROM + 2, 0xfeb1);
    assert_eq!(moved, Effects { rom_moved: true, ..Effects::default() });
    assert_eq!(function.epoch(), epoch + 2);
    assert_eq!(write16(&mut function, ROM + 2, 0xfeb1), Effects::default());

    let _ = write8(&mut function, PM + spec::power::PMCSR, 3);
    assert!(!function.claims_rom());
    let _ = write8(&mut function, PM + spec::power::PMCSR, 0);
    let _ = command(&mut function, Command::empty());
    assert!(!function.claims_rom());
    assert!(function.rom().unwrap().enabled, "and yet its own bit stays");

    let reset = function.reset(ResetKind::FunctionLevel);
    assert!(reset.rom_moved);
    assert_eq!(function.rom(), Some(Rom { size: 0x1_0000, address: 0, enabled: false }));
}

#[test]
fn a_function_with_nothing_but_a_rom_has_memory_space() {
    let rom = Some(RomSpec { size: 0x800 });
    let mut function = Function::new(FunctionSpec { rom, ..FunctionSpec::new(IDS) }).unwrap();
    let _ = write32(&mut function, ROM, 1);
    let _ = write16(&mut function, spec::header::COMMAND, 0xffff);
    assert!(function.claims_rom());
}

#[test]
fn a_vendors_bytes_are_read_only_where_the_vendor_says_so() {
    let mut function = everything();
    let mut data = [0; 10];
    function.config_read(EVERYTHING_VENDOR, &mut data);
    assert_eq!(data, *b"\x09\xb4\x0abarkeep");
    let _ = function.config_write(EVERYTHING_VENDOR, &[0xff; 12]);
    let mut after = [0; 12];
    function.config_read(EVERYTHING_VENDOR, &mut after);
    assert_eq!(after, *b"\x09\xb4\x0abarkeep\0\0");

    let second = EVERYTHING_VENDOR + 12;
    for (value, bytes) in [(0xff, 0x5f), (0x00, 0x50), (0xa3, 0x53)] {
        let _ = function.config_write(second, &[value; 12]);
        let mut data = [0; 12];
        function.config_read(second, &mut data);
        let b = bytes;
        assert_eq!(data, [0x09, 0, 9, b, b, b, b, b, b, 0, 0, 0]);
    }
    let _ = function.reset(ResetKind::Hot);
    assert_eq!(read8(&function, second + 8), 0x5a);
}

#[test]
fn capabilities_end_where_configuration_space_of_a_conventional_function_does() {
    let vendor = |length| VendorSpec::read_only(&vec![1; length]);
    let with = |vendor| Function::new(FunctionSpec { vendor, ..FunctionSpec::new(IDS) });
    assert!(with(vec![vendor(0xc0 - 3)]).is_ok());
    assert!(with(vec![vendor(0); 48]).is_ok());
    let too_long = |end| Some(SpecError::CapabilitiesTooLong { end });
    assert_eq!(with(vec![vendor(0xc0 - 2)]).err(), too_long(0x104));
    assert_eq!(with(vec![vendor(0); 49]).err(), too_long(0x104));
    assert_eq!(with(vec![vendor(1 << 20)]).err(), too_long((1 << 20) + 0x44));
}
