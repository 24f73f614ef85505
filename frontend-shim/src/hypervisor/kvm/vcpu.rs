//! A KVM virtual CPU.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_UNKNOWN, KVM_INTERNAL_ERROR_EMULATION, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_regs,
    kvm_segment, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use rustix::io::Errno;

use super::complete::{Completion, Progress, in_nested_guest};
use super::gate::{Entry, Pass};
use super::stopped::{find_fault, find_refusal};
use super::{Machine, failed};
use crate::fault::{Backing, FaultPlace};
use crate::hypervisor::{GuestAddress, HypervisorError, MemoryFault, Vcpu, VcpuEntry, VcpuExit};
use crate::x86::long_mode::{
    CODE_SELECTOR, CR0, CR4_PAE, DATA_SELECTOR, EFER, RFLAGS_RESERVED, TYPE_CODE_READ_ACCESSED,
    TYPE_DATA_WRITE_ACCESSED,
};

/// Exception vector of an instruction that does not exist (AMD64 APM volume 2, 8.2.7).
const INVALID_OPCODE: u8 = 6;

/// How far an instruction came that is executed here.
enum Step {
    /// It needs the access that the completion has.
    Exit,
    Fault(MemoryFault),
    Done,
    GaveUp,
}

pub(super) struct KvmVcpu {
    // Declared before `machine`, so that it is closed while the memory of the slots still exists.
    fd: VcpuFd,
    machine: Arc<Machine>,
    pass: Pass,
    /// The registers before an instruction that KVM may yet find out it can't emulate.
    before: Option<kvm_regs>,
    /// An instruction that KVM could not emulate and that is executed here.
    completion: Option<Completion>,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, machine: Arc<Machine>) -> KvmVcpu {
        let pass = machine.gate.pass();
        KvmVcpu { fd, machine, pass, before: None, completion: None }
    }

    pub(super) fn enter_long_mode(&self, entry: &VcpuEntry) -> Result<(), HypervisorError> {
        // From what the kernel made of a reset: VM entry also checks TR and LDTR, which are valid there.
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: DATA_SELECTOR,
            type_: TYPE_DATA_WRITE_ACCESSED,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
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
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        self.set_regs(kvm_regs {
            rip: entry.rip,
            rsp: entry.rsp,
            rdi: entry.rdi,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        })
    }

    pub(super) fn enter_real_mode(&self, rip: u64) -> Result<(), HypervisorError> {
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        self.set_regs(kvm_regs { rip, rflags: RFLAGS_RESERVED, ..Default::default() })
    }

    #[cfg(test)]
    pub(super) fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), HypervisorError> {
        set_xsave(&self.fd, xsave)
    }

    #[cfg(test)]
    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Goes on with the instruction that is executed here.
    fn go_on(&mut self) -> Result<Step, HypervisorError> {
        let Some(completion) = &mut self.completion else {
            return Ok(Step::Done);
        };
        let step = match completion.attempt(&self.machine) {
            Some(Progress::Exit) => return Ok(Step::Exit),
            Some(Progress::Fault(access)) => {
                let place = FaultPlace::Located(access);
                return Ok(Step::Fault(MemoryFault { place, private: false }));
            }
            Some(Progress::Retired) => {
                // Also takes back the exception that older kernels have queued for the guest.
                self.fd.set_regs(&completion.regs()).map_err(failed("KVM_SET_REGS"))?;
                if let Some(xsave) = completion.xsave() {
                    set_xsave(&self.fd, &xsave)?;
                }
                Step::Done
            }
            Some(Progress::NotMapped) | None => Step::GaveUp,
        };
        self.completion = None;
        Ok(step)
    }

    /// After KVM's emulator gave up: the first exit of the instruction, executed here. Without a device to
    /// exit for, it may be the memory of one that made the emulator give up, as it does where a locked
    /// access is refused.
    /// `before` has the registers of its beginning, unless they are still the same.
    fn emulation_failed(
        &mut self,
        before: Option<kvm_regs>,
    ) -> Result<VcpuExit<'_>, HypervisorError> {
        self.completion = Completion::new(&self.fd, &self.machine);
        let step = if self.completion.is_some() {
            self.go_on()?
        } else if let Some(place) = find_refusal(&self.fd, &self.machine) {
            // Also takes back the exception that older kernels have queued for the guest.
            self.set_regs(match before {
                Some(regs) => regs,
                None => self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
            })?;
            Step::Fault(MemoryFault { place, private: false })
        } else {
            Step::GaveUp
        };
        self.exit(step)
    }

    fn exit(&mut self, step: Step) -> Result<VcpuExit<'_>, HypervisorError> {
        match step {
            Step::Exit => {
                let completion = self.completion.as_mut().expect("it announced the exit");
                Ok(completion.exit().expect("it announced the exit"))
            }
            Step::Fault(fault) => Ok(VcpuExit::MemoryFault(fault)),
            Step::Done => Ok(VcpuExit::Interrupted),
            Step::GaveUp => self.give_up(),
        }
    }

    /// An instruction that neither KVM nor we can complete. The user space of the guest, and guests of
    /// the guest, get the exception that KVM itself would give them; they must not stop the machine.
    pub(super) fn give_up(&self) -> Result<VcpuExit<'static>, HypervisorError> {
        let sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        if sregs.ss.dpl != 3 && !in_nested_guest(&self.fd) {
            let rip = self.fd.get_regs().ok().map(|regs| regs.rip);
            return Ok(VcpuExit::InternalError { suberror: KVM_INTERNAL_ERROR_EMULATION, rip });
        }
        let mut events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        (events.exception.injected, events.exception.nr) = (1, INVALID_OPCODE);
        (events.exception.has_error_code, events.exception.error_code) = (0, 0);
        self.fd.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        Ok(VcpuExit::Interrupted)
    }

    /// Where the access of the next instruction went that KVM could not complete.
    pub(super) fn find_fault(&self) -> FaultPlace {
        find_fault(&self.fd, &self.machine)
    }

    fn set_regs(&self, regs: kvm_regs) -> Result<(), HypervisorError> {
        self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit<'_>, HypervisorError> {
        if self.completion.is_some() {
            match self.go_on()? {
                Step::Done => {}
                step => return self.exit(step),
            }
        }
        // EFAULT alone and EFAULT with KVM_EXIT_MEMORY_FAULT are told apart by the exit reason. Kernels
        // that have KVM_EXIT_MEMORY_FAULT (since 6.8) reset it when they begin to run the guest, but not
        // where KVM_RUN fails before that; a reason from an earlier run must not stay.
        self.fd.get_kvm_run().exit_reason = KVM_EXIT_UNKNOWN;
        // Finishing what an exit is in hand for is all that KVM_RUN does then.
        let entry = self.machine.gate.enter(&mut self.pass, &self.fd)?;
        self.fd.set_kvm_immediate_exit(u8::from(entry == Entry::Finish));
        let fd: *mut VcpuFd = &mut self.fd;
        // SAFETY: this is `&mut self.fd`. The detour hides from the borrow checker that exits without
        // data end the borrow, which it can't see while other arms return theirs.
        let result = unsafe { &mut *fd }.run();
        let reading = matches!(
            result,
            Ok(kvm_ioctls::VcpuExit::MmioRead(..) | kvm_ioctls::VcpuExit::IoIn(..))
        );
        if self.machine.gate.leave(&self.pass, reading) {
            self.machine.add_waiting();
        }
        let before = self.before.take();
        match result {
            Ok(kvm_ioctls::VcpuExit::MmioRead(address, data)) => {
                // Memory that refuses: where KVM emulates everything, it exits for the read, and gives up
                // where the write has to be one locked access with it. Registers have changed by then.
                if self.machine.backing(GuestAddress(address), false) != Backing::NoSlot {
                    self.before = self.fd.get_regs().ok();
                }
                Ok(VcpuExit::MmioRead { address: GuestAddress(address), data })
            }
            Ok(kvm_ioctls::VcpuExit::MmioWrite(address, data)) => {
                Ok(VcpuExit::MmioWrite { address: GuestAddress(address), data })
            }
            Ok(kvm_ioctls::VcpuExit::IoIn(port, data)) => {
                let (start, len) = (data.as_mut_ptr(), data.len());
                // SAFETY: `data` is not used any more; what follows it points to the same bytes.
                let width = pio_width(unsafe { &mut *fd }, len);
                // SAFETY: KVM puts the data on a page of its own behind `struct kvm_run`, mapped as
                // long as the fd, which the result borrows.
                let data = unsafe { std::slice::from_raw_parts_mut(start, len) };
                Ok(VcpuExit::PioRead { port, width, data })
            }
            Ok(kvm_ioctls::VcpuExit::IoOut(port, data)) => {
                let (start, len) = (data.as_ptr(), data.len());
                // SAFETY: as for IoIn.
                let width = pio_width(unsafe { &mut *fd }, len);
                // SAFETY: as for IoIn.
                let data = unsafe { std::slice::from_raw_parts(start, len) };
                Ok(VcpuExit::PioWrite { port, width, data })
            }
            Ok(kvm_ioctls::VcpuExit::MemoryFault { flags, gpa, size }) => {
                let fault = MemoryFault::reported(GuestAddress(gpa), size, None);
                let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
                Ok(VcpuExit::MemoryFault(MemoryFault { private, ..fault }))
            }
            Ok(kvm_ioctls::VcpuExit::Hlt) => Ok(VcpuExit::Halted),
            Ok(kvm_ioctls::VcpuExit::Shutdown | kvm_ioctls::VcpuExit::SystemEvent(..)) => {
                Ok(VcpuExit::Shutdown)
            }
            Ok(kvm_ioctls::VcpuExit::Intr) => Ok(VcpuExit::Interrupted),
            Ok(kvm_ioctls::VcpuExit::FailEntry(reason, cpu)) => {
                Ok(VcpuExit::FailEntry { reason, cpu })
            }
            Ok(kvm_ioctls::VcpuExit::InternalError) => {
                // SAFETY: this exit holds no borrow of the fd, so that there is no other one.
                match internal_error(unsafe { &mut *fd }) {
                    VcpuExit::InternalError { suberror: KVM_INTERNAL_ERROR_EMULATION, .. } => {
                        self.emulation_failed(before)
                    }
                    other => Ok(other),
                }
            }
            Ok(_) => {
                // SAFETY: whatever such an exit borrows is not used any more.
                let reason = unsafe { &mut *fd }.get_kvm_run().exit_reason;
                Ok(VcpuExit::Unexpected { reason })
            }
            Err(error) => match Errno::from_raw_os_error(error.errno()) {
                Errno::INTR | Errno::AGAIN => Ok(VcpuExit::Interrupted),
                // Released kernels say no more than this when the memory of a slot refuses the access.
                Errno::FAULT => Ok(VcpuExit::MemoryFault(MemoryFault {
                    place: self.find_fault(),
                    private: false,
                })),
                // Memory of the host is damaged. That is no device that stopped decoding.
                Errno::HWPOISON => {
                    let fault = MemoryFault { place: self.find_fault(), private: false };
                    let source = io::Error::other(format!("the host's memory is damaged: {fault}"));
                    Err(HypervisorError::Call { call: "KVM_RUN", source })
                }
                _ => Err(failed("KVM_RUN")(error)),
            },
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if self.machine.gate.forget(&self.pass) {
            self.machine.add_waiting();
        }
    }
}

/// Sets the vector registers from an image that `KVM_GET_XSAVE` gave.
fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), HypervisorError> {
    // SAFETY: the kernel reads no more than the structure: where the guest has features that need a
    // longer image, KVM_GET_XSAVE fails.
    unsafe { fd.set_xsave(xsave) }.map_err(failed("KVM_SET_XSAVE"))
}

/// Bytes of one access: with REP INS and REP OUTS, one exit has several.
fn pio_width(fd: &mut VcpuFd, len: usize) -> usize {
    // SAFETY: the exit reason was KVM_EXIT_IO, so `io` is the field that is set.
    let width = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    // Never 0, which would divide the data into nothing.
    usize::from(width).clamp(1, len.max(1))
}

fn internal_error(fd: &mut VcpuFd) -> VcpuExit<'static> {
    let rip = fd.get_regs().ok().map(|regs| regs.rip);
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so `internal` is the field that is set.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    VcpuExit::InternalError { suberror, rip }
}
