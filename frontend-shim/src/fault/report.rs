use std::fmt;

use crate::GuestAddress;

/// A guest access that the hypervisor could not complete although a slot is mapped there. The
/// instruction has not retired: it is executed again when the virtual CPU is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFault {
    /// What is known about where it happened.
    pub place: FaultPlace,
    /// The fault asks for a conversion between private and shared memory (confidential guests).
    pub private: bool,
}

/// Where a memory fault happened, and how that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultPlace {
    /// The hypervisor says so: `KVM_EXIT_MEMORY_FAULT`, an intercept message of mshv.
    Reported(GuestAccess),
    /// The hypervisor said nothing; the instruction has exactly one access that can have faulted.
    Located(GuestAccess),
    /// The instruction has several accesses that can have faulted, and one of them has.
    OneOf(Vec<GuestAccess>),
    /// Nobody knows.
    Unknown(Unlocated),
}

/// One access of an instruction, or the part of it within one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestAccess {
    /// First byte. A report by KVM is rounded down to a page.
    pub address: GuestAddress,
    /// Size of the range in bytes; zero if unknown. KVM reports a page or more, never the width of the
    /// access.
    pub size: u64,
    /// What the guest wanted to do, where that is known.
    pub kind: Option<FaultAccess>,
}

/// Direction of a faulting access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAccess {
    /// Data read.
    Read,
    /// Data write, or the write half of a read-modify-write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// Why a memory fault was not located.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unlocated {
    /// Nobody tried, or this hypervisor has no way to.
    #[error("nobody looked")]
    NotTried,
    /// The registers of the virtual CPU can't be read.
    #[error("the registers can't be read")]
    Registers,
    /// A linear address that the page tables of the guest do not map, or not any more.
    #[error("linear address {0:#x} is not mapped by the guest")]
    NotMapped(u64),
    /// The instruction is not in memory that may be read without side effects.
    #[error("the instruction at {0} is not in RAM")]
    CodeNotInRam(GuestAddress),
    /// No such instruction is known.
    #[error("the instruction at rip {0:#x} is unknown")]
    UnknownInstruction(u64),
    /// The addresses or masks of the instruction are in vector registers, which can't be read.
    #[error("the instruction at rip {0:#x} needs vector registers, which can't be read")]
    VectorRegisters(u64),
    /// The instruction's accesses are known, and none of them lies in a slot.
    #[error("the instruction at rip {0:#x} accesses no slot")]
    NoSlot(u64),
}

impl MemoryFault {
    /// A fault whose place the hypervisor told.
    #[must_use]
    pub fn reported(address: GuestAddress, size: u64, kind: Option<FaultAccess>) -> Self {
        let access = GuestAccess { address, size, kind };
        Self { place: FaultPlace::Reported(access), private: false }
    }

    /// A fault that could be anywhere.
    #[must_use]
    pub fn unknown(why: Unlocated) -> Self {
        Self { place: FaultPlace::Unknown(why), private: false }
    }

    /// The accesses that can have faulted; none if nothing is known.
    #[must_use]
    pub fn candidates(&self) -> &[GuestAccess] {
        match &self.place {
            FaultPlace::Reported(access) | FaultPlace::Located(access) => {
                std::slice::from_ref(access)
            }
            FaultPlace::OneOf(accesses) => accesses,
            FaultPlace::Unknown(_) => &[],
        }
    }
}

impl fmt::Display for MemoryFault {
    /// One line for the operator.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            FaultPlace::Reported(access) => write!(f, "memory fault at {access}")?,
            FaultPlace::Located(access) => {
                write!(f, "memory fault at {access}, located by its instruction")?;
            }
            FaultPlace::OneOf(accesses) => {
                f.write_str("memory fault at one of")?;
                for (index, access) in accesses.iter().enumerate() {
                    write!(f, "{} {access}", if index == 0 { "" } else { "," })?;
                }
            }
            FaultPlace::Unknown(why) => write!(f, "memory fault at an unknown address: {why}")?,
        }
        f.write_str(if self.private { ", private memory" } else { "" })
    }
}

impl fmt::Display for GuestAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Some(FaultAccess::Read) => " (read)",
            Some(FaultAccess::Write) => " (write)",
            Some(FaultAccess::Execute) => " (execute)",
            None => "",
        };
        write!(f, "{}{kind}", self.address)
    }
}
