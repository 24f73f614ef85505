//! Instructions on devices that KVM's emulator does not know, AVX loads and stores before all.
//!
//! An access without a slot is emulated by KVM. Where its emulator gives up, the instruction is executed
//! here; its accesses to devices are exits like those that KVM makes.

#[cfg(test)]
mod tests;

use std::sync::MutexGuard;

use iced_x86::{Decoder, DecoderOptions, EncodingKind};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{KVM_STATE_NESTED_GUEST_MODE, kvm_regs, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::Machine;
use super::paging::Paging;
use super::stopped::{self, Stopped, general};
use crate::fault::{Backing, CodeWidth, FaultAccess, StoppedVcpu, locate};
use crate::hypervisor::slots::SlotTable;
use crate::hypervisor::{GuestAccess, GuestAddress, PAGE_SIZE, SlotAccess, VcpuExit};
use crate::x86::{
    MAX_INSTRUCTION, Memory, Outcome, PendingInstruction, Ram, Registers, XsaveImage,
};

/// An instruction that is executed here.
pub(super) struct Completion {
    pending: PendingInstruction,
    paging: Paging,
    image: Option<XsaveImage>,
    /// The vector register whose bytes above the first 32 a VEX instruction clears.
    cleared: Option<usize>,
}

/// How far a completion came.
pub(super) enum Progress {
    /// [`Completion::exit`] has the access that comes next.
    Exit,
    /// Memory refuses this access; go on when it does not any more.
    Fault(GuestAccess),
    /// The guest maps an address no more. The registers are as before.
    NotMapped,
    /// The instruction is done, or one iteration of it. The registers are those after it.
    Retired,
}

impl Completion {
    /// Takes over the next instruction; `None` unless it accesses at least one address without a slot,
    /// nothing that refuses, and is known.
    pub(super) fn new(fd: &VcpuFd, machine: &Machine) -> Option<Completion> {
        let stopped = Stopped::new(fd, machine).ok()?;
        let sregs = fd.get_sregs().ok()?;
        if stopped.state().code != CodeWidth::Bits64 || in_nested_guest(fd) {
            return None;
        }
        let mut accesses_device = false;
        for access in locate(&stopped).ok()? {
            let page = GuestAddress(access.address.0 & !(PAGE_SIZE - 1));
            match machine.backing(page, access.kind == Some(FaultAccess::Write)) {
                Backing::NoSlot => accesses_device |= access.kind != Some(FaultAccess::Execute),
                Backing::Usable | Backing::Device => {}
                Backing::Refused => return None,
            }
        }
        if !accesses_device {
            return None;
        }
        let regs = fd.get_regs().ok()?;
        let code = code(&stopped);
        let registers = Registers {
            general: general(&regs),
            rip: regs.rip,
            flags: regs.rflags,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            vectors: None,
        };
        let mut pending = PendingInstruction::new(registers, &code).ok()?;
        let mut image = None;
        if pending.uses_vectors() {
            let loaded = stopped::image(&fd.get_xsave().ok()?, &machine.xsave);
            pending.set_vectors(loaded.vectors());
            image = Some(loaded);
        }
        let paging = Paging::new(&sregs, regs.rflags);
        Some(Completion { pending, paging, image, cleared: vex_destination(&code, regs.rip) })
    }

    /// Executes as much of the instruction as needs no exit; `None` if it turns out not to be known.
    pub(super) fn attempt(&mut self, machine: &Machine) -> Option<Progress> {
        let mut memory = GuestMemory { slots: machine.slots(), paging: &self.paging };
        Some(match self.pending.attempt(&mut memory).ok()? {
            Outcome::Exit => Progress::Exit,
            Outcome::Fault { address, access } => {
                Progress::Fault(GuestAccess { address, size: 1, kind: Some(access) })
            }
            Outcome::NotMapped { .. } => Progress::NotMapped,
            Outcome::Retired | Outcome::Halted => Progress::Retired,
        })
    }

    /// The access that [`Progress::Exit`] announced.
    pub(super) fn exit(&mut self) -> Option<VcpuExit<'_>> {
        self.pending.exit()
    }

    /// The registers after the last attempt.
    pub(super) fn regs(&self) -> kvm_regs {
        let registers = self.pending.registers();
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
            registers.general;
        let (rip, rflags) = (registers.rip, registers.flags);
        kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        }
    }

    /// The vector registers after the last attempt, if the instruction has to do with them.
    pub(super) fn xsave(&self) -> Option<kvm_xsave> {
        let vectors = self.pending.registers().vectors.as_ref()?;
        let mut image = self.image.clone()?;
        image.set_vectors(vectors, self.cleared);
        Some(stopped::xsave(&image))
    }
}

/// Whether the guest runs a guest of its own: its linear addresses lead to guest-physical ones of which
/// the slots know nothing.
pub(super) fn in_nested_guest(fd: &VcpuFd) -> bool {
    let mut state = KvmNestedStateBuffer::empty();
    // A kernel without nested virtualization knows nothing of its state.
    let known = fd.nested_state(&mut state).is_ok_and(|size| size.is_some());
    known && u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0
}

/// The bytes at rip, as far as they are RAM.
fn code(stopped: &Stopped<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MAX_INSTRUCTION);
    while bytes.len() < MAX_INSTRUCTION {
        let linear = stopped.state().rip.wrapping_add(bytes.len() as u64);
        let to_page_end = usize::try_from(PAGE_SIZE - linear % PAGE_SIZE).unwrap_or(1);
        let from = bytes.len();
        bytes.resize((from + to_page_end).min(MAX_INSTRUCTION), 0);
        let in_ram = stopped
            .translate(linear)
            .is_some_and(|address| stopped.read_ram(address, &mut bytes[from..]));
        if !in_ram {
            bytes.truncate(from);
            break;
        }
    }
    bytes
}

fn vex_destination(code: &[u8], rip: u64) -> Option<usize> {
    let instruction = Decoder::with_ip(64, code, rip, DecoderOptions::NONE).decode();
    let register = instruction.op0_register();
    let clears = instruction.encoding() == EncodingKind::VEX && register.is_vector_register();
    clears.then(|| register.number())
}

/// Memory as the instruction sees it. Slots can't change while this exists.
struct GuestMemory<'a> {
    slots: MutexGuard<'a, SlotTable>,
    paging: &'a Paging,
}

impl Memory for GuestMemory<'_> {
    fn translate(&mut self, linear: u64, write: bool) -> Option<GuestAddress> {
        self.paging.walk(&self.slots, linear, write)
    }

    /// Of a device that is mapped the accesses are exits too: its memory may refuse, and we would not
    /// survive that.
    fn ram(&self, address: GuestAddress, write: bool) -> Option<Ram<'_>> {
        let (slot, offset) = self.slots.locate(address.0)?;
        let exits = slot.memory.is_of_device() || write && slot.access == SlotAccess::ReadOnly;
        (!exits).then_some(Ram { memory: &slot.memory, offset })
    }
}
