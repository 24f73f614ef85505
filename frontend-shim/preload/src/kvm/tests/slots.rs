use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use proptest::prelude::*;
use rustix::io::Errno;

use super::kernel::{DEV_KVM, Do, Kernel};
use super::world::*;
use crate::device::{BarMapping, Decode};
use crate::kvm::abi;
use crate::kvm::slots::{Place, Region, Slot};
use crate::system::{Answer, System as _};

/// What a VMM does, and what happens behind its back.
#[derive(Clone, Debug)]
enum Step {
    Set(Region),
    /// The slot goes, if the kernel has it.
    Suspend(u32),
    /// It comes back, if it was gone.
    Restore(u32),
    Log(u32),
    Clear {
        slot: u32,
        first: u64,
        count: u32,
    },
}

/// Few numbers and addresses, so that steps meet.
fn region() -> impl Strategy<Value = Region> {
    let slot = prop_oneof![0u32..4, Just(1 << 16), Just(1 << 16 | 1), Just(2 << 16), Just(600)];
    let flags = prop_oneof![
        4 => Just(0),
        2 => Just(KVM_MEM_LOG_DIRTY_PAGES),
        1 => Just(KVM_MEM_READONLY),
        1 => Just(1 << 7),
    ];
    let guest = prop_oneof![8 => (0u64..6).prop_map(|page| page * PAGE), 1 => Just(100)];
    let size =
        prop_oneof![4 => Just(0), 8 => (1u64..4).prop_map(|pages| pages * PAGE), 1 => Just(5)];
    let host = prop_oneof![
        8 => (0u64..3).prop_map(|page| BAR_HOST + page * PAGE),
        1 => Just(BAR_HOST + 1),
        1 => Just(1 << 48),
    ];
    (slot, flags, guest, size, host).prop_map(|(slot, flags, guest, size, host)| Region {
        slot,
        flags,
        guest,
        size,
        host,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let slot = prop_oneof![0u32..4, Just(1 << 16), Just(1 << 16 | 1)];
    prop_oneof![
        6 => region().prop_map(Step::Set),
        4 => slot.clone().prop_map(Step::Suspend),
        2 => slot.clone().prop_map(Step::Restore),
        1 => slot.clone().prop_map(Step::Log),
        1 => (slot, prop_oneof![Just(0u64), Just(1), Just(64)], 0u32..5)
            .prop_map(|(slot, first, count)| Step::Clear { slot, first, count }),
    ]
}

fn device_world() -> World {
    let world = World::empty();
    world.around.devices().mappings.push(BarMapping {
        device: DEVICE,
        bar: 2,
        start: usize::try_from(BAR_HOST).unwrap(),
        len: 16 << 12,
        offset: 0,
    });
    world
}

fn believed(world: &World, slot: u32) -> Option<Slot> {
    world.vms.vms.get(world.number).unwrap().slots().get(slot).copied()
}

fn suspend(world: &World, slot: u32) {
    let vm = world.vms.vms.get(world.number).unwrap();
    if let Some(slot) = believed(world, slot) {
        let bar = world.around.devices().mappings[0];
        vm.suspend(&world.around, world.number, &[(slot, bar)]).unwrap();
    }
}

fn restore(world: &World, slot: u32) {
    let vm = world.vms.vms.get(world.number).unwrap();
    if let Some(Slot { region, .. }) = believed(world, slot) {
        vm.restore(&world.around, world.number, &region);
    }
}

fn dirty_log(world: &World, slot: u32) -> (Answer<i32>, u64) {
    let bitmap = [0x5555u64];
    let log = [u64::from(slot), bitmap.as_ptr().expose_provenance() as u64];
    let mut slots = world.vms.vms.get(world.number).unwrap().slots();
    let argument = log.as_ptr().expose_provenance();
    let answer = slots.dirty_log(&world.around.kernel, world.vm, argument);
    (answer, std::hint::black_box(&bitmap)[0])
}

fn clear_dirty_log(world: &World, slot: u32, first: u64, count: u32) -> Answer<i32> {
    let clear = [u64::from(slot) | u64::from(count) << 32, first, 0];
    let slots = world.vms.vms.get(world.number).unwrap().slots();
    slots.clear_dirty_log(&world.around.kernel, world.vm, clear.as_ptr().expose_provenance())
}

proptest! {
    #[test]
    fn the_vmm_can_not_tell_whether_slots_were_suspended(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let world = device_world();
        let direct = Kernel::default();
        let vm = direct.ioctl(DEV_KVM, abi::CREATE_VM.into(), 0).unwrap();
        for step in &steps {
            match step {
                Step::Set(region) => {
                    let words = words(region);
                    let argument = words.as_ptr().expose_provenance();
                    let alone = direct.ioctl(vm, abi::SET_USER_MEMORY_REGION.into(), argument);
                    prop_assert_eq!(world.set(*region), alone, "{:?}", region);
                }
                Step::Suspend(slot) => suspend(&world, *slot),
                Step::Restore(slot) => restore(&world, *slot),
                Step::Log(slot) => {
                    let bitmap = [0u64];
                    let log = [u64::from(*slot), bitmap.as_ptr().expose_provenance() as u64];
                    let argument = log.as_ptr().expose_provenance();
                    let alone = direct.ioctl(vm, abi::GET_DIRTY_LOG.into(), argument);
                    prop_assert_eq!(dirty_log(&world, *slot).0, alone);
                }
                Step::Clear { slot, first, count } => {
                    let clear = [u64::from(*slot) | u64::from(*count) << 32, *first, 0];
                    let argument = clear.as_ptr().expose_provenance();
                    let alone = direct.ioctl(vm, abi::CLEAR_DIRTY_LOG.into(), argument);
                    // The kernel looks at the alignment first, whether or not there is a slot.
                    prop_assert_eq!(clear_dirty_log(&world, *slot, *first, *count), alone);
                }
            }
            let slots = world.vms.vms.get(world.number).unwrap().slots();
            let belief: Vec<Region> = slots.iter().map(|slot| slot.region).collect();
            prop_assert_eq!(&belief, &direct.slots(vm));
            let installed = slots.iter().filter(|slot| slot.is_installed());
            let installed: Vec<Region> = installed.map(|slot| slot.region).collect();
            drop(slots);
            prop_assert_eq!(installed, world.around.kernel.slots(world.vm));
        }
        for slot in direct.slots(vm) {
            restore(&world, slot.slot);
        }
        prop_assert_eq!(world.around.kernel.slots(world.vm), direct.slots(vm));
    }
}

#[test]
fn deleting_a_suspended_slot_asks_nothing_of_the_kernel() {
    let world = World::new();
    suspend(&world, BAR_SLOT);
    world.around.kernel.state().calls.clear();
    assert_eq!(world.set(Region { size: 0, ..bar() }), Ok(0));
    assert_eq!(world.set(Region { size: 0, ..bar() }), Err(Errno::INVAL));
    assert_eq!(world.around.kernel.state().calls.len(), 1);
    assert!(believed(&world, BAR_SLOT).is_none());
}

#[test]
fn a_slot_that_became_another_is_not_suspended_in_its_place() {
    let world = World::new();
    let before = believed(&world, BAR_SLOT).unwrap();
    world.set(Region { size: 0, ..bar() }).unwrap();
    let ram = Region { guest: 0x10_0000, size: PAGE, host: BAR_HOST / 2, ..bar() };
    world.set(ram).unwrap();
    let vm = world.vms.vms.get(world.number).unwrap();
    let bar = world.around.devices().mappings[0];
    assert_eq!(vm.suspend(&world.around, world.number, &[(before, bar)]), Some(0));
    assert!(world.kernel_has(BAR_SLOT));
}

#[test]
fn a_slot_that_is_in_the_way_is_back_even_if_the_kernel_refuses_then() {
    let world = World::new();
    suspend(&world, BAR_SLOT);
    let vm = world.vms.vms.get(world.number).unwrap();
    assert!(vm.may_have_suspended(BAR));
    assert_eq!(world.set(Region { slot: 9, ..bar() }), Err(Errno::EXIST));
    assert!(world.kernel_has(BAR_SLOT));
    assert!(!vm.may_have_suspended(BAR));
}

#[test]
fn a_slot_of_confidential_memory_is_never_suspended() {
    let world = World::new();
    let confidential = Slot {
        region: Region { flags: 1 << 2, ..bar() },
        place: Place::Installed,
        log_lost: false,
    };
    assert!(!confidential.region.is_plain());
    // The kernel of these tests knows no such memory; what it refuses is not believed.
    let region = Region { slot: 9, guest: 0x8000_0000, ..confidential.region };
    assert_eq!(world.set(region), Err(Errno::INVAL));
    assert!(believed(&world, 9).is_none());
}

#[test]
fn an_argument_that_can_not_be_read_is_the_kernels_to_refuse() {
    let world = World::new();
    let vm = world.vms.vms.get(world.number).unwrap();
    let request = (world.vm, abi::SET_USER_MEMORY_REGION.into(), 8);
    assert_eq!(vm.set_region(&world.around, world.number, request), Err(Errno::FAULT));
}

#[test]
fn the_log_of_a_suspended_slot_is_empty_after_one_that_has_everything() {
    let world = World::new();
    world.set(Region { flags: KVM_MEM_LOG_DIRTY_PAGES, ..bar() }).unwrap();
    world.around.kernel.dirty(world.vm, BAR_SLOT, 2);
    assert_eq!(dirty_log(&world, BAR_SLOT), (Ok(0), 1 << 2));
    suspend(&world, BAR_SLOT);
    // Which pages were written before is not known any more.
    // A bit for each of its pages, and none behind them.
    assert_eq!(dirty_log(&world, BAR_SLOT), (Ok(0), 0xf));
    assert_eq!(dirty_log(&world, BAR_SLOT), (Ok(0), 0));
    assert_eq!(clear_dirty_log(&world, BAR_SLOT, 0, 4), Ok(0));
    assert_eq!(clear_dirty_log(&world, BAR_SLOT, 0, 5), Err(Errno::INVAL));
    assert_eq!(clear_dirty_log(&world, BAR_SLOT, 64, 0), Err(Errno::INVAL));
}

#[test]
fn what_was_lost_of_a_log_is_told_after_the_slot_is_back() {
    let world = World::new();
    world.set(Region { flags: KVM_MEM_LOG_DIRTY_PAGES, ..bar() }).unwrap();
    world.around.kernel.dirty(world.vm, BAR_SLOT, 2);
    suspend(&world, BAR_SLOT);
    restore(&world, BAR_SLOT);
    assert_eq!(dirty_log(&world, BAR_SLOT), (Ok(0), 0xf));
    assert_eq!(dirty_log(&world, BAR_SLOT), (Ok(0), 0));
}

#[test]
fn a_device_belongs_to_the_vm_that_has_a_slot_of_it() {
    let world = World::new();
    let belonging = &world.around.devices().belonging;
    assert_eq!(belonging.iter().collect::<Vec<_>>(), [&(DEVICE.0, world.number)]);
}

#[test]
fn suspending_and_deleting_at_once_leaves_both_sides_agreed() {
    let world = World::new();
    world.decode(Decode::Off);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Off: it is suspended if the VMM has it. Otherwise nobody is there.
                assert_eq!(world.does(&[Do::Read(BAR), Do::Port]), Ok(0));
                if world.exit_reason() == kvm_bindings::KVM_EXIT_MMIO {
                    assert_eq!(world.run(), Ok(0));
                }
            }
        });
        for _ in 0..2000 {
            assert_eq!(world.set(Region { size: 0, ..bar() }), Ok(0));
            assert_eq!(world.set(Region { size: 0, ..bar() }), Err(Errno::INVAL));
            assert_eq!(world.set(bar()), Ok(0));
            assert_eq!(world.set(Region { slot: 9, ..bar() }), Err(Errno::EXIST));
        }
        stop.store(true, Ordering::Relaxed);
    });
    restore(&world, BAR_SLOT);
    assert_eq!(world.around.kernel.slots(world.vm)[1], bar());
    assert_eq!(world.count(crate::status::Count::FailOpens), 0);
}
