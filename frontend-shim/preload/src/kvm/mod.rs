//! VMs of KVM: what the VMM believes of its slots, what the kernel has, and what `KVM_RUN` returns.
//!
//! A slot of a BAR that does not decode is suspended: taken from the kernel, while the VMM goes on
//! believing in it. An access then exits as MMIO and completes as an Unsupported Request before the VMM
//! sees it.
//!
//! As in the VMM without us, a slot that comes back while an instruction is half way can make KVM
//! finish it in memory that it began as MMIO: the two halves of an access across a page, or of a
//! read-modify-write, may then go different ways. And an instruction that KVM's emulator does not know,
//! such as a load into an AVX register, ends the VM where there is no slot, be it suspended or deleted.

mod abi;
mod around;
mod arrivals;
mod run;
mod run_area;
mod slots;
mod stopped;
mod tables;
#[cfg(test)]
mod tests;
mod vm;

use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use barkeep_shim::x86::XsaveLayout;

use crate::Shim;
use crate::descriptors::Descriptor;
use crate::device::DeviceId;
use crate::status::FailOpen;
use crate::system::{Answer, System};

use arrivals::{Arrivals, Losses};
use tables::{Entry, Table, Vcpu};
use vm::Vm;

/// VMs at the same time, in steps of 64.
const VMS: usize = 16;
/// Virtual CPUs at the same time, likewise.
const VCPUS: usize = 256;

/// All VMs of the process.
#[derive(Debug)]
pub(crate) struct Vms {
    vms: Table<Vm>,
    vcpus: Table<Vcpu>,
    arrivals: Arrivals,
    losses: Losses,
    /// Whether the VMM sees to it that a signal between two `KVM_RUN`s ends the second one.
    keeps_kicks: AtomicBool,
    /// Where KVM puts the vector registers.
    xsave: OnceLock<XsaveLayout>,
}

impl Default for Vms {
    fn default() -> Self {
        Self {
            vms: Table::new(VMS),
            vcpus: Table::new(VCPUS),
            arrivals: Arrivals::default(),
            losses: Losses::default(),
            keeps_kicks: AtomicBool::new(false),
            xsave: OnceLock::new(),
        }
    }
}

