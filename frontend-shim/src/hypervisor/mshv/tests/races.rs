//! Slots that come and go while virtual CPUs access them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use iced_x86::code_asm::{dword_ptr, eax, rbx};

use super::*;
use crate::hypervisor::mshv::regions::Resolution;

const PAGE: u64 = PAGE_SIZE;

fn frame(page: u64) -> GuestFrame {
    GuestFrame::of(BAR + page * PAGE)
}

#[test]
fn an_access_that_another_virtual_cpu_has_resolved_is_not_mapped_again() {
    for second in [SecondMap::Refused, SecondMap::Accepted] {
        for policy in [MapPolicy::Whole, MapPolicy::Page] {
            let machine = Machine::with(policy, second);
            machine.map_bar();
            let regions = &machine.adapter.regions;
            // Both entered the guest before anything was mapped.
            let entered = regions.now();
            let found = [regions.find(BAR).unwrap(), regions.find(BAR).unwrap()];
            for found in &found {
                let resolution = regions.resolve(found, frame(2), entered).unwrap();
                assert_eq!(resolution, Resolution::Mapped);
            }
            assert_eq!(machine.partition.maps().len(), 2, "RAM, and the BAR once");
            // One that enters now and still can't access it says that it does not work.
            let resolution = regions.resolve(&found[0], frame(2), regions.now()).unwrap();
            assert_eq!(resolution, Resolution::Suspended);
        }
    }
}

#[test]
fn a_slot_that_is_removed_after_the_lookup_is_not_mapped() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    let regions = &machine.adapter.regions;
    let entered = regions.now();
    let found = regions.find(BAR + PAGE).unwrap();
    machine.adapter.unmap_slot(BAR_SLOT).unwrap();
    assert_eq!(regions.resolve(&found, frame(1), entered).unwrap(), Resolution::Changed);
    assert!(machine.mapped_bar_pages().is_empty());
    assert_eq!(machine.partition.ranges(), 1, "RAM");
}

#[test]
fn a_slot_that_took_the_number_of_a_removed_one_is_not_mapped_in_its_place() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    let regions = &machine.adapter.regions;
    let entered = regions.now();
    let found = regions.find(BAR).unwrap();
    machine.adapter.unmap_slot(BAR_SLOT).unwrap();
    let other = device_memory(&machine.partition);
    let mapping = SlotMapping::whole(GuestAddress(BAR), &other);
    machine.adapter.map_slot(BAR_SLOT, mapping).unwrap();
    assert_eq!(regions.resolve(&found, frame(0), entered).unwrap(), Resolution::Changed);
    assert_eq!(machine.partition.ranges(), 1, "RAM");

    // The next access finds what is there now.
    other.store_u32(0, 0x0bed).unwrap();
    let mut vcpu = machine.vcpu(|a| a.mov(eax, dword_ptr(rbx)).unwrap());
    assert_eq!(run_to_halt(&mut vcpu), []);
    assert_eq!(machine.partition.registers().general[0], 0x0bed);
}

#[test]
fn a_slot_that_is_removed_during_the_hypercall_leaves_nothing_mapped() {
    for policy in [MapPolicy::Whole, MapPolicy::Page] {
        let machine = Machine::new(policy);
        machine.map_bar();
        let (begin, begun) = mpsc::channel();
        let remover = {
            let adapter = Arc::clone(&machine.adapter);
            thread::spawn(move || {
                begun.recv().unwrap();
                adapter.unmap_slot(BAR_SLOT).unwrap();
            })
        };
        // From within the call: the slot is looked up, and the lock for changes is held.
        machine.partition.on_next_map(move || begin.send(()).unwrap());
        let mut vcpu = machine.vcpu(|a| a.mov(eax, dword_ptr(rbx)).unwrap());
        run_to_halt(&mut vcpu);
        assert!(!machine.partition.has_hook(), "the BAR was mapped");
        remover.join().unwrap();
        assert!(machine.mapped_bar_pages().is_empty(), "{policy:?}");
        assert_eq!(machine.partition.ranges(), 1, "RAM");
        assert!(machine.adapter.regions.find(BAR).is_none());
    }
}

#[test]
fn lookups_do_not_wait_for_a_hypercall() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    let adapter = Arc::clone(&machine.adapter);
    let (found, was_found) = mpsc::channel();
    machine.partition.on_next_map(move || {
        // The lock for changes is held by this very thread: waiting for it would never end.
        found.send(adapter.regions.find(BAR).is_some()).unwrap();
    });
    run_to_halt(&mut machine.vcpu(|a| a.mov(eax, dword_ptr(rbx)).unwrap()));
    assert_eq!(was_found.try_recv(), Ok(true));
}

#[test]
fn removing_a_slot_waits_for_accesses_that_are_made_here() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    let removed = AtomicBool::new(false);
    thread::scope(|scope| {
        let view = machine.adapter.regions.view();
        scope.spawn(|| {
            machine.adapter.unmap_slot(BAR_SLOT).unwrap();
            removed.store(true, Ordering::SeqCst);
        });
        while machine.adapter.regions.find(BAR).is_some() {
            thread::yield_now();
        }
        // Now nothing but the view is in its way. Many chances to be wrong, none to be late.
        for _ in 0..10_000 {
            thread::yield_now();
            assert!(!removed.load(Ordering::SeqCst));
        }
        assert!(view.ram(GuestAddress(BAR), true).is_some());
    });
    assert!(removed.load(Ordering::SeqCst));
    assert!(machine.adapter.regions.view().ram(GuestAddress(BAR), true).is_none());
}

#[test]
fn virtual_cpus_and_slots_that_come_and_go_agree_in_the_end() {
    const ROUNDS: u32 = 200;
    for policy in [MapPolicy::Whole, MapPolicy::Page] {
        let machine = Machine::new(policy);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                let mut vcpu = machine.vcpu(|a| {
                    let mut again = a.create_label();
                    a.set_label(&mut again).unwrap();
                    for page in 0..BAR_PAGES {
                        a.add(dword_ptr(rbx + page * PAGE), 1).unwrap();
                    }
                    a.jmp(again).unwrap();
                });
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        match run(&mut vcpu) {
                            Seen::Read(..) | Seen::Write(..) => {}
                            Seen::Other(exit) if exit == "interrupted" => {}
                            other => panic!("{other:?}"),
                        }
                    }
                });
            }
            for round in 0..ROUNDS {
                machine.map_bar();
                if round % 2 == 0 {
                    thread::yield_now();
                }
                machine.adapter.unmap_slot(BAR_SLOT).unwrap();
                // Nothing reaches the memory any more, from wherever.
                machine.bar.store_u32(0, 0xdead_beef).unwrap();
                assert!(machine.mapped_bar_pages().is_empty());
                assert_eq!(machine.bar.load_u32(0), Ok(0xdead_beef));
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(machine.partition.ranges(), 1, "RAM");
    }
}
