use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::Scope;

use nix::sys::signal::SigSet;

use super::super::Kvm;
use super::super::vcpu::KvmVcpu;
use super::KICK;
use crate::fault::Backing;
use crate::hypervisor::{
    GuestAddress, HostMapping, Hypervisor, HypervisorError, PAGE_SIZE, SlotId, SlotMapping, Vcpu,
    VcpuEntry, VcpuExit,
};

const TABLES: u64 = 0x1000;
const CODE: u64 = 0x4000;
const COUNTER: u64 = 0x5000;
const RAM_SIZE: u64 = 0x1_0000;
const BAR: u64 = 0x10_0000;
const BAR_SLOT: SlotId = SlotId(1);

/// inc qword [rdi]; jmp back
const COUNT: &[u8] = &[0x48, 0xff, 0x07, 0xeb, 0xfb];
/// hlt
const HALT: &[u8] = &[0xf4];

/// A machine with `code`, and a BAR that is not mapped; `None` without KVM.
struct Machine {
    kvm: Kvm,
    ram: Arc<HostMapping>,
    bar: Arc<HostMapping>,
}

fn machine(code: &[u8]) -> Option<Machine> {
    let kvm = match Kvm::probe().and_then(|()| Kvm::open()) {
        Ok(kvm) => kvm,
        Err(reason) => {
            println!("kvm skipped: {reason}");
            return None;
        }
    };
    let ram = Arc::new(HostMapping::anonymous(RAM_SIZE).unwrap());
    // Identity tables for 2 MiB.
    for (at, entry) in [(TABLES, 0x2003), (0x2000, 0x3003), (0x3000, 0b1000_0011)] {
        ram.store_u64(at, entry).unwrap();
    }
    ram.write(CODE, code).unwrap();
    kvm.map_slot(SlotId(0), SlotMapping::whole(GuestAddress(0), &ram)).unwrap();
    let bar = Arc::new(HostMapping::anonymous(PAGE_SIZE).unwrap().of_device());
    Some(Machine { kvm, ram, bar })
}

impl Machine {
    fn vcpu(&self, id: u32, rdi: u64) -> KvmVcpu {
        let vcpu = self.kvm.reset_vcpu(id).unwrap();
        let page_table_root = GuestAddress(TABLES);
        vcpu.enter_long_mode(&VcpuEntry { rip: CODE, rsp: 0x8000, rdi, page_table_root }).unwrap();
        vcpu
    }

    fn map(&self) -> Result<(), HypervisorError> {
        self.kvm.map_slot(BAR_SLOT, SlotMapping::whole(GuestAddress(BAR), &self.bar))
    }

    fn unmap(&self) {
        self.kvm.unmap_slot(BAR_SLOT).unwrap();
    }

    fn holds_back(&self) -> bool {
        self.kvm.machine.gate.holds_back(BAR_SLOT)
    }

    fn counter(&self, vcpu: u64) -> u64 {
        self.ram.load_u64(COUNTER + 8 * vcpu).unwrap()
    }

    fn wait_for_progress(&self, vcpu: u64) {
        let before = self.counter(vcpu);
        while self.counter(vcpu) == before {
            std::hint::spin_loop();
        }
    }
}

/// Virtual CPUs on threads of their own, until this is dropped.
struct Running<'scope> {
    stop: Arc<AtomicBool>,
    machine: &'scope Machine,
}

