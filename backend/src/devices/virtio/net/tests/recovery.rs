//! Going on where a process was killed.

use super::*;
use crate::devices::virtio::Words;
use crate::state::Scratch;

fn address(rig: &Rig) -> [u8; 6] {
    let mut bytes = [0; 6];
    Core::<Memory>::config_read(&rig.net, 0, &mut bytes);
    bytes
}

fn words(rig: &mut Rig, scratch: &Scratch) {
    Core::<Memory>::set_words(&mut rig.net, Words::new(scratch.clone()));
}

fn save(rig: &Rig) -> Vec<u8> {
    Core::<Memory>::save(&rig.net)
}

/// Another process takes over what was saved.
fn successor(scratch: &Scratch, state: &[u8]) -> Rig {
    let mut rig = Rig::with("", 2, u64::MAX);
    let features = features_of(&rig.net);
    Core::<Memory>::reset(&mut rig.net);
    words(&mut rig, scratch);
    Core::<Memory>::reset(&mut rig.net);
    Core::<Memory>::start(&mut rig.net, features);
    Core::<Memory>::restore(&mut rig.net, state).unwrap();
    for queue in 0..5 {
        Core::<Memory>::queue_recovered(&mut rig.net, queue);
    }
    rig
}

#[test]
fn a_command_that_was_acknowledged_holds_though_nobody_has_saved_it() {
    let scratch = Scratch::private(1).unwrap();
    let mut rig = Rig::with("", 2, u64::MAX);
    words(&mut rig, &scratch);
    let before = save(&rig);
    let revision = Core::<Memory>::revision(&rig.net);
    for command in [&[4, 0, 2, 0][..], &[1, 1, 2, 0, 0, 0, 0, 1]] {
        rig.driver.send(4, &[Part::Readable(command), Part::Writable(1)]);
        rig.kick(4);
    }
    assert_ne!(Core::<Memory>::revision(&rig.net), revision);
    let other = successor(&scratch, &before);
    assert_eq!(address(&other), [2, 0, 0, 0, 0, 1]);
    assert_eq!(save(&other), save(&rig));

    // With a reset it is forgotten.
    let revision = Core::<Memory>::revision(&rig.net);
    Core::<Memory>::reset(&mut rig.net);
    assert_ne!(Core::<Memory>::revision(&rig.net), revision);
    let other = successor(&scratch, &before);
    assert_eq!(save(&other), before);
}

#[test]
fn whatever_lies_in_its_word_is_believed_only_if_it_can_be() {
    let scratch = Scratch::private(1).unwrap();
    let mut rig = Rig::with("", 2, u64::MAX);
    words(&mut rig, &scratch);
    let before = save(&rig);
    // No pairs, too many, and a multicast address.
    for word in [0x0000_0100_0000_0002, 0x0003_0100_0000_0002, 0x0001_0100_0000_0003, u64::MAX] {
        scratch.set(0, word);
        assert_eq!(save(&successor(&scratch, &before)), before, "{word:#x}");
    }
}

#[test]
fn an_address_is_made_up_once() {
    let scratch = Scratch::private(1).unwrap();
    let mut rig = Rig::new();
    words(&mut rig, &scratch);
    let mut other = Rig::new();
    assert_ne!(address(&other), address(&rig));
    Core::<Memory>::restore(&mut other.net, &save(&rig)).unwrap();
    Core::<Memory>::reset(&mut other.net);
    assert_eq!(address(&other), address(&rig));
}
