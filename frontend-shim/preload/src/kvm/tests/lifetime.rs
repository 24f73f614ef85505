use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::kernel::{DEV_KVM, Do, Kernel};
use super::world::{PAGE, ram, words};
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::device::DeviceId;
use crate::kvm::abi;
use crate::kvm::slots::Region;
use crate::status::Status;

fn shim() -> Shim<Kernel> {
    Shim::new(Kernel::default(), Status::private(true))
}

fn create_vm(shim: &Shim<Kernel>) -> RawFd {
    shim.ioctl(DEV_KVM, abi::CREATE_VM.into(), 0).unwrap()
}

fn create_vcpu(shim: &Shim<Kernel>, vm: RawFd) -> RawFd {
    let vcpu = shim.ioctl(vm, abi::CREATE_VCPU.into(), 0).unwrap();
    shim.vcpu_mapped(vcpu, shim.system.run_area(vcpu), 12288);
    vcpu
}

fn set(shim: &Shim<Kernel>, vm: RawFd, region: Region) {
    let words = words(&region);
    let argument = words.as_ptr().expose_provenance();
    assert_eq!(shim.ioctl(vm, abi::SET_USER_MEMORY_REGION.into(), argument), Ok(0));
}

/// What is believed of a VM's slots.
fn belief(shim: &Shim<Kernel>, vm: RawFd) -> Vec<Region> {
    let Some(Descriptor::Vm(number)) = shim.descriptors.get(vm) else { panic!("no VM") };
    let vm = shim.vms.vms.get(number).unwrap();
    vm.slots().iter().map(|slot| slot.region).collect()
}

/// As the hook of `close` does it.
fn close(shim: &Shim<Kernel>, fd: RawFd) {
    let was = shim.descriptors.clear(fd).unwrap();
    if shim.descriptors.another(-1, was).is_none() {
        match was {
            Descriptor::Vm(vm) => shim.vm_closed(vm),
            Descriptor::Vcpu(vcpu) => shim.vcpu_closed(vcpu),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn vms_and_virtual_cpus_are_followed_from_their_creation() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpu = create_vcpu(&shim, vm);
    assert_eq!(shim.descriptors.get(vm), Some(Descriptor::Vm(0)));
    assert_eq!(shim.descriptors.get(vcpu), Some(Descriptor::Vcpu(0)));
    assert!(shim.vms.vcpus.get(0).unwrap().run().is_some());
    shim.system.state().vcpus.get_mut(&vcpu).unwrap().todo.push_back(Do::Port);
    assert_eq!(shim.ioctl(vcpu, abi::RUN.into(), 0), Ok(0));
}

#[test]
fn a_run_structure_may_be_unmapped_and_mapped_again() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpu = create_vcpu(&shim, vm);
    let area = shim.system.run_area(vcpu);
    let entry = shim.vms.vcpus.get(0).unwrap();
    shim.unmapped(area + 12288, 4096);
    assert!(entry.run().is_some());
    shim.unmapped(area + 8192, 4096);
    assert!(entry.run().is_none());
    shim.vcpu_mapped(vcpu, area, 12288);
    assert!(entry.run().is_some());
}

#[test]
fn only_a_thread_that_runs_a_virtual_cpu_begins_an_arrival() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpu = create_vcpu(&shim, vm);
    let (device, now) = (DeviceId(1), Instant::now());
    shim.decode_may_come_back(device);
    assert!(!shim.vms.arrivals.has(device, now));
    shim.system.state().vcpus.get_mut(&vcpu).unwrap().todo.extend([Do::Port; 2]);
    assert_eq!(shim.ioctl(vcpu, abi::RUN.into(), 0), Ok(0));
    shim.decode_may_come_back(device);
    assert!(shim.vms.arrivals.has(device, now));
    assert_eq!(shim.ioctl(vcpu, abi::RUN.into(), 0), Ok(0));
    assert!(!shim.vms.arrivals.has(device, now));
}

#[test]
fn the_upper_half_of_a_request_is_nobodys() {
    let shim = shim();
    let vm = shim.ioctl(DEV_KVM, 0xffff_ffff_0000_0000 | u64::from(abi::CREATE_VM), 0).unwrap();
    assert_eq!(shim.descriptors.get(vm), Some(Descriptor::Vm(0)));
}

