//! The control queue.

use super::*;

/// The answer to a command.
fn command(rig: &mut Rig, queue: u16, parts: &[Part<'_>]) -> u8 {
    let parts = [parts, &[Part::Writable(1)]].concat();
    let sent = rig.driver.send(queue, &parts);
    // Neither answer.
    let at = *sent.addresses.last().unwrap();
    vm_memory::Bytes::write_obj(&*rig.driver.memory, 0xee_u8, vm_memory::GuestAddress(at)).unwrap();
    rig.kick(queue);
    assert_eq!(rig.driver.used(queue), Some((sent.head, 1)));
    rig.driver.bytes(at, 1)[0]
}

/// Name, features, class and command, data, answer.
type Row<'a> = (&'a str, u64, &'a [u8], &'a [u8], u8);

#[test]
fn commands_are_done_or_refused() {
    const OK: u8 = 0;
    const ERR: u8 = 1;
    let every = u64::MAX;
    let two_addresses = [2, 0, 0, 0, 2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2];
    let rows: [Row<'_>; 30] = [
        ("promiscuous", every, &[0, 0], &[1], OK),
        ("all multicast", every, &[0, 1], &[0], OK),
        ("a mode of CTRL_RX_EXTRA", every, &[0, 2], &[1], ERR),
        ("no mode", every, &[0, 0], &[], ERR),
        ("a long mode", every, &[0, 0], &[1, 0], ERR),
        ("a mode without CTRL_RX", !feature::CTRL_RX, &[0, 0], &[1], ERR),
        ("empty tables", every, &[1, 0], &[0; 8], OK),
        ("one table", every, &[1, 0], &[&two_addresses[..], &[0; 4]].concat(), OK),
        ("two tables", every, &[1, 0], &[two_addresses, two_addresses].concat(), OK),
        ("a table without its second", every, &[1, 0], &two_addresses, ERR),
        ("a cut table", every, &[1, 0], &[two_addresses, two_addresses].concat()[..31], ERR),
        ("more behind tables", every, &[1, 0], &[0; 9], ERR),
        ("a huge table", every, &[1, 0], &[0xff; 8], ERR),
        ("no table", every, &[1, 0], &[], ERR),
        ("tables without CTRL_RX", !feature::CTRL_RX, &[1, 0], &[0; 8], ERR),
        ("an address", every, &[1, 1], &[2, 0, 0, 0, 0, 1], OK),
        ("a multicast address", every, &[1, 1], &[3, 0, 0, 0, 0, 1], ERR),
        ("no address", every, &[1, 1], &[0; 6], ERR),
        ("a short address", every, &[1, 1], &[2, 0, 0, 0, 1], ERR),
        ("a long address", every, &[1, 1], &[2, 0, 0, 0, 0, 1, 0], ERR),
        ("an address without the feature", !feature::CTRL_MAC_ADDR, &[1, 1], &[2; 6], ERR),
        ("one pair", every, &[4, 0], &[1, 0], OK),
        ("all pairs", every, &[4, 0], &[2, 0], OK),
        ("no pair", every, &[4, 0], &[0, 0], ERR),
        ("too many pairs", every, &[4, 0], &[3, 0], ERR),
        ("half a number of pairs", every, &[4, 0], &[1], ERR),
        ("another command of pairs", every, &[4, 1], &[1, 0], ERR),
        ("VLANs", every, &[2, 0], &[1, 0], ERR),
        ("an unknown class", every, &[77, 0], &[], ERR),
        ("no command", every, &[4], &[], ERR),
    ];
    for (name, features, head, data, expected) in rows {
        let mut rig = Rig::with("", 2, features);
        let answer = command(&mut rig, 4, &[Part::Readable(head), Part::Readable(data)]);
        assert_eq!(answer, expected, "{name}");
        // In one piece it is the same.
        let whole = [head, data].concat();
        assert_eq!(command(&mut rig, 4, &[Part::Readable(&whole)]), expected, "{name}, whole");
    }
}

#[test]
fn a_command_without_data_is_refused_and_one_without_room_for_an_answer_needs_a_reset() {
    let mut rig = Rig::new();
    assert_eq!(command(&mut rig, CONTROL, &[]), 1);
    rig.driver.send(CONTROL, &[Part::Readable(&[0, 0, 1])]);
    let result = rig.net.kicked(CONTROL, &mut rig.driver);
    assert!(matches!(result, Err(DeviceError::Request { queue: CONTROL, .. })), "{result:?}");
}

#[test]
fn the_address_that_is_set_is_the_one_that_is_read() {
    let mut rig = Rig::new();
    assert_eq!(command(&mut rig, CONTROL, &[Part::Readable(&[1, 1, 6, 5, 4, 3, 2, 1])]), 0);
    let mut data = [0; 6];
    Core::<Memory>::config_read(&rig.net, 0, &mut data);
    assert_eq!(data, [6, 5, 4, 3, 2, 1]);
}

#[test]
fn the_control_queue_comes_behind_the_pairs_that_can_be_used() {
    // Without MQ there is one pair, whatever the device could do.
    let mut rig = Rig::with("", 4, !feature::MQ);
    assert_eq!(command(&mut rig, 2, &[Part::Readable(&[0, 0, 1])]), 0);
    let mut rig = Rig::with("", 4, u64::MAX);
    assert_eq!(command(&mut rig, 8, &[Part::Readable(&[0, 0, 1])]), 0);
    // Without the feature there is none.
    let mut rig = Rig::with("", 1, !feature::CTRL_VQ);
    rig.driver.send(CONTROL, &[Part::Readable(&[0, 0, 1]), Part::Writable(1)]);
    rig.kick(CONTROL);
    assert_eq!(rig.driver.used(CONTROL), None);
    rig.kick(77);
}

#[test]
fn every_pair_transmits_and_the_first_receives_from_a_socket() {
    let mut rig = Rig::with("", 2, u64::MAX);
    assert_eq!(command(&mut rig, 4, &[Part::Readable(&[4, 0, 2, 0])]), 0);
    for pair in 0..2 {
        rig.driver.send(2 * pair, &[Part::Writable(2000)]);
        let data = [&NO_HEADER[..], &frame(60 + usize::from(pair))].concat();
        rig.driver.send(2 * pair + 1, &[Part::Readable(&data)]);
        rig.kick(2 * pair);
        rig.kick(2 * pair + 1);
        assert_eq!(rig.arrived(), Some(frame(60 + usize::from(pair))));
    }
    rig.deliver(&frame(60));
    rig.wake(PORT);
    assert_eq!((rig.driver.used(0), rig.driver.used(2)), (Some((0, 72)), None));
}
