//! The hypercalls, by the ioctls of `/dev/mshv`. Compiled, never run: see the parent module.
#![expect(unsafe_code, reason = "reads unions that the kernel fills")]

use std::io;

use mshv_bindings::{
    HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT, HV_TRANSLATE_GVA_VALIDATE_EXECUTE,
    HV_TRANSLATE_GVA_VALIDATE_READ, HV_TRANSLATE_GVA_VALIDATE_WRITE, MSHV_SET_MEM_BIT_EXECUTABLE,
    MSHV_SET_MEM_BIT_WRITABLE, SegmentRegister, StandardRegisters, hv_message,
    hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION as UNIMPLEMENTED_MSR_ACTION,
    hv_translate_gva_result_code_HV_TRANSLATE_GVA_SUCCESS as TRANSLATED,
    hv_unimplemented_msr_action_HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO as IGNORE_WRITE_READ_ZERO,
    mshv_user_mem_region,
};
use mshv_ioctls::{MshvError, VcpuFd, VmFd};
use rustix::io::Errno;

use super::hypercalls::{CallError, CallErrorKind, Partition, Processor};
use super::message::{MESSAGE_SIZE, Message};
use super::policy::MapPlan;
use crate::hypervisor::{FaultAccess, GuestAddress, HypervisorError, SlotAccess, VcpuEntry};
use crate::x86::Registers;
use crate::x86::long_mode::{
    CODE_SELECTOR, CR0, CR4_PAE, DATA_SELECTOR, EFER, RFLAGS_RESERVED, TYPE_CODE_READ_ACCESSED,
    TYPE_DATA_WRITE_ACCESSED,
};

/// A partition of the kernel's driver.
#[derive(Debug)]
pub(super) struct IoctlPartition {
    vm: VmFd,
}

impl IoctlPartition {
    pub(super) fn open() -> Result<IoctlPartition, HypervisorError> {
        let mshv = mshv_ioctls::Mshv::new().map_err(|error| unavailable(error.errno()))?;
        let vm = mshv.create_vm().map_err(failed("MSHV_CREATE_PARTITION"))?;
        // A guest that probes MSRs then goes on as on hardware that has them, and no message is left
        // that nobody handles.
        vm.set_partition_property(UNIMPLEMENTED_MSR_ACTION, IGNORE_WRITE_READ_ZERO.into())
            .map_err(failed("HVCALL_SET_PARTITION_PROPERTY"))?;
        vm.initialize().map_err(failed("MSHV_INITIALIZE_PARTITION"))?;
        Ok(IoctlPartition { vm })
    }
}

impl Partition for IoctlPartition {
    type Processor = IoctlProcessor;

    fn map_gpa(&self, plan: MapPlan, access: SlotAccess) -> Result<(), CallError> {
        let flags = match access {
            SlotAccess::ReadWrite => {
                1 << MSHV_SET_MEM_BIT_WRITABLE | 1 << MSHV_SET_MEM_BIT_EXECUTABLE
            }
            SlotAccess::ReadOnly => 1 << MSHV_SET_MEM_BIT_EXECUTABLE,
        };
        // The slot that the plan is of keeps the host memory mapped until the plan is unmapped, and
        // nobody borrows it: `HostMapping` copies atomically.
        self.vm.map_user_memory(memory_region(plan, flags)).map_err(failed("MSHV_SET_GUEST_MEMORY"))
    }

    fn unmap_gpa(&self, plan: MapPlan) -> Result<(), CallError> {
        self.vm.unmap_user_memory(memory_region(plan, 0)).map_err(failed("MSHV_SET_GUEST_MEMORY"))
    }

    fn create_processor(&self, index: u32) -> Result<IoctlProcessor, CallError> {
        const CALL: &str = "MSHV_CREATE_VP";
        let index = u8::try_from(index).map_err(|_| CallError {
            call: CALL,
            kind: CallErrorKind::Other(Errno::INVAL.into()),
        })?;
        Ok(IoctlProcessor { vcpu: self.vm.create_vcpu(index).map_err(failed(CALL))? })
    }
}

fn memory_region(plan: MapPlan, flags: u8) -> mshv_user_mem_region {
    mshv_user_mem_region {
        size: plan.len(),
        guest_pfn: plan.guest.0,
        userspace_addr: plan.host.address(),
        flags,
        ..Default::default()
    }
}

/// A virtual processor of the kernel's driver.
pub(super) struct IoctlProcessor {
    vcpu: VcpuFd,
}

impl Processor for IoctlProcessor {
    fn run(&mut self) -> Result<Message, CallError> {
        self.vcpu.run().map(|message| bytes(&message)).map_err(failed("MSHV_RUN_VP"))
    }

