//! Enumeration of bus 0, by ports and by ECAM.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    dword_ptr, dx, eax, ecx, edx, qword_ptr, r10d, r12, r13, r13d, r14, r14d, r15, rbx,
};

use super::asm::{Assembly, Width};
use super::layout::{PROBE_RESULT, control};
use super::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, GuestError, StatBlock, WrongValue};
use crate::hypervisor::HostMapping;

/// The result: a count, then 8 bytes per function found.
const COUNT: i32 = 0;
const ENTRIES: i32 = 64;
/// Functions of a bus.
const FUNCTIONS: u32 = 256;

/// What `probe` found on bus 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReport {
    /// Functions that answer through the ports, by routing ID.
    pub functions: Vec<FoundFunction>,
    /// Functions, absent ones included, whose ID reads otherwise through ECAM.
    pub mismatches: u64,
    /// The first of them: `address` in ECAM, `value` through ECAM, `expected` through the ports.
    pub first_mismatch: Option<WrongValue>,
}

/// A function that answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundFunction {
    /// Routing ID: bus << 8 | device << 3 | function.
    pub bdf: u16,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
}

impl ProbeReport {
    /// Reads what the program found so far, run by virtual CPU `vcpu`.
    ///
    /// # Errors
    /// [`GuestError::TooManyVcpus`] and [`GuestError::Ram`].
    pub fn read(ram: &HostMapping, vcpu: u32) -> Result<ProbeReport, GuestError> {
        let stats = StatBlock::read(ram, vcpu)?;
        let count = ram.load_u64(PROBE_RESULT)?.min(FUNCTIONS.into());
        let entries = PROBE_RESULT + u64::from(ENTRIES.unsigned_abs());
        let mut functions = Vec::new();
        for at in (entries..).step_by(8).zip(0..count).map(|(at, _)| at) {
            let half = |offset| {
                let mut data = [0; 2];
                ram.read(at + offset, &mut data).map(|()| u16::from_le_bytes(data))
            };
            functions.push(FoundFunction { bdf: half(0)?, vendor: half(4)?, device: half(6)? });
        }
        Ok(ProbeReport { functions, mismatches: stats.wrong, first_mismatch: stats.first_wrong })
    }
}

/// Registers beyond the common ones: `r10` ID through the ports, `r14` functions found, `r15` result.
pub(super) fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = Assembly::new()?;
    let (mut next, mut absent) = (asm.label(), asm.label());
    asm.a.xor(r13, r13)?;
    asm.a.xor(r14, r14)?;
    asm.a.mov(r15, PROBE_RESULT)?;
    asm.bind(&mut next)?;

    asm.a.mov(eax, r13d)?;
    asm.a.shl(eax, 8)?;
    asm.a.or(eax, i32::MIN)?;
    asm.a.mov(edx, u32::from(CONFIG_ADDRESS_PORT))?;
    asm.a.out(dx, eax)?;
    asm.a.mov(edx, u32::from(CONFIG_DATA_PORT))?;
    asm.a.in_(eax, dx)?;
    asm.a.mov(r10d, eax)?;

    asm.a.mov(rbx, r13)?;
    asm.a.shl(rbx, 12)?;
    asm.a.add(rbx, qword_ptr(r12 + control::ECAM))?;
    asm.read(Width::Dword)?;
    asm.a.mov(ecx, r10d)?;
    asm.expect()?;

    asm.a.cmp(r10d, -1)?;
    asm.a.je(absent)?;
    asm.a.mov(dword_ptr(r15 + r14 * 8 + ENTRIES), r13d)?;
    asm.a.mov(dword_ptr(r15 + r14 * 8 + (ENTRIES + 4)), r10d)?;
    asm.a.inc(r14d)?;
    asm.a.mov(qword_ptr(r15 + COUNT), r14)?;
    asm.bind(&mut absent)?;
    asm.a.inc(r13)?;
    asm.a.cmp(r13d, FUNCTIONS)?;
    asm.a.jb(next)?;
    asm.exit()?;
    asm.finish(address)
}
