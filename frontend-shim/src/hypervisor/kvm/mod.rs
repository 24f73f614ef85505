//! Linux KVM.
//!
//! The slots of a [`Kvm`] are `KVM_SET_USER_MEMORY_REGION` slots; their numbers go to the kernel as
//! they are. Deleting one is synchronous in the kernel: the ioctl returns after every virtual CPU has
//! left the old memory. Adding one of device memory takes the gate of `gate.rs`.
#![expect(unsafe_code, reason = "gives the kernel addresses of host memory to map into a guest")]

mod complete;
mod events;
mod gate;
mod paging;
mod probe;
mod stopped;
#[cfg(test)]
mod tests;
mod vcpu;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, kvm_enable_cap, kvm_ioeventfd, kvm_irqfd, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use self::events::{KVM_IOEVENTFD, KVM_IRQFD, Routes};
use self::gate::{Closed, Gate};
use self::vcpu::KvmVcpu;
use super::slots::{Slot, SlotTable};
use super::{
    DoorbellWrite, Hypervisor, HypervisorError, HypervisorKind, MsiMessage, SlotAccess, SlotId,
    SlotMapping, Vcpu, VcpuEntry, Vm,
};
use crate::x86::{XsaveComponent, XsaveLayout};

/// Where Intel processors without unrestricted guest mode keep three pages of their own; out of the
/// way of RAM and of every PCI window.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A virtual machine of Linux KVM.
#[derive(Debug)]
pub struct Kvm {
    machine: Arc<Machine>,
    cpuid: CpuId,
    slot_limit: u32,
}

/// The machine and the host memory that it maps. Virtual CPUs share it: each keeps the machine in the
/// kernel alive, which goes on using the host addresses of its slots.
#[derive(Debug)]
struct Machine {
    // Declared before `slots`, so that the machine goes before the memory.
    vm: VmFd,
    /// Locked across the ioctl, so that this table and the kernel's change together.
    slots: Mutex<SlotTable>,
    /// Locked after `slots`.
    gate: Gate,
    /// Locked across the ioctl, like `slots`.
    routes: Mutex<Routes>,
    /// Where KVM puts the vector registers.
    xsave: XsaveLayout,
}

impl Kvm {
    /// Opens `/dev/kvm` and creates a virtual machine.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`] says why KVM can't be used on this machine,
    /// [`HypervisorError::Call`] which call failed unexpectedly.
    pub fn open() -> Result<Kvm, HypervisorError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|error| unavailable(error.errno()))?;
        let version = kvm.get_api_version();
        if i64::from(version) != i64::from(KVM_API_VERSION) {
            return Err(HypervisorError::Unavailable {
                reason: format!("/dev/kvm speaks API version {version}, not {KVM_API_VERSION}"),
            });
        }
        for (cap, what) in [
            (Cap::UserMemory, "user memory slots"),
            (Cap::ReadonlyMem, "read-only memory slots"),
            (Cap::ExtCpuid, "KVM_SET_CPUID2"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(HypervisorError::Unavailable {
                    reason: format!("this kernel's KVM has no {what}"),
                });
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let slot_limit = u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX);
        let vm = create_vm(&kvm)?;
        if vm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        }
        exit_on_emulation_failure(&vm)?;
        let xsave = xsave_layout(&cpuid);
        let machine = Arc::new(Machine {
            vm,
            slots: Mutex::default(),
            gate: Gate::default(),
            routes: Mutex::default(),
            xsave,
        });
        Ok(Kvm { machine, cpuid, slot_limit })
    }

    /// Proves that this machine's KVM executes guest code, by running five bytes of it.
    ///
    /// # Errors
    /// What [`open`](Self::open) says, and [`HypervisorError::Unavailable`] with what the guest did
    /// instead.
    pub fn probe() -> Result<(), HypervisorError> {
        probe::run()
    }

    /// Gives the machine an interrupt controller in the kernel, for
    /// [`route_msi`](Hypervisor::route_msi) and [`add_irqfd`](Hypervisor::add_irqfd). To be called before
    /// the first virtual CPU is created. A virtual CPU that halts then waits for an interrupt, and does
    /// not exit.
    ///
    /// # Errors
    /// [`HypervisorError::Call`] where the kernel refuses.
    pub fn create_interrupt_controller(&self) -> Result<(), HypervisorError> {
        self.machine.vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))
    }

    /// A virtual CPU as the kernel resets it.
    fn reset_vcpu(&self, id: u32) -> Result<KvmVcpu, HypervisorError> {
        let fd = self.machine.vm.create_vcpu(id.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&self.cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        Ok(KvmVcpu::new(fd, Arc::clone(&self.machine)))
    }
}

