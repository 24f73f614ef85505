//! A VMM with one VM, one virtual CPU, RAM with an instruction in it, and a device.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use barkeep_protocol::wire::FaultAccess;

use super::kernel::{DEV_KVM, Do, Done, Kernel};
use crate::device::{BarAddress, BarMapping, Decode, DeviceId};
use crate::kvm::around::Around;
use crate::kvm::slots::Region;
use crate::kvm::{Vms, abi};
use crate::status::{Count, Status};
use crate::system::{Answer, System as _};

pub(super) const PAGE: u64 = 4096;
/// Guest-physical addresses.
pub(super) const BAR: u64 = 0xfe00_0000;
pub(super) const RAM: u64 = 0;
/// Host address of the BAR's memory. Nothing is there.
pub(super) const BAR_HOST: u64 = 0x7000_0000_0000;
pub(super) const BAR_SLOT: u32 = 7;
pub(super) const DEVICE: DeviceId = DeviceId(3);
pub(super) const BAR_SIZE: u64 = 4 * PAGE;

/// What the VMs are among.
pub(super) struct Neighbours {
    pub(super) kernel: Kernel,
    pub(super) status: Status,
    devices: Mutex<Devices>,
}

#[derive(Default)]
pub(super) struct Devices {
    pub(super) mappings: Vec<BarMapping>,
    /// Those that are not here are on.
    pub(super) decode: BTreeMap<(u32, u8), Decode>,
    /// What another thread does right after somebody has asked whether a BAR decodes.
    pub(super) after_decode: Option<Box<dyn FnOnce() + Send>>,
    /// What a server would say of BAR 2.
    pub(super) after_a_look: Option<Decode>,
    pub(super) windows: Vec<(std::ops::Range<u64>, BarAddress)>,
    /// What was completed: place, direction, data.
    pub(super) completed: Vec<(BarAddress, bool, Vec<u8>)>,
    pub(super) belonging: BTreeSet<(u32, u32)>,
    pub(super) vm: Option<RawFd>,
    /// Looking for a window is a bug.
    pub(super) window_panics: bool,
}

impl Neighbours {
    pub(super) fn new() -> Self {
        Self { kernel: Kernel::default(), status: Status::private(true), devices: Mutex::default() }
    }

    pub(super) fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Around for Neighbours {
    type System = Kernel;

    fn system(&self) -> &Kernel {
        &self.kernel
    }

    fn status(&self) -> &Status {
        &self.status
    }

    fn shielded<T>(&self, of_ours: impl FnOnce() -> T) -> Option<T> {
        catch_unwind(AssertUnwindSafe(of_ours)).ok()
    }

    fn descriptor_of(&self, _: u32) -> Option<RawFd> {
        self.devices().vm
    }

    fn mapping(&self, host: u64, len: u64) -> Option<BarMapping> {
        let mappings = &self.devices().mappings;
        let inside = |mapping: &&BarMapping| {
            let start = mapping.start as u64;
            start <= host && host + len <= start + mapping.len as u64
        };
        mappings.iter().find(inside).copied()
    }

    fn look(&self, device: DeviceId) {
        let mut devices = self.devices();
        if let Some(decode) = devices.after_a_look.take() {
            devices.decode.insert((device.0, 2), decode);
        }
    }

    fn decode(&self, device: DeviceId, bar: u8) -> Decode {
        let mut devices = self.devices();
        let decode = devices.decode.get(&(device.0, bar)).copied().unwrap_or(Decode::On);
        if let Some(then) = devices.after_decode.take() {
            then();
        }
        decode
    }

    fn verdict(&self, place: BarAddress, _: FaultAccess) -> Decode {
        self.decode(place.device, place.bar)
    }

    fn window_at(&self, _: u32, guest: u64) -> Option<BarAddress> {
        let devices = self.devices();
        assert!(!devices.window_panics, "a bug");
        let (window, start) = devices.windows.iter().find(|(window, _)| window.contains(&guest))?;
        Some(BarAddress { offset: start.offset + (guest - window.start), ..*start })
    }

    fn complete(&self, place: BarAddress, data: &mut [u8], write: bool) {
        self.devices().completed.push((place, write, data.to_vec()));
    }

    fn belongs(&self, device: DeviceId, vm: u32) {
        self.devices().belonging.insert((device.0, vm));
    }
}

/// The VMM.
pub(super) struct World {
    pub(super) around: Neighbours,
    pub(super) vms: Vms,
    pub(super) vm: RawFd,
    pub(super) number: u32,
    pub(super) vcpu: RawFd,
    pub(super) vcpu_number: u32,
}

impl World {
    /// RAM at 0, whose first bytes are `mov eax, [rbx]`, and a BAR that decodes.
    pub(super) fn new() -> Self {
        let world = Self::empty();
        world.around.devices().mappings.push(BarMapping {
            device: DEVICE,
            bar: 2,
            start: usize::try_from(BAR_HOST).unwrap(),
            len: usize::try_from(BAR_SIZE).unwrap(),
            offset: 0x10000,
        });
        world.set(ram()).unwrap();
        world.set(bar()).unwrap();
        world
    }

