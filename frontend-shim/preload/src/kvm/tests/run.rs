use std::sync::atomic::Ordering;
use std::time::Instant;

use kvm_bindings::{
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_MEMORY_EXIT_FLAG_PRIVATE,
};
use rustix::io::Errno;

use super::kernel::{Do, Done};
use super::world::*;
use crate::device::{BarAddress, BarMapping, Decode, DeviceId};
use crate::kvm::abi;
use crate::kvm::slots::Region;
use crate::status::Count;
use crate::system::System as _;

const ONES: u32 = u32::MAX;

fn in_bar(offset: u64) -> BarAddress {
    BarAddress { device: DEVICE, bar: 2, offset: 0x10000 + offset }
}

fn runs(world: &World) -> usize {
    let calls = &world.around.kernel.state().calls;
    calls.iter().filter(|(_, request)| *request == abi::RUN).count()
}

#[test]
fn an_exit_that_is_the_vmms_costs_no_other_system_call() {
    let world = World::new();
    world.around.kernel.state().calls.clear();
    assert_eq!(world.does(&[Do::Port]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_IO);
    assert_eq!(world.does(&[Do::Read(0xd000_0000)]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
    assert_eq!(world.around.kernel.state().calls, [(world.vcpu, abi::RUN); 2]);
}

#[test]
fn an_access_to_a_bar_that_is_off_is_an_unsupported_request_that_the_vmm_never_sees() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR + 0x10), Do::Write(BAR + 0x20, 5), Do::Port]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_IO);
    assert_eq!(world.done(), [Done::Read(ONES), Done::Written]);
    assert!(!world.kernel_has(BAR_SLOT));
    let completed = &world.around.devices().completed;
    let written = (in_bar(0x20), true, vec![5, 0, 0, 0]);
    assert_eq!(*completed, [(in_bar(0x10), false, vec![0xff; 4]), written]);
    let counts = [Count::FaultsLocated, Count::SlotsSuspended, Count::SlotsRestored];
    assert_eq!(counts.map(|count| world.count(count)), [1, 1, 0]);
}

#[test]
fn a_slot_comes_back_when_the_bar_decodes_again() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    world.decode(Decode::On);
    // The exit that shows it is the VMM's: it has the mapping.
    assert_eq!(world.does(&[Do::Read(BAR + 4), Do::Read(BAR + 8), Do::Port]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
    assert!(world.kernel_has(BAR_SLOT));
    assert_eq!(world.around.kernel.slots(world.vm)[1], bar());
    assert_eq!(world.run(), Ok(0));
    assert_eq!(world.done()[2], Done::Live);
    assert_eq!(world.count(Count::SlotsRestored), 1);
}

#[test]
fn all_parts_of_a_bar_are_suspended_together_and_nothing_else() {
    let world = World::new();
    let smm = Region { slot: BAR_SLOT | 1 << 16, ..bar() };
    world.set(smm).unwrap();
    let other = Region { slot: 8, guest: BAR + 0x10_0000, host: BAR_HOST + 0x10_0000, ..bar() };
    world.around.devices().mappings.push(BarMapping {
        device: DeviceId(4),
        bar: 0,
        start: usize::try_from(other.host).unwrap(),
        len: usize::try_from(other.size).unwrap(),
        offset: 0,
    });
    world.around.devices().decode.insert((4, 0), Decode::Off);
    world.set(other).unwrap();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    let has = |slot: u32| world.kernel_has(slot);
    assert_eq!((has(BAR_SLOT), has(smm.slot), has(8), has(0)), (false, false, true, true));
}

#[test]
fn a_suspended_slot_counts_in_its_own_address_space_only() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    world.around.kernel.state().vcpus.get_mut(&world.vcpu).unwrap().in_smm = true;
    assert_eq!(world.does(&[Do::Read(BAR)]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
}

#[test]
fn an_exit_that_reaches_out_of_a_suspended_slot_is_the_vmms() {
    let world = World::new();
    world.decode(Decode::Off);
    let last = BAR + BAR_SIZE - 4;
    assert_eq!(world.does(&[Do::Read(last), Do::Read(last + 2)]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
    assert_eq!(world.around.devices().completed.len(), 1);
}

#[test]
fn a_fault_that_kvm_reports_is_located_by_its_report() {
    let world = World::new();
    world.around.kernel.state().registers_unreadable = true;
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Reported { flags: 0, address: BAR }, Do::Port]), Ok(0));
    assert!(!world.kernel_has(BAR_SLOT));
}

#[test]
fn a_report_that_is_not_about_a_bar_goes_to_the_vmm_untouched() {
    let private = u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE);
    for (flags, address) in [(private, BAR), (1, BAR), (0, RAM)] {
        let world = World::new();
        world.decode(Decode::Off);
        assert_eq!(world.does(&[Do::Reported { flags, address }]), Err(Errno::FAULT));
        assert_eq!(world.exit_reason(), KVM_EXIT_MEMORY_FAULT);
        let words = world.around.kernel.run_words(world.vcpu);
        assert_eq!(words[4..7], [flags, address, 4096]);
        assert_eq!(runs(&world), 1);
        assert!(world.kernel_has(BAR_SLOT));
    }
}