impl Machine {
    fn slots(&self) -> MutexGuard<'_, SlotTable> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the slots that wait for instructions to be done, if none is half way any more.
    fn add_waiting(&self) {
        let slots = self.slots();
        self.release(&slots, &self.gate.close());
    }

    fn release(&self, slots: &SlotTable, closed: &Closed<'_>) {
        closed.release(|id| {
            let added = slots.get(id).and_then(|slot| self.set_region(slot, slot.len));
            added.inspect_err(|error| tracing::warn!("slot {id} stays without memory: {error}"))
        });
    }

    fn set_region(&self, slot: &Slot, len: u64) -> Result<(), HypervisorError> {
        let flags = match slot.access {
            SlotAccess::ReadWrite => 0,
            SlotAccess::ReadOnly => KVM_MEM_READONLY,
        };
        let region = kvm_userspace_memory_region {
            slot: slot.id.0,
            flags,
            guest_phys_addr: slot.guest,
            memory_size: len,
            userspace_addr: slot.memory.host_address() + slot.offset,
        };
        // SAFETY: the range lies within a mapping that the slot table keeps alive until the kernel has
        // deleted the slot, and that nobody borrows: `HostMapping` copies atomically.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// Ioctls that kvm-ioctls wraps for a narrower use.
impl Machine {
    fn ioeventfd(&self, event: &kvm_ioeventfd) -> Result<(), HypervisorError> {
        // SAFETY: the kernel reads the structure, and looks up its descriptor itself.
        done("KVM_IOEVENTFD", unsafe { ioctl_with_ref(&self.vm, KVM_IOEVENTFD(), event) })
    }

    fn irqfd(&self, irqfd: &kvm_irqfd) -> Result<(), HypervisorError> {
        // SAFETY: as above.
        done("KVM_IRQFD", unsafe { ioctl_with_ref(&self.vm, KVM_IRQFD(), irqfd) })
    }
}

fn done(call: &'static str, result: i32) -> Result<(), HypervisorError> {
    match result {
        0 => Ok(()),
        _ => Err(HypervisorError::Call { call, source: io::Error::last_os_error() }),
    }
}

impl Hypervisor for Kvm {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Kvm
    }

    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        if slot.0 >= self.slot_limit {
            return Err(HypervisorError::TooManySlots { slot, limit: self.slot_limit });
        }
        let slot = Slot::new(slot, mapping)?;
        let mut slots = self.machine.slots();
        slots.admits(&slot)?;
        let closed = slot.memory.is_of_device().then(|| self.machine.gate.close());
        match closed {
            Some(closed) if closed.is_half_way() => closed.hold_back(slot.id),
            _ => self.machine.set_region(&slot, slot.len)?,
        }
        slots.insert(slot)
    }

    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
        let mut slots = self.machine.slots();
        let mapped = slots.get(slot)?;
        if !self.machine.gate.withdraw(slot) {
            self.machine.set_region(mapped, 0)?;
        }
        slots.remove(slot).map(|_| ())
    }

    fn add_ioeventfd(
        &self,
        write: &DoorbellWrite,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), HypervisorError> {
        self.machine.ioeventfd(&events::ioeventfd(write, eventfd, true)?)
    }

    fn remove_ioeventfd(
        &self,
        write: &DoorbellWrite,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), HypervisorError> {
        self.machine.ioeventfd(&events::ioeventfd(write, eventfd, false)?)
    }

    fn route_msi(&self, gsi: u32, message: Option<MsiMessage>) -> Result<(), HypervisorError> {
        let mut routes = self.machine.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = routes.with(gsi, message);
        let set = self.machine.vm.set_gsi_routing(&changed.to_kvm()?);
        set.map_err(failed("KVM_SET_GSI_ROUTING"))?;
        *routes = changed;
        Ok(())
    }

    fn add_irqfd(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        self.machine.irqfd(&events::irqfd(gsi, eventfd, true))
    }

    fn remove_irqfd(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        self.machine.irqfd(&events::irqfd(gsi, eventfd, false))
    }
}

