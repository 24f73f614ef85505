//! From the link to the driver.

use super::*;

#[test]
fn a_frame_lies_behind_its_header_in_one_chain_of_any_pieces() {
    for features in [u64::MAX, !feature::MRG_RXBUF] {
        for pieces in [&[2000][..], &[12, 2000], &[5, 9, 58, 1], &[72]] {
            let mut rig = Rig::with("", 1, features);
            let parts: Vec<_> = pieces.iter().map(|len| Part::Writable(*len)).collect();
            let sent = rig.driver.send(RECEIVE, &parts);
            rig.deliver(&frame(60));
            rig.wake(PORT);
            assert_eq!(rig.driver.used(RECEIVE), Some((sent.head, 72)), "{pieces:?}");
            assert!(rig.driver.interrupted(RECEIVE));
            let mut bytes = Vec::new();
            for (address, len) in sent.addresses.iter().zip(pieces) {
                bytes.extend(rig.driver.bytes(*address, usize::try_from(*len).unwrap()));
            }
            assert_eq!(bytes[..72], [&in_buffers(1)[..], &frame(60)].concat(), "{pieces:?}");
            assert!(bytes[72..].iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn a_long_frame_lies_in_several_chains_that_are_used_at_once() {
    let mut rig = Rig::new();
    let sent: Vec<_> = (0..4).map(|_| rig.driver.send(RECEIVE, &[Part::Writable(100)])).collect();
    rig.deliver(&frame(250));
    rig.wake(PORT);
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.used(RECEIVE)).collect();
    assert_eq!(used, [(sent[0].head, 100), (sent[1].head, 100), (sent[2].head, 62)]);
    let bytes: Vec<_> =
        sent.iter().flat_map(|sent| rig.driver.bytes(sent.addresses[0], 100)).collect();
    assert_eq!(bytes[..262], [&in_buffers(3)[..], &frame(250)].concat());

    // The fourth is for the next one.
    rig.deliver(&frame(60));
    rig.wake(PORT);
    assert_eq!(rig.driver.used(RECEIVE), Some((sent[3].head, 72)));
}

#[test]
fn a_frame_waits_until_the_driver_has_room_for_all_of_it() {
    let mut rig = Rig::new();
    rig.deliver(&frame(250));
    rig.deliver(&frame(60));
    rig.wake(PORT);
    for _ in 0..2 {
        rig.driver.send(RECEIVE, &[Part::Writable(100)]);
        rig.kick(RECEIVE);
        assert_eq!(rig.driver.used(RECEIVE), None);
        assert!(!rig.driver.interrupted(RECEIVE));
    }
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.kick(RECEIVE);
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.used(RECEIVE)).collect();
    assert_eq!(used, [(0, 100), (1, 100), (2, 62), (3, 72)]);
    assert_eq!((rig.net.receivers[0].frames, rig.net.receivers[0].lost), (2, 0));
}

#[test]
fn a_driver_is_asked_to_kick_for_what_comes_behind_the_buffers_it_gave_too_few_of() {
    let mut rig = Rig::new();
    rig.driver.use_event_idx(RECEIVE);
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.deliver(&frame(250));
    rig.wake(PORT);
    // The index whose passing is to be told.
    assert_eq!(rig.driver.avail_event(RECEIVE), 2);
}

#[test]
fn with_indices_a_driver_is_told_of_a_frame_whichever_of_its_chains_it_waits_for() {
    for used_event in 0..3 {
        let mut rig = Rig::new();
        rig.driver.use_event_idx(RECEIVE);
        rig.driver.set_used_event(RECEIVE, used_event);
        for _ in 0..4 {
            rig.driver.send(RECEIVE, &[Part::Writable(100)]);
        }
        rig.deliver(&frame(250));
        rig.wake(PORT);
        assert!(rig.driver.interrupted(RECEIVE), "{used_event}");
    }
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_lost_and_its_chain_is_not() {
    let mut rig = Rig::with("", 1, !feature::MRG_RXBUF);
    let sent = rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.deliver(&frame(89));
    rig.deliver(&frame(88));
    rig.wake(PORT);
    assert_eq!(rig.driver.used(RECEIVE), Some((sent.head, 100)));
    assert_eq!(rig.driver.used(RECEIVE), None);
    assert_eq!((rig.net.receivers[0].frames, rig.net.receivers[0].lost), (1, 1));
    assert_eq!(rig.driver.bytes(sent.addresses[0], 100), [&in_buffers(1)[..], &frame(88)].concat());
}

#[test]
fn a_frame_that_no_number_of_buffers_can_hold_is_lost() {
    let mut rig = Rig::new();
    // All of the queue, with room for less than the frame.
    for _ in 0..256 {
        rig.driver.send(RECEIVE, &[Part::Writable(20)]);
    }
    rig.deliver(&frame(256 * 20));
    rig.deliver(&frame(60));
    rig.wake(PORT);
    assert_eq!((rig.net.receivers[0].frames, rig.net.receivers[0].lost), (1, 1));
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.used(RECEIVE)).collect();
    assert_eq!(used, [(0, 20), (1, 20), (2, 20), (3, 12)]);
}

#[test]
fn what_is_no_frame_is_lost() {
    let mut rig = Rig::new();
    for _ in 0..4 {
        rig.driver.send(RECEIVE, &[Part::Writable(70_000)]);
    }
    let longest = 65_535 + 18;
    for len in [0, 13, longest + 1, longest + 100, 14, longest] {
        rig.deliver(&frame(len));
    }
    rig.wake(PORT);
    let lens: Vec<_> =
        std::iter::from_fn(|| rig.driver.used(RECEIVE)).map(|(_, len)| len).collect();
    assert_eq!(lens, [12 + 14, u32::try_from(12 + longest).unwrap()]);
    assert_eq!(rig.net.receivers[0].lost, 4);
}

#[test]
fn a_chain_without_room_for_a_header_ends_in_an_error() {
    let readable = [Part::Readable(&[0; 100])];
    for parts in [&[Part::Writable(11)][..], &readable, &[Part::Raw(u64::MAX - 50, 100, 2)]] {
        let mut rig = Rig::new();
        rig.driver.send(RECEIVE, parts);
        rig.deliver(&frame(60));
        let result = rig.net.woken(PORT, &mut rig.driver);
        assert!(matches!(result, Err(DeviceError::Queue { queue: RECEIVE, .. })), "{result:?}");
    }
    // Behind the first, any room will do, but there must be some.
    let mut rig = Rig::new();
    rig.driver.send(RECEIVE, &[Part::Writable(12)]);
    rig.driver.send(RECEIVE, &[Part::Writable(0)]);
    rig.deliver(&frame(60));
    assert!(rig.net.woken(PORT, &mut rig.driver).is_err());
}

#[test]
fn without_a_queue_frames_wait_at_the_link() {
    let mut rig = Rig::new();
    rig.driver.send(RECEIVE, &[Part::Writable(100)]);
    rig.driver.paused = true;
    rig.deliver(&frame(60));
    rig.wake(PORT);
    rig.kick(RECEIVE);
    rig.driver.paused = false;
    assert_eq!(rig.driver.used(RECEIVE), None);
    rig.kick(RECEIVE);
    assert_eq!(rig.driver.used(RECEIVE), Some((0, 72)));
}
