//! Configuration space as a whole: what is where, and what software can change.

use super::*;

/// Per doubleword: the value at power-on and after all ones were written to it.
#[test]
fn every_doubleword_of_a_full_function() {
    let expected: &[(usize, u32, u32)] = &[
        (0x00, 0x0042_1b36, 0x0042_1b36), // Device ID, Vendor ID
        (0x04, 0x0010_0000, 0x0010_0547), // Status, Command
        (0x08, 0x0108_0203, 0x0108_0203), // Class Code, Revision ID
        (0x0c, 0x0000_0000, 0x0000_00ff), // BIST, Header Type, Latency Timer, Cache Line Size
        (0x10, 0x0000_0000, 0xffff_f000), // BAR 0: 4 KiB
        (0x18, 0x0000_000c, 0x0000_000c), // BAR 2: 8 GiB, 64 bits
        (0x1c, 0x0000_0000, 0xffff_fffe),
        (0x20, 0x0000_0001, 0xffff_ffe1), // BAR 4: 32 ports
        (0x2c, 0x1100_1af4, 0x1100_1af4), // Subsystem ID, Subsystem Vendor ID
        (0x34, 0x0000_0040, 0x0000_0040), // Capabilities Pointer
        (0x3c, 0x0000_0100, 0x0000_01ff), // Max_Lat, Min_Gnt, Interrupt Pin, Interrupt Line
        (0x40, 0x0003_4801, 0x0003_4801), // PM
        (0x44, 0x0000_0008, 0x0000_000b),
        (0x48, 0x0186_6005, 0x01f7_6005), // MSI
        (0x4c, 0x0000_0000, 0xffff_fffc),
        (0x50, 0x0000_0000, 0xffff_ffff),
        (0x54, 0x0000_0000, 0x0000_ffff),
        (0x58, 0x0000_0000, 0x0000_00ff),
        (0x60, 0x0002_0010, 0x0002_0010), // PCI Express
        (0x64, 0x1000_8000, 0x1000_8000),
        (0x68, 0x0000_2810, 0x0000_2810), // all ones sets Initiate FLR
        (0x6c, 0x0040_0011, 0x0040_0011),
        (0x70, 0x0011_0000, 0x0011_00c3),
        (0x8c, 0x0000_0002, 0x0000_0002),
    ];
    for offset in (0..spec::EXTENDED_CONFIG_SIZE).step_by(4) {
        let row = expected.iter().find(|row| row.0 == offset);
        let &(_, power_on, written) = row.unwrap_or(&(offset, 0, 0));
        let mut function = full();
        assert_eq!(read32(&function, offset), power_on, "{offset:#x} at power-on");
        let _ = function.config_write(offset, &[0xff; 4]);
        assert_eq!(read32(&function, offset), written, "{offset:#x} after all ones");
    }
}

#[test]
fn a_function_without_capabilities_has_no_list() {
    let function = Function::new(FunctionSpec::new(IDS)).unwrap();
    assert_eq!(function.config_size(), 256);
    assert_eq!(read16(&function, spec::header::STATUS), 0);
    assert_eq!(read8(&function, spec::header::CAPABILITIES_POINTER), 0);
    assert_eq!(read8(&function, spec::header::INTERRUPT_PIN), 0);
}

#[test]
fn only_a_conventional_function_has_a_latency_timer() {
    for (express, timer) in
        [(None, 0xff), (Some(ExpressSpec { function_level_reset: false, aer: false }), 0)]
    {
        let mut function =
            Function::new(FunctionSpec { express, ..FunctionSpec::new(IDS) }).unwrap();
        let _ = write8(&mut function, spec::header::LATENCY_TIMER, 0xff);
        assert_eq!(read8(&function, spec::header::LATENCY_TIMER), timer);
    }
}

#[test]
fn the_vendor_id_of_no_function_is_refused() {
    let spec = FunctionSpec::new(Ids { vendor: 0xffff, ..IDS });
    assert_eq!(Function::new(spec).err(), Some(SpecError::VendorAbsent));
}

#[test]
fn past_the_end_reads_are_all_ones_and_writes_are_dropped() {
    for express in [None, Some(ExpressSpec { function_level_reset: false, aer: false })] {
        let mut function =
            Function::new(FunctionSpec { express, ..FunctionSpec::new(IDS) }).unwrap();
        let size = function.config_size();
        for offset in [size, size + 1, usize::MAX] {
            assert_eq!(function.config_write(offset, &[0; 8]), Effects::default());
            assert_eq!(read32(&function, offset), u32::MAX);
        }
        let mut straddling = [0xaa; 6];
        function.config_read(size - 2, &mut straddling);
        assert_eq!(straddling, [0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(function.config_write(size - 2, &[0xff; 6]), Effects::default());
    }
}

#[test]
fn registers_are_in_order_and_do_not_overlap() {
    for function in [full(), everything()] {
        let mut end = 0;
        for register in function.registers() {
            assert!(register.offset >= end, "{register:x?} overlaps the one before");
            assert_eq!(register.offset % register.width.bytes(), 0, "{register:x?} is misaligned");
            let both = register.read_write & register.write_one_to_clear;
            assert_eq!(both, 0, "{register:x?} has bits of two kinds");
            let own = register.volatile & register.read_write;
            assert_eq!(own, 0, "{register:x?} has bits that two sides change");
            let kept = register.reset_retains & register.sticky;
            assert_eq!(kept, 0, "{register:x?} has bits kept twice");
            end = register.offset + register.width.bytes();
        }
        assert!(end <= function.config_size());
    }
}