#[test]
fn each_vm_has_slots_of_its_own() {
    let shim = shim();
    let (one, two) = (create_vm(&shim), create_vm(&shim));
    assert!(!shim.is_only_vm(0));
    set(&shim, one, ram());
    set(&shim, two, Region { guest: 16 * PAGE, ..ram() });
    assert_eq!(belief(&shim, one), shim.system.slots(one));
    assert_eq!(belief(&shim, two), shim.system.slots(two));
}

#[test]
fn a_vm_lasts_as_long_as_its_virtual_cpus() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpu = create_vcpu(&shim, vm);
    set(&shim, vm, ram());
    close(&shim, vm);
    assert_eq!(shim.vms.vms.iter().count(), 1);
    close(&shim, vcpu);
    assert_eq!((shim.vms.vms.iter().count(), shim.vms.vcpus.iter().count()), (0, 0));
    // Another one begins with nothing.
    let vm = create_vm(&shim);
    assert_eq!(shim.descriptors.get(vm), Some(Descriptor::Vm(0)));
    assert!(belief(&shim, vm).is_empty());
}

#[test]
fn whoever_says_twice_that_a_virtual_cpu_is_closed_takes_it_from_its_vm_once() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpus = [create_vcpu(&shim, vm), create_vcpu(&shim, vm)];
    close(&shim, vm);
    shim.vcpu_closed(1);
    shim.vcpu_closed(1);
    assert_eq!(shim.vms.vms.iter().count(), 1, "one is left");
    vcpus.into_iter().for_each(|vcpu| close(&shim, vcpu));
    assert_eq!(shim.vms.vms.iter().count(), 0);
}

#[test]
fn kicks_are_kept_by_a_mask_of_signals_for_kvm_run() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpu = create_vcpu(&shim, vm);
    assert!(!shim.vms.keeps_kicks.load(Ordering::Relaxed));
    shim.kvm_ioctl(vcpu, abi::SET_SIGNAL_MASK.into(), 0).unwrap();
    assert!(shim.vms.keeps_kicks.load(Ordering::Relaxed));
}

#[test]
fn a_vm_that_was_closed_unseen_goes_when_its_number_is_used_again() {
    let shim = shim();
    let vm = create_vm(&shim);
    let was = shim.descriptors.clear(vm).unwrap();
    shim.descriptors.set(vm + 1, was);
    assert_eq!(create_vm(&shim), vm + 1);
    assert_eq!(shim.vms.vms.iter().count(), 1);
}

#[test]
fn a_number_that_looks_like_a_request_of_kvms_makes_no_vm() {
    let shim = shim();
    shim.system.state().strange = true;
    let fd = create_vm(&shim);
    assert_eq!(shim.descriptors.get(fd), None);
}

#[test]
fn a_vm_is_followed_where_there_is_no_proc() {
    let shim = shim();
    shim.system.state().no_proc = true;
    let fd = create_vm(&shim);
    assert!(matches!(shim.descriptors.get(fd), Some(Descriptor::Vm(_))));
}

#[test]
fn virtual_cpus_come_and_go_without_end() {
    let shim = shim();
    let vm = create_vm(&shim);
    for _ in 0..500 {
        let vcpus = [(); 3].map(|()| create_vcpu(&shim, vm));
        vcpus.into_iter().for_each(|vcpu| close(&shim, vcpu));
    }
    assert_eq!(shim.vms.vcpus.iter().count(), 0);
    create_vcpu(&shim, vm);
    assert_eq!(shim.vms.vcpus.iter().next().unwrap().0, 0);
}

#[test]
fn a_child_knows_nothing_of_its_parents_vms_even_if_their_locks_are_held() {
    let shim = shim();
    let vm = create_vm(&shim);
    let vcpu = create_vcpu(&shim, vm);
    let held = shim.vms.vms.get(0).unwrap().slots();
    shim.kvm_forked();
    assert_eq!((shim.descriptors.get(vm), shim.descriptors.get(vcpu)), (None, None));
    // A VM of the child is another one.
    let own = create_vm(&shim);
    assert_eq!(shim.descriptors.get(own), Some(Descriptor::Vm(1)));
    set(&shim, own, ram());
    assert!(shim.is_only_vm(1));
    drop(held);
}
