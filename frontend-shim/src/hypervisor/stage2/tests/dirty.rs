//! Tracking of writes.

use super::*;
use crate::fault::Verdict;

const PAGES: u64 = 8;

fn faults_of(memory: &GuestMemory, program: Vec<Access>) -> Vec<Vec<Resolved>> {
    let mut vcpu = Vcpu::new(memory, Policy::RelaxOnPermission, program);
    vcpu.run().unwrap().iter().map(|done| done.faults.clone()).collect()
}

fn all_pages(access: fn(u64) -> Access) -> Vec<Access> {
    (0..PAGES).map(|index| access(page(index))).collect()
}

fn every_page() -> Vec<GuestAddress> {
    (0..PAGES).map(|index| GuestAddress(page(index))).collect()
}

/// The answers to one fault for each access, in order; each has succeeded.
fn one_each(faults: &[Vec<Resolved>]) -> Vec<Answer> {
    faults
        .iter()
        .map(|faults| {
            assert!(faults.len() == 1 && faults[0].code == Some(Ok(())), "{faults:?}");
            faults[0].answer
        })
        .collect()
}

#[test]
fn the_first_write_to_each_page_is_relaxed_and_marks_it_once() {
    let memory = memory_of(ram(PAGES * PAGE_SIZE, Perms::RWX));
    faults_of(&memory, all_pages(write));
    assert_eq!(memory.take_dirty(), [], "nothing is marked while nothing is tracked");
    memory.track_writes(GuestAddress(BASE), false);
    for round in 0..3 {
        assert!(faults_of(&memory, all_pages(read)).iter().all(Vec::is_empty), "round {round}");
        let relaxed = one_each(&faults_of(&memory, all_pages(write)));
        let expected = all_pages(write).len();
        assert_eq!(relaxed, vec![Answer::Verdict(Verdict::Relax); expected], "round {round}");
        let more = faults_of(&memory, [all_pages(write), all_pages(read)].concat());
        assert!(more.iter().all(Vec::is_empty), "round {round}");
        assert_eq!(memory.take_dirty(), every_page(), "round {round}");
    }
}

#[test]
fn a_page_that_is_read_or_executed_first_is_marked_by_its_write_alone() {
    let memory = memory_of(ram(PAGES * PAGE_SIZE, Perms::RWX));
    memory.track_writes(GuestAddress(BASE), false);
    faults_of(&memory, [all_pages(read), all_pages(fetch)].concat());
    assert_eq!(perms_at(&memory, page(0)), Perms::RX);
    assert_eq!(memory.take_dirty(), []);
    faults_of(&memory, all_pages(write));
    assert_eq!(perms_at(&memory, page(0)), Perms::RWX, "and stays executable");
    assert_eq!(memory.take_dirty(), every_page());
}

#[test]
fn a_block_is_broken_by_the_first_write_or_split_beforehand() {
    for (split, kept, expected) in [(false, 1, Verdict::Map), (true, 512, Verdict::Relax)] {
        let memory = memory_of(ram(BLOCK_SIZE, Perms::RWX));
        faults_of(&memory, vec![write(page(0))]);
        assert_eq!(memory.table().leaves().len(), 1);
        memory.track_writes(GuestAddress(BASE), split);
        let answers = one_each(&faults_of(&memory, vec![write(page(3))]));
        assert_eq!(answers, [Answer::Verdict(expected)], "split {split}");
        assert_eq!(memory.table().leaves().len(), kept, "split {split}");
        let answers = one_each(&faults_of(&memory, vec![write(page(4))]));
        assert_eq!(answers, [Answer::Verdict(expected)], "split {split}");
        assert_eq!(memory.take_dirty(), [GuestAddress(page(3)), GuestAddress(page(4))]);
    }
}

#[test]
fn a_write_fault_that_loses_its_race_marks_nothing() {
    let memory = memory_of(ram(PAGES * PAGE_SIZE, Perms::RWX));
    memory.track_writes(GuestAddress(BASE), false);
    faults_of(&memory, vec![read(page(0))]);
    let abort = memory.access(write(page(0))).unwrap_err();
    memory.invalidate(GuestAddress(BASE));
    let mut resolution = Resolution::new(&memory, abort, Policy::RelaxOnPermission);
    let resolved = std::iter::repeat_with(|| resolution.step()).flatten().next().unwrap();
    assert_eq!(resolved.code, Some(Err(TableError::Again)));
    assert_eq!(memory.take_dirty(), []);
}
