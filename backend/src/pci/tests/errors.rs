//! What a function records of requests it does not support.

use super::*;

const DEVICE_CONTROL: usize = EXPRESS + spec::express::DEVICE_CONTROL;
const DEVICE_STATUS: usize = EXPRESS + spec::express::DEVICE_STATUS;

#[test]
fn the_severity_of_an_unsupported_request_depends_on_who_else_learns_of_it() {
    let ur = DeviceStatus::UNSUPPORTED_REQUEST_DETECTED;
    let posted = ur | DeviceStatus::NON_FATAL_ERROR_DETECTED;
    let non_posted = ur | DeviceStatus::CORRECTABLE_ERROR_DETECTED;
    let serr = Command::SERR_ENABLE;
    let reporting =
        DeviceControl::NON_FATAL_ERROR_REPORTING | DeviceControl::UNSUPPORTED_REQUEST_REPORTING;
    let off = DeviceControl::empty();
    for (kind, enable, control, detected, signaled) in [
        (RequestKind::MemoryWrite, Command::empty(), off, posted, false),
        (RequestKind::MemoryWrite, serr, off, posted, true),
        // Reported by an error message, but not by way of SERR#.
        (RequestKind::MemoryWrite, Command::empty(), reporting, posted, false),
        (RequestKind::MemoryWrite, serr, reporting, posted, true),
        (RequestKind::MemoryRead, Command::empty(), off, non_posted, false),
        (RequestKind::MemoryRead, serr, reporting, non_posted, false),
    ] {
        let mut function = full();
        let _ = command(&mut function, enable);
        let _ = write16(&mut function, DEVICE_CONTROL, control.bits());
        function.record_unsupported_request(&request(kind));

        let what = format!("{kind:?} {enable:?} {control:?}");
        assert_eq!(read16(&function, DEVICE_STATUS), detected.bits(), "{what}");
        let status = Status::from_bits_retain(read16(&function, spec::header::STATUS));
        assert_eq!(status.contains(Status::SIGNALED_SYSTEM_ERROR), signaled, "{what}");
    }
}

#[test]
fn errors_add_up_until_software_clears_them_one_by_one() {
    let mut function = full();
    let _ = command(&mut function, Command::SERR_ENABLE);
    function.record_unsupported_request(&request(RequestKind::MemoryWrite));
    function.record_unsupported_request(&request(RequestKind::MemoryRead));
    assert_eq!(read16(&function, DEVICE_STATUS), 0b1011);

    assert_eq!(write16(&mut function, DEVICE_STATUS, 0), Effects::default());
    assert_eq!(read16(&function, DEVICE_STATUS), 0b1011);
    let _ = write16(&mut function, DEVICE_STATUS, 0b1000);
    assert_eq!(read16(&function, DEVICE_STATUS), 0b0011);
    let _ = write16(&mut function, DEVICE_STATUS, 0b0111);
    assert_eq!(read16(&function, DEVICE_STATUS), 0);

    // A driver that writes Command and Status as one doubleword, with what it read.
    let both = read32(&function, spec::header::COMMAND);
    assert_eq!(both, 0x4010_0100);
    let _ = write32(&mut function, spec::header::COMMAND, both);
    assert_eq!(read32(&function, spec::header::COMMAND), 0x0010_0100);
}

#[test]
fn errors_are_recorded_in_d3hot() {
    let mut function = full();
    let _ = write8(&mut function, PM + spec::power::PMCSR, 3);
    function.record_unsupported_request(&request(RequestKind::MemoryRead));
    assert_eq!(read16(&function, DEVICE_STATUS), 0b1001);
}

#[test]
fn a_conventional_function_does_not_notice_what_it_does_not_claim() {
    let spec = FunctionSpec { express: None, ..full_spec() };
    let mut function = Function::new(spec).unwrap();
    let _ = command(&mut function, Command::SERR_ENABLE);
    let before = image(&function);
    function.record_unsupported_request(&request(RequestKind::MemoryWrite));
    function.record_unsupported_request(&request(RequestKind::MemoryRead));
    assert_eq!(image(&function), before);
}
