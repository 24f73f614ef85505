//! The capability list.

use super::*;

fn walk(function: &Function) -> Vec<(usize, u8)> {
    let mut list = Vec::new();
    let mut at = usize::from(read8(function, spec::header::CAPABILITIES_POINTER));
    while at != 0 {
        assert_eq!(at % 4, 0, "capabilities are doubleword aligned");
        assert!(list.len() < 48, "the list ends");
        list.push((at, read8(function, at)));
        at = usize::from(read8(function, at + spec::capability::NEXT));
    }
    list
}

#[test]
fn the_list_holds_what_the_function_has_in_order() {
    let power = Some(PowerSpec { no_soft_reset: true });
    let masking = Some(MsiSpec { vectors: MsiVectors::Four, per_vector_masking: true });
    let plain = Some(MsiSpec { vectors: MsiVectors::One, per_vector_masking: false });
    let express = Some(ExpressSpec { function_level_reset: true, aer: false });
    type Case = (Option<PowerSpec>, Option<MsiSpec>, Option<ExpressSpec>, &'static [(usize, u8)]);
    let cases: [Case; 8] = [
        (None, None, None, &[]),
        (power, None, None, &[(0x40, 0x01)]),
        (None, plain, None, &[(0x40, 0x05)]),
        (None, None, express, &[(0x40, 0x10)]),
        (None, plain, express, &[(0x40, 0x05), (0x50, 0x10)]),
        (None, masking, express, &[(0x40, 0x05), (0x58, 0x10)]),
        (power, plain, express, &[(0x40, 0x01), (0x48, 0x05), (0x58, 0x10)]),
        (power, masking, express, &[(PM, 0x01), (MSI, 0x05), (EXPRESS, 0x10)]),
    ];
    for (power, msi, express, expected) in cases {
        let spec = FunctionSpec { power, msi, express, ..FunctionSpec::new(IDS) };
        let function = Function::new(spec).unwrap();
        assert_eq!(walk(&function), expected);
        let listed = read16(&function, spec::header::STATUS) & Status::CAPABILITIES_LIST.bits();
        assert_eq!(listed != 0, !expected.is_empty());
    }
}

#[test]
fn msix_and_vendor_capabilities_are_in_the_list() {
    let second = EVERYTHING_VENDOR + 12;
    let expected = [
        (PM, 0x01),
        (MSI, 0x05),
        (EVERYTHING_MSIX, 0x11),
        (EVERYTHING_EXPRESS, 0x10),
        (EVERYTHING_VENDOR, 0x09),
        (second, 0x09),
    ];
    assert_eq!(walk(&everything()), expected);

    // The extended list starts at 0x100 and ends with its first.
    let header = read32(&everything(), AER);
    assert_eq!((header & 0xffff, header >> 16 & 0xf, header >> 20), (1, 2, 0));
}

#[test]
fn message_control_says_what_the_function_asks_for() {
    for (vectors, per_vector_masking, control) in [
        (MsiVectors::One, false, 0x0080),
        (MsiVectors::Two, false, 0x0082),
        (MsiVectors::Sixteen, true, 0x0188),
        (MsiVectors::ThirtyTwo, true, 0x018a),
    ] {
        let msi = Some(MsiSpec { vectors, per_vector_masking });
        let function = Function::new(FunctionSpec { msi, ..FunctionSpec::new(IDS) }).unwrap();
        assert_eq!(read16(&function, 0x42), control);
    }
}

#[test]
fn no_soft_reset_and_flr_show_in_their_capabilities() {
    for yes in [false, true] {
        let function = Function::new(FunctionSpec {
            power: Some(PowerSpec { no_soft_reset: yes }),
            express: Some(ExpressSpec { function_level_reset: yes, aer: false }),
            ..full_spec()
        })
        .unwrap();
        assert_eq!(read16(&function, PM + spec::power::PMCSR) & 0x8 != 0, yes);
        let capabilities = read32(&function, EXPRESS + spec::express::DEVICE_CAPABILITIES);
        assert_eq!(capabilities & 1 << 28 != 0, yes);
    }
}

#[test]
fn a_window_needs_the_capability_that_it_is_said_to_be() {
    let window = |bar_window, vendor: VendorSpec| {
        let spec = FunctionSpec { vendor: vec![vendor], bar_window, ..FunctionSpec::new(IDS) };
        let mut function = Function::new(spec).unwrap();
        let _ = write8(&mut function, 0x40 + spec::vendor_window::ACCESS_LENGTH, 4);
        function.window_access(0x40 + spec::vendor_window::DATA, 4).is_some()
    };
    assert!(window(Some(0), VendorSpec::bar_window(5)));
    assert!(!window(None, VendorSpec::bar_window(5)));
    assert!(!window(Some(1), VendorSpec::bar_window(5)));
    // A byte too short.
    let short = VendorSpec { bytes: vec![VendorByte { reset: 0, read_write: 0xff }; 16] };
    assert!(!window(Some(0), short));
}
