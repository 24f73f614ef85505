use super::*;

#[test]
fn a_write_multi_has_the_layout_of_the_specification() {
    let first = SmallWrite::new(2, 0x1122, &[1, 2, 3, 4]).unwrap();
    let second = SmallWrite::new(0, 8, &[9; 8]).unwrap();
    assert_eq!(SmallWrite::new(0, 0, &[0; 9]), None);
    let writes = [first, second];
    let bytes = written(|out| RegionWrites { writes: &writes }.write_to(out));
    let expected = [
        longs(&[2, 0x1122]),
        words(&[2, 4]),
        vec![1, 2, 3, 4, 0, 0, 0, 0],
        longs(&[8]),
        words(&[0, 8]),
        vec![9; 8],
    ];
    assert_eq!(bytes, expected.concat());

    let Ok(Request::RegionWriteMulti(parsed)) = Request::parse(15, &bytes) else { panic!() };
    let seen: Vec<_> = parsed.writes.iter().map(|one| (one.access(), one.data())).collect();
    let access = |region, offset, count| RegionAccess { offset, region, count };
    assert_eq!(seen, [(access(2, 0x1122, 4), &[1, 2, 3, 4][..]), (access(0, 8, 8), &[9; 8])]);

    let reply = written(|out| RegionWrites::write_reply(out, 1));
    assert_eq!(reply, longs(&[1]));
    assert_eq!(parsed.parse_reply(&reply), Ok(1));
    assert_eq!(parsed.parse_reply(&longs(&[3])), Err(WireError::Count(3)));
    assert!(parsed.parse_reply(&[0; 7]).is_err());
}

#[test]
fn a_write_multi_with_one_wrong_count_is_refused_as_a_whole() {
    let one = |count| [longs(&[0]), words(&[0, count]), vec![0; 8]].concat();
    let multi = |count: u64, rest: &[u8]| [longs(&[count]), rest.to_vec()].concat();
    assert!(Request::parse(15, &multi(0, &[])).is_ok());
    assert!(Request::parse(15, &multi(1, &one(0))).is_ok());
    let rows: &[(&str, Vec<u8>)] = &[
        ("no count", vec![0; 7]),
        ("a write too few", multi(2, &one(8))),
        ("a write too many", multi(0, &one(8))),
        ("half a write", multi(1, &one(8)[..23])),
        ("the last one too long", multi(2, &[one(8), one(9)].concat())),
        ("a huge count in a write", multi(1, &one(u32::MAX))),
        ("a count that wraps", multi(u64::MAX / 24 + 2, &one(8))),
        ("the greatest count", multi(u64::MAX, &[])),
    ];
    for (what, body) in rows {
        assert_eq!(errno_of(15, body), Some(Errno::INVAL), "{what}");
    }
}

#[test]
fn a_read_is_answered_in_place() {
    let access = RegionAccess { offset: 4, region: 1, count: 3 };
    let bytes = written(|out| {
        access.write_reply(out, |data| {
            assert_eq!(data, [0; 3]);
            data.copy_from_slice(b"abc");
        });
    });
    assert_eq!(bytes, RegionData { access, data: b"abc" }.to_bytes());
    assert_eq!(RegionData::parse(&bytes).unwrap().data, b"abc");
    assert_eq!(access.write_reply(&mut Vec::new(), |_| 7), 7);
    assert_eq!(written(|out| access.write_to(out)), access.to_bytes());
}

