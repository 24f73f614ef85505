//! The bug that this module exists to show, and its cure.

use super::*;
use crate::fault::{MemoryFault, NoProgress, ProgressGuard, Verdict};

const BOUND: usize = ProgressGuard::BOUND as usize;

/// Writes to a page, then fetches from it.
fn program() -> Vec<Access> {
    vec![write(page(0)), fetch(page(0)), read(page(1))]
}

fn memory(dic: bool) -> GuestMemory {
    let memory = GuestMemory::new(dic);
    memory.add(ram(4 * PAGE_SIZE, Perms::RWX)).unwrap();
    memory
}

#[test]
fn mapping_again_on_a_permission_fault_livelocks_and_is_escalated() {
    let memory = memory(false);
    let mut vcpu = Vcpu::new(&memory, Policy::AlwaysMap, program());
    let place = MemoryFault::reported(GuestAddress(BASE), PAGE_SIZE, Some(FaultAccess::Execute));
    assert_eq!(vcpu.run(), Err(NoProgress { fault: place }));
    assert_eq!(vcpu.current(), Some(fetch(page(0))), "it never got past this one");
    assert_eq!(vcpu.done().len(), 1);
    let refused =
        Resolved { answer: Answer::Verdict(Verdict::Map), code: Some(Err(TableError::Again)) };
    assert_eq!(vcpu.faults(), vec![refused; BOUND]);
    assert_eq!(perms_at(&memory, page(0)), Perms::RW, "and nothing has changed");
    assert!(matches!(vcpu.step(), VcpuStep::Stuck(_)));
}

#[test]
fn relaxing_on_a_permission_fault_takes_one_more_fault_and_goes_on() {
    let memory = memory(false);
    let mut vcpu = Vcpu::new(&memory, Policy::RelaxOnPermission, program());
    let done = vcpu.run().unwrap();
    let fault = |verdict| Resolved { answer: Answer::Verdict(verdict), code: Some(Ok(())) };
    let faults: Vec<_> = done.iter().map(|done| done.faults.clone()).collect();
    let [map, relax] = [Verdict::Map, Verdict::Relax].map(fault);
    assert_eq!(faults, [vec![map], vec![relax], vec![map]]);
    assert!(done.iter().all(|done| done.completion == Completion::Retired));
    assert_eq!(perms_at(&memory, page(0)), Perms::RWX);
    assert_eq!(perms_at(&memory, page(1)), Perms::RW);
}

#[test]
fn with_dic_the_first_mapping_is_executable_and_even_the_wrong_policy_gets_by() {
    for policy in [Policy::AlwaysMap, Policy::RelaxOnPermission] {
        let memory = memory(true);
        let mut vcpu = Vcpu::new(&memory, policy, program());
        let faults: Vec<_> = vcpu.run().unwrap().iter().map(|done| done.faults.len()).collect();
        assert_eq!(faults, [1, 0, 1], "{policy:?}");
    }
}

#[test]
fn a_livelock_is_seen_although_other_vcpus_change_the_table_all_the_time() {
    let memory = memory_of(ram(BLOCK_SIZE, Perms::RWX));
    memory.track_writes(GuestAddress(BASE), false);
    let mut stuck = Vcpu::new(&memory, Policy::AlwaysMap, program());
    let others = (2..512).map(|index| read(page(index))).collect();
    let mut busy = Vcpu::new(&memory, Policy::RelaxOnPermission, others);
    let mut steps = 0;
    while !matches!(stuck.step(), VcpuStep::Stuck(_)) {
        assert_eq!(busy.step(), VcpuStep::Ran);
        steps += 1;
        assert!(steps < 10 * BOUND);
    }
}