#[test]
fn a_fault_in_ram_goes_to_the_vmm() {
    let world = World::new();
    world.decode(Decode::Off);
    let ram = world.around.kernel.slots(world.vm)[0].host;
    world.around.kernel.state().refusing.push(ram + PAGE..ram + 2 * PAGE);
    assert_eq!(world.does(&[Do::Read(PAGE)]), Err(Errno::FAULT));
    assert_eq!((world.exit_reason(), runs(&world)), (0, 1), "at once");
    assert!(world.kernel_has(BAR_SLOT));
}

#[test]
fn a_fault_of_a_vm_without_bars_is_none_of_our_business() {
    let world = World::empty();
    world.set(ram()).unwrap();
    let ram = world.around.kernel.slots(world.vm)[0].host;
    world.around.kernel.state().refusing.push(ram..ram + PAGE);
    world.around.kernel.state().calls.clear();
    assert_eq!(world.does(&[Do::Read(0)]), Err(Errno::FAULT));
    assert_eq!(world.around.kernel.state().calls, [(world.vcpu, abi::RUN)]);
}

#[test]
fn a_fault_without_a_place_suspends_the_bars_that_are_off() {
    let world = World::new();
    let on = Region { slot: 8, guest: BAR + 0x10_0000, host: BAR_HOST + 0x10_0000, ..bar() };
    world.around.devices().mappings.push(BarMapping {
        device: DeviceId(4),
        bar: 0,
        start: usize::try_from(on.host).unwrap(),
        len: usize::try_from(on.size).unwrap(),
        offset: 0,
    });
    world.set(on).unwrap();
    world.decode(Decode::Off);
    world.around.kernel.state().registers_unreadable = true;
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    assert_eq!(world.done(), [Done::Read(ONES)]);
    assert!(world.kernel_has(8));
}

#[test]
fn memory_that_refuses_although_the_bar_decodes_ends_in_the_vmms_hands() {
    for decode in [Decode::On, Decode::Unknown] {
        let world = World::new();
        world.decode(Decode::Off);
        world.around.devices().decode.insert((DEVICE.0, 2), decode);
        assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::FAULT));
        assert!(world.kernel_has(BAR_SLOT));
        assert_eq!(world.count(Count::FailOpens), 1);
        assert_eq!(runs(&world), 65, "bounded");
    }
}

#[test]
fn faults_with_signals_between_them_are_bounded_too() {
    let world = World::new();
    world.decode(Decode::Off);
    world.around.devices().decode.insert((DEVICE.0, 2), Decode::On);
    world.around.kernel.state().signals = Some((8, 0));
    assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::INTR));
    let signals = (1..100).find(|_| world.run() == Err(Errno::FAULT));
    assert_eq!(signals, Some(8));
}

#[test]
fn faults_that_were_over_when_they_were_looked_at_are_no_standstill_while_the_guest_toggles() {
    let world = World::new();
    world.decode(Decode::Off);
    world.around.devices().decode.insert((DEVICE.0, 2), Decode::On);
    world.around.kernel.state().signals = Some((8, 0));
    assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::INTR));
    for _ in 0..20 {
        world.vms.losses.add(DEVICE);
        assert_eq!(world.run(), Err(Errno::INTR));
    }
    assert_eq!(world.count(Count::FailOpens), 0);
}

