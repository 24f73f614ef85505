//! Advanced Error Reporting: what an Unsupported Request leaves in which register.

use super::*;

const DEVICE_CONTROL: usize = EVERYTHING_EXPRESS + spec::express::DEVICE_CONTROL;
const DEVICE_STATUS: usize = EVERYTHING_EXPRESS + spec::express::DEVICE_STATUS;
const UNCORRECTABLE_STATUS: usize = AER + spec::aer::UNCORRECTABLE_STATUS;
const UNCORRECTABLE_MASK: usize = AER + spec::aer::UNCORRECTABLE_MASK;
const UNCORRECTABLE_SEVERITY: usize = AER + spec::aer::UNCORRECTABLE_SEVERITY;
const CORRECTABLE_STATUS: usize = AER + spec::aer::CORRECTABLE_STATUS;
const CORRECTABLE_MASK: usize = AER + spec::aer::CORRECTABLE_MASK;
const CONTROL: usize = AER + spec::aer::CAPABILITIES_AND_CONTROL;
const HEADER_LOG: usize = AER + spec::aer::HEADER_LOG;

const UR: u32 = 1 << 20;
const ADVISORY: u32 = 1 << 13;

fn header_log(function: &Function) -> [u32; 4] {
    [0, 4, 8, 12].map(|offset| read32(function, HEADER_LOG + offset))
}

fn ur(kind: RequestKind, address: u64, length: usize) -> UnsupportedRequest {
    UnsupportedRequest { kind, address, length }
}

/// With the advisory error unmasked, so that all errors are logged.
fn logging() -> Function {
    let mut function = everything();
    let _ = write32(&mut function, CORRECTABLE_MASK, 0);
    function
}

#[test]
fn the_registers_of_an_endpoint() {
    let implemented = 0x0015_5010;
    for (offset, power_on, written) in [
        (AER, 0x0002_0001, 0x0002_0001),
        (UNCORRECTABLE_STATUS, 0, 0),
        (UNCORRECTABLE_MASK, 0, implemented),
        (UNCORRECTABLE_SEVERITY, 0x0004_0010, implemented),
        (CORRECTABLE_STATUS, 0, 0),
        (CORRECTABLE_MASK, 0x2000, 0x31c0),
        (CONTROL, 0, 0),
        (HEADER_LOG, 0, 0),
        (HEADER_LOG + 12, 0, 0),
        (AER + 0x2c, 0, 0),
    ] {
        let mut function = everything();
        assert_eq!(read32(&function, offset), power_on, "{offset:#x} at power-on");
        let _ = write32(&mut function, offset, u32::MAX);
        assert_eq!(read32(&function, offset), written, "{offset:#x} after all ones");
    }
    assert_eq!(read32(&full(), AER), 0, "no extended capability");
}

