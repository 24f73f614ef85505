//! The built-in guest programs: bare-metal x86-64 code, assembled at run time, that does to PCI
//! functions what a hostile or busy guest does and checks every value that it reads.
//!
//! The same code runs on KVM and on the software hypervisor in
//! [`hypervisor::model`](crate::hypervisor::model). It uses no interrupts, no floating point and only
//! instructions that KVM's emulator knows, so that it runs where KVM has to emulate every one of them.
//!
//! To run: map [`RAM_SIZE`] bytes of RAM at guest-physical 0, [`Parameters::install`],
//! [`Program::load`] each program that is needed, and create virtual CPUs with [`Program::entry`].
//! Results are read from RAM while the guest runs, or after it: [`StatBlock`], [`ProbeReport`],
//! [`EduReport`], [`InstructionsReport`].

mod asm;
mod edu;
mod hammer;
mod instructions;
mod layout;
mod lost_ram;
mod page_tables;
mod probe;
mod recover;
mod stats;
#[cfg(test)]
mod tests;
mod toggle;

pub use self::edu::EduReport;
pub use self::instructions::{
    InstructionGroup, InstructionKind, InstructionReport, InstructionsParameters,
    InstructionsReport,
};
pub use self::layout::{
    ConfigAddress, DMA_BUFFER, Device, LOST_RAM, LOST_RAM_SIZE, MAX_DEVICES, MAX_VCPUS, Parameters,
    RAM_SIZE, request_stop,
};
pub use self::page_tables::{MMIO_WINDOW, MMIO_WINDOW_SIZE};
pub use self::probe::{FoundFunction, ProbeReport};
pub use self::stats::{RunState, StatBlock, WrongValue};

use crate::hypervisor::memory::AccessError;
use crate::hypervisor::{GuestAddress, HostMapping, VcpuEntry};

/// A program writes one byte here when it has finished: 0 if every value was right, else 1. It then halts.
/// ([`Program::Hammer`] and [`Program::Recover`] only halt.)
pub const EXIT_PORT: u16 = 0x604;

/// [`Program::LostRam`] writes one byte here when its RAM shall go.
pub const LOSE_RAM_PORT: u16 = 0x605;

/// CONFIG_ADDRESS and CONFIG_DATA (PCI Local Bus 3.0, 3.2.2.3.2).
pub const CONFIG_ADDRESS_PORT: u16 = 0xcf8;
/// See [`CONFIG_ADDRESS_PORT`].
pub const CONFIG_DATA_PORT: u16 = 0xcfc;

/// A built-in guest program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Switches memory decode of every function off and on, and checks what reads return in between.
    /// For one virtual CPU, which must be number 0; sets the stop flag at its end.
    Toggle,
    /// Reads and writes the BARs of all functions, with every width, until the stop flag is set. For any
    /// number of virtual CPUs; not for number 0 where that runs [`Program::Toggle`] at the same time.
    Hammer,
    /// Looks for functions that were reset behind the guest's back, and programs them anew: BAR0 of edu
    /// functions and BAR2 of ivshmem functions. Until the stop flag is set. For one virtual CPU, which
    /// must be number 0; the others run [`Program::Hammer`], with [`Parameters::resets`].
    Recover,
    /// Enumerates bus 0 through ports and compares with ECAM.
    Probe,
    /// Makes each edu function compute a factorial and copy a buffer by DMA there and back.
    Edu,
    /// Makes every kind of access that an instruction can make to BARs, with decode on and off. Needs
    /// [`InstructionsParameters`] as well. For one virtual CPU.
    Instructions,
    /// Reads RAM at [`LOST_RAM`] before and after the VMM took its memory away. It has no right way to
    /// end: the virtual machine has to be stopped.
    LostRam,
}

impl Program {
    /// Machine code, to be placed at the program's address.
    ///
    /// # Errors
    /// [`GuestError::Assemble`], which would be a bug of ours.
    pub fn assemble(self) -> Result<Vec<u8>, GuestError> {
        let code = match self {
            Program::Toggle => toggle::assemble(self.address()),
            Program::Hammer => hammer::assemble(self.address()),
            Program::Probe => probe::assemble(self.address()),
            Program::Edu => edu::assemble(self.address()),
            Program::Instructions => instructions::assemble(self.address()),
            Program::LostRam => lost_ram::assemble(self.address()),
            Program::Recover => recover::assemble(self.address()),
        };
        code.map_err(|error| GuestError::Assemble(error.to_string()))
    }

    /// Assembles the program into guest RAM.
    ///
    /// # Errors
    /// [`GuestError::Assemble`], and [`GuestError::Ram`] for RAM smaller than [`RAM_SIZE`].
    pub fn load(self, ram: &HostMapping) -> Result<(), GuestError> {
        Ok(ram.write(self.address(), &self.assemble()?)?)
    }

    /// Where virtual CPU `vcpu` starts to execute the program.
    ///
    /// # Errors
    /// [`GuestError::TooManyVcpus`].
    pub fn entry(self, vcpu: u32) -> Result<VcpuEntry, GuestError> {
        if vcpu >= MAX_VCPUS {
            return Err(GuestError::TooManyVcpus { vcpu });
        }
        Ok(VcpuEntry {
            rip: self.address(),
            rsp: layout::stack_top(vcpu),
            rdi: vcpu.into(),
            page_table_root: GuestAddress(layout::PAGE_TABLES),
        })
    }

    fn address(self) -> u64 {
        layout::code(match self {
            Program::Toggle => 0,
            Program::Hammer => 1,
            Program::Probe => 2,
            Program::Edu => 3,
            Program::Instructions => 4,
            Program::LostRam => 5,
            Program::Recover => 6,
        })
    }
}

/// Why a guest can't be set up or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The device table has [`MAX_DEVICES`] rows.
    #[error("{devices} devices are more than the guest's table of {MAX_DEVICES}")]
    TooManyDevices {
        /// Devices asked for.
        devices: usize,
    },
    /// There are stacks and stat blocks for [`MAX_VCPUS`] virtual CPUs.
    #[error("vCPU {vcpu} is beyond the guest's {MAX_VCPUS}")]
    TooManyVcpus {
        /// Virtual CPU asked for.
        vcpu: u32,
    },
    /// The assembler refused a program.
    #[error("built-in guest program does not assemble: {0}")]
    Assemble(String),
    /// Guest RAM is smaller than [`RAM_SIZE`], or inaccessible.
    #[error("guest RAM: {0}")]
    Ram(#[from] AccessError),
}
