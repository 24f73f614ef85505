//! Where a bare `EFAULT` of `KVM_RUN` happened.

use std::cell::OnceCell;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::Machine;
use super::complete::in_nested_guest;
use crate::fault::{
    Backing, CodeWidth, FaultAccess, FaultPlace, SegmentBases, StoppedVcpu, Unlocated, VcpuState,
    locate, narrow,
};
use crate::hypervisor::{GuestAddress, SlotAccess};
use crate::x86::long_mode::{CR4_LA57, EFER_LMA};
use crate::x86::{XsaveImage, XsaveLayout};

/// Finds the access that made `KVM_RUN` fail: from registers, the guest's page tables and the
/// instruction. Device memory is never touched.
pub(super) fn find_fault(fd: &VcpuFd, machine: &Machine) -> FaultPlace {
    let found = Stopped::new(fd, machine).and_then(|stopped| {
        let accesses = locate(&stopped)?;
        Ok(narrow(stopped.state.rip, &accesses, |page, write| machine.backing(page, write)))
    });
    found.unwrap_or_else(FaultPlace::Unknown)
}

/// Finds the access to a slot that made KVM's emulator give up, if the instruction has one that can
/// have been refused.
pub(super) fn find_refusal(fd: &VcpuFd, machine: &Machine) -> Option<FaultPlace> {
    if in_nested_guest(fd) {
        return None;
    }
    let stopped = Stopped::new(fd, machine).ok()?;
    let mut accesses = locate(&stopped).ok()?;
    accesses.retain(|access| access.kind != Some(FaultAccess::Execute));
    let place = narrow(stopped.state.rip, &accesses, |page, write| {
        match machine.backing(page, write) {
            // The emulator would have made an exit of it.
            Backing::NoSlot => Backing::Usable,
            backing => backing,
        }
    });
    (!matches!(place, FaultPlace::Unknown(_))).then_some(place)
}

/// A virtual CPU outside of `KVM_RUN`.
pub(super) struct Stopped<'a> {
    fd: &'a VcpuFd,
    machine: &'a Machine,
    state: VcpuState,
    /// Bits of a linear address that the page tables translate, in 64-bit mode.
    linear_bits: u32,
    /// Vector registers, asked for when the first one is needed.
    image: OnceCell<Option<XsaveImage>>,
}

impl<'a> Stopped<'a> {
    pub(super) fn new(fd: &'a VcpuFd, machine: &'a Machine) -> Result<Self, Unlocated> {
        let regs = fd.get_regs().map_err(|_| Unlocated::Registers)?;
        let sregs = fd.get_sregs().map_err(|_| Unlocated::Registers)?;
        let linear_bits = if sregs.cr4 & CR4_LA57 == 0 { 48 } else { 57 };
        let state = state(&regs, &sregs);
        Ok(Self { fd, machine, state, linear_bits, image: OnceCell::new() })
    }

    fn image(&self) -> Option<&XsaveImage> {
        let image = self.image.get_or_init(|| {
            let xsave = self.fd.get_xsave().ok()?;
            Some(image(&xsave, &self.machine.xsave))
        });
        image.as_ref()
    }
}

impl StoppedVcpu for Stopped<'_> {
    fn state(&self) -> &VcpuState {
        &self.state
    }

    /// The kernel walks the guest's page tables for this, wherever the guest has them, and sets their
    /// Accessed bits, as the access itself does.
    fn translate(&self, linear: u64) -> Option<GuestAddress> {
        // The kernel ignores the upper bits, where the processor raises an exception.
        let unused = 64 - self.linear_bits;
        let canonical = (linear << unused).cast_signed() >> unused == linear.cast_signed();
        if self.state.code == CodeWidth::Bits64 && !canonical {
            return None;
        }
        let translation = self.fd.translate_gva(linear).ok()?;
        (translation.valid != 0).then_some(GuestAddress(translation.physical_address))
    }

    fn read_ram(&self, address: GuestAddress, data: &mut [u8]) -> bool {
        self.machine.read_ram(address, data)
    }

    fn vector(&self, number: usize) -> Option<[u8; 64]> {
        self.image()?.vector(number)
    }

    fn mask(&self, number: usize) -> Option<u64> {
        self.image()?.mask(number)
    }
}

impl Machine {
    /// Copies from RAM, within one page; false for everything else, and for RAM that would refuse.
    pub(super) fn read_ram(&self, address: GuestAddress, data: &mut [u8]) -> bool {
        let slots = self.slots();
        let Some((slot, offset)) = slots.locate(address.0) else {
            return false;
        };
        // Probed first: a file that was truncated would send us a signal.
        !slot.memory.is_of_device()
            && slot.memory.probe(offset, false)
            && slot.memory.read(offset, data).is_ok()
    }

    /// What takes an access to a page.
    pub(super) fn backing(&self, page: GuestAddress, write: bool) -> Backing {
        let slots = self.slots();
        match slots.locate(page.0) {
            None => Backing::NoSlot,
            Some((slot, _)) if self.gate.holds_back(slot.id) => Backing::NoSlot,
            // A write to a read-only slot exits as MMIO.
            Some((slot, _)) if write && slot.access == SlotAccess::ReadOnly => Backing::NoSlot,
            Some((slot, offset)) if !slot.memory.probe(offset, write) => Backing::Refused,
            Some((slot, _)) if slot.memory.is_of_device() => Backing::Device,
            Some(_) => Backing::Usable,
        }
    }
}

fn state(regs: &kvm_regs, sregs: &kvm_sregs) -> VcpuState {
    let code = match (&sregs.cs, sregs.efer & EFER_LMA != 0) {
        (kvm_segment { l: 1, .. }, true) => CodeWidth::Bits64,
        (kvm_segment { db: 1, .. }, _) => CodeWidth::Bits32,
        _ => CodeWidth::Bits16,
    };
    VcpuState {
        general: general(regs),
        rip: regs.rip,
        segments: SegmentBases {
            es: sregs.es.base,
            cs: sregs.cs.base,
            ss: sregs.ss.base,
            ds: sregs.ds.base,
            fs: sregs.fs.base,
            gs: sregs.gs.base,
        },
        code,
        stack32: sregs.ss.db != 0,
    }
}

/// What `KVM_GET_XSAVE` gave.
pub(super) fn image(xsave: &kvm_xsave, layout: &XsaveLayout) -> XsaveImage {
    let bytes = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
    XsaveImage::new(bytes, layout)
}

/// What `KVM_SET_XSAVE` takes.
pub(super) fn xsave(image: &XsaveImage) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    let (words, _) = image.bytes().as_chunks();
    for (word, bytes) in xsave.region.iter_mut().zip(words) {
        *word = u32::from_le_bytes(*bytes);
    }
    xsave
}

/// General-purpose registers in the order of their numbers in instructions.
#[rustfmt::skip]
pub(super) fn general(r: &kvm_regs) -> [u64; 16] {
    [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi,
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
    ]
}