impl<'scope> Running<'scope> {
    fn start(
        scope: &'scope Scope<'scope, '_>,
        machine: &'scope Machine,
        vcpus: Vec<KvmVcpu>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for mut vcpu in vcpus {
            let stop = Arc::clone(&stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    match vcpu.run().unwrap() {
                        VcpuExit::MmioRead { data, .. } => {
                            data.copy_from_slice(&MMIO[..data.len()])
                        }
                        VcpuExit::MmioWrite { .. } | VcpuExit::Interrupted => {}
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        Running { stop, machine }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Each thread has one until it ends, and may have looked at it before it changed.
        while Arc::strong_count(&self.stop) > 1 {
            drop(self.machine.kvm.machine.gate.close());
        }
    }
}

/// What a device answers, and what its memory holds while the guest may see it, and while not.
const MMIO: [u8; 8] = [0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7];
const DIRECT: u64 = 0x1716_1514_1312_1110;
const HIDDEN: u64 = 0xe7e6_e5e4_e3e2_e1e0;

#[test]
fn nobody_runs_while_the_gate_is_closed_and_all_go_on_when_it_opens() {
    let Some(machine) = machine(COUNT) else { return };
    let vcpus = (0..2).map(|id| machine.vcpu(id, COUNTER + 8 * u64::from(id))).collect();
    std::thread::scope(|scope| {
        let running = Running::start(scope, &machine, vcpus);
        for round in 0..200 {
            machine.wait_for_progress(round % 2);
            let closed = machine.kvm.machine.gate.close();
            assert!(machine.kvm.machine.gate.state().inside.is_empty());
            let counters = [machine.counter(0), machine.counter(1)];
            for _ in 0..1000 {
                assert_eq!([machine.counter(0), machine.counter(1)], counters, "round {round}");
            }
            drop(closed);
        }
        drop(running);
    });
}

#[test]
fn a_virtual_cpu_in_an_endless_loop_keeps_no_slot_from_appearing() {
    let Some(machine) = machine(COUNT) else { return };
    let vcpus = vec![machine.vcpu(0, COUNTER)];
    std::thread::scope(|scope| {
        let running = Running::start(scope, &machine, vcpus);
        machine.wait_for_progress(0);
        for _ in 0..500 {
            machine.map().unwrap();
            machine.unmap();
        }
        machine.wait_for_progress(0);
        drop(running);
    });
}

#[test]
fn virtual_cpus_that_never_ran_have_halted_or_are_gone_keep_no_slot_from_appearing() {
    let Some(machine) = machine(HALT) else { return };
    let _never_ran = machine.vcpu(0, 0);
    let mut halted = machine.vcpu(1, 0);
    while !matches!(halted.run().unwrap(), VcpuExit::Halted) {}
    drop(machine.vcpu(2, 0));
    machine.map().unwrap();
    assert!(!machine.holds_back());
}

#[test]
fn virtual_cpus_come_move_and_go_while_slots_appear() {
    let Some(machine) = machine(COUNT) else { return };
    let machine = &machine;
    std::thread::scope(|scope| {
        let done = Arc::new(AtomicBool::new(false));
        let maps = scope.spawn({
            let done = Arc::clone(&done);
            move || {
                while !done.load(Ordering::SeqCst) {
                    machine.map().unwrap();
                    machine.unmap();
                }
            }
        });
        for id in 0..10 {
            let mut vcpu = machine.vcpu(id, COUNTER);
            // Every run that ends was kicked out.
            for _ in 0..3 {
                let thread = scope.spawn(move || {
                    // As in a thread whose parent has run no virtual CPU.
                    SigSet::from(KICK).thread_unblock().unwrap();
                    while !matches!(vcpu.run().unwrap(), VcpuExit::Interrupted) {}
                    vcpu
                });
                vcpu = thread.join().unwrap();
            }
        }
        done.store(true, Ordering::SeqCst);
        maps.join().unwrap();
    });
}

#[test]
fn slots_of_several_threads_appear_all() {
    let Some(machine) = machine(COUNT) else { return };
    let vcpus = vec![machine.vcpu(0, COUNTER)];
    let start = Barrier::new(3);
    std::thread::scope(|scope| {
        let running = Running::start(scope, &machine, vcpus);
        let threads: Vec<_> = (1..=3_u32)
            .map(|id| {
                let (kvm, bar, start) = (&machine.kvm, &machine.bar, &start);
                scope.spawn(move || {
                    start.wait();
                    let address = GuestAddress(BAR + u64::from(id) * PAGE_SIZE);
                    for _ in 0..100 {
                        kvm.map_slot(SlotId(id), SlotMapping::whole(address, bar)).unwrap();
                        kvm.unmap_slot(SlotId(id)).unwrap();
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        machine.wait_for_progress(0);
        drop(running);
    });
}

#[test]
fn every_read_is_answered_by_the_device_or_by_its_memory_as_a_whole() {
    // top: mov rax, [rdi]; cmp rax, r8; je ok; cmp rax, r9; je ok; hlt; ok: inc qword [rsi]; jmp top
    let code = [
        0x48, 0x8b, 0x07, 0x4c, 0x39, 0xc0, 0x74, 6, 0x4c, 0x39, 0xc8, 0x74, 1, 0xf4, 0x48, 0xff,
        0x06, 0xeb, 0xed,
    ];
    let Some(machine) = machine(&code) else { return };
    let vcpus = (0..2).map(|id| {
        let vcpu = machine.vcpu(id, BAR);
        let mut regs = vcpu.fd().get_regs().unwrap();
        (regs.r8, regs.r9) = (u64::from_le_bytes(MMIO), DIRECT);
        regs.rsi = COUNTER + 8 * u64::from(id);
        vcpu.fd().set_regs(&regs).unwrap();
        vcpu
    });
    let vcpus = vcpus.collect();
    std::thread::scope(|scope| {
        let running = Running::start(scope, &machine, vcpus);
        for round in 0..100 {
            machine.bar.store_u64(0, DIRECT).unwrap();
            machine.map().unwrap();
            machine.wait_for_progress(round % 2);
            machine.unmap();
            machine.bar.store_u64(0, HIDDEN).unwrap();
            machine.wait_for_progress(round % 2);
        }
        drop(running);
    });
}

/// Runs to the next exit that is no interruption, and tells about it: (write, address).
fn next_access(vcpu: &mut KvmVcpu) -> Option<(bool, u64)> {
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::MmioRead { address, data } => {
                data.fill(1);
                return Some((false, address.0));
            }
            VcpuExit::MmioWrite { address, .. } => return Some((true, address.0)),
            VcpuExit::Interrupted => {}
            VcpuExit::Halted => return None,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_instruction_that_is_half_way_finishes_without_the_slot() {
    // add dword [rdi], eax; mov dword [rdi + 4], 5; hlt
    let code = [0x01, 0x07, 0xc7, 0x47, 4, 5, 0, 0, 0, 0xf4];
    let Some(machine) = machine(&code) else { return };
    let mut vcpu = machine.vcpu(0, BAR);
    assert_eq!(next_access(&mut vcpu), Some((false, BAR)));
    machine.map().unwrap();
    assert!(machine.holds_back());
    assert!(matches!(machine.map(), Err(HypervisorError::SlotInUse { .. })));
    assert_eq!(next_access(&mut vcpu), Some((true, BAR)), "the other half exits too");
    assert!(!machine.holds_back(), "after the write nothing is looked up any more");
    assert_eq!(next_access(&mut vcpu), None);
    assert_eq!(machine.bar.load_u64(0), Ok(5 << 32), "the next instruction has the slot");
    machine.unmap();
}

#[test]
fn a_string_instruction_finishes_without_the_slot() {
    // mov ecx, 3; rep movsd; hlt, from the BAR to RAM
    let code = [0xb9, 3, 0, 0, 0, 0xf3, 0xa5, 0xf4];
    let Some(machine) = machine(&code) else { return };
    let mut vcpu = machine.vcpu(0, 0x6000);
    let mut regs = vcpu.fd().get_regs().unwrap();
    regs.rsi = BAR;
    vcpu.fd().set_regs(&regs).unwrap();
    assert_eq!(next_access(&mut vcpu), Some((false, BAR)));
    machine.map().unwrap();
    assert_eq!(next_access(&mut vcpu), Some((false, BAR + 4)));
    assert_eq!(next_access(&mut vcpu), Some((false, BAR + 8)));
    assert!(machine.holds_back());
    assert_eq!(next_access(&mut vcpu), None);
    assert!(!machine.holds_back());
}

#[test]
fn a_slot_that_waits_appears_before_the_next_instruction() {
    // mov eax, [rdi]; mov [rdi + 8], eax; hlt
    let Some(machine) = machine(&[0x8b, 0x07, 0x89, 0x47, 8, 0xf4]) else { return };
    let mut vcpu = machine.vcpu(0, BAR);
    assert_eq!(next_access(&mut vcpu), Some((false, BAR)));
    machine.map().unwrap();
    assert_eq!(machine.kvm.machine.backing(GuestAddress(BAR), false), Backing::NoSlot);
    assert_eq!(next_access(&mut vcpu), None);
    assert_eq!(machine.bar.load_u64(8), Ok(0x0101_0101));
}

#[test]
fn a_slot_that_waits_can_be_removed_and_waits_for_nobody_who_is_gone() {
    // mov eax, [rdi]; mov eax, [rdi]; hlt
    let Some(machine) = machine(&[0x8b, 0x07, 0x8b, 0x07, 0xf4]) else { return };
    let mut vcpu = machine.vcpu(0, BAR);
    assert_eq!(next_access(&mut vcpu), Some((false, BAR)));
    machine.map().unwrap();
    machine.unmap();
    assert_eq!(Arc::strong_count(&machine.bar), 1);
    assert_eq!(next_access(&mut vcpu), Some((false, BAR)), "there is no slot");

    machine.map().unwrap();
    assert!(machine.holds_back());
    drop(vcpu);
    assert!(!machine.holds_back());
    machine.unmap();
}

#[test]
fn one_thread_may_run_several_virtual_cpus_while_a_slot_waits() {
    // mov eax, [rdi]; hlt
    let Some(machine) = machine(&[0x8b, 0x07, 0xf4]) else { return };
    let (mut reads, mut other) = (machine.vcpu(0, BAR), machine.vcpu(1, BAR));
    assert_eq!(next_access(&mut reads), Some((false, BAR)));
    machine.map().unwrap();
    assert_eq!(next_access(&mut other), Some((false, BAR)), "trapped until the first has finished");
    assert_eq!(next_access(&mut reads), None);
    assert!(machine.holds_back(), "now the other one is half way");
    assert_eq!(next_access(&mut other), None);
    assert!(!machine.holds_back());
}

#[test]
fn ram_waits_for_nobody() {
    let Some(machine) = machine(&[0x8b, 0x07, 0xf4]) else { return };
    let mut vcpu = machine.vcpu(0, BAR);
    assert_eq!(next_access(&mut vcpu), Some((false, BAR)));
    let ram = Arc::new(HostMapping::anonymous(PAGE_SIZE).unwrap());
    machine
        .kvm
        .map_slot(SlotId(2), SlotMapping::whole(GuestAddress(BAR + PAGE_SIZE), &ram))
        .unwrap();
    assert!(!machine.kvm.machine.gate.holds_back(SlotId(2)));
}