    /// Vector registers are left out: their upper halves are not registers of the hypervisor's
    /// interface.
    fn registers(&self) -> Result<Registers, CallError> {
        let regs = self.vcpu.get_regs().map_err(failed("HVCALL_GET_VP_REGISTERS"))?;
        let sregs = self.vcpu.get_sregs().map_err(failed("HVCALL_GET_VP_REGISTERS"))?;
        Ok(Registers {
            general: [
                regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
                regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
            ],
            rip: regs.rip,
            flags: regs.rflags,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            vectors: None,
        })
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), CallError> {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
            registers.general;
        let (rip, rflags) = (registers.rip, registers.flags);
        #[rustfmt::skip]
        let regs = StandardRegisters {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
        };
        self.vcpu.set_regs(&regs).map_err(failed("HVCALL_SET_VP_REGISTERS"))
    }

    fn enter_long_mode(&mut self, entry: &VcpuEntry) -> Result<(), CallError> {
        // From what a reset made of them: the hypervisor also checks TR and LDTR, which are valid there.
        let mut sregs = self.vcpu.get_sregs().map_err(failed("HVCALL_GET_VP_REGISTERS"))?;
        let data = SegmentRegister {
            limit: u32::MAX,
            selector: DATA_SELECTOR,
            type_: TYPE_DATA_WRITE_ACCESSED,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = SegmentRegister {
            selector: CODE_SELECTOR,
            type_: TYPE_CODE_READ_ACCESSED,
            db: 0,
            l: 1,
            ..data
        };
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 = CR0;
        sregs.cr3 = entry.page_table_root.0;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER;
        self.vcpu.set_sregs(&sregs).map_err(failed("HVCALL_SET_VP_REGISTERS"))?;
        let regs = StandardRegisters {
            rip: entry.rip,
            rsp: entry.rsp,
            rdi: entry.rdi,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(failed("HVCALL_SET_VP_REGISTERS"))
    }

    fn translate(&self, gva: u64, access: FaultAccess) -> Result<Option<GuestAddress>, CallError> {
        let validate = match access {
            FaultAccess::Read => HV_TRANSLATE_GVA_VALIDATE_READ,
            FaultAccess::Write => HV_TRANSLATE_GVA_VALIDATE_WRITE,
            FaultAccess::Execute => HV_TRANSLATE_GVA_VALIDATE_EXECUTE,
        };
        // The processor has checked the privilege of the access that was intercepted.
        let flags = validate | HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT;
        let (address, result) = self
            .vcpu
            .translate_gva(gva, flags.into())
            .map_err(failed("HVCALL_TRANSLATE_VIRTUAL_ADDRESS"))?;
        // SAFETY: both fields of the union are plain integers over all of its bytes.
        let result = unsafe { result.as_uint64 };
        // The code is the low half of the result.
        let translated = result & u64::from(u32::MAX) == u64::from(TRANSLATED);
        Ok(translated.then_some(GuestAddress(address)))
    }
}

/// The bytes of a message, at the offsets at which the hypervisor wrote them.
fn bytes(message: &hv_message) -> Message {
    let mut bytes = [0; MESSAGE_SIZE];
    bytes[..4].copy_from_slice(&{ message.header.message_type }.to_le_bytes());
    bytes[4] = message.header.payload_size;
    // SAFETY: the union has this field alone, an array of integers.
    let payload = unsafe { message.u.payload };
    for (word, room) in payload.iter().zip(bytes[16..].chunks_exact_mut(8)) {
        room.copy_from_slice(&word.to_le_bytes());
    }
    Message(bytes)
}

fn failed(call: &'static str) -> impl Fn(MshvError) -> CallError {
    move |error| {
        let kind = match Errno::from_raw_os_error(error.errno()) {
            Errno::EXIST => CallErrorKind::Mapped,
            Errno::NOENT => CallErrorKind::NotMapped,
            Errno::FAULT => CallErrorKind::NoBacking,
            Errno::INTR | Errno::AGAIN => CallErrorKind::Interrupted,
            // The errno alone would hide what the hypervisor answered.
            _ => CallErrorKind::Other(io::Error::other(error)),
        };
        CallError { call, kind }
    }
}

/// One line for the operator about a `/dev/mshv` that can't be opened.
fn unavailable(errno: i32) -> HypervisorError {
    let reason = match Errno::from_raw_os_error(errno) {
        Errno::NOENT => {
            "there is no /dev/mshv: this is not the root partition of Microsoft's hypervisor, or the mshv_root module is not loaded"
                .to_owned()
        }
        Errno::ACCESS | Errno::PERM => {
            "no permission to open /dev/mshv: allow the user, or the device in this container".to_owned()
        }
        _ => format!("/dev/mshv can't be opened: {}", io::Error::from_raw_os_error(errno)),
    };
    HypervisorError::Unavailable { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_for_a_missing_mshv_is_one_line_that_says_what_to_do() {
        for (errno, expected) in [
            (Errno::NOENT, "not loaded"),
            (Errno::ACCESS, "allow"),
            (Errno::NOTTY, "can't be opened"),
        ] {
            let line = unavailable(errno.raw_os_error()).to_string();
            assert!(line.contains("/dev/mshv") && line.contains(expected), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
