//! INTx and MSI.

use super::*;

const CONTROL: usize = MSI + spec::msi::MESSAGE_CONTROL;
const MASK: usize = MSI + spec::msi::MASK;
const PENDING: usize = MSI + spec::msi::PENDING;
const ENABLE: u16 = spec::msi::CONTROL_ENABLE;

fn multiple(log2: u16) -> u16 {
    log2 << spec::msi::CONTROL_MULTIPLE_ENABLE_SHIFT
}

fn interrupt_status(function: &Function) -> bool {
    read16(function, spec::header::STATUS) & Status::INTERRUPT_STATUS.bits() != 0
}

/// Bus mastering on, MSI enabled with all eight vectors.
fn eight_vectors() -> Function {
    let mut function = full();
    let _ = command(&mut function, Command::BUS_MASTER);
    let _ = write16(&mut function, CONTROL, ENABLE | multiple(3));
    function
}

#[test]
fn intx_follows_the_device() {
    let mut function = full();
    assert_eq!(function.set_intx(false), None);
    assert_eq!(function.set_intx(true), Some(true));
    assert_eq!(function.set_intx(true), None);
    assert!(function.intx_line() && interrupt_status(&function));
    assert_eq!(function.set_intx(false), Some(false));
    assert!(!function.intx_line() && !interrupt_status(&function));
}

#[test]
fn interrupt_disable_hides_the_line_but_not_the_status() {
    let mut function = full();
    let _ = function.set_intx(true);
    let effects = command(&mut function, Command::INTERRUPT_DISABLE);
    assert_eq!(effects, Effects { intx: Some(false), ..Effects::default() });
    assert!(interrupt_status(&function));

    assert_eq!(function.set_intx(false), None);
    assert!(!interrupt_status(&function));
    assert_eq!(function.set_intx(true), None);

    let effects = command(&mut function, Command::empty());
    assert_eq!(effects, Effects { intx: Some(true), ..Effects::default() });
}

#[test]
fn msi_takes_the_pin_away() {
    let mut function = full();
    let _ = function.set_intx(true);
    let on = write16(&mut function, CONTROL, ENABLE);
    assert_eq!((on.intx, on.msi.enabled), (Some(false), Some(true)));
    let off = write16(&mut function, CONTROL, 0);
    assert_eq!((off.intx, off.msi.enabled), (Some(true), Some(false)));
}

#[test]
fn a_function_without_a_pin_has_no_intx() {
    let spec = FunctionSpec { interrupt_pin: None, ..full_spec() };
    let mut function = Function::new(spec).unwrap();
    assert_eq!(function.set_intx(true), None);
    assert!(!function.intx_line() && !interrupt_status(&function));
}

#[test]
fn software_cannot_clear_interrupt_status() {
    let mut function = full();
    let _ = function.set_intx(true);
    for value in [0x0000, 0xffff] {
        let _ = write16(&mut function, spec::header::STATUS, value);
        assert!(interrupt_status(&function) && function.intx_line());
    }
}

#[test]
fn granted_vectors_are_bounded_by_what_the_function_asks_for() {
    let mut function = full();
    for (written, granted) in [(0, 1), (1, 2), (2, 4), (3, 8), (4, 8), (5, 8), (6, 8), (7, 8)] {
        let _ = write16(&mut function, CONTROL, ENABLE | multiple(written));
        assert_eq!(function.msi_vectors(), granted, "Multiple Message Enable {written}");
        assert_eq!((read16(&function, CONTROL) >> 4) & 7, written, "reads back as written");
    }
    let _ = write16(&mut function, CONTROL, multiple(3));
    assert_eq!(function.msi_vectors(), 0, "disabled");
}

#[test]
fn a_message_needs_msi_bus_mastering_and_a_granted_vector() {
    let mut function = eight_vectors();
    assert_eq!(function.raise_msi(0), MsiOutcome::Deliver);
    assert_eq!(function.raise_msi(7), MsiOutcome::Deliver);
    for vector in [8, 32, 255] {
        assert_eq!(function.raise_msi(vector), MsiOutcome::Dropped);
    }
    let _ = write16(&mut function, CONTROL, multiple(3));
    assert_eq!(function.raise_msi(0), MsiOutcome::Dropped, "MSI disabled");
    let _ = write16(&mut function, CONTROL, ENABLE | multiple(3));
    let _ = write8(&mut function, PM + spec::power::PMCSR, 3);
    assert_eq!(function.raise_msi(0), MsiOutcome::Dropped, "D3hot");
    let _ = write8(&mut function, PM + spec::power::PMCSR, 0);
    let _ = command(&mut function, Command::empty());
    assert_eq!(function.raise_msi(0), MsiOutcome::Dropped, "no bus master");

    let spec = FunctionSpec { msi: None, ..full_spec() };
    assert_eq!(Function::new(spec).unwrap().raise_msi(0), MsiOutcome::Dropped, "no MSI");
}

#[test]
fn a_masked_vector_is_pending_until_unmasked() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 0b0000_1110);
    for vector in [1, 2, 2, 3] {
        assert_eq!(function.raise_msi(vector), MsiOutcome::Pending);
    }
    assert_eq!(function.raise_msi(4), MsiOutcome::Deliver);
    assert_eq!(read32(&function, PENDING), 0b1110);
    assert_eq!(function.config_write(PENDING, &[0xff; 4]), Effects::default());
    assert_eq!(read32(&function, PENDING), 0b1110, "read-only");

    let effects = write8(&mut function, MASK, 0b0000_1000);
    assert_eq!(effects.msi.deliver.iter().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(read32(&function, PENDING), 0b1000);
    assert_eq!(write8(&mut function, MASK, 0b0000_1000), Effects::default(), "delivered once");
}