#[test]
fn another_exit_in_between_is_progress() {
    let world = World::new();
    world.decode(Decode::Off);
    world.around.devices().decode.insert((DEVICE.0, 2), Decode::On);
    world.around.kernel.state().signals = Some((60, 0));
    for _ in 0..3 {
        assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::INTR));
        world.around.kernel.state().vcpus.get_mut(&world.vcpu).unwrap().todo.clear();
        assert_eq!(world.does(&[Do::Port]), Ok(0));
    }
}

#[test]
fn a_signal_is_told_to_the_vmm_with_the_exit_completed() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Fail(Errno::INTR)]), Err(Errno::INTR));
    assert_eq!(world.done(), [Done::Read(ONES)]);
}

/// A VMM that looks at a flag between its calls, and how many of these there are.
fn calls_until_all_is_done(world: &World, reads: usize) -> usize {
    world.decode(Decode::Off);
    let todo: Vec<Do> = vec![Do::Read(BAR); reads];
    let mut calls = 1;
    let mut answer = world.does(&todo);
    while world.done().len() < reads {
        assert_eq!((answer, world.exit_reason()), (Err(Errno::INTR), KVM_EXIT_INTR));
        answer = world.run();
        calls += 1;
    }
    assert_eq!(world.done(), vec![Done::Read(ONES); reads]);
    assert_eq!(world.around.devices().completed.len(), reads);
    calls
}

#[test]
fn a_guest_that_does_nothing_else_lets_the_vmm_look_up_between_two_instructions() {
    let world = World::new();
    let calls = calls_until_all_is_done(&world, 1000);
    assert!(calls > 1000 / 128, "{calls}");
    // What the VMM sees is the state after the access, as after a signal.
    let out = world.around.kernel.state().vcpus[&world.vcpu].out;
    assert!(out + 1 >= calls, "{out}");
    assert_eq!(world.around.kernel.run_words(world.vcpu)[0], 0);
    assert_eq!(world.does(&[Do::Port]), Ok(0));
}

#[test]
fn a_vmm_whose_kicks_may_get_lost_looks_up_after_each_access() {
    let world = World::new();
    world.vms.keeps_kicks.store(false, Ordering::Relaxed);
    assert_eq!(calls_until_all_is_done(&world, 10), 10);
}

#[test]
fn a_vmm_that_was_seen_to_ask_for_the_exit_itself_keeps_its_kicks() {
    let world = World::new();
    world.vms.keeps_kicks.store(false, Ordering::Relaxed);
    let (_, vcpu) = world.vms.vcpus.iter().next().unwrap();
    assert!(vcpu.run().unwrap().ask_to_leave());
    assert_eq!(world.run(), Err(Errno::INTR));
    assert!(vcpu.run().unwrap().is_asked_to_leave(), "it is the VMM's to take back");
    vcpu.run().unwrap().ask_no_more();
    assert_eq!(calls_until_all_is_done(&world, 10), 1);
}

#[test]
fn an_instruction_that_reads_without_end_lets_the_vmm_look_up_too() {
    let world = World::new();
    world.around.kernel.state().vcpus.get_mut(&world.vcpu).unwrap().repeats = true;
    let calls = calls_until_all_is_done(&world, 1000);
    assert!(calls > 1000 / 256, "{calls}");
    assert_eq!(world.around.kernel.run_words(world.vcpu)[0], 0);
}

#[test]
fn a_slot_that_the_kernel_does_not_delete_leaves_the_fault_to_the_vmm() {
    let world = World::new();
    world.decode(Decode::Off);
    world.around.kernel.state().next_slot_error = Some(Errno::NOMEM);
    assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::FAULT));
    assert!(world.kernel_has(BAR_SLOT));
    assert_eq!(world.count(Count::FailOpens), 1);
    // And the next one may go better.
    assert_eq!(world.does(&[Do::Port]), Ok(0));
}

#[test]
fn a_server_that_has_to_be_asked_is_asked_before_an_exit_in_a_suspended_slot() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    // It said something else meanwhile, which may be old.
    world.around.devices().decode.insert((DEVICE.0, 2), Decode::Unknown);
    world.around.devices().after_a_look = Some(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    assert_eq!(world.done(), [Done::Read(ONES); 2]);
}

