//! Where `KVM_RUN` failed: from registers, the guest's page tables and the instruction.

use std::cell::OnceCell;
use std::os::fd::RawFd;

use barkeep_shim::GuestAddress;
use barkeep_shim::fault::{
    Backing, CodeWidth, FaultPlace, SegmentBases, StoppedVcpu, Unlocated, VcpuState, locate, narrow,
};
use barkeep_shim::x86::{XsaveComponent, XsaveImage, XsaveLayout};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_translation, kvm_xsave};

use super::abi;
use super::slots::{Place, Slot};
use crate::system::{Answer, System};

/// Long mode is active (AMD64 APM volume 2, 3.1.7).
const EFER_LMA: u64 = 1 << 10;
/// Page tables of five levels: linear addresses have 57 bits instead of 48 (3.1.3).
const CR4_LA57: u64 = 1 << 12;

/// CPUID leaf that tells where the components of extended state are.
const XSAVE_LEAF: u32 = 0xd;

/// A virtual CPU whose `KVM_RUN` has failed, asked by the thread that called it.
pub(super) struct Stopped<'a, S> {
    system: &'a S,
    fd: RawFd,
    /// The slots of its VM.
    slots: &'a [Slot],
    /// The address space that it is in.
    space: u32,
    xsave: &'a XsaveLayout,
    state: VcpuState,
    /// Bits of a linear address that the page tables translate, in 64-bit mode.
    linear_bits: u32,
    /// Vector registers, asked for when the first one is needed.
    image: OnceCell<Option<XsaveImage>>,
}

impl<'a, S: System> Stopped<'a, S> {
    pub(super) fn new(
        system: &'a S,
        fd: RawFd,
        slots: &'a [Slot],
        space: u32,
        xsave: &'a XsaveLayout,
    ) -> Result<Self, Unlocated> {
        let (mut regs, mut sregs) = (kvm_regs::default(), kvm_sregs::default());
        ask(system, fd, abi::GET_REGS, &mut regs).map_err(|_| Unlocated::Registers)?;
        ask(system, fd, abi::GET_SREGS, &mut sregs).map_err(|_| Unlocated::Registers)?;
        let linear_bits = if sregs.cr4 & CR4_LA57 == 0 { 48 } else { 57 };
        let (state, image) = (state(&regs, &sregs), OnceCell::new());
        Ok(Self { system, fd, slots, space, xsave, state, linear_bits, image })
    }

    /// The accesses of the next instruction that can have failed. RAM is not looked at: whatever it is,
    /// it is the VMM's. `is_bar` tells which host memory is not RAM.
    pub(super) fn find(&self, is_bar: impl Fn(&Slot) -> bool) -> FaultPlace {
        match locate(self) {
            Ok(accesses) => narrow(self.state.rip, &accesses, |page, _| match self.slot_at(page) {
                None => Backing::NoSlot,
                Some(slot) if is_bar(slot) => Backing::Device,
                Some(_) => Backing::Usable,
            }),
            Err(why) => FaultPlace::Unknown(why),
        }
    }

    fn slot_at(&self, address: GuestAddress) -> Option<&Slot> {
        self.slots.iter().find(|slot| {
            let region = &slot.region;
            region.space() == self.space && region.contains(address.0) && slot.is_installed()
        })
    }

    fn image(&self) -> Option<&XsaveImage> {
        let image = self.image.get_or_init(|| {
            let mut xsave = kvm_xsave::default();
            ask(self.system, self.fd, abi::GET_XSAVE, &mut xsave).ok()?;
            let bytes: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
            Some(XsaveImage::new(bytes, self.xsave))
        });
        image.as_ref()
    }
}

impl<S: System> StoppedVcpu for Stopped<'_, S> {
    fn state(&self) -> &VcpuState {
        &self.state
    }

    fn translate(&self, linear: u64) -> Option<GuestAddress> {
        // The kernel ignores the upper bits, where the processor raises an exception.
        let unused = 64 - self.linear_bits;
        let canonical = (linear << unused).cast_signed() >> unused == linear.cast_signed();
        if self.state.code == CodeWidth::Bits64 && !canonical {
            return None;
        }
        let mut translation = kvm_translation { linear_address: linear, ..Default::default() };
        ask(self.system, self.fd, abi::TRANSLATE, &mut translation).ok()?;
        (translation.valid != 0).then_some(GuestAddress(translation.physical_address))
    }

    fn read_ram(&self, address: GuestAddress, data: &mut [u8]) -> bool {
        let Some(slot) = self.slot_at(address) else { return false };
        if slot.place != Place::Installed || !slot.region.is_plain() {
            return false;
        }
        let host = slot.region.host.wrapping_add(address.0 - slot.region.guest);
        // A BAR, or memory that its file lacks, is an error here and nothing else.
        usize::try_from(host).is_ok_and(|host| self.system.read_memory(host, data).is_ok())
    }

    fn vector(&self, number: usize) -> Option<[u8; 64]> {
        self.image()?.vector(number)
    }

    fn mask(&self, number: usize) -> Option<u64> {
        self.image()?.mask(number)
    }
}

/// Where this machine's processors have their extended state, which is where KVM puts it too.
pub(super) fn xsave_layout() -> XsaveLayout {
    XsaveLayout::new(|component| {
        let leaf = std::arch::x86_64::__cpuid_count(XSAVE_LEAF, component);
        XsaveComponent { size: leaf.eax, offset: leaf.ebx }
    })
}

/// A request that fills in a structure.
fn ask<T>(system: &impl System, fd: RawFd, request: u32, answer: &mut T) -> Answer<i32> {
    system.ioctl(fd, request.into(), std::ptr::from_mut(answer).expose_provenance())
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

/// General-purpose registers in the order of their numbers in instructions.
#[rustfmt::skip]
fn general(r: &kvm_regs) -> [u64; 16] {
    [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi,
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
    ]
}
