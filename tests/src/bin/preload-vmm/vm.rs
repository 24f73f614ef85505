//! The least VMM: VMs with memory slots, and virtual CPUs in real mode.

use std::fmt;

use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};

use crate::raw::{self, Answer};

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
pub(crate) const KVM_RUN: u64 = 0xae80;
pub(crate) const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;

/// Where a virtual CPU starts.
pub(crate) const CODE: u64 = 0x1000;
/// Where its data segment is: accesses by `bx` go there.
pub(crate) const DATA: u64 = 0xe000_0000;

/// `again: out 0x10, al; jmp again`
pub(crate) const EXITS: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
/// `again: mov eax, [bx]; out 0x10, eax; jmp again`
pub(crate) const READS: &[u8] = &[0x66, 0x8b, 0x07, 0x66, 0xe7, 0x10, 0xeb, 0xf8];
/// `again: inc eax; mov [bx], eax; out 0x10, eax; jmp again`
pub(crate) const WRITES: &[u8] = &[0x66, 0x40, 0x66, 0x89, 0x07, 0x66, 0xe7, 0x10, 0xeb, 0xf6];
/// `again: mov eax, [bx]; jmp again`
pub(crate) const HAMMERS: &[u8] = &[0x66, 0x8b, 0x07, 0xeb, 0xfb];
/// `again: mov cx, 0xffff; rep lodsd; jmp again`
pub(crate) const REPEATS: &[u8] = &[0xb9, 0xff, 0xff, 0xf3, 0x66, 0xad, 0xeb, 0xf8];
/// `hlt; jmp to it`
pub(crate) const HALTS: &[u8] = &[0xf4, 0xeb, 0xfd];

/// `/dev/kvm`.
pub(crate) fn kvm() -> Answer<i32> {
    raw::open("/dev/kvm")
}

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) fd: i32,
    pub(crate) run_size: usize,
    /// Where the memory is that its program is in; 0 without.
    pub(crate) memory: usize,
}

impl Vm {
    /// A VM without memory.
    pub(crate) fn bare() -> Answer<Self> {
        let kvm = kvm()?;
        let fd = raw::ioctl(kvm, KVM_CREATE_VM, 0)?;
        let run_size = raw::ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)?;
        raw::close(kvm)?;
        Ok(Self { fd, run_size: usize::try_from(run_size).unwrap_or(0), memory: 0 })
    }

    /// A VM with a program in its memory.
    pub(crate) fn new(program: &[u8]) -> Answer<Self> {
        let vm = Self::bare()?;
        let memory = raw::anonymous(0x8000)?;
        raw::put(memory + 0x1000, program);
        vm.set_slot(0, 0, 0, 0x8000, memory)?;
        Ok(Self { memory, ..vm })
    }

    pub(crate) fn set_slot(
        &self,
        slot: u32,
        flags: u32,
        guest: u64,
        len: u64,
        host: usize,
    ) -> Answer<i32> {
        let mut region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host as u64,
        };
        raw::ioctl_with(self.fd, KVM_SET_USER_MEMORY_REGION, &mut region)
    }

    pub(crate) fn vcpu(&self, id: usize) -> Answer<Vcpu> {
        let fd = raw::ioctl(self.fd, KVM_CREATE_VCPU, id)?;
        let run = raw::shared(fd, self.run_size)?;
        let vcpu = Vcpu { fd, run, run_size: self.run_size };
        let mut sregs = kvm_sregs::default();
        raw::ioctl_with(fd, KVM_GET_SREGS, &mut sregs)?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        sregs.ds.base = DATA;
        raw::ioctl_with(fd, KVM_SET_SREGS, &mut sregs)?;
        vcpu.start_at(CODE)?;
        Ok(vcpu)
    }
}

/// What a virtual CPU stopped for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Out { port: u16, value: u32 },
    MmioRead { address: u64, len: u32 },
    MmioWrite { address: u64, len: u32, value: u32 },
    Halt,
    Other(u32),
    Failed(i32, u32),
}

impl fmt::Debug for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Out { port, value } => write!(f, "out {port:#x} {value:#x}"),
            Self::MmioRead { address, len } => write!(f, "mmio read {address:#x} {len}"),
            Self::MmioWrite { address, len, value } => {
                write!(f, "mmio write {address:#x} {len} {value:#x}")
            }
            Self::Halt => write!(f, "halt"),
            Self::Other(reason) => write!(f, "exit {reason}"),
            Self::Failed(errno, reason) => write!(f, "errno {errno} exit {reason}"),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) fd: i32,
    pub(crate) run: usize,
    pub(crate) run_size: usize,
}

impl Vcpu {
    /// Puts it at an address, with registers of 0.
    pub(crate) fn start_at(&self, address: u64) -> Answer<()> {
        let mut regs = kvm_regs { rip: address, rflags: 2, ..Default::default() };
        raw::ioctl_with(self.fd, KVM_SET_REGS, &mut regs).map(drop)
    }

    pub(crate) fn run(&self) -> Exit {
        let answer = raw::ioctl(self.fd, KVM_RUN, 0);
        let reason = raw::load(self.run + EXIT_REASON);
        match (answer, reason) {
            (Err(errno), _) => Exit::Failed(errno, reason),
            (Ok(_), KVM_EXIT_IO) => self.port_exit(),
            (Ok(_), KVM_EXIT_MMIO) => self.mmio_exit(),
            (Ok(_), KVM_EXIT_HLT) => Exit::Halt,
            (Ok(_), other) => Exit::Other(other),
        }
    }

    fn port_exit(&self) -> Exit {
        let word = raw::load(self.run + DETAILS).to_le_bytes();
        assert_eq!(u32::from(word[0]), KVM_EXIT_IO_OUT);
        let port = u16::from_le_bytes([word[2], word[3]]);
        let data = self.run + raw::load(self.run + DETAILS + 8) as usize;
        let value = if word[1] == 1 { raw::load_byte(data).into() } else { raw::load(data) };
        Exit::Out { port, value }
    }

    fn mmio_exit(&self) -> Exit {
        let half = |at| u64::from(raw::load(self.run + DETAILS + at));
        let address = half(0) | half(4) << 32;
        let value = raw::load(self.run + DATA_OF_MMIO);
        let len = raw::load(self.run + DETAILS + 16);
        match raw::load_byte(self.run + DETAILS + 20) {
            0 => Exit::MmioRead { address, len },
            _ => Exit::MmioWrite { address, len, value },
        }
    }

    /// Completes an MMIO read.
    pub(crate) fn answer(&self, value: u32) {
        raw::store(self.run + DATA_OF_MMIO, value);
    }

    pub(crate) fn set_immediate_exit(&self, wanted: bool) {
        let word = raw::load(self.run) & !0xff00 | u32::from(wanted) << 8;
        raw::store(self.run, word);
    }
}

// Where `struct kvm_run` has things.
const EXIT_REASON: usize = 8;
const DETAILS: usize = 32;
const DATA_OF_MMIO: usize = DETAILS + 8;
