use super::*;

fn entries() -> Vec<IoFd> {
    let eventfd = IoFdKind::Eventfd { datamatch: Some(0x1122_3344_5566_7788), pio: false };
    let io_region = IoFdKind::IoRegion { flags: IoRegionFlags::POSTED_WRITES, user_data: 99 };
    vec![
        IoFd { offset: 0x10, size: 4, fd_index: Some(0), kind: eventfd },
        IoFd { offset: 0x20, size: 0, fd_index: Some(1), kind: io_region },
        IoFd {
            offset: 0x28,
            size: 2,
            fd_index: None,
            kind: IoFdKind::Eventfd { datamatch: None, pio: true },
        },
    ]
}

fn answer(argsz: u32) -> (IoFdsQuery, bool, Vec<u8>) {
    let query = IoFdsQuery { region: 2, argsz };
    let mut whole = false;
    let bytes =
        written(|out| whole = IoFds { region: 2, entries: entries() }.write_to(&query, out));
    (query, whole, bytes)
}

#[test]
fn io_fds_have_the_layout_of_the_specification_or_of_libvfio_user() {
    let (query, whole, spec) = answer(4000);
    assert!(whole);
    assert_eq!((spec.len(), &spec[..16]), (16 + 3 * 40, &words(&[136, 0, 2, 3])[..]));
    assert_eq!(spec[16..32], longs(&[0x10, 4]));
    assert_eq!(spec[32..48], words(&[0, 0, 1, 0]));
    assert_eq!(spec[48..56], longs(&[0x1122_3344_5566_7788]));
    assert_eq!(spec[72..96], [words(&[1, 1, 2, 0]), longs(&[99])].concat());
    assert_eq!(spec[112..120], words(&[u32::MAX, 0]));
    let complete = IoFdsReply::Complete(IoFds { region: 2, entries: entries() });
    assert_eq!(IoFds::parse_reply(&query, &spec, 2), Ok(complete.clone()));

    let (query, whole, libvfio) = answer(16 + 3 * 48);
    assert!(whole);
    assert_eq!((libvfio.len(), &libvfio[..16]), (16 + 3 * 48, &words(&[160, 0, 2, 3])[..]));
    assert_eq!(libvfio[48..64], longs(&[0, 0x1122_3344_5566_7788]));
    assert_eq!(libvfio[96..112], longs(&[99, 0]));
    assert_eq!(IoFds::parse_reply(&query, &libvfio, 2), Ok(complete));
}

#[test]
fn the_layout_follows_from_the_room_that_the_client_has() {
    let layout = |room| IoFdsQuery { region: 0, argsz: 16 + room }.layout();
    for entries in 1..6 {
        assert_eq!(layout(40 * entries), IoFdLayout::Spec);
    }
    for entries in [1, 2, 3, 4, 6, 7, 8, 9] {
        assert_eq!(layout(48 * entries), IoFdLayout::Libvfio);
    }
    for unclear in [0, 1, 240, 480, 496, 48 * 17, 1008, 3984, u32::MAX - 16] {
        assert_eq!(layout(unclear), IoFdLayout::Spec);
    }
}

#[test]
fn io_fds_that_do_not_fit_tell_what_they_need() {
    for argsz in [16, 135] {
        let (query, whole, bytes) = answer(argsz);
        assert!(!whole);
        assert_eq!(bytes, words(&[136, 0, 2, 3]));
        let too_small = IoFdsReply::TooSmall { argsz: 136 };
        assert_eq!(IoFds::parse_reply(&query, &bytes, 0), Ok(too_small));
    }
    let (_, whole, _) = answer(136);
    assert!(whole);
    let query = IoFdsQuery { region: 1, argsz: 16 };
    let none = IoFds { region: 1, entries: vec![] };
    let bytes = written(|out| assert!(none.write_to(&query, out)));
    assert_eq!(IoFds::parse_reply(&query, &bytes, 0), Ok(IoFdsReply::Complete(none)));
}

#[test]
fn malformed_queries_and_answers_are_refused() {
    let query = IoFdsQuery { region: 2, argsz: 500 };
    let bytes = written(|out| query.write_to(out));
    assert_eq!(bytes, words(&[500, 0, 2, 0]));
    assert_eq!(Request::parse(6, &bytes), Ok(Request::GetRegionIoFds(query)));
    for body in [[15, 0, 0, 0], [16, 1, 0, 0], [16, 0, 0, 1]] {
        assert_eq!(errno_of(6, &words(&body)), Some(Errno::INVAL), "{body:?}");
    }
    assert_eq!(errno_of(6, &[0; 15]), Some(Errno::INVAL));

    let (query, _, good) = answer(500);
    let change = |at: usize, word: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        IoFds::parse_reply(&query, &bytes, 2)
    };
    assert!(change(0, 0).is_ok());
    let rows = [
        ("another region", 8, 3),
        ("fewer entries", 12, 2),
        ("no entries", 12, 0),
        ("4 Gi entries", 12, u32::MAX),
        ("a descriptor that did not come", 32, 2),
        ("an unknown flag of an ioeventfd", 40, 4),
        ("an unknown flag of an ioregionfd", 80, 4),
    ];
    for (what, at, word) in rows {
        assert!(change(at, word).is_err(), "{what}");
    }
    let Ok(IoFdsReply::Complete(shadow)) = change(36, 2) else { panic!("not refused") };
    assert_eq!(shadow.entries[0].kind, IoFdKind::Other(2));
    // A server that asks for the room that it already has would be asked for ever.
    assert!(IoFds::parse_reply(&query, &words(&[500, 0, 2, 3]), 0).is_err());
}
