//! Sessions whose workers are killed at random instants, and as fast as they come.

use std::sync::atomic::{AtomicU64, Ordering};

use barkeep_tests::figure;
use barkeep_tests::supervised::{Launch, Supervised};

use crate::blk;
use crate::kills::{Lives, number_of_kills, while_killed};
use crate::random::Random;
use crate::script::assert_same;
use crate::sessions::{self, Session};

fn start(session: &Session) -> Supervised {
    let directory = tempfile::tempdir().unwrap();
    let device = (session.device)(directory.path());
    Supervised::start_in(directory, &[&device], &Launch::default())
}

/// Repeats a session while its worker is killed; each time it answers what it answers undisturbed.
fn survive(session: &Session, kills: u64) {
    let mut random = Random::new();
    let run = start(session);
    let descriptors = run.descriptors();
    let expected = (session.run)(&run);
    let rounds = AtomicU64::new(0);
    let recovery = while_killed(
        &run,
        0,
        (kills, Lives::Short),
        &mut random,
        || rounds.load(Ordering::Relaxed),
        || {
            let answers = (session.run)(&run);
            assert_same(&expected, &answers, "while workers are killed");
            rounds.fetch_add(1, Ordering::Relaxed);
        },
    );
    run.until("the end of what was held for clients", || {
        (run.descriptors() == descriptors).then_some(())
    });
    figure(&format_args!(
        "{}: {} rounds, {} kills",
        session.name,
        rounds.into_inner(),
        recovery.kills()
    ));
}

#[test]
fn registers_survive_kills_at_random_instants() {
    survive(&sessions::REGISTERS, number_of_kills() / 4);
}

#[test]
fn what_a_decode_page_shows_survives_kills_at_random_instants() {
    survive(&sessions::SHOWN, number_of_kills() / 4);
}

#[test]
fn interrupts_survive_kills_at_random_instants() {
    survive(&sessions::INTERRUPTS, number_of_kills() / 4);
}

#[test]
fn windows_of_memory_survive_kills_at_random_instants() {
    survive(&sessions::MEMORY, number_of_kills() / 4);
}

#[test]
fn a_client_that_waits_for_nothing_survives_kills_at_random_instants() {
    survive(&sessions::PIPELINED, number_of_kills() / 4);
}

#[test]
fn transfers_by_messages_survive_kills_at_random_instants() {
    survive(&sessions::MESSAGES, number_of_kills() / 4);
}

#[test]
fn transfers_over_a_twin_socket_survive_kills_at_random_instants() {
    survive(&sessions::TWIN, number_of_kills() / 4);
}

#[test]
fn a_stopped_function_survives_kills_at_random_instants() {
    survive(&sessions::STOPPED, number_of_kills() / 4);
}

#[test]
fn shared_memory_and_doorbells_survive_kills_at_random_instants() {
    survive(&sessions::SHARED, number_of_kills() / 4);
}

/// Each one dies before it has served anything.
#[test]
fn kills_that_come_faster_than_recovery_delay_and_lose_nothing() {
    let (run, image) = blk::disk(blk::SIZE, "", &Launch::default());
    let mut driver = blk::drive(&run, 0, blk::setup());
    let mut load = barkeep_tests::virtio::Load::new(blk::SIZE, 512, blk::DEPTH);
    for _ in 0..3 {
        load.run(&mut driver, 100);
        load.fill(&mut driver);
        for _ in 0..10 {
            run.until("a child", || run.children().into_iter().find(|child| !child.has_ended()))
                .kill();
        }
        load.run(&mut driver, 100);
    }
    load.finish(&mut driver);
    blk::assert_settled(&mut driver, &load);
    load.verify(&image);
}
