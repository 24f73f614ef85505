//! What all tests of stage 2 share: a memory with vCPUs in it, stepped one at a time.

mod dirty;
mod faults;
mod livelock;
mod properties;
mod races;
mod table;

use super::*;
use crate::GuestAddress;
use crate::fault::FaultAccess;
use crate::hypervisor::PAGE_SIZE;

/// Where regions begin: at a block, and mapped to a block unless a test shifts it.
const BASE: u64 = 16 * BLOCK_SIZE;
const FRAME: u64 = 512 * BLOCK_SIZE;

fn page(index: u64) -> u64 {
    BASE + index * PAGE_SIZE
}

fn read(ipa: u64) -> Access {
    Access::new(FaultAccess::Read, ipa)
}

fn write(ipa: u64) -> Access {
    Access::new(FaultAccess::Write, ipa)
}

fn fetch(ipa: u64) -> Access {
    Access::new(FaultAccess::Execute, ipa)
}

fn region(size: u64, perms: Perms, kind: RegionKind) -> Region {
    Region { ipa: GuestAddress(BASE), size, frame: FRAME, perms, kind }
}

fn ram(size: u64, perms: Perms) -> Region {
    region(size, perms, RegionKind::Ram { private: false })
}

/// A memory of one region, without DIC.
fn memory_of(region: Region) -> GuestMemory {
    let memory = GuestMemory::new(false);
    memory.add(region).unwrap();
    memory
}

/// Permissions of what is mapped at `ipa`.
fn perms_at(memory: &GuestMemory, ipa: u64) -> Perms {
    match memory.table().lookup(GuestAddress(ipa)) {
        Entry::Valid(leaf) => leaf.perms,
        Entry::Invalid { .. } => Perms::NONE,
    }
}

/// vCPUs that share a memory, and what has happened to each one's current instruction.
struct World<'m> {
    memory: &'m GuestMemory,
    vcpus: Vec<Vcpu<'m>>,
    /// Changes by others, since the instruction began, of the entry that it needs.
    disturbances: Vec<usize>,
    /// Whether to look at the whole table after every step.
    look: bool,
}

impl<'m> World<'m> {
    fn new(memory: &'m GuestMemory, programs: &[Vec<Access>]) -> Self {
        let vcpu =
            |program: &Vec<Access>| Vcpu::new(memory, Policy::RelaxOnPermission, program.clone());
        let vcpus: Vec<_> = programs.iter().map(vcpu).collect();
        let disturbances = vec![0; vcpus.len()];
        Self { memory, vcpus, disturbances, look: true }
    }

    /// vCPUs that can go on.
    fn ready(&self) -> Vec<usize> {
        let ready = |index: &usize| self.vcpus[*index].standstill().is_none();
        (0..self.vcpus.len()).filter(ready).collect()
    }

    fn finished(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.current().is_none())
    }

    /// Steps one vCPU.
    ///
    /// Between two faults of one instruction, somebody else must have changed the entry: otherwise
    /// the first fault would have made it what the instruction needs. So there is at most one fault
    /// more than there were disturbances. An exit as MMIO is no memory fault.
    fn step(&mut self, index: usize) {
        let done = self.vcpus[index].done().len();
        let before = self.observe();
        assert_eq!(self.vcpus[index].step(), VcpuStep::Ran);
        let vcpu = &self.vcpus[index];
        let faults = vcpu.done().get(done).map_or(vcpu.faults(), |done| &done.faults);
        let count = faults.iter().filter(|fault| fault.answer != Answer::Mmio).count();
        let disturbances = self.disturbances[index];
        assert!(count <= 1 + disturbances, "{disturbances} disturbances, and {faults:?}");
        self.disturb(&before, Some(index));
        if self.vcpus[index].done().len() > done {
            self.disturbances[index] = 0;
        }
        self.check();
    }

    /// Does something that excludes walks; `false` while there is one.
    fn host(&mut self, act: impl FnOnce(&GuestMemory)) -> bool {
        if self.memory.table().try_exclusive().is_none() {
            return false;
        }
        let before = self.observe();
        act(self.memory);
        self.disturb(&before, None);
        self.check();
        true
    }

    fn observe(&self) -> Vec<(u64, u64)> {
        let observe = |vcpu: &Vcpu<'_>| {
            let ipa = vcpu.current().map_or(GuestAddress(0), |access| access.ipa);
            (self.memory.table().changes(ipa), self.memory.sequence())
        };
        self.vcpus.iter().map(observe).collect()
    }

    fn disturb(&mut self, before: &[(u64, u64)], by: Option<usize>) {
        let after = self.observe();
        for (index, disturbances) in self.disturbances.iter_mut().enumerate() {
            if by != Some(index) && before[index] != after[index] {
                *disturbances += 1;
            }
        }
    }

    /// No entry exceeds its region, permits more than the memory behind it, leads elsewhere, or is
    /// there for a BAR that does not decode.
    fn check(&self) {
        if !self.look {
            return;
        }
        for leaf in self.memory.table().leaves() {
            let backing = self.memory.backing(leaf.ipa).expect("no entry without a region");
            let Region { ipa, size, perms, kind, .. } = backing.region;
            assert!(leaf.ipa.0 + leaf.size <= ipa.0 + size, "{leaf:?} exceeds {backing:?}");
            assert!(perms.contains(leaf.perms), "{leaf:?} permits more than {backing:?}");
            assert_eq!(leaf.frame, backing.region.frame_of(leaf.ipa), "{leaf:?} {backing:?}");
            if let RegionKind::Bar { decodes, suspended } = kind {
                assert!(decodes && !suspended, "{leaf:?} maps {backing:?}");
            }
        }
    }
}
