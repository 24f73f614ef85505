//! The pure parts, where a whole session would not show it.

use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind, RegionAccess, RegionData};
use proptest::prelude::*;

use super::{ASK, YES, message};
use crate::stream::incoming::{Answer, Expected, Incoming, Next};
use crate::stream::outgoing::{Begun, Configured, Outgoing, Passed};
use crate::stream::pending::{Greeting, Pending};

fn pass(outgoing: &mut Outgoing, data: &[u8]) -> Passed {
    outgoing.pass(data.len(), |at, out| {
        out.copy_from_slice(&data[at..at + out.len()]);
        true
    })
}

fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let count = u32::try_from(data.len()).unwrap();
    let access = RegionAccess { offset, region, count };
    message(1, Command::RegionWrite.code(), ASK, &RegionData { access, data }.to_bytes())
}

fn header(id: u16, command: Command, kind: MessageKind) -> Header {
    Header { id: MessageId(id), command: command.code(), body_size: 0, kind }
}

fn asked(id: MessageId, command: Command) -> Begun {
    Begun::Asked(id, command.code())
}

#[test]
fn only_writes_to_configuration_space_change_what_decodes() {
    let moves = Some(Configured { moves: true, enables: false });
    let enables = Some(Configured { moves: false, enables: true });
    let other = Some(Configured::default());
    let cases = [
        (write(7, 4, &[2, 0]), enables),
        (write(7, 4, &[5, 0]), other),
        (write(7, 2, &[0, 0, 2]), enables),
        (write(7, 5, &[2]), other),
        (write(7, 0x10, &[0; 4]), moves),
        (write(7, 0x24, &[0; 4]), moves),
        (write(7, 0x30, &[0; 4]), other),
        (write(0, 4, &[2, 0]), None),
        (message(1, Command::Reset.code(), ASK, &[]), moves),
        (message(1, Command::RegionWriteMulti.code(), ASK, &[0; 32]), moves),
        (message(1, Command::RegionRead.code(), ASK, &[0; 16]), None),
        (message(1, Command::RegionWrite.code(), YES, &write(7, 4, &[2])[16..]), None),
        (message(1, Command::RegionWrite.code(), ASK, &[7]), None),
    ];
    for (bytes, expected) in cases {
        assert_eq!(pass(&mut Outgoing::default(), &bytes).configured, expected, "{bytes:?}");
    }
}

#[test]
fn the_order_of_writes_in_one_call_counts() {
    let both = |first: Vec<u8>, second: Vec<u8>| {
        pass(&mut Outgoing::default(), &[first, second].concat()).configured.unwrap()
    };
    let bar = || write(7, 0x10, &[0; 4]);
    let command = || write(7, 4, &[2, 0]);
    assert_eq!(both(bar(), command()), Configured { moves: true, enables: true });
    assert_eq!(both(command(), bar()), Configured { moves: true, enables: false });
}

#[test]
fn bytes_that_are_no_messages_end_the_boundaries() {
    let mut outgoing = Outgoing::default();
    pass(&mut outgoing, &[0xff; 16]);
    assert!(outgoing.is_lost());
    pass(&mut outgoing, &message(1, 4, ASK, &[]));
    assert!(!outgoing.at_boundary());
    let mut unreadable = Outgoing::default();
    unreadable.pass(16, |_, _| false);
    assert!(unreadable.is_lost());
}

#[test]
fn our_ids_are_nobody_elses() {
    let mut pending = Pending::new(MessageId(0xfffe));
    pending.greeting = Greeting::Answered(None);
    let first = pending.ask(Command::RegionRead).unwrap();
    assert_eq!(first, MessageId(0x7ffe));
    assert_eq!(pending.ask(Command::RegionRead), Some(MessageId(0x7fff)));
    pending.begins(asked(MessageId(0x8000), Command::GetInfo));
    pending.begins(asked(MessageId(0xffff), Command::GetInfo));
    assert_eq!(pending.ask(Command::RegionRead), Some(MessageId(0x8001)));
}

#[test]
fn an_answer_to_us_is_told_from_the_vmms_by_id_and_command() {
    let mut pending = Pending::new(MessageId(1));
    assert!(pending.is_welcome(&header(1, Command::Version, YES)));
    assert!(!pending.is_welcome(&header(1, Command::Version, ASK)));
    let ours = pending.ask(Command::RegionRead).unwrap().0;
    assert!(pending.is_ours(&header(ours, Command::RegionRead, YES)));
    // Not all servers repeat the command.
    assert!(pending.is_ours(&header(ours, Command::Version, YES)));
    // The server's own commands have ids of their own.
    assert!(!pending.is_ours(&header(ours, Command::DmaRead, ASK)));
    pending.begins(asked(MessageId(ours), Command::GetInfo));
    assert!(!pending.is_ours(&header(ours, Command::GetInfo, YES)));
    assert!(pending.is_ours(&header(ours, Command::RegionRead, YES)));
    pending.deliver(Answer::new(&header(ours, Command::RegionRead, YES)));
    assert!(!pending.is_ours(&header(ours, Command::RegionRead, YES)));
}

