//! From the driver to the link.

use super::super::header::{Direction, Header};
use super::*;

#[test]
fn a_frame_is_sent_without_its_header_however_its_buffers_lie() {
    let whole = [&NO_HEADER[..], &frame(60)].concat();
    for cuts in [&[][..], &[12], &[5], &[3, 30, 71], &[12, 13, 14]] {
        let mut rig = Rig::new();
        let mut parts = Vec::new();
        let mut from = 0;
        for cut in cuts.iter().chain([&whole.len()]) {
            parts.push(Part::Readable(&whole[from..*cut]));
            from = *cut;
        }
        let sent = rig.driver.send(TRANSMIT, &parts);
        rig.kick(TRANSMIT);
        assert_eq!(rig.arrived(), Some(frame(60)), "{cuts:?}");
        assert_eq!(rig.driver.used(TRANSMIT), Some((sent.head, 0)));
        assert!(rig.driver.interrupted(TRANSMIT));
    }
}

#[test]
fn the_longest_frame_is_sent() {
    let mut rig = Rig::new();
    rig.send(NO_HEADER, &frame(65_535 + 18));
    rig.kick(TRANSMIT);
    assert_eq!(rig.arrived(), Some(frame(65_535 + 18)));
}

#[test]
fn what_can_not_be_sent_is_given_back_and_counted() {
    let mut needs_checksum = NO_HEADER;
    needs_checksum[header::FLAGS] = header::NEEDS_CSUM;
    let mut segments = NO_HEADER;
    segments[header::GSO_TYPE] = header::GSO_TCPV4;
    let rows = [
        (NO_HEADER, frame(13), "no Ethernet header"),
        (NO_HEADER, frame(65_535 + 19), "longer than any frame"),
        (NO_HEADER, frame(200_000), "much longer"),
        (needs_checksum, frame(60), "a checksum that was not agreed upon"),
        (segments, frame(60), "segments that were not agreed upon"),
    ];
    let mut rig = Rig::new();
    for (header, frame, what) in rows {
        let sent = rig.send(header, &frame);
        rig.kick(TRANSMIT);
        assert_eq!(rig.arrived(), None, "{what}");
        assert_eq!(rig.driver.used(TRANSMIT), Some((sent.head, 0)), "{what}");
    }
    // Shorter than a header; nothing to read at all.
    rig.driver.send(TRANSMIT, &[Part::Readable(&[0; 11])]);
    rig.driver.send(TRANSMIT, &[Part::Writable(100)]);
    rig.kick(TRANSMIT);
    assert_eq!(std::iter::from_fn(|| rig.driver.used(TRANSMIT)).count(), 2);
    assert_eq!((rig.net.transmitters[0].frames, rig.net.transmitters[0].lost), (0, 7));
}

#[test]
fn a_frame_in_no_memory_ends_in_an_error() {
    let mut rig = Rig::new();
    rig.driver.send(TRANSMIT, &[Part::Raw(u64::MAX - 50, 100, 0)]);
    let result = rig.net.kicked(TRANSMIT, &mut rig.driver);
    assert!(matches!(result, Err(DeviceError::Queue { queue: TRANSMIT, .. })), "{result:?}");
}

#[test]
fn frames_to_nobody_and_to_somebody_who_does_not_keep_up_are_lost() {
    let mut rig = Rig::new();
    let mut sent = 0;
    // More than any queue of a socket holds, without anybody reading.
    while rig.net.transmitters[0].lost == 0 {
        rig.send(NO_HEADER, &frame(60));
        rig.kick(TRANSMIT);
        assert!(rig.driver.used(TRANSMIT).is_some());
        sent += 1;
        assert!(sent < 100_000, "the kernel's queues are bounded");
    }
    let arrived = std::iter::from_fn(|| rig.arrived()).count();
    assert_eq!(arrived, sent - 1);

    std::fs::remove_file(rig.directory.path().join("peer")).unwrap();
    rig.send(NO_HEADER, &frame(60));
    rig.kick(TRANSMIT);
    assert!(rig.driver.used(TRANSMIT).is_some());
    assert_eq!(rig.net.transmitters[0].lost, 2);
}

/// The header with a flag and a kind of segmentation, as it is passed on.
fn agreed(flags: u8, kind: u8, features: u64, direction: Direction) -> Option<(u8, u8)> {
    let mut bytes = [0xa5; header::SIZE];
    bytes[header::FLAGS] = flags;
    bytes[header::GSO_TYPE] = kind;
    let agreed = Header(bytes).agreed(features, direction)?;
    assert_eq!(agreed.0[header::NUM_BUFFERS..], [1, 0]);
    assert_eq!(agreed.0[2..header::NUM_BUFFERS], bytes[2..header::NUM_BUFFERS]);
    Some((agreed.0[header::FLAGS], agreed.0[header::GSO_TYPE]))
}

#[test]
fn unfinished_work_is_passed_on_as_far_as_it_was_agreed_upon() {
    use Direction::{Receive, Transmit};
    let every = u64::MAX;
    let rows = [
        (Transmit, 0xff, 0, every, Some((1, 0))),
        (Transmit, 1, 0, !feature::CSUM, None),
        (Transmit, 0, 0, !feature::CSUM, Some((0, 0))),
        (Transmit, 1, header::GSO_TCPV4, every, Some((1, 1))),
        (Transmit, 1, header::GSO_TCPV4, !feature::HOST_TSO4, None),
        (Transmit, 1, header::GSO_TCPV6, !feature::HOST_TSO6, None),
        (Transmit, 1, header::GSO_TCPV6 | header::GSO_ECN, every, Some((1, 0x84))),
        (Transmit, 1, header::GSO_TCPV6 | header::GSO_ECN, !feature::HOST_ECN, None),
        (Transmit, 1, header::GSO_UDP, !feature::HOST_UFO, None),
        (Transmit, 1, header::GSO_UDP | header::GSO_ECN, every, None),
        (Transmit, 1, header::GSO_ECN, every, None),
        (Transmit, 1, 2, every, None),
        (Transmit, 1, 5, every, None),
        (Receive, 0xff, 0, every, Some((3, 0))),
        (Receive, 2, 0, !feature::GUEST_CSUM, Some((0, 0))),
        (Receive, 3, 0, !feature::GUEST_CSUM, None),
        (Receive, 1, header::GSO_TCPV4, every & !feature::HOST_TSO4, Some((1, 1))),
        (Receive, 1, header::GSO_TCPV4, !feature::GUEST_TSO4, None),
        (Receive, 1, header::GSO_TCPV6, !feature::GUEST_TSO6, None),
        (Receive, 1, header::GSO_TCPV4 | header::GSO_ECN, !feature::GUEST_ECN, None),
        (Receive, 1, header::GSO_UDP, !feature::GUEST_UFO, None),
    ];
    for (direction, flags, kind, features, expected) in rows {
        let found = agreed(flags, kind, features, direction);
        assert_eq!(found, expected, "{direction:?} {flags:#x} {kind:#x} {features:#x}");
    }
}
