//! A split virtqueue with rings and chains of any content, against a model of what is legal: what is
//! taken is what the driver described, what is malformed is an error and stays where it is, and
//! nothing is written but what the device writes to a used ring.
#![no_main]

mod model;

use barkeep_backend::devices::virtio::{Buffers, Chain, Io, needs_interrupt, spec::feature};
use barkeep_fuzz::Input;
use barkeep_fuzz::guest::{self, Queues};
use libfuzzer_sys::fuzz_target;
use virtio_queue::QueueT;
use vm_memory::guest_memory::Permissions;
use vm_memory::{Bytes, GuestAddress};

use self::model::{Model, Piece, Request};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let memory = guest::memory();
    let flags = input.u8();
    let indirect = flags & 1 != 0;
    let features = if indirect { feature::TRANSPORT } else { feature::VERSION_1 };
    let mut queue = guest::queue(&mut input);
    queue.set_event_idx(flags & 2 != 0);
    let mut queues = Queues::new(&memory, features, vec![queue]);
    let mut taken = false;
    while !input.is_empty() {
        let (size, table) = (queues.queues[0].size(), queues.queues[0].desc_table());
        match input.u8() % 9 {
            0 => {
                let at = guest::address(&mut input);
                let length = input.u8() % 64;
                let _ = memory.write_slice(input.bytes(length.into()), GuestAddress(at));
            }
            1 => guest::write_descriptor(&memory, table, size, &mut input),
            2 => {
                // An indirect table, or rubbish.
                let at = guest::address(&mut input);
                guest::write_descriptor(&memory, at, 32, &mut input);
            }
            3 => {
                let head = u16::from(input.u8());
                guest::make_available(&memory, &queues.queues[0], head, 1);
            }
            4 => {
                let (head, more) = (input.u16(), input.u16());
                guest::make_available(&memory, &queues.queues[0], head, more);
            }
            kind => {
                let model = Model::of(&queues, indirect);
                match (kind, input.u8() % 5) {
                    (5 | 6, _) => taken = pop(&mut queues, &model),
                    (7, _) => push(&mut queues, input.u16(), input.u32(), &model),
                    (_, 0) => follow(&mut queues, input.u16(), &model),
                    (_, 1) if taken => {
                        queues.queue(0).expect("it is there").unpop(0);
                        taken = false;
                        assert_eq!(queues.queues[0].next_avail(), model.next_avail.wrapping_sub(1));
                    }
                    (_, 2) => {
                        let _ = needs_interrupt(&mut queues.queues[0], &memory);
                    }
                    (_, 3) => rearm(&mut queues, &model),
                    _ => disable(&mut queues, &model),
                }
            }
        }
    }
});

/// Whether a request was taken.
fn pop(queues: &mut Queues, model: &Model) -> bool {
    let mut chain = Chain::default();
    let found = queues.queue(0).expect("it is there").pop(&mut chain);
    let next = queues.queues[0].next_avail();
    assert!(guest::snapshot(&queues.memory) == model.bytes, "taking writes nothing");
    match (found, model.pop()) {
        (Ok(true), Ok(Some(expected))) => {
            assert_eq!(next, model.next_avail.wrapping_add(1));
            compare(queues, &chain, &expected, model);
            true
        }
        (Ok(false), Ok(None)) | (Err(_), Err(_)) => {
            assert_eq!(next, model.next_avail, "nothing was taken");
            false
        }
        (found, expected) => panic!("{found:?} instead of {expected:?}"),
    }
}

fn follow(queues: &mut Queues, head: u16, model: &Model) {
    let mut chain = Chain::default();
    let found = queues.queue(0).expect("it is there").chain(head, &mut chain);
    match (found, model.follow(head)) {
        (Ok(()), Ok(expected)) => compare(queues, &chain, &expected, model),
        (Err(_), Err(())) => {}
        (found, expected) => panic!("{found:?} instead of {expected:?}"),
    }
}

fn compare(queues: &Queues, chain: &Chain, expected: &Request, model: &Model) {
    assert_eq!(chain.head(), expected.head);
    let sides = [
        (&chain.readable, &expected.readable, Permissions::Read),
        (&chain.writable, &expected.writable, Permissions::Write),
    ];
    for (found, expected, access) in sides {
        compare_buffers(queues, found, expected, access, model);
    }
}

fn compare_buffers(
    queues: &Queues,
    found: &Buffers,
    expected: &[Piece],
    access: Permissions,
    model: &Model,
) {
    let total: u64 = expected.iter().map(|piece| u64::from(piece.length)).sum();
    assert_eq!((found.len(), found.is_empty()), (total, total == 0));
    let pieces: Vec<_> = found.pieces(0, found.len()).map(|(at, len)| (at.0, len)).collect();
    let all: Vec<_> = expected.iter().map(|piece| (piece.address, piece.length as usize)).collect();
    assert_eq!(pieces, all);
    let bytes: Option<Vec<u8>> = expected
        .iter()
        .map(|piece| model.read(piece.address, piece.length as usize))
        .collect::<Option<Vec<_>>>()
        .map(|parts| parts.concat());
    assert_eq!(found.reachable(&*queues.memory, access), bytes.is_some());
    let Some(bytes) = bytes.filter(|bytes| bytes.len() < 1 << 16) else { return };
    // In parts that share no border with the pieces.
    let mut at = 0;
    while at < bytes.len() {
        let length = (bytes.len() - at).min(1 + at % 97);
        let mut part = vec![0; length];
        found.read(&*queues.memory, at as u64, &mut part).expect("all of it is reachable");
        assert!(part == bytes[at..at + length]);
        at += length;
    }
    found.read(&*queues.memory, total, &mut [0]).expect_err("behind the end");
}

fn push(queues: &mut Queues, head: u16, written: u32, model: &Model) {
    let result = queues.queue(0).expect("it is there").push(head, written);
    let now = guest::snapshot(&queues.memory);
    match (result, model.push(head, written)) {
        (Ok(()), Ok(expected)) => assert!(now == expected, "the used ring"),
        (Err(_), Err(())) => {}
        (found, expected) => panic!("{found:?} instead of {:?}", expected.map(|_| ())),
    }
}

fn rearm(queues: &mut Queues, model: &Model) {
    let found = queues.queue(0).expect("it is there").rearm();
    if let (Ok(found), Some(index)) = (found, model.avail_index()) {
        // The index may be where the wish was written.
        let now = Model::of(queues, false).avail_index().expect("as before");
        assert!(found == (index != model.next_avail) || now != index);
    }
    model.assert_only_wishes_changed(&guest::snapshot(&queues.memory));
}

fn disable(queues: &mut Queues, model: &Model) {
    let _ = queues.queue(0).expect("it is there").disable_kicks();
    model.assert_only_wishes_changed(&guest::snapshot(&queues.memory));
}
