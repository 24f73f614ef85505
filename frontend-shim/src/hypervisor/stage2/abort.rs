use super::{BLOCK_SIZE, Perms};
use crate::GuestAddress;
use crate::fault::{FaultAccess, MemoryFault};
use crate::hypervisor::PAGE_SIZE;

/// One memory access of the guest; an instruction of [`Vcpu`](super::Vcpu) is one of these. It does not
/// cross a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it does.
    pub kind: FaultAccess,
    /// Where.
    pub ipa: GuestAddress,
    /// The guest takes the address for its private memory (confidential guests).
    pub private: bool,
}

impl Access {
    /// An access to memory that is shared with the host, as all of an ordinary guest's.
    #[must_use]
    pub fn new(kind: FaultAccess, ipa: u64) -> Self {
        Self { kind, ipa: GuestAddress(ipa), private: false }
    }

    /// The permission it needs.
    #[must_use]
    pub fn needs(&self) -> Perms {
        match self.kind {
            FaultAccess::Read => Perms::R,
            FaultAccess::Write => Perms::W,
            FaultAccess::Execute => Perms::X,
        }
    }
}

/// Why stage 2 stopped an access: the fault status code of the syndrome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultStatus {
    /// No valid entry.
    Translation,
    /// A valid entry that does not permit the access.
    Permission,
}

/// An access that stage 2 stopped. The instruction has not retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// The access.
    pub access: Access,
    /// Why it was stopped.
    pub status: FaultStatus,
    /// Bytes that the entry spans at which the walk ended: [`PAGE_SIZE`] or [`BLOCK_SIZE`].
    pub granule: u64,
}

/// ESR_ELx.EC, bits 31:26 (Arm ARM D24.2): instruction and data abort from a lower exception level.
const EC_SHIFT: u32 = 26;
const EC_INSTRUCTION_ABORT: u64 = 0x20;
const EC_DATA_ABORT: u64 = 0x24;
/// ESR_ELx.IL: an instruction of 32 bits, and always so in aborts without a valid ISS.
const IL: u64 = 1 << 25;
/// ISS.WnR of a data abort.
const WRITE: u64 = 1 << 6;
/// ISS.IFSC and DFSC, bits 5:0; the lowest two are the level.
const STATUS_MASK: u64 = 0x3c;
const TRANSLATION: u64 = 0x04;
const PERMISSION: u64 = 0x0c;
const LEVEL_MASK: u64 = 0x03;
const LEVEL_BLOCK: u64 = 2;
const LEVEL_PAGE: u64 = 3;

impl Abort {
    /// The abort as ESR_EL2 has it. Where it happened is not in there (HPFAR_EL2 and FAR_EL2 are), nor
    /// is what the guest takes the memory for.
    #[must_use]
    pub fn syndrome(&self) -> u64 {
        let (class, write) = match self.access.kind {
            FaultAccess::Execute => (EC_INSTRUCTION_ABORT, 0),
            FaultAccess::Read => (EC_DATA_ABORT, 0),
            FaultAccess::Write => (EC_DATA_ABORT, WRITE),
        };
        let status = match self.status {
            FaultStatus::Translation => TRANSLATION,
            FaultStatus::Permission => PERMISSION,
        };
        let level = if self.granule == BLOCK_SIZE { LEVEL_BLOCK } else { LEVEL_PAGE };
        class << EC_SHIFT | IL | write | status | level
    }

    /// The abort that `syndrome` tells of, at `ipa`; `None` for any other kind of exception, status or
    /// level.
    #[must_use]
    pub fn from_syndrome(syndrome: u64, ipa: GuestAddress) -> Option<Self> {
        let kind = match (syndrome >> EC_SHIFT & 0x3f, syndrome & WRITE != 0) {
            (EC_INSTRUCTION_ABORT, _) => FaultAccess::Execute,
            (EC_DATA_ABORT, false) => FaultAccess::Read,
            (EC_DATA_ABORT, true) => FaultAccess::Write,
            _ => return None,
        };
        let status = match syndrome & STATUS_MASK {
            TRANSLATION => FaultStatus::Translation,
            PERMISSION => FaultStatus::Permission,
            _ => return None,
        };
        let granule = match syndrome & LEVEL_MASK {
            LEVEL_BLOCK => BLOCK_SIZE,
            LEVEL_PAGE => PAGE_SIZE,
            _ => return None,
        };
        Some(Self { access: Access { kind, ipa, private: false }, status, granule })
    }

    /// The abort as a memory fault of the shim: rounded to its page.
    #[must_use]
    pub fn memory_fault(&self) -> MemoryFault {
        let Access { kind, ipa, private } = self.access;
        let page = GuestAddress(ipa.0 - ipa.0 % PAGE_SIZE);
        MemoryFault { private, ..MemoryFault::reported(page, PAGE_SIZE, Some(kind)) }
    }
}
