//! What is left when a server dies, or can't go on.

use std::io::Write;
use std::sync::atomic::Ordering;

use barkeep_protocol::transport::{Received, Receiver};
use barkeep_protocol::wire::{Errno, InfoQuery, IrqAction, IrqData, MessageId, MessageKind};
use rustix::net::SendFlags;

use super::client::send_with;
use super::fragile::{self, DEADLY, DEADLY_WAKES, PIN, QUIESCED, VALUE, WAKES};
use super::talk::Talk;
use super::*;
use crate::state::PreviousEnd;
use crate::state::plan::Killed;

#[test]
fn a_write_that_nobody_survives_is_dropped() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    for _ in 0..2 {
        let (answer, deaths) = talk.ask(write(BAR0, DEADLY, &[1]));
        assert!(answer.is_ok());
        assert_eq!(deaths, 3);
    }
    assert_eq!(talk.byte(VALUE), 5);
}

#[test]
fn a_read_that_nobody_survives_brings_all_ones() {
    let mut talk = Talk::begin(test_crash);
    let (answer, deaths) = talk.ask(read(BAR0, 0, 8));
    assert_eq!(deaths, 3);
    assert_eq!(answer.unwrap()[16..], [0xff; 8]);
}

/// Each of them may be survived by somebody.
#[test]
fn deaths_of_other_requests_do_not_count() {
    let mut talk = Talk::begin(test_crash);
    for round in 0..5 {
        talk.client.also(vec![write(BAR0, 0x20, &[round; 8])]);
        talk.lab.run_until(|| talk.client.step());
        talk.restart();
    }
    assert_eq!(talk.expect(read(BAR0, 0x20, 8))[16..], [4; 8]);
}

#[test]
fn a_wake_that_nobody_survives_resets_the_function_and_leaves_its_wiring() {
    let (irq, memory) = (counter(), memory());
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(set_irq(IrqAction::Trigger, IrqData::Eventfd, 0, Some(&irq)));
    let _ = talk.expect(map(MEMORY, Some(&memory)));
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    let _ = talk.expect(write(BAR0, DEADLY_WAKES, &[1]));
    talk.lab.kick();
    let (answer, deaths) = talk.ask(read(CONFIG, COMMAND, 2));
    assert_eq!(deaths, 3);
    assert_eq!(answer.unwrap()[16..], [0, 0], "as after a reset");
    let _ = talk.expect(enable());
    assert_eq!(talk.byte(VALUE), 0);
    let _ = talk.expect(write(BAR0, PIN, &[1]));
    assert_eq!(signals(&irq), 1);
    let (answer, _) = talk.ask(map(MEMORY, None));
    assert_eq!(answer, Err(Errno::EXIST), "the window is still there");
}

#[test]
fn what_is_killed_from_outside_is_tried_again_for_long() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    talk.lab.blame(PreviousEnd::FromOutside);
    assert_eq!(talk.ask(write(BAR0, DEADLY, &[1])).1, 48);
    assert_eq!(talk.byte(VALUE), 5);
    let _ = talk.expect(write(BAR0, DEADLY_WAKES, &[1]));
    talk.lab.kick();
    assert_eq!(talk.ask(read(CONFIG, COMMAND, 2)).1, 48);
    let _ = talk.expect(enable());
    assert_eq!(talk.byte(VALUE), 0);
}

/// Kills this many successors while they recover, and returns whether the function is as it was, or
/// nothing if the session is over.
fn recovered_after(kills: usize, end: PreviousEnd) -> Option<bool> {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    talk.lab.blame(end);
    talk.lab.bury();
    killed_at(u64::MAX, || talk.lab.start()).unwrap();
    let recovering = passed() / 2;
    for _ in 0..kills {
        talk.lab.bury();
        assert_eq!(killed_at(recovering, || talk.lab.start()), Err(Killed));
    }
    talk.restart();
    if !talk.lab.port().is_busy() {
        talk.expect_end();
        return None;
    }
    let _ = talk.expect(enable());
    Some(talk.byte(VALUE) == 5)
}

#[test]
fn a_recovery_that_nobody_survives_is_given_up() {
    let recovered = |kills| recovered_after(kills, PreviousEnd::ByItself);
    assert_eq!([2, 3, 5].map(recovered), [Some(true), Some(false), Some(false)]);
    assert_eq!(recovered(6), None);
}

