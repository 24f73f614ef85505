//! What has nothing to do with a device is the same with the library as without: every answer, every
//! errno, and the way in which a process ends.

use std::os::unix::process::ExitStatusExt;

use crate::wrapped::{With, has_kvm, run, text};

/// Runs a scenario twice, and compares all that it said and how it ended. Returns what it said.
#[track_caller]
fn same(name: &str) -> String {
    let plain = run(name, &[], With::Nothing);
    assert_ne!(plain.status.code(), Some(1), "{name} by itself: {}", text(&plain));
    assert_ne!(plain.status.code(), Some(2), "{name}: {}", text(&plain));
    let wrapped = run(name, &[], With::Library);
    let stderr = String::from_utf8_lossy(&wrapped.stderr);
    assert_eq!(
        text(&wrapped),
        text(&plain),
        "{name}, with the library (left) and without; {stderr}"
    );
    assert_eq!(
        wrapped.status, plain.status,
        "{name}, with the library (left) and without; {stderr}"
    );
    assert_eq!(wrapped.stderr, plain.stderr, "{name}: {stderr}");
    text(&plain)
}

/// A test for each scenario that needs KVM.
macro_rules! same_on_kvm {
    ($($test:ident: $name:literal,)*) => {$(
        #[test]
        fn $test() {
            if has_kvm() {
                same($name);
            }
        }
    )*};
}

/// A test for each scenario that runs anywhere.
macro_rules! same_anywhere {
    ($($test:ident: $name:literal,)*) => {$(
        #[test]
        fn $test() {
            same($name);
        }
    )*};
}

same_on_kvm! {
    slots_are_answered_as_by_kvm: "slots",
    exits_that_are_the_vmms_reach_it_on_kvm: "exits",
    unknown_requests_pass_on_kvm: "unknown-ioctls",
    several_vms_live_in_a_process_on_kvm: "several-vms",
    virtual_cpus_come_and_go_on_kvm: "vcpus-come-and-go",
    a_run_page_may_be_mapped_anywhere_and_nowhere_on_kvm: "run-page",
    an_immediate_exit_is_one_on_kvm: "immediate-exit",
    a_signal_interrupts_a_virtual_cpu_on_kvm: "interrupted",
    what_succeeds_leaves_errno_alone_on_kvm: "errno",
    threads_have_vms_of_their_own_on_kvm: "threads",
    ram_that_went_away_stays_the_vmms_trouble_on_kvm: "lost-ram",
    copies_of_descriptors_are_what_they_copy_on_kvm: "dups",
    fcntl_does_what_it_did_on_kvm: "fcntl",
    ranges_of_descriptors_are_closed_on_kvm: "close-range",
    numbers_that_are_used_again_mean_what_they_are_now_on_kvm: "reuse",
    a_child_has_vms_of_its_own_on_kvm: "forks",
    a_child_is_never_born_into_a_held_lock_on_kvm: "fork-storm",
}

same_anywhere! {
    files_are_mapped: "mmap",
    mappings_fail_as_they_did: "mmap-errors",
    mappings_move: "mremap",
    mappings_lose_parts: "partial-munmap",
    threads_map_side_by_side: "mapping-threads",
    files_are_read_and_written_in_place: "pread",
    the_disposition_of_sigbus_is_the_vmms_own: "disposition",
    signal_sets_what_sigaction_tells: "signal",
    handlers_run_and_mend_what_was_lost: "handler",
    handlers_run_under_the_masks_that_were_asked_for: "handler-details",
    handlers_run_on_the_stack_that_was_asked_for: "handler-stack",
    a_handler_that_is_for_once_runs_once: "reset-hand",
    masks_are_told_as_they_were_set: "masks",
    what_is_blocked_stays_pending: "pending",
    what_a_thread_blocks_stays_pending: "pending-in-a-thread",
    what_is_blocked_can_be_waited_for: "waited-for",
    what_a_thread_blocks_can_be_waited_for: "waited-for-in-a-thread",
    what_is_blocked_is_told_by_a_descriptor: "by-descriptor",
    threads_inherit_the_mask: "new-threads",
    a_fault_kills_by_default: "dies",
    a_fault_that_is_blocked_kills: "dies-blocked",
    a_fault_that_is_ignored_kills: "dies-ignored",
    what_is_sent_kills_by_default: "dies-raised",
    a_handler_that_gives_up_kills: "dies-reraised",
    other_signals_are_none_of_ours: "other-signals",
    sockets_of_others_carry_what_they_carried: "strangers",
    sockets_of_other_kinds_carry_what_they_carried: "other-kinds",
    programs_are_started: "programs",
    a_helper_that_resets_its_signals_resets_its_own: "helped",
}

#[test]
fn a_process_that_dies_of_its_own_fault_dies_by_the_same_signal() {
    for with in [With::Nothing, With::Library] {
        assert_eq!(run("dies", &[], with).status.signal(), Some(7), "{with:?}");
    }
}
