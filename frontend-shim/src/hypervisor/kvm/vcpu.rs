//! A KVM virtual CPU.

use std::sync::Arc;

use kvm_bindings::{KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use rustix::io::Errno;

use super::{Machine, failed};
use crate::fault::Unlocated;
use crate::hypervisor::{GuestAddress, HypervisorError, MemoryFault, Vcpu, VcpuEntry, VcpuExit};

/// Bits of CR0, CR4 and EFER that make 64-bit mode (AMD64 APM volume 2, 14.6).
const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// RFLAGS with nothing but the bit that is always one.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Selectors that a GDT would have; nothing reloads a segment, so there is none.
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;

/// Segment types (AMD64 APM volume 2, 4.7 and 4.8).
const TYPE_CODE_READ_ACCESSED: u8 = 0xb;
const TYPE_DATA_WRITE_ACCESSED: u8 = 0x3;

pub(super) struct KvmVcpu {
    // Declared before `_machine`, so that it is closed while the memory of the slots still exists.
    fd: VcpuFd,
    _machine: Arc<Machine>,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, machine: Arc<Machine>) -> KvmVcpu {
        KvmVcpu { fd, _machine: machine }
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
        sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        sregs.cr3 = entry.page_table_root.0;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
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

    fn set_regs(&self, regs: kvm_regs) -> Result<(), HypervisorError> {
        self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit<'_>, HypervisorError> {
        let fd: *mut VcpuFd = &mut self.fd;
        // SAFETY: this is `&mut self.fd`. The detour hides from the borrow checker that exits without
        // data end the borrow, which it can't see while other arms return theirs.
        match unsafe { &mut *fd }.run() {
            Ok(kvm_ioctls::VcpuExit::MmioRead(address, data)) => {
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
                Ok(internal_error(unsafe { &mut *fd }))
            }
            Ok(_) => {
                // SAFETY: whatever such an exit borrows is not used any more.
                let reason = unsafe { &mut *fd }.get_kvm_run().exit_reason;
                Ok(VcpuExit::Unexpected { reason })
            }
            Err(error) => match Errno::from_raw_os_error(error.errno()) {
                Errno::INTR | Errno::AGAIN => Ok(VcpuExit::Interrupted),
                // Released kernels say no more than this when the memory of a slot refuses the access.
                Errno::FAULT => {
                    Ok(VcpuExit::MemoryFault(MemoryFault::unknown(Unlocated::NotTried)))
                }
                _ => Err(failed("KVM_RUN")(error)),
            },
        }
    }
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