#[test]
fn a_recovery_that_is_killed_from_outside_is_tried_again_for_long() {
    let recovered = |kills| recovered_after(kills, PreviousEnd::FromOutside);
    assert_eq!([47, 48, 95].map(recovered), [Some(true), Some(false), Some(false)]);
    assert_eq!(recovered(96), None);
}

#[test]
fn a_wake_is_not_lost_with_the_server() {
    let mut talk = Talk::begin(fragile::savable);
    talk.lab.bury();
    talk.lab.kick();
    talk.lab.start();
    talk.lab.round();
    assert_eq!(talk.byte(WAKES), 1);
}

#[test]
fn a_function_that_cant_be_saved_starts_anew_with_its_wiring() {
    let irq = counter();
    let mut talk = Talk::begin(fragile::unsavable);
    let _ = talk.expect(set_irq(IrqAction::Trigger, IrqData::Eventfd, 0, Some(&irq)));
    let _ = talk.expect(map(MEMORY, None));
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    talk.restart();
    assert_eq!(talk.expect(read(CONFIG, COMMAND, 2))[16..], [0, 0]);
    let _ = talk.expect(enable());
    assert_eq!(talk.byte(VALUE), 0);
    let _ = talk.expect(write(BAR0, PIN, &[1]));
    assert_eq!(signals(&irq), 1);
    assert_eq!(talk.ask(map(MEMORY, None)).0, Err(Errno::EXIST));
}

#[test]
fn a_state_that_is_not_this_functions_is_a_reset() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, None));
    talk.lab.serve_instead(test_crash);
    talk.restart();
    assert_eq!(talk.expect(read(CONFIG, COMMAND, 2))[16..], [0, 0]);
    assert_eq!(talk.ask(map(MEMORY, None)).0, Err(Errno::EXIST));
}

#[test]
fn a_foreign_state_ends_the_session() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, Some(&memory())));
    talk.lab.rename("another");
    talk.restart();
    talk.expect_end();
}

#[test]
fn a_window_whose_file_was_not_kept_ends_the_session() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, Some(&memory())));
    talk.lab.lose_held();
    talk.restart();
    talk.expect_end();
}

#[test]
fn a_client_that_leaves_leaves_nothing() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, Some(&memory())));
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    talk.client.leave();
    talk.lab.round();
    assert!(talk.lab.has_ended());
    assert_eq!(talk.lab.held(), talk.lab.kept());
    // The next one, of the same server and of another one.
    for restart in [false, true] {
        let socket = talk.lab.accept(restart);
        talk.client = Client::new(socket, Vec::new(), UNSHARED, SIZE);
        let _ = talk.expect(version(Offer::empty()));
        let _ = talk.expect(enable());
        assert_eq!(talk.byte(VALUE), 0);
        let _ = talk.expect(map(MEMORY, None));
        let _ = talk.expect(write(BAR0, VALUE, &[6]));
        talk.client.leave();
        talk.lab.round();
    }
}

#[test]
fn draining_brings_the_device_to_rest_and_keeps_its_state() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(write(BAR0, VALUE, &[5]));
    let before = QUIESCED.load(Ordering::Relaxed);
    talk.lab.port().drain();
    assert!(QUIESCED.load(Ordering::Relaxed) > before);
    talk.restart();
    assert_eq!(talk.byte(VALUE), 5);
}

#[test]
fn stopping_ends_the_session() {
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, Some(&memory())));
    talk.lab.port().stop();
    assert!(talk.client.is_hung_up());
    assert_eq!(talk.lab.held(), talk.lab.kept());
}

#[test]
fn a_message_may_come_byte_by_byte_from_one_server_to_the_next() {
    let mut talk = Talk::begin(test_crash);
    let _ = talk.expect(write(BAR0, 0x28, &[0; 8]));
    let bytes = read(BAR0, 0x28, 8).message(77);
    for byte in bytes.chunks(1) {
        talk.client.socket().write_all(byte).unwrap();
        talk.lab.round();
        talk.restart();
    }
    talk.client.expects(77);
    talk.lab.run_until(|| talk.client.step());
    assert_eq!(talk.client.last().unwrap()[16..], 1u64.to_le_bytes());
}

