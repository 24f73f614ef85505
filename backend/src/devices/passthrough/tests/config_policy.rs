use super::super::fake::config;
use super::super::{ConfigPolicy, MessageEnables, MsixTablePlace};

/// What a guest reads.
fn seen(policy: &ConfigPolicy, config: &[u8]) -> Vec<u8> {
    let mut bytes = config.to_vec();
    policy.read(0, &mut bytes);
    bytes
}

#[test]
fn registers_are_found_where_the_capability_list_says() {
    let policy = ConfigPolicy::new(&config(&[]));
    let table = MsixTablePlace { bar: 0, offset: 0x1040, entries: 4 };
    assert_eq!((policy.layout().power, policy.layout().msix), (Some(0x64), Some(table)));
}

#[test]
fn a_guest_sees_one_function_and_the_rest_as_the_device_says() {
    let config = config(&[]);
    let bytes = seen(&ConfigPolicy::new(&config), &config);
    let differ = |(at, _): &(usize, &u8)| bytes[*at] != config[*at];
    let differences: Vec<_> = config.iter().enumerate().filter(differ).collect();
    assert_eq!(differences, [(0x0e, &0x80)]);
}

#[test]
fn extended_capabilities_that_cannot_work_are_taken_out_of_the_list() {
    const AER: (u16, usize) = (0x01, 0x100);
    const SRIOV: (u16, usize) = (0x10, 0x160);
    const ARI: (u16, usize) = (0x0e, 0x148);
    const SERIAL: (u16, usize) = (0x03, 0x1a0);
    type List = &'static [(u16, usize)];
    let rows: &[(&str, List, List)] = &[
        ("none", &[AER, SERIAL], &[AER, SERIAL]),
        ("in the middle", &[AER, ARI, SERIAL], &[AER, SERIAL]),
        ("two in a row", &[AER, ARI, SRIOV, SERIAL], &[AER, SERIAL]),
        ("behind others", &[AER, (0x18, 0x120), ARI, SERIAL], &[AER, (0x18, 0x120), SERIAL]),
        ("the last", &[AER, SRIOV], &[AER]),
        ("the first", &[(0x15, 0x100), SERIAL], &[(0, 0x100), SERIAL]),
        ("the first two", &[(0x15, 0x100), ARI, SERIAL], &[(0, 0x100), SERIAL]),
        ("the only one", &[(0x10, 0x100)], &[(0, 0x100)]),
    ];
    for (what, list, visible) in rows {
        let config = config(list);
        let bytes = seen(&ConfigPolicy::new(&config), &config);
        let mut found = Vec::new();
        let mut at = 0x100;
        while at != 0 {
            found.push((u16::from_le_bytes([bytes[at], bytes[at + 1]]), at));
            at = usize::from(u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]) >> 4);
        }
        assert_eq!(&found, visible, "{what}");
    }
}

#[test]
fn lists_without_an_end_and_spaces_without_lists_are_survived() {
    let mut looping = config(&[(1, 0x100), (0x10, 0x140)]);
    looping[0x71] = 0x40;
    looping[0x142..0x144].copy_from_slice(&0x1001_u16.to_le_bytes());
    let _ = ConfigPolicy::new(&looping);
    for length in [0, 1, 0x35, 0x40, 0x41, 0x44, 0x52, 256, 0x101, 0x141] {
        let _ = ConfigPolicy::new(&looping[..length]);
    }
    for byte in [0, 0xff] {
        let mut bytes = vec![byte; 4096];
        ConfigPolicy::new(&bytes).read(0, &mut bytes);
    }
}

#[test]
fn writes_go_on_to_the_device_around_what_the_kernel_sets_itself() {
    type Row = (&'static str, usize, &'static [u8], &'static [(usize, &'static [u8])]);
    let rows: &[Row] = &[
        ("a BAR", 0x10, &[1, 2, 3, 4], &[(0x10, &[1, 2, 3, 4])]),
        ("the header type", 0x0c, &[1, 2, 3, 4], &[(0x0c, &[1, 2, 3, 4])]),
        ("MSI control", 0x42, &[0x81, 0], &[(0x43, &[0])]),
        ("MSI control, one byte", 0x42, &[0x81], &[]),
        ("all of MSI", 0x40, &[5, 0, 1, 0, 9], &[(0x40, &[5, 0]), (0x43, &[0, 9])]),
        ("MSI-X control", 0x52, &[3, 0x80], &[(0x52, &[3])]),
        ("from MSI to MSI-X", 0x42, &[7; 18], &[(0x43, &[7; 16]), (0x53, &[])]),
    ];
    for (what, offset, data, pieces) in rows {
        let mut policy = ConfigPolicy::new(&config(&[]));
        let expected: Vec<_> =
            pieces.iter().filter(|(_, piece)| !piece.is_empty()).copied().collect();
        assert_eq!(policy.write(*offset, data).concat_pieces(), expected.concat_pieces(), "{what}");
    }
}

trait Pieces {
    fn concat_pieces(&self) -> Vec<(usize, u8)>;
}

impl Pieces for Vec<(usize, &[u8])> {
    /// Each byte with its place.
    fn concat_pieces(&self) -> Vec<(usize, u8)> {
        let bytes = |(at, piece): &(usize, &[u8])| {
            let at = *at;
            piece
                .iter()
                .enumerate()
                .map(move |(index, byte)| (at + index, *byte))
                .collect::<Vec<_>>()
        };
        self.iter().flat_map(bytes).collect()
    }
}

#[test]
fn message_enables_are_what_the_guest_wrote_until_a_reset() {
    let config = config(&[]);
    let mut policy = ConfigPolicy::new(&config);
    let rows: &[(usize, &[u8], MessageEnables)] = &[
        (0x42, &[0x01], MessageEnables { msi: Some(1), msix: false }),
        (0x42, &[0x21, 0], MessageEnables { msi: Some(4), msix: false }),
        // More than the device is capable of.
        (0x42, &[0x71, 0], MessageEnables { msi: Some(8), msix: false }),
        (0x53, &[0x80], MessageEnables { msi: Some(8), msix: true }),
        (0x42, &[0x70], MessageEnables { msi: None, msix: true }),
        (0x50, &[0, 0, 0, 0x40], MessageEnables::default()),
    ];
    for (offset, data, enables) in rows {
        policy.write(*offset, data);
        assert_eq!(policy.message_enables(), *enables, "{offset:#x} {data:x?}");
    }
    assert_eq!(seen(&policy, &config)[0x42], 0x86 | 0x70, "reads back");
    assert_eq!(seen(&policy, &config)[0x53], 0x40, "reads back");
    policy.write(0x42, &[1]);
    policy.reset();
    assert_eq!(policy.message_enables(), MessageEnables::default());
    assert_eq!(seen(&policy, &config)[0x42], 0x86);
}

#[test]
fn a_write_that_initiates_a_reset_is_recognised() {
    let policy = ConfigPolicy::new(&config(&[]));
    let rows: &[(usize, &[u8], bool)] = &[
        (0x78, &[0, 0x80], true),
        (0x79, &[0x80], true),
        (0x78, &[0x80, 0x7f], false),
        (0x78, &[0x80], false),
        (0x79, &[], false),
        (0x70, &[0xff; 16], true),
    ];
    for (offset, data, resets) in rows {
        assert_eq!(policy.resets(*offset, data), *resets, "{offset:#x} {data:x?}");
    }
}