#[test]
fn interrupts_are_set_in_every_form_that_vfio_has() {
    let set = |action, data, start, count| SetIrqs { action, data, index: 2, start, count };
    let actions = [IrqAction::Mask, IrqAction::Unmask, IrqAction::Trigger];
    let forms = [IrqData::None, IrqData::Bool(&[0, 1, 7]), IrqData::Eventfd];
    for (action, data) in actions.into_iter().flat_map(|a| forms.map(|form| (a, form))) {
        let set = set(action, data, 5, 3);
        assert_eq!(Request::parse(8, &set.to_bytes()), Ok(Request::SetIrqs(set)));
        assert!(!set.disables_index());
    }
    let disable = set(IrqAction::Trigger, IrqData::None, 0, 0);
    assert_eq!(Request::parse(8, &disable.to_bytes()), Ok(Request::SetIrqs(disable)));
    assert!(disable.disables_index());
    for (action, data, start) in [
        (IrqAction::Trigger, IrqData::None, 1),
        (IrqAction::Mask, IrqData::None, 0),
        (IrqAction::Trigger, IrqData::Bool(&[]), 0),
        (IrqAction::Trigger, IrqData::Eventfd, 0),
    ] {
        let nothing = set(action, data, start, 0);
        assert_eq!(Request::parse(8, &nothing.to_bytes()), Ok(Request::SetIrqs(nothing)));
        assert!(!nothing.disables_index());
    }
    // VFIO's argsz counts the eventfds too.
    assert!(Request::parse(8, &words(&[32, 0x24, 2, 0, 3])).is_ok());

    let rows: &[(&str, Vec<u8>)] = &[
        ("no data type", words(&[20, 0x20, 0, 0, 1])),
        ("no action", words(&[20, 0x04, 0, 0, 1])),
        ("an unknown flag", words(&[20, 0x61, 0, 0, 1])),
        ("argsz below the structure", words(&[19, 0x21, 0, 0, 1])),
        ("short", words(&[20, 0x21, 0, 0])),
        ("data that NONE has not", words(&[24, 0x21, 0, 0, 1, 0])),
        ("data that EVENTFD has not", words(&[24, 0x24, 0, 0, 1, 3])),
        ("more bools than counted", words(&[24, 0x22, 0, 0, 3, 0])),
        ("fewer bools than counted", words(&[24, 0x22, 0, 0, 5, 0])),
        ("4 GiB of bools", words(&[20, 0x22, 0, 0, u32::MAX])),
        ("a range that wraps", words(&[20, 0x21, 0, u32::MAX, 1])),
    ];
    for (what, body) in rows {
        assert_eq!(errno_of(8, body), Some(Errno::INVAL), "{what}");
    }
}

proptest! {
    #[test]
    fn small_writes_round_trip(
        list in prop::collection::vec((any::<u64>(), any::<u32>(), 0usize..=8, any::<[u8; 8]>()), 0..9),
    ) {
        let writes: Vec<_> = list
            .iter()
            .map(|(offset, region, count, data)| {
                SmallWrite::new(*region, *offset, &data[..*count]).unwrap()
            })
            .collect();
        let writes = RegionWrites { writes: &writes };
        let bytes = written(|out| writes.write_to(out));
        prop_assert_eq!(Request::parse(15, &bytes), Ok(Request::RegionWriteMulti(writes)));
    }

    #[test]
    fn migration_data_round_trips(data in prop::collection::vec(any::<u8>(), 0..64), asked in 0u32..64) {
        let data = MigData { data: &data };
        let bytes = written(|out| data.write_to(out));
        prop_assert_eq!(Request::parse(18, &bytes), Ok(Request::MigDataWrite(data)));
        let read = MigDataRead { size: asked };
        let request = written(|out| read.write_to(out));
        prop_assert_eq!(Request::parse(17, &request), Ok(Request::MigDataRead(read)));
        // libvfio-user pads.
        let padded = [bytes, vec![0; 9]].concat();
        let reply = read.parse_reply(&padded);
        prop_assert_eq!(reply.ok(), (data.data.len() <= asked as usize).then_some(data));
    }
}

#[test]
fn migration_data_is_never_more_than_announced() {
    const LIMIT: u32 = MAX_DATA_XFER_SIZE;
    let rows: &[(&str, u16, Vec<u8>)] = &[
        ("short read", 17, words(&[16])),
        ("read above the limit", 17, words(&[u32::MAX, LIMIT + 1])),
        ("read of 4 GiB", 17, words(&[u32::MAX, u32::MAX])),
        ("no room for the answer", 17, words(&[23, 16])),
        ("short write", 18, words(&[8])),
        ("missing data", 18, words(&[12, 5, 0])),
        ("more data", 18, words(&[12, 3, 0])),
        ("write above the limit", 18, words(&[u32::MAX, LIMIT + 1])),
    ];
    for (what, code, body) in rows {
        assert_eq!(errno_of(*code, body), Some(Errno::INVAL), "{what}");
    }
    assert!(Request::parse(17, &words(&[LIMIT + 8, LIMIT])).is_ok());
    let read = MigDataRead { size: 4 };
    assert!(read.parse_reply(&words(&[12, 4])).is_err());
}