#[test]
fn an_abandoned_id_that_the_vmm_comes_round_to_is_the_vmms() {
    let mut pending = Pending::new(MessageId(1));
    let ours = pending.ask(Command::RegionRead).unwrap();
    pending.abandon(ours);
    assert!(pending.owes_us());
    pending.begins(asked(ours, Command::RegionRead));
    assert!(!pending.owes_us());
    assert!(!pending.is_ours(&header(ours.0, Command::RegionRead, YES)));
}

#[test]
fn an_abandoned_id_stays_ours_for_its_command() {
    let mut pending = Pending::new(MessageId(1));
    let ours = pending.ask(Command::RegionRead).unwrap();
    pending.abandon(ours);
    pending.begins(asked(ours, Command::GetInfo));
    assert!(pending.owes_us());
    let late = header(ours.0, Command::RegionRead, YES);
    assert!(!pending.is_ours(&header(ours.0, Command::GetInfo, YES)));
    assert!(pending.is_ours(&late));
    pending.deliver(Answer::new(&late));
    assert!(!pending.owes_us());
    assert!(!pending.is_ours(&late));
}

#[test]
fn a_server_that_owes_too_many_answers_is_not_asked() {
    let mut pending = Pending::new(MessageId(1));
    while pending.may_ask() {
        let id = pending.ask(Command::RegionRead).unwrap();
        pending.abandon(id);
    }
    pending.deliver(Answer::new(&header(0x8001, Command::RegionRead, YES)));
    assert!(pending.may_ask());
}

#[test]
fn the_beginning_of_a_header_is_withheld_only_while_an_answer_to_us_is_due() {
    let mut pending = Pending::new(MessageId(1));
    let incoming = Incoming::default();
    assert_eq!(incoming.decide(&[0; 5], &pending), Next::Unclear);
    pending.greeting = Greeting::Answered(None);
    assert_eq!(incoming.decide(&[0; 5], &pending), Next::Theirs(5));
    pending.ask(Command::RegionRead).unwrap();
    assert_eq!(incoming.decide(&[0; 5], &pending), Next::Unclear);
    // What the VMM has the first bytes of is the VMM's.
    assert_eq!(Incoming::Header(vec![0; 3]).decide(&[0; 5], &pending), Next::Theirs(5));
}

#[test]
fn of_an_answer_to_us_one_descriptor_is_kept() {
    let mut answer = Answer::new(&Header { body_size: 2, ..header(1, Command::DecodePage, YES) });
    let (mut first, mut others) = (None, Vec::new());
    for _ in 0..10 {
        let (reader, writer) = std::io::pipe().unwrap();
        first.get_or_insert(reader.try_clone().unwrap());
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        others.push(reader);
        answer.add(&[0], vec![writer.try_clone().unwrap().into(), writer.into()]);
    }
    let kept = answer.fd.expect("one");
    rustix::io::write(&kept, &[7]).unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(&mut first.unwrap(), &mut byte).unwrap();
    assert_eq!(byte, [7], "the first");
    // Nobody can write to the others any more.
    for mut other in others.into_iter().skip(1) {
        assert_eq!(std::io::Read::read(&mut other, &mut byte).unwrap(), 0);
    }
}

#[test]
fn an_answer_to_us_that_is_too_long_ends_the_messages() {
    let mut pending = Pending::new(MessageId(1));
    let ours = pending.ask(Command::RegionRead).unwrap().0;
    let next = |body_size| {
        let header = Header { body_size, ..header(ours, Command::RegionRead, YES) };
        Incoming::default().decide(&header.to_bytes(), &pending)
    };
    assert!(matches!(next((64 << 10) - 16), Next::Ours(_)));
    assert_eq!(next((64 << 10) - 15), Next::Lost);
}

proptest! {
    #[test]
    fn boundaries_are_found_in_any_pieces(
        messages in prop::collection::vec((any::<u16>(), 0_usize..60, any::<bool>()), 1..10),
        pieces in prop::collection::vec(1_usize..50, 1..10),
    ) {
        let mut stream = Vec::new();
        let mut ends = vec![0];
        let mut expected = Vec::new();
        for (id, len, told) in messages {
            stream.extend(message(id, 10, if told { YES } else { ASK }, &vec![7; len]));
            ends.push(stream.len());
            expected.push(if told { Begun::Told } else { Begun::Asked(MessageId(id), 10) });
        }
        let mut outgoing = Outgoing::default();
        let mut begun = Vec::new();
        let mut at = 0;
        for piece in pieces.iter().cycle() {
            prop_assert_eq!(outgoing.at_boundary(), ends.contains(&at));
            let piece = &stream[at..(at + piece).min(stream.len())];
            if piece.is_empty() {
                break;
            }
            begun.extend(pass(&mut outgoing, piece).begun);
            at += piece.len();
        }
        prop_assert_eq!(begun, expected);
    }
}