/// PCIe figure 6-2, a row for each way through it.
#[test]
fn what_is_logged_and_reported_depends_on_masks_severity_and_enables() {
    use ErrorMessage::{Correctable, Fatal, NonFatal};
    use RequestKind::{IoRead, IoWrite, MemoryRead, MemoryWrite};
    #[derive(Clone, Copy)]
    struct Setting {
        severity: u32,
        mask: u32,
        advisory_mask: u32,
        control: u16,
        command: u16,
    }
    #[derive(Debug, PartialEq)]
    struct Outcome {
        device: u16,
        uncorrectable: u32,
        correctable: u32,
        logged: bool,
        message: Option<ErrorMessage>,
        system_error: bool,
    }
    let quiet = Setting { severity: 0, mask: 0, advisory_mask: 0, control: 0, command: 0 };
    let serr = 1 << 8;
    let outcome = |device, uncorrectable, correctable, logged, message, system_error| Outcome {
        device,
        uncorrectable,
        correctable,
        logged,
        message,
        system_error,
    };
    let rows = [
        // Non-posted and non-fatal: advisory.
        (MemoryRead, quiet, outcome(0b1001, UR, ADVISORY, true, None, false)),
        (IoRead, quiet, outcome(0b1001, UR, ADVISORY, true, None, false)),
        (IoWrite, quiet, outcome(0b1001, UR, ADVISORY, true, None, false)),
        (
            MemoryRead,
            Setting { control: 0b1001, ..quiet },
            outcome(0b1001, UR, ADVISORY, true, Some(Correctable), false),
        ),
        // Each enable by itself is not enough, and SERR# has no say in a correctable error.
        (
            MemoryRead,
            Setting { control: 0b0001, command: serr, ..quiet },
            outcome(0b1001, UR, ADVISORY, true, None, false),
        ),
        (
            MemoryRead,
            Setting { control: 0b1110, command: serr, ..quiet },
            outcome(0b1001, UR, ADVISORY, true, None, false),
        ),
        // Masked as advisory, as it is at reset: nothing in the uncorrectable registers.
        (
            MemoryRead,
            Setting { advisory_mask: ADVISORY, control: 0b1111, command: serr, ..quiet },
            outcome(0b1001, 0, ADVISORY, false, None, false),
        ),
        // Masked as uncorrectable only: status without header, and the message goes out.
        (
            MemoryRead,
            Setting { mask: UR, control: 0b1001, ..quiet },
            outcome(0b1001, UR, ADVISORY, false, Some(Correctable), false),
        ),
        // Posted and non-fatal.
        (MemoryWrite, quiet, outcome(0b1010, UR, 0, true, None, false)),
        (
            MemoryWrite,
            Setting { control: 0b1010, ..quiet },
            outcome(0b1010, UR, 0, true, Some(NonFatal), false),
        ),
        (
            MemoryWrite,
            Setting { control: 0b1101, ..quiet },
            outcome(0b1010, UR, 0, true, None, false),
        ),
        (
            MemoryWrite,
            Setting { control: 0b0010, ..quiet },
            outcome(0b1010, UR, 0, true, None, false),
        ),
        (
            MemoryWrite,
            Setting { command: serr, ..quiet },
            outcome(0b1010, UR, 0, true, Some(NonFatal), true),
        ),
        (
            MemoryWrite,
            Setting { control: 0b1111, command: serr, advisory_mask: ADVISORY, ..quiet },
            outcome(0b1010, UR, 0, true, Some(NonFatal), true),
        ),
        (
            MemoryWrite,
            Setting { mask: UR, control: 0b1111, command: serr, ..quiet },
            outcome(0b1010, UR, 0, false, None, false),
        ),
        // Fatal because software said so: posted or not makes no difference.
        (
            MemoryWrite,
            Setting { severity: UR, control: 0b1100, ..quiet },
            outcome(0b1100, UR, 0, true, Some(Fatal), false),
        ),
        (
            MemoryRead,
            Setting { severity: UR, control: 0b1100, advisory_mask: ADVISORY, ..quiet },
            outcome(0b1100, UR, 0, true, Some(Fatal), false),
        ),
        (
            MemoryRead,
            Setting { severity: UR, control: 0b1011, ..quiet },
            outcome(0b1100, UR, 0, true, None, false),
        ),
        (
            MemoryRead,
            Setting { severity: UR, command: serr, ..quiet },
            outcome(0b1100, UR, 0, true, Some(Fatal), true),
        ),
        (
            IoWrite,
            Setting { severity: UR, mask: UR, control: 0b1111, command: serr, ..quiet },
            outcome(0b1100, UR, 0, false, None, false),
        ),
    ];
    for (row, (kind, setting, expected)) in rows.into_iter().enumerate() {
        let mut function = everything();
        let _ = write32(&mut function, UNCORRECTABLE_SEVERITY, setting.severity);
        let _ = write32(&mut function, UNCORRECTABLE_MASK, setting.mask);
        let _ = write32(&mut function, CORRECTABLE_MASK, setting.advisory_mask);
        let _ = write16(&mut function, DEVICE_CONTROL, setting.control);
        let _ = write16(&mut function, spec::header::COMMAND, setting.command);
        let message = function.record_unsupported_request(&request(kind));
        let status = Status::from_bits_retain(read16(&function, spec::header::STATUS));
        let pointer = read32(&function, CONTROL);
        assert_eq!(pointer, if expected.logged { 20 } else { 0 }, "row {row}");
        let seen = Outcome {
            device: read16(&function, DEVICE_STATUS),
            uncorrectable: read32(&function, UNCORRECTABLE_STATUS),
            correctable: read32(&function, CORRECTABLE_STATUS),
            logged: header_log(&function) != [0; 4],
            message,
            system_error: status.contains(Status::SIGNALED_SYSTEM_ERROR),
        };
        assert_eq!(seen, expected, "row {row}");
    }
}