impl<S: System> Shim<S> {
    /// `ioctl` of the VMM with a request of KVM's (type `0xae`).
    ///
    /// # Errors
    /// Those of `ioctl`.
    pub(crate) fn kvm_ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        // The kernel looks at no more of it.
        #[expect(clippy::cast_possible_truncation, reason = "the kernel's own")]
        let known = request as u32;
        match (known, self.descriptors.get(fd)) {
            (abi::RUN, Some(Descriptor::Vcpu(vcpu))) => self.vms.run(self, fd, vcpu, argument),
            (abi::CREATE_VM, _) => {
                let created = self.system.ioctl(fd, request, argument)?;
                self.shielded(|| self.vm_created(created));
                Ok(created)
            }
            (abi::CREATE_VCPU, Some(Descriptor::Vm(vm))) => {
                let created = self.system.ioctl(fd, request, argument)?;
                self.shielded(|| self.vcpu_created(vm, created));
                Ok(created)
            }
            (
                abi::SET_USER_MEMORY_REGION | abi::SET_USER_MEMORY_REGION2,
                Some(Descriptor::Vm(number)),
            ) if let Some(vm) = self.vms.vms.get(number) => {
                let asked = (fd, request, argument);
                let answer = self.shielded(|| vm.set_region(self, number, asked));
                answer.unwrap_or_else(|| self.system.ioctl(fd, request, argument))
            }
            (abi::GET_DIRTY_LOG, Some(Descriptor::Vm(vm)))
                if let Some(vm) = self.vms.vms.get(vm) =>
            {
                vm.slots().dirty_log(&self.system, fd, argument)
            }
            (abi::CLEAR_DIRTY_LOG, Some(Descriptor::Vm(vm)))
                if let Some(vm) = self.vms.vms.get(vm) =>
            {
                vm.slots().clear_dirty_log(&self.system, fd, argument)
            }
            (abi::SET_SIGNAL_MASK, Some(Descriptor::Vcpu(_))) => {
                // Signals wait for the next `KVM_RUN` and end that.
                let answer = self.system.ioctl(fd, request, argument)?;
                self.vms.keeps_kicks.store(true, Ordering::Relaxed);
                Ok(answer)
            }
            _ => self.system.ioctl(fd, request, argument),
        }
    }

    /// The VMM is about to write to the configuration of a device that does not decode. To be called on
    /// the thread that writes, before the write: from then on the device may decode for everybody, while
    /// the VMM has not put its BARs back.
    pub(crate) fn decode_may_come_back(&self, device: DeviceId) {
        let thread = arrivals::this_thread();
        let runs = |vcpu: &Vcpu| vcpu.thread.load(Ordering::Relaxed) == thread;
        if self.vms.vcpus.iter().any(|(_, vcpu)| runs(vcpu)) {
            self.vms.arrivals.begin(device, Instant::now());
        }
    }

    /// A device decodes after such a write. To be called without a lock.
    pub(crate) fn decode_came_back(&self, device: DeviceId) {
        for (number, vm) in self.vms.vms.iter() {
            vm.restore_device(self, number, device);
        }
    }

    /// A device stopped to decode by a write of the VMM. To be called on the thread that made it, right
    /// after the write: the VMM takes the BARs away next.
    pub(crate) fn decode_went(&self, device: DeviceId) {
        self.vms.losses.add(device);
    }

    #[cfg(test)]
    pub(crate) fn losses_of(&self, device: DeviceId) -> u64 {
        self.vms.losses.of(device)
    }

    /// Whether a VM is the only one of the process.
    pub(crate) fn is_only_vm(&self, vm: u32) -> bool {
        self.vms.vms.iter().all(|(number, _)| number == vm)
    }

    /// A virtual CPU's descriptor was mapped, from its beginning.
    pub(crate) fn vcpu_mapped(&self, fd: RawFd, start: usize, len: usize) {
        if let Some(Descriptor::Vcpu(vcpu)) = self.descriptors.get(fd)
            && let Some(vcpu) = self.vms.vcpus.get(vcpu)
        {
            vcpu.mapped(start, len);
        }
    }

    /// Host memory is about to be unmapped, or mapped anew. Called for all memory, so it must be quick, and
    /// may be called inside of an allocation.
    pub(crate) fn unmapped(&self, start: usize, len: usize) {
        for (_, vcpu) in self.vms.vcpus.iter() {
            if vcpu.has_run_in(start, len) && !self.elsewhere() {
                vcpu.mapped(0, 0);
            }
        }
    }

    /// The last descriptor of a VM is closed.
    pub(crate) fn vm_closed(&self, vm: u32) {
        if let Some(vm) = self.vms.vms.get(vm) {
            // Whoever changes slots has looked for its descriptor under the lock.
            let slots = vm.slots();
            drop(slots);
            self.let_go(vm);
        }
    }

    /// The last descriptor of a virtual CPU is closed.
    pub(crate) fn vcpu_closed(&self, vcpu: u32) {
        let Some(vcpu) = self.vms.vcpus.get(vcpu) else { return };
        let vm = vcpu.vm.load(Ordering::Acquire);
        // Of two threads that close the last two descriptors, each may think that it has the last one.
        if vcpu.close()
            && let Some(vm) = self.vms.vms.get(vm)
        {
            self.let_go(vm);
        }
    }

    /// In the child of a fork: the kernel answers no request about the parent's VMs. Takes no lock, since
    /// a thread may hold it that does not exist here.
    pub(crate) fn kvm_forked(&self) {
        self.descriptors
            .forget(|descriptor| matches!(descriptor, Descriptor::Vm(_) | Descriptor::Vcpu(_)));
        self.vms.vcpus.lose_all();
        self.vms.vms.lose_all();
    }

    /// Lets another VM have the entry, if nothing in this process refers to this one any more.
    fn let_go(&self, vm: &Vm) {
        if vm.let_go() && vm.state().free() {
            self.status.vm_gone();
        }
    }

    /// What had this number before was closed without our hearing of it.
    fn forget_stale(&self, fd: RawFd) {
        self.forget_range(fd.unsigned_abs(), fd.unsigned_abs());
    }

    fn vm_created(&self, fd: RawFd) {
        // Where there is no /proc, as in a jail, the request's own answer must do.
        if self.system.link(fd).is_ok_and(|link| link != b"anon_inode:kvm-vm") {
            return;
        }
        self.forget_stale(fd);
        let Some((number, vm)) = self.vms.vms.take() else {
            return self.status.fail_open(FailOpen::TooManyVms);
        };
        vm.begin();
        if !self.descriptors.set(fd, Descriptor::Vm(number)) {
            vm.state().free();
            return self.status.fail_open(FailOpen::TooManyDescriptors);
        }
        self.status.vm_made();
    }

    fn vcpu_created(&self, vm: u32, fd: RawFd) {
        self.forget_stale(fd);
        let Some(its) = self.vms.vms.get(vm).filter(|vm| vm.hold()) else { return };
        let Some((number, vcpu)) = self.vms.vcpus.take() else {
            self.let_go(its);
            return self.status.fail_open(FailOpen::TooManyVms);
        };
        vcpu.begin(vm);
        if !self.descriptors.set(fd, Descriptor::Vcpu(number)) {
            vcpu.state().free();
            self.let_go(its);
            self.status.fail_open(FailOpen::TooManyDescriptors);
        }
    }
}