#[test]
fn urgent_bytes_are_like_others() {
    let mut talk = Talk::begin(test_crash);
    for byte in write(BAR0, 0x20, &[7; 8]).message(77).chunks(1) {
        rustix::net::send(talk.client.socket(), byte, SendFlags::OOB).unwrap();
        talk.lab.round();
        talk.lab.round();
    }
    talk.client.expects(77);
    talk.lab.run_until(|| talk.client.step());
    assert_eq!(talk.expect(read(BAR0, 0x20, 8))[16..], [7; 8]);
}

#[test]
fn a_masked_pin_stays_masked() {
    let irq = counter();
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(set_irq(IrqAction::Trigger, IrqData::Eventfd, 0, Some(&irq)));
    let _ = talk.expect(set_irq(IrqAction::Mask, IrqData::None, 0, None));
    talk.restart();
    let _ = talk.expect(write(BAR0, PIN, &[1]));
    assert_eq!(signals(&irq), 0);
    talk.restart();
    assert_eq!(signals(&irq), 0);
    let _ = talk.expect(set_irq(IrqAction::Unmask, IrqData::None, 0, None));
    assert_eq!(signals(&irq), 1);
    // Masked by its signal.
    talk.restart();
    talk.lab.round();
    assert_eq!(signals(&irq), 0);
}

/// As when too many descriptors are on their way, of which a test with privileges sees nothing.
#[test]
fn answers_whose_descriptors_cant_be_sent_are_errors_of_the_same_number() {
    let mut talk = Talk::begin(ivshmem);
    talk.lab.send_little_at_once();
    let describe =
        Step::new(Command::GetRegionInfo, InfoQuery { index: 2, argsz: 32 }.to_region_bytes());
    let ids = 100..130;
    for id in ids.clone() {
        talk.client.socket().write_all(&describe.message(id)).unwrap();
    }
    talk.lab.round();
    talk.lab.lose_held();
    talk.restart();
    let (socket, mut receiver, mut failed) = (talk.client.socket(), Receiver::default(), 0);
    for id in ids {
        let header = loop {
            match receiver.receive(&socket).unwrap() {
                Received::Message(message) => break message.into_frame().header,
                Received::Pending => talk.lab.round(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(header.id, MessageId(id));
        match header.kind {
            MessageKind::Reply { error: None } => {}
            MessageKind::Reply { error } => {
                assert_eq!(error, Some(Errno::TOOMANYREFS));
                failed += 1;
            }
            MessageKind::Command { .. } => panic!("{header:?}"),
        }
    }
    assert!((2..30).contains(&failed), "{failed}");
}

#[test]
fn more_descriptors_than_a_message_may_have_are_held_by_nobody() {
    let file = memory();
    let mut talk = Talk::begin(fragile::savable);
    let before = talk.lab.stored();
    for count in [17, 32, 33, 253] {
        send_with(
            &talk.client.socket(),
            &map(MEMORY, None).message(77),
            &vec![file.as_fd(); count],
        )
        .unwrap();
        talk.client.expects(77);
        talk.lab.run_until(|| talk.client.step());
        assert_eq!(talk.client.last(), Err(Errno::INVAL), "{count}");
    }
    assert_eq!(talk.lab.stored(), before);
    let _ = talk.expect(map(MEMORY, Some(&file)));
}

/// Each part is looked at by itself, since it comes with a descriptor.
#[test]
fn a_message_in_many_parts_is_not_all_that_is_served() {
    let file = memory();
    let mut talk = Talk::begin(test_crash);
    let parts = write(BAR0, 0x20, &[7; 8]).message(77);
    for part in parts.chunks(1) {
        send_with(&talk.client.socket(), part, &[file.as_fd()]).unwrap();
    }
    talk.lab.round();
    assert!((1..parts.len()).contains(&talk.lab.unread()));
    talk.client.expects(77);
    talk.lab.run_until(|| talk.client.step());
    assert_eq!(talk.client.last(), Err(Errno::INVAL), "too many descriptors");
}

#[test]
fn descriptors_that_cant_be_held_are_refused() {
    let mut talk = Talk::begin(fragile::savable);
    talk.lab.hold_no_more();
    assert_eq!(talk.ask(map(MEMORY, Some(&memory()))).0, Err(Errno::MFILE));
    let _ = talk.expect(map(MEMORY, None));
}