#[test]
fn without_advanced_error_reporting_an_advisory_error_has_no_message() {
    let mut function = full();
    let _ = write16(&mut function, EXPRESS + spec::express::DEVICE_CONTROL, 0b1111);
    let mut report = |kind| function.record_unsupported_request(&request(kind));
    assert_eq!(report(RequestKind::MemoryRead), None);
    assert_eq!(report(RequestKind::IoWrite), None);
    assert_eq!(report(RequestKind::MemoryWrite), Some(ErrorMessage::NonFatal));
}

#[test]
fn the_header_log_shows_the_packet() {
    use RequestKind::{IoRead, IoWrite, MemoryRead, MemoryWrite};
    let high = 0x12_0000_0000;
    let rows = [
        // An aligned doubleword of each kind.
        (ur(MemoryRead, 0xe000_0010, 4), [0x0000_0001, 0x0f, 0xe000_0010, 0]),
        (ur(MemoryWrite, 0xe000_0010, 4), [0x4000_0001, 0x0f, 0xe000_0010, 0]),
        (ur(IoRead, 0xc010, 4), [0x0200_0001, 0x0f, 0xc010, 0]),
        (ur(IoWrite, 0xc010, 4), [0x4200_0001, 0x0f, 0xc010, 0]),
        (ur(MemoryRead, high + 0x10, 4), [0x2000_0001, 0x0f, 0x12, 0x10]),
        (ur(MemoryWrite, high + 0x10, 4), [0x6000_0001, 0x0f, 0x12, 0x10]),
        (ur(MemoryRead, 0xffff_fffc, 4), [0x0000_0001, 0x0f, 0xffff_fffc, 0]),
        (ur(MemoryRead, 0x1_0000_0000, 4), [0x2000_0001, 0x0f, 1, 0]),
        // Byte enables.
        (ur(MemoryRead, 0xe000_0011, 1), [0x0000_0001, 0x02, 0xe000_0010, 0]),
        (ur(MemoryWrite, 0xe000_0012, 2), [0x4000_0001, 0x0c, 0xe000_0010, 0]),
        (ur(MemoryRead, 0xe000_0013, 2), [0x0000_0002, 0x18, 0xe000_0010, 0]),
        (ur(MemoryRead, 0xe000_0010, 8), [0x0000_0002, 0xff, 0xe000_0010, 0]),
        (ur(MemoryRead, 0xe000_0011, 8), [0x0000_0003, 0x1e, 0xe000_0010, 0]),
        (ur(MemoryRead, 0xe000_0010, 0), [0x0000_0001, 0x00, 0xe000_0010, 0]),
        // What takes several packets shows the first: up to a page, a payload, a doubleword.
        (ur(MemoryRead, 0xe000_0000, 4096), [0x0000_0000, 0xff, 0xe000_0000, 0]),
        (ur(MemoryRead, 0xe000_0000, 1 << 20), [0x0000_0000, 0xff, 0xe000_0000, 0]),
        (ur(MemoryRead, 0xe000_0ffe, 16), [0x0000_0001, 0x0c, 0xe000_0ffc, 0]),
        (ur(MemoryWrite, 0xe000_0000, 4096), [0x4000_0020, 0xff, 0xe000_0000, 0]),
        (ur(MemoryWrite, 0xe000_0001, 4096), [0x4000_0020, 0xfe, 0xe000_0000, 0]),
        (ur(IoRead, 0xc012, 4), [0x0200_0001, 0x0c, 0xc010, 0]),
        (ur(IoWrite, 0xc013, 4), [0x4200_0001, 0x08, 0xc010, 0]),
        (ur(MemoryRead, u64::MAX, 4), [0x2000_0001, 0x08, u32::MAX, 0xffff_fffc]),
    ];
    for (request, header) in rows {
        let mut function = logging();
        let _ = function.record_unsupported_request(&request);
        assert_eq!(header_log(&function), header, "{request:x?}");
    }
}

