//! Bytes that mean nothing, and messages whose payloads do.

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, message};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// The same cases every time: a failure is one that everybody sees.
fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

#[test]
fn random_bytes_cost_a_session() {
    let backend = Backend::serve(&["edu"]);
    for greeted in [false, true] {
        runner(64)
            .run(&vec(any::<u8>(), 0..4096), |bytes| {
                let mut peer = Peer::connect(backend.socket());
                if greeted {
                    peer.greet();
                }
                send_and_leave(peer, &bytes, &backend);
                Ok(())
            })
            .expect("the next client is served");
    }
}

/// Sends bytes of any kind, reads what comes and leaves; the next client must be served.
fn send_and_leave(mut peer: Peer, bytes: &[u8], backend: &Backend) {
    // The backend may hang up at any byte of it.
    let _ = peer.try_send(bytes);
    peer.finish_sending();
    peer.drain();
    drop(peer);
    edu::assert_served(backend.socket());
}

/// Payloads that are nearly right: of about the right length, with small numbers in the fields.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let field = prop_oneof![
        4 => (0u32..64).prop_map(|small| small),
        1 => any::<u32>(),
        1 => Just(u32::MAX),
        1 => Just(4096),
    ];
    let bytes = |fields: Vec<u32>| fields.into_iter().flat_map(u32::to_ne_bytes).collect();
    (vec(field, 0..10).prop_map(bytes), 0usize..4).prop_map(|(mut bytes, cut): (Vec<u8>, _)| {
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes
    })
}

#[test]
fn every_well_framed_command_gets_exactly_one_reply() {
    let backend = Backend::serve(&["edu"]);
    let commands = prop_oneof![6 => 0u16..20, 1 => 0x8000u16..0x8004, 1 => any::<u16>()];
    runner(48)
        .run(&vec((commands, payload()), 1..64), |messages| {
            let mut peer = backend.client();
            for (command, body) in messages {
                let reply = peer.call(command, &body);
                prop_assert!(reply.flags == 1 && reply.error == 0 || reply.flags == 0x21);
                prop_assert!(reply.flags == 1 || reply.error != 0 && reply.body.is_empty());
            }
            drop(peer);
            edu::assert_served(backend.socket());
            Ok(())
        })
        .expect("the session goes on whatever is asked");
}

#[test]
fn a_flipped_byte_costs_at_most_a_session() {
    let backend = Backend::serve(&["edu"]);
    let requests = [
        barkeep_tests::peer::requests::info(16, 0),
        barkeep_tests::peer::requests::dma_map(3, 0, 0x1000, 0x1000),
        barkeep_tests::peer::requests::access(7, 0, 64),
        barkeep_tests::peer::requests::write(0, 4, &[1, 2, 3, 4]),
    ];
    let commands = [4, 2, 9, 10];
    let stream: Vec<u8> = commands
        .into_iter()
        .zip(&requests)
        .flat_map(|(command, body)| message(command, command, COMMAND, body))
        .collect();
    runner(96)
        .run(&(0..stream.len(), 1u8..), |(at, flip)| {
            let mut bytes = stream.clone();
            bytes[at] ^= flip;
            send_and_leave(backend.client(), &bytes, &backend);
            Ok(())
        })
        .expect("the next client is served");
}