impl Vm for Kvm {
    fn create_vcpu(&self, id: u32, entry: &VcpuEntry) -> Result<Box<dyn Vcpu>, HypervisorError> {
        let vcpu = self.reset_vcpu(id)?;
        vcpu.enter_long_mode(entry)?;
        Ok(Box::new(vcpu))
    }
}

/// Has KVM tell us of every instruction that its emulator does not know, also of those of the guest's
/// user space, which would otherwise get an exception for what the processor can do. Kernels before 5.13
/// tell only of the guest's kernel.
fn exit_on_emulation_failure(vm: &VmFd) -> Result<(), HypervisorError> {
    if vm.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
    cap.args[0] = 1;
    vm.enable_cap(&cap).map_err(failed("KVM_CAP_EXIT_ON_EMULATION_FAILURE"))
}

/// CPUID leaf that tells where the components of extended state are.
const XSAVE_LEAF: u32 = 0xd;

fn xsave_layout(cpuid: &CpuId) -> XsaveLayout {
    XsaveLayout::new(|component| {
        let mut entries = cpuid.as_slice().iter();
        let entry = entries.find(|entry| (entry.function, entry.index) == (XSAVE_LEAF, component));
        entry.map_or_else(XsaveComponent::default, |entry| XsaveComponent {
            size: entry.eax,
            offset: entry.ebx,
        })
    })
}

fn create_vm(kvm: &kvm_ioctls::Kvm) -> Result<VmFd, HypervisorError> {
    loop {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            // The kernel allocates here and gives up on any signal.
            Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
            Err(error) if error.errno() == rustix::io::Errno::BUSY.raw_os_error() => {
                return Err(HypervisorError::Unavailable {
                    reason:
                        "KVM is there, but another hypervisor owns the processor's virtualization"
                            .to_owned(),
                });
            }
            Err(error) => return Err(failed("KVM_CREATE_VM")(error)),
        }
    }
}

/// One line for the operator about a `/dev/kvm` that can't be opened.
fn unavailable(errno: i32) -> HypervisorError {
    use rustix::io::Errno;
    let reason = match Errno::from_raw_os_error(errno) {
        Errno::NOENT => {
            "there is no /dev/kvm: the kvm module is not loaded, or the device is not passed into this container"
                .to_owned()
        }
        Errno::ACCESS | Errno::PERM => {
            "no permission to open /dev/kvm: add the user to the kvm group, or allow the device in this container"
                .to_owned()
        }
        Errno::NODEV | Errno::NXIO => {
            "/dev/kvm has no driver behind it: the processor has no VMX or SVM, or firmware disables it"
                .to_owned()
        }
        _ => format!("/dev/kvm can't be opened: {}", io::Error::from_raw_os_error(errno)),
    };
    HypervisorError::Unavailable { reason }
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> HypervisorError {
    move |error| HypervisorError::Call { call, source: io::Error::from_raw_os_error(error.errno()) }
}