#[test]
fn the_log_keeps_the_first_error_until_its_status_bit_is_cleared() {
    let mut function = logging();
    let record = |function: &mut Function, address| {
        let _ = function.record_unsupported_request(&ur(RequestKind::MemoryRead, address, 4));
        header_log(function)[2]
    };
    assert_eq!(record(&mut function, 0x1000), 0x1000);
    assert_eq!(record(&mut function, 0x2000), 0x1000, "the first");
    let _ = write32(&mut function, CORRECTABLE_STATUS, u32::MAX);
    let _ = write32(&mut function, UNCORRECTABLE_STATUS, !UR);
    assert_eq!(record(&mut function, 0x3000), 0x1000, "its status bit is still set");

    for offset in [CONTROL, HEADER_LOG, HEADER_LOG + 4, HEADER_LOG + 8, HEADER_LOG + 12] {
        let before = read32(&function, offset);
        for value in [0, u32::MAX] {
            let _ = write32(&mut function, offset, value);
            assert_eq!(read32(&function, offset), before, "software can't alter {offset:#x}");
        }
    }
    // One byte of the register is enough to clear it.
    let _ = write8(&mut function, UNCORRECTABLE_STATUS + 2, 0x10);
    assert_eq!(read32(&function, UNCORRECTABLE_STATUS), 0);
    assert_eq!(header_log(&function)[2], 0x1000, "the log stays until there is a new one");
    assert_eq!(record(&mut function, 0x4000), 0x4000);
}

#[test]
fn a_masked_error_does_not_take_an_old_header_for_its_own() {
    let read = |address| ur(RequestKind::MemoryRead, address, 4);
    let mut function = logging();
    let _ = function.record_unsupported_request(&read(0x1000));
    let _ = write32(&mut function, UNCORRECTABLE_STATUS, UR);
    let _ = write32(&mut function, UNCORRECTABLE_MASK, UR);
    let _ = function.record_unsupported_request(&read(0x2000));
    assert_eq!(read32(&function, UNCORRECTABLE_STATUS), UR);
    assert_eq!(read32(&function, CONTROL), 0, "bit 0 is never set: no error is pointed to");

    // Nor does it use the log up.
    let _ = write32(&mut function, UNCORRECTABLE_MASK, 0);
    let _ = function.record_unsupported_request(&read(0x3000));
    assert_eq!((read32(&function, CONTROL), header_log(&function)[2]), (20, 0x3000));
}

#[test]
fn only_power_on_clears_sticky_bits() {
    let mut used = everything();
    let _ = write32(&mut used, UNCORRECTABLE_MASK, 1 << 12);
    let _ = write32(&mut used, UNCORRECTABLE_SEVERITY, 1 << 14);
    let _ = write32(&mut used, CORRECTABLE_MASK, 1 << 6);
    let _ = used.record_unsupported_request(&request(RequestKind::MemoryRead));
    assert_ne!(read16(&used, DEVICE_STATUS), 0);
    let sticky = [
        (UNCORRECTABLE_STATUS, UR),
        (UNCORRECTABLE_MASK, 1 << 12),
        (UNCORRECTABLE_SEVERITY, 1 << 14),
        (CORRECTABLE_STATUS, ADVISORY),
        (CORRECTABLE_MASK, 1 << 6),
        (CONTROL, 20),
        (HEADER_LOG, 1),
        (HEADER_LOG + 4, 0x0f),
        (HEADER_LOG + 8, 0xe000_0010),
    ];
    for kind in [ResetKind::Soft, ResetKind::FunctionLevel, ResetKind::Hot] {
        let mut function = used.clone();
        let _ = function.reset(kind);
        for (offset, value) in sticky {
            assert_eq!(read32(&function, offset), value, "{offset:#x} after {kind:?}");
        }
        assert_eq!(read16(&function, DEVICE_STATUS), 0, "Device Status is not sticky");
    }
    let _ = used.reset(ResetKind::Device);
    assert_eq!(image(&used), image(&everything()));
}

#[test]
fn only_a_hot_reset_and_power_on_forget_the_link() {
    let link_control = EVERYTHING_EXPRESS + spec::express::LINK_CONTROL;
    let writable = spec::express::LINK_CONTROL_WRITABLE;
    for (kind, value) in [
        (ResetKind::Soft, writable),
        (ResetKind::FunctionLevel, writable),
        (ResetKind::Hot, 0),
        (ResetKind::Device, 0),
    ] {
        let mut function = everything();
        let _ = write16(&mut function, link_control, 0xffff);
        let _ = function.reset(kind);
        assert_eq!(read16(&function, link_control), value, "{kind:?}");
    }
}