#[test]
fn an_unmasked_vector_waits_for_msi_and_bus_mastering() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 1);
    assert_eq!(function.raise_msi(0), MsiOutcome::Pending);
    let _ = command(&mut function, Command::empty());
    let _ = write16(&mut function, CONTROL, multiple(3));
    assert!(write8(&mut function, MASK, 0).msi.deliver.is_empty());
    assert!(write16(&mut function, CONTROL, ENABLE).msi.deliver.is_empty());
    assert!(command(&mut function, Command::BUS_MASTER).msi.deliver.contains(0));
}

#[test]
fn a_vector_taken_back_is_no_longer_pending() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 0xff);
    assert_eq!(function.raise_msi(5), MsiOutcome::Pending);
    let _ = write16(&mut function, CONTROL, ENABLE | multiple(2));
    assert_eq!(read32(&function, PENDING), 0);
}

#[test]
fn a_write_across_registers_enables_and_unmasks() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 1);
    assert_eq!(function.raise_msi(0), MsiOutcome::Pending);
    let _ = write16(&mut function, CONTROL, multiple(3));

    // From inside Message Control to past the mask bits.
    let mut data = [0; 0x14];
    function.config_read(CONTROL, &mut data);
    data[0] |= 1;
    data[MASK - CONTROL] = 0;
    let effects = function.config_write(CONTROL, &data);
    assert_eq!(effects.msi.enabled, Some(true));
    assert!(effects.msi.deliver.contains(0));
}

#[test]
fn a_reset_drops_pending_vectors() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 1);
    assert_eq!(function.raise_msi(0), MsiOutcome::Pending);
    let effects = function.reset(ResetKind::FunctionLevel);
    assert!(effects.msi.deliver.is_empty());
    assert_eq!(effects.msi.enabled, Some(false));
    assert_eq!(read32(&function, PENDING), 0);
}

#[test]
fn a_vector_unmasked_by_the_write_that_resets_is_dropped() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 1);
    assert_eq!(function.raise_msi(0), MsiOutcome::Pending);

    // From the mask bits to Initiate FLR, which is last.
    let end = EXPRESS + spec::express::DEVICE_CONTROL + 2;
    let mut data = vec![0; end - MASK];
    *data.last_mut().unwrap() = 0x80;
    let effects = function.config_write(MASK, &data);
    assert_eq!(effects.reset, Some(ResetKind::FunctionLevel));
    assert!(effects.msi.deliver.is_empty());
}

/// Each width at each place: what is covered takes what is writable, the rest stays.
#[test]
fn every_register_of_msi_takes_writes_of_every_width() {
    let writable: [u8; 0x18] = [
        0, 0, 0x71, 0, // ID, next, Message Control
        0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // Message Address
        0xff, 0xff, 0, 0, // Message Data, reserved
        0xff, 0, 0, 0, // Mask Bits of eight vectors
        0, 0, 0, 0, // Pending Bits
    ];
    for width in [1, 2, 4, 8] {
        for at in (0..0x18).step_by(width) {
            for value in [0x00, 0xff, 0x5a] {
                let mut function = full();
                let mut expected = [0; 0x18];
                function.config_read(MSI, &mut expected);
                for byte in at..at + width {
                    expected[byte] = expected[byte] & !writable[byte] | value & writable[byte];
                }
                let _ = function.config_write(MSI + at, &vec![value; width]);
                let mut seen = [0; 0x18];
                function.config_read(MSI, &mut seen);
                assert_eq!(seen, expected, "{width} bytes of {value:#x} at {at:#x}");
            }
        }
    }
}

#[test]
fn message_control_written_by_byte_or_word_enables_and_grants() {
    for data in [&[0x31][..], &[0x31, 0x00], &[0x31, 0xff, 0, 0]] {
        let mut function = full();
        let effects = function.config_write(CONTROL, data);
        assert_eq!(effects.msi.enabled, Some(true), "{data:x?}");
        assert_eq!(function.msi_vectors(), 8);
        assert_eq!(read16(&function, CONTROL), 0x01b7);
    }
    let mut function = full();
    let upper = function.config_write(CONTROL + 1, &[0xff]);
    assert_eq!((upper, read16(&function, CONTROL)), (Effects::default(), 0x0186));
}

#[test]
fn bus_mastering_gates_messages_whichever_comes_first() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 0b11);
    assert_eq!(function.raise_msi(0), MsiOutcome::Pending);
    let _ = command(&mut function, Command::empty());
    assert_eq!(function.raise_msi(1), MsiOutcome::Dropped, "masked or not");
    assert_eq!(function.raise_msi(2), MsiOutcome::Dropped);
    assert_eq!(read32(&function, PENDING), 0b01, "what was pending stays");
    let _ = write8(&mut function, MASK, 0);
    assert_eq!(function.raise_msi(2), MsiOutcome::Dropped);

    // Bus mastering by a one-byte write of Command delivers what waited, and no more.
    let effects = write8(&mut function, spec::header::COMMAND, 0b100);
    assert_eq!(effects.msi.deliver.iter().collect::<Vec<_>>(), [0]);
    assert_eq!(function.raise_msi(2), MsiOutcome::Deliver);
}

#[test]
fn a_message_that_waited_in_d3hot_goes_out_in_d0() {
    let mut function = eight_vectors();
    let _ = write8(&mut function, MASK, 1);
    assert_eq!(function.raise_msi(0), MsiOutcome::Pending);
    let _ = write8(&mut function, PM + spec::power::PMCSR, 3);
    assert!(write8(&mut function, MASK, 0).msi.deliver.is_empty());
    assert!(write8(&mut function, PM + spec::power::PMCSR, 0).msi.deliver.contains(0));
}
