//! Every instant at which a crash can make a difference, one by one.
//!
//! A worker that was built for it counts the stores to its state and the calls for its sockets, and
//! kills itself at the one that it is told to.

use std::path::Path;

use barkeep_tests::supervised::{Launch, Supervised};
use barkeep_tests::{binary, figure, skip};

use crate::random::Random;
use crate::script::{Answer, assert_same};
use crate::sessions::{self, Session};

/// So many points of each session, and pairs of points, where not all of them are asked for.
const SOME: u64 = 24;
const SOME_PAIRS: u64 = 8;
/// A worker passes about as many points before it serves what its predecessor left.
const RECOVERY: u64 = 60;

struct Outcome {
    answers: Vec<Answer>,
    deaths: usize,
}

/// Runs a session whose workers die at these points, the first one at the first, and so on.
fn run(session: &Session, binary: &Path, points: &[u64], count: Option<&Path>) -> Outcome {
    // Of a session that hangs, this is the last one.
    println!("deaths at {points:?}");
    let directory = tempfile::tempdir().unwrap();
    let device = (session.device)(directory.path());
    let mut environment = Vec::new();
    if !points.is_empty() {
        let list: Vec<_> = points.iter().map(u64::to_string).collect();
        environment.push(("BARKEEP_FAILPOINTS".into(), list.join(",")));
    }
    if let Some(path) = count {
        environment.push(("BARKEEP_FAILPOINT_LOG".into(), path.display().to_string()));
    }
    let binary = Some(binary.to_owned());
    let launch = Launch { binary, environment, ..Launch::default() };
    let mut run = Supervised::start_in(directory, &[&device], &launch);
    let answers = (session.run)(&run);
    assert_eq!(run.stop(), Some(0), "after deaths at {points:?}:\n{}", run.log());
    Outcome { answers, deaths: run.logged(&["ended by signal 9"]) }
}

/// What a session that nothing disturbs answers, and how many points its worker passes.
fn undisturbed(session: &Session, binary: &Path) -> (Vec<Answer>, u64) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("points");
    let first = run(session, binary, &[], Some(&log)).answers;
    let text = std::fs::read_to_string(&log).unwrap();
    let last = text.split_whitespace().last().and_then(|count| count.parse().ok());
    let count = last.unwrap_or_else(|| unreachable!("no count in {text:?}"));
    compare(&first, &run(session, binary, &[], None), &[]);
    (first, count)
}

fn compare(expected: &[Answer], outcome: &Outcome, points: &[u64]) {
    assert_same(expected, &outcome.answers, &format!("after deaths at {points:?}"));
}

fn every_point_is_survived(session: &Session) {
    let Some(binary) = binary::with_failpoints() else {
        return skip(&"BARKEEP_FAILPOINTS_BIN names no barkeep with points of failure");
    };
    let mut random = Random::new();
    let (expected, count) = undisturbed(session, &binary);
    assert!(count > 100, "{} has {count} points", session.name);
    let all = std::env::var("BARKEEP_CRASH_POINTS").is_ok_and(|points| points == "all");
    let (step, pairs) = if all { (1, count / 4) } else { (count.div_ceil(SOME), SOME_PAIRS) };
    let mut deaths = 0;
    let singles: Vec<_> =
        (1 + random.below(step)..=count).step_by(usize::try_from(step).unwrap()).collect();
    for point in &singles {
        let outcome = run(session, &binary, &[*point], None);
        compare(&expected, &outcome, &[*point]);
        deaths += outcome.deaths;
    }
    figure(&format_args!("{}: {} of {count} points, {deaths} deaths", session.name, singles.len()));
    // The last points are passed when the supervisor says so, and are none of the session's.
    assert!(deaths * 10 >= singles.len() * 9, "{deaths} deaths at {singles:?}");
    let mut deaths = 0;
    for _ in 0..pairs {
        let points = [1 + random.below(count), 1 + random.below(RECOVERY)];
        let outcome = run(session, &binary, &points, None);
        compare(&expected, &outcome, &points);
        deaths += outcome.deaths;
    }
    figure(&format_args!("{}: {pairs} pairs, {deaths} deaths", session.name));
}

#[test]
fn registers_survive_a_death_at_every_point() {
    every_point_is_survived(&sessions::REGISTERS);
}

#[test]
fn what_a_decode_page_shows_survives_a_death_at_every_point() {
    every_point_is_survived(&sessions::SHOWN);
}

#[test]
fn interrupts_survive_a_death_at_every_point() {
    every_point_is_survived(&sessions::INTERRUPTS);
}

#[test]
fn windows_of_memory_survive_a_death_at_every_point() {
    every_point_is_survived(&sessions::MEMORY);
}

#[test]
fn a_client_that_waits_for_nothing_survives_a_death_at_every_point() {
    every_point_is_survived(&sessions::PIPELINED);
}

#[test]
fn transfers_by_messages_survive_a_death_at_every_point() {
    every_point_is_survived(&sessions::MESSAGES);
}

#[test]
fn transfers_over_a_twin_socket_survive_a_death_at_every_point() {
    every_point_is_survived(&sessions::TWIN);
}

#[test]
fn a_stopped_function_survives_a_death_at_every_point() {
    every_point_is_survived(&sessions::STOPPED);
}

#[test]
fn shared_memory_and_doorbells_survive_a_death_at_every_point() {
    every_point_is_survived(&sessions::SHARED);
}

#[test]
fn writes_are_counted_once_whatever_point_a_worker_dies_at() {
    every_point_is_survived(&sessions::COUNTED);
}

#[test]
fn a_disk_survives_a_death_at_every_point() {
    every_point_is_survived(&sessions::DISK);
}