    pub(super) fn empty() -> Self {
        let (around, vms) = (Neighbours::new(), Vms::default());
        let vm = around.kernel.ioctl(DEV_KVM, abi::CREATE_VM.into(), 0).unwrap();
        let vcpu = around.kernel.ioctl(vm, abi::CREATE_VCPU.into(), 0).unwrap();
        let (number, entry) = vms.vms.take().unwrap();
        entry.begin();
        let (vcpu_number, entry) = vms.vcpus.take().unwrap();
        entry.begin(number);
        entry.mapped(around.kernel.run_area(vcpu), 12288);
        around.devices().vm = Some(vm);
        // As QEMU was seen to, early on.
        vms.keeps_kicks.store(true, Ordering::Relaxed);
        Self { around, vms, vm, number, vcpu, vcpu_number }
    }

    /// The VMM's request.
    pub(super) fn set(&self, region: Region) -> Answer<i32> {
        let words = words(&region);
        let argument = words.as_ptr().expose_provenance();
        let request = (self.vm, abi::SET_USER_MEMORY_REGION.into(), argument);
        self.vms.vms.get(self.number).unwrap().set_region(&self.around, self.number, request)
    }

    /// The VMM's `KVM_RUN`.
    pub(super) fn run(&self) -> Answer<i32> {
        self.vms.run(&self.around, self.vcpu, self.vcpu_number, 0)
    }

    /// `KVM_RUN` of a guest that does these things.
    pub(super) fn does(&self, todo: &[Do]) -> Answer<i32> {
        self.around.kernel.state().vcpus.get_mut(&self.vcpu).unwrap().todo.extend(todo);
        self.run()
    }

    /// What came of what the guest did.
    pub(super) fn done(&self) -> Vec<Done> {
        self.around.kernel.state().vcpus[&self.vcpu].done.clone()
    }

    pub(super) fn kernel_has(&self, slot: u32) -> bool {
        self.around.kernel.slots(self.vm).iter().any(|region| region.slot == slot)
    }

    /// Decode of the device's BAR, and with it whether the memory can be accessed.
    pub(super) fn decode(&self, decode: Decode) {
        self.around.devices().decode.insert((DEVICE.0, 2), decode);
        let mut kernel = self.around.kernel.state();
        kernel.refusing.clear();
        if decode == Decode::Off {
            kernel.refusing.push(BAR_HOST..BAR_HOST + BAR_SIZE);
        }
    }

    pub(super) fn count(&self, count: Count) -> u64 {
        self.around.status.get(count)
    }

    pub(super) fn exit_reason(&self) -> u32 {
        let word = self.around.kernel.run_words(self.vcpu)[1];
        u32::try_from(word & u64::from(u32::MAX)).unwrap()
    }
}

pub(super) fn words(region: &Region) -> [u64; 4] {
    let head = u64::from(region.slot) | u64::from(region.flags) << 32;
    [head, region.guest, region.size, region.host]
}

pub(super) fn ram() -> Region {
    // As aligned as a page is.
    let memory = vec![0u8; 3 * 4096].leak();
    let host = (memory.as_ptr().expose_provenance() as u64).next_multiple_of(PAGE);
    let skipped = usize::try_from(host).unwrap() - memory.as_ptr().addr();
    memory[skipped..][..2].copy_from_slice(&[0x8b, 0x03]);
    Region { slot: 0, flags: 0, guest: RAM, size: 2 * PAGE, host }
}

pub(super) fn bar() -> Region {
    Region { slot: BAR_SLOT, flags: 0, guest: BAR, size: BAR_SIZE, host: BAR_HOST }
}
