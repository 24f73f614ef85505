//! A VMM in miniature, to be run with and without the preloaded library: one scenario a run, told by
//! name, which says what it saw on standard output, line by line.
//!
//! Everything goes through the C library, as it does in a VMM that is written in C. What it prints
//! has no addresses or numbers that differ from run to run, so that two runs can be compared.
#![expect(clippy::print_stdout, reason = "what it prints is what the test compares")]

mod descriptors;
mod forks;
mod lives;
mod machine;
mod mappings;
mod measure;
mod proxy;
mod raw;
mod signals;
mod sockets;
mod user_device;
mod vm;
mod vms;

use std::process::ExitCode;

/// What a scenario ends with when a call fails that must not.
type Outcome = Result<(), raw::Errno>;

/// Prints a fact: what it is about, and what was seen.
fn say(what: &str, seen: impl std::fmt::Debug) {
    println!("{what}: {seen:?}");
}

/// A scenario, by its name.
type Scenario = (&'static str, fn() -> Outcome);

const SCENARIOS: &[Scenario] = &[
    ("slots", vms::slots),
    ("exits", vms::exits),
    ("unknown-ioctls", vms::unknown_ioctls),
    ("several-vms", vms::several_vms),
    ("vcpus-come-and-go", vms::vcpus_come_and_go),
    ("run-page", vms::run_page),
    ("immediate-exit", vms::immediate_exit),
    ("interrupted", vms::interrupted),
    ("errno", vms::errno_is_kept),
    ("threads", vms::threads),
    ("lost-ram", vms::lost_ram),
    ("mmap", mappings::mapping),
    ("mmap-errors", mappings::errors),
    ("mremap", mappings::moving),
    ("partial-munmap", mappings::partial_unmapping),
    ("mapping-threads", mappings::threads),
    ("dups", descriptors::dups),
    ("fcntl", descriptors::fcntl),
    ("close-range", descriptors::close_range),
    ("reuse", descriptors::reuse),
    ("pread", descriptors::pread),
    ("disposition", signals::disposition),
    ("signal", signals::by_signal),
    ("handler", signals::handler_runs),
    ("handler-details", signals::handler_details),
    ("handler-stack", signals::handler_on_its_stack),
    ("reset-hand", signals::reset_hand),
    ("masks", signals::masks),
    ("pending", signals::pending),
    ("pending-in-a-thread", signals::pending_in_a_thread),
    ("waited-for", signals::waited_for),
    ("waited-for-in-a-thread", signals::waited_for_in_a_thread),
    ("by-descriptor", signals::by_descriptor),
    ("new-threads", signals::new_threads),
    ("dies", signals::dies),
    ("dies-blocked", signals::dies_blocked),
    ("dies-ignored", signals::dies_ignored),
    ("dies-raised", signals::dies_raised),
    ("dies-reraised", signals::dies_reraised),
    ("other-signals", signals::other_signals),
    ("forks", forks::forks),
    ("fork-storm", forks::storm),
    ("programs", forks::programs),
    ("helped", lives::helped),
    ("daemonized", lives::daemonized),
    ("no-standard-error", lives::no_standard_error),
    ("cancelled", lives::cancelled),
    ("strangers", sockets::strangers),
    ("other-kinds", sockets::other_kinds),
    ("session", user_device::session),
    ("crowd", user_device::crowd),
    ("switched", user_device::switched),
    ("written", user_device::written),
    ("toggled", user_device::toggled),
    ("truncated", user_device::truncated),
    ("hammered", user_device::hammered),
    ("deserted", user_device::deserted),
    ("measure-runs", measure::runs),
    ("count-runs", measure::counted_runs),
    ("exit-loop", measure::exit_loop),
];

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let Some((_, scenario)) = SCENARIOS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = SCENARIOS.iter().map(|(known, _)| *known).collect();
        println!("no scenario {name:?}; there are {}", known.join(" "));
        return ExitCode::from(2);
    };
    match scenario() {
        Ok(()) => ExitCode::SUCCESS,
        Err(errno) => {
            say("failed with errno", errno);
            ExitCode::FAILURE
        }
    }
}