#[test]
fn a_slot_that_the_vmm_has_changed_since_is_not_given_back() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    let vm = world.vms.vms.get(world.number).unwrap();
    vm.restore(&world.around, world.number, &Region { guest: bar().guest + PAGE, ..bar() });
    assert!(!world.kernel_has(BAR_SLOT));
    vm.restore(&world.around, world.number, &bar());
    assert!(world.kernel_has(BAR_SLOT));
}

#[test]
fn a_vmm_that_knows_of_nothing_there_leaves_all_ones_in_an_exit_of_a_bar_that_decodes() {
    let world = World::new();
    world.set(Region { size: 0, ..bar() }).unwrap();
    world.around.devices().windows.push((BAR..BAR + BAR_SIZE, in_bar(0)));
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
    assert_eq!(world.run(), Ok(0));
    assert_eq!(world.done(), [Done::Read(ONES)]);
}

#[test]
fn a_slot_that_the_kernel_does_not_take_back_stays_suspended_and_the_vmm_completes() {
    let world = World::new();
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    world.decode(Decode::On);
    world.around.kernel.state().next_slot_error = Some(Errno::NOMEM);
    assert_eq!(world.does(&[Do::Read(BAR)]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
    assert!(!world.kernel_has(BAR_SLOT));
    assert_eq!(world.does(&[Do::Read(BAR)]), Ok(0));
    assert!(world.kernel_has(BAR_SLOT));
}

#[test]
fn an_exit_in_the_window_of_a_bar_without_a_slot_is_an_unsupported_request_while_it_is_off() {
    let world = World::new();
    world.set(Region { size: 0, ..bar() }).unwrap();
    world.around.devices().windows.push((BAR..BAR + BAR_SIZE, in_bar(0)));
    for (decode, reason, done) in [
        (Decode::Off, KVM_EXIT_IO, 1),
        (Decode::On, KVM_EXIT_MMIO, 1),
        (Decode::Unknown, KVM_EXIT_MMIO, 1),
    ] {
        world.around.devices().decode.insert((DEVICE.0, 2), decode);
        world.around.kernel.state().vcpus.get_mut(&world.vcpu).unwrap().todo.clear();
        assert_eq!(world.does(&[Do::Read(BAR + 8), Do::Port]), Ok(0));
        assert_eq!((world.exit_reason(), world.around.devices().completed.len()), (reason, done));
    }
}

#[test]
fn an_exit_while_the_vmm_still_puts_the_bar_back_is_an_unsupported_request() {
    let world = World::new();
    world.set(Region { size: 0, ..bar() }).unwrap();
    world.around.devices().windows.push((BAR..BAR + BAR_SIZE, in_bar(0)));
    std::thread::scope(|scope| {
        let writes = || world.vms.arrivals.begin(DEVICE, Instant::now());
        scope.spawn(writes).join().unwrap();
    });
    // Not forwarded: the backend would answer, and it is not to be asked yet.
    assert_eq!(world.does(&[Do::Read(BAR), Do::Write(BAR, 1), Do::Port]), Ok(0));
    assert_eq!(world.done(), [Done::Read(ONES), Done::Written]);
    assert!(world.around.devices().completed.is_empty());
    assert_eq!((world.count(Count::UrReads), world.count(Count::UrWrites)), (1, 1));
}

#[test]
fn a_slot_that_the_vmm_deletes_while_the_device_is_asked_is_none_until_it_has_put_the_bar_back() {
    let world: &'static World = Box::leak(Box::new(World::new()));
    world.decode(Decode::Off);
    assert_eq!(world.does(&[Do::Write(BAR, 0), Do::Port]), Ok(0));
    world.decode(Decode::On);
    world.around.devices().after_decode = Some(Box::new(|| {
        world.vms.vms.get(world.number).unwrap().slots().note(Region { size: 0, ..bar() });
        let writes = || world.vms.arrivals.begin(DEVICE, Instant::now());
        std::thread::spawn(writes).join().unwrap();
    }));
    assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_IO);
    assert_eq!(world.done().last(), Some(&Done::Read(ONES)));
}

#[test]
fn a_read_that_the_vmm_lost_on_its_way_is_an_unsupported_request() {
    for (lost, off, value, read) in
        [(true, false, 0, ONES), (false, true, 0, ONES), (false, false, 0, 0), (true, true, 5, 5)]
    {
        let world = World::new();
        world.set(Region { size: 0, ..bar() }).unwrap();
        world.around.devices().windows.push((BAR..BAR + BAR_SIZE, in_bar(0)));
        assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
        // The VMM finds nothing there, or a value.
        let (_, vcpu) = world.vms.vcpus.iter().next().unwrap();
        vcpu.run().unwrap().set_mmio_data([value, 0, 0, 0, 9, 9, 9, 9]);
        if lost {
            world.vms.losses.add(DEVICE);
        }
        world.decode(if off { Decode::Off } else { Decode::On });
        assert_eq!(world.run(), Ok(0));
        assert_eq!(world.done(), [Done::Read(read)]);
        assert_eq!(world.count(Count::UrReads), u64::from(read == ONES));
    }
}

#[test]
fn a_read_that_was_lost_while_the_device_was_asked_is_an_unsupported_request() {
    for suspended in [false, true] {
        let world: &'static World = Box::leak(Box::new(World::new()));
        if suspended {
            world.decode(Decode::Off);
            assert_eq!(world.does(&[Do::Write(BAR, 0), Do::Port]), Ok(0));
            world.decode(Decode::On);
        } else {
            world.set(Region { size: 0, ..bar() }).unwrap();
            world.around.devices().windows.push((BAR..BAR + BAR_SIZE, in_bar(0)));
        }
        // Decode goes, and comes back before the VMM has answered.
        let lost = || world.vms.losses.add(DEVICE);
        world.around.devices().after_decode = Some(Box::new(lost));
        assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
        assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
        let (_, vcpu) = world.vms.vcpus.iter().next().unwrap();
        vcpu.run().unwrap().set_mmio_data([0; 8]);
        assert_eq!(world.run(), Ok(0));
        assert_eq!(world.done().last(), Some(&Done::Read(ONES)));
    }
}

#[test]
fn the_thread_that_wrote_ends_it_by_running_its_own_virtual_cpu() {
    let world = World::new();
    world.set(Region { size: 0, ..bar() }).unwrap();
    world.around.devices().windows.push((BAR..BAR + BAR_SIZE, in_bar(0)));
    world.vms.arrivals.begin(DEVICE, Instant::now());
    assert_eq!(world.does(&[Do::Read(BAR)]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
}

#[test]
fn without_a_run_structure_everything_is_the_vmms() {
    let world = World::new();
    world.decode(Decode::Off);
    let (_, vcpu) = world.vms.vcpus.iter().next().unwrap();
    vcpu.mapped(0, 0);
    assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::FAULT));
    vcpu.mapped(world.around.kernel.run_area(world.vcpu), 12288);
    assert_eq!(world.does(&[Do::Port]), Ok(0));
    assert_eq!(world.done(), [Done::Read(ONES)]);
    assert_eq!(vcpu.vm.load(Ordering::Relaxed), world.number);
}

#[test]
fn a_call_whose_virtual_cpu_is_closed_meanwhile_does_not_look_at_the_next_one() {
    for again in [false, true] {
        let world: &'static World = Box::leak(Box::new(World::new()));
        world.decode(Decode::Off);
        let other = world.around.kernel.ioctl(world.vm, abi::CREATE_VCPU.into(), 0).unwrap();
        let area = world.around.kernel.run_area(other);
        world.around.kernel.meanwhile(move || {
            world.vms.vcpus.get(world.vcpu_number).unwrap().close();
            if again {
                let (number, entry) = world.vms.vcpus.take().unwrap();
                entry.begin(world.number);
                entry.mapped(area, 12288);
                assert_eq!(number, world.vcpu_number);
            }
        });
        world.around.kernel.state().calls.clear();
        assert_eq!(world.does(&[Do::Read(BAR)]), Err(Errno::FAULT));
        let calls = &world.around.kernel.state().calls;
        assert_eq!(*calls, [(world.vcpu, abi::RUN)], "its number may be another's");
    }
}

#[test]
fn an_exit_in_which_there_is_a_bug_of_ours_is_the_vmms() {
    let world = World::new();
    world.around.devices().window_panics = true;
    assert_eq!(world.does(&[Do::Read(0xfd00_0000)]), Ok(0));
    assert_eq!(world.exit_reason(), KVM_EXIT_MMIO);
}
