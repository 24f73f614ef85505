//! Workers die at every step that there is; their successors go on as if nothing had happened.

use proptest::collection::vec;
use proptest::proptest;

use super::peer::{Message, Peer};
use super::random::Random;
use super::recover;
use super::worker::Worker;
use super::world::{Expected, OPERATIONS, Session, World};
use crate::state::SectionId;
use crate::state::plan::{killed_at, passed};

/// Serves until all is done.
fn serve(world: &mut World) {
    let mut worker = Worker::start(world);
    loop {
        while world.act() | worker.turn(world) {}
        // The last one stays, so that what there is of it can be looked at.
        if world.is_last_session() {
            return;
        }
        world.peers.iter_mut().for_each(Peer::close);
    }
}

fn random_session(random: &mut Random, messages: u64, abrupt: bool) -> Session {
    let mut some = |most: u64| {
        let message = |random: &mut Random| {
            let operation = u8::try_from(random.below(OPERATIONS)).unwrap();
            let length = if random.one_in(6) { 5000 } else { 60 };
            let message = Message::new(operation, random.below(u64::MAX), random.length(length));
            (message, if random.one_in(2) { 0 } else { random.length(4) })
        };
        (0..random.below(most + 1)).map(|_| message(random)).collect()
    };
    let messages = [some(messages), some(messages / 2)];
    let wakes = (0..random.below(3)).map(|_| u16::try_from(random.below(200)).unwrap()).collect();
    Session { messages, abrupt, wakes }
}

/// Runs a scenario, whose workers die at these of their crash points, to its end. Returns the crash
/// points that the last worker has passed.
fn run(sessions: &[Session], seed: u64, deaths: &[u64]) -> u64 {
    let mut world = World::new(sessions, seed);
    for point in deaths {
        let _ = killed_at(*point, || serve(&mut world));
    }
    killed_at(u64::MAX, || serve(&mut world)).unwrap();
    let last = passed();
    check(&world);
    last
}

fn check(world: &World) {
    let expected = Expected::of(&world.session);
    let (mut journal, recovered) = recover(&world.memfd).unwrap();
    world.check_frames();
    let function = recovered.sections[SectionId::Function.index()].clone().unwrap();
    let words: Vec<u64> = function
        .unwrap_or(vec![0; 40])
        .as_chunks()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    assert_eq!(words[..2], expected.histories);
    assert_eq!(words[2..4], expected.counts);
    assert!(words[4] >= world.wakes_done, "a wake is lost");
    let held: Vec<_> = world.held.keys().copied().collect();
    let mut kept = world.inodes(&held);
    kept.sort_unstable();
    assert_eq!(kept, expected.kept, "what was kept, and nothing else, is held");
    for stream in crate::state::StreamId::ALL {
        let stream = journal.stream(stream);
        assert!(stream.is_empty() && stream.received_len() == 0);
    }
}

/// The last session is an orderly one.
fn scenario(seed: u64, sessions: u64, messages: u64) -> Vec<Session> {
    let mut random = Random(seed);
    let session = |left| {
        let abrupt = left > 0 && random.one_in(2);
        random_session(&mut random, messages, abrupt)
    };
    (0..sessions).rev().map(session).collect()
}

#[test]
fn scenarios_go_well_without_a_death() {
    for seed in 0..30 {
        run(&scenario(seed, 3, 8), seed, &[]);
    }
}

#[test]
fn a_death_at_any_step_is_not_seen_by_anybody() {
    for seed in 100..105 {
        let sessions = scenario(seed, 2, 4);
        let points = run(&sessions, seed, &[]);
        for point in 1..=points {
            run(&sessions, seed, &[point]);
        }
    }
}

#[test]
fn a_death_after_a_death_is_not_seen_by_anybody() {
    for seed in 200..202 {
        let sessions = scenario(seed, 1, 2);
        let points = run(&sessions, seed, &[]);
        for first in 1..=points {
            let left = run(&sessions, seed, &[first]);
            for second in (1 + first % 17..=left).step_by(17) {
                run(&sessions, seed, &[first, second]);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_number_of_deaths_is_not_seen_by_anybody(
        seed: u64,
        deaths in vec(1..200_u64, 0..20),
    ) {
        run(&scenario(seed, 3, 6), seed, &deaths);
    }
}
