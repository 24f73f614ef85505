//! What each virtual CPU counts.

use super::layout::stat_block;
use super::{GuestError, MAX_VCPUS};
use crate::hypervisor::{GuestAddress, HostMapping};

/// Offsets in a stat block; every field is a u64.
pub(super) mod field {
    pub(in super::super) const STATE: i32 = 0;
    pub(in super::super) const PROGRESS: i32 = 8;
    pub(in super::super) const READS: i32 = 16;
    pub(in super::super) const READS_UR: i32 = 24;
    pub(in super::super) const NARROW_READS: i32 = 32;
    pub(in super::super) const TRAPPED_WRITES: i32 = 40;
    pub(in super::super) const MAPPED_WRITES: i32 = 48;
    pub(in super::super) const WRONG: i32 = 56;
    pub(in super::super) const WRONG_ADDRESS: i32 = 64;
    pub(in super::super) const WRONG_VALUE: i32 = 72;
    pub(in super::super) const WRONG_EXPECTED: i32 = 80;
    pub(in super::super) const RECOVERIES: i32 = 88;
}

/// Values of [`field::STATE`].
pub(super) const RUNNING: i32 = 1;
pub(super) const FINISHED: i32 = 2;

/// Counters of one virtual CPU. Each is current when it is read; together they are a consistent picture
/// only after the program has finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatBlock {
    /// How far the program is.
    pub state: RunState,
    /// `toggle`: cycles done. `hammer` and `recover`: rounds through all devices.
    pub progress: u64,
    /// Reads of BARs (`probe`: of ECAM), of any width.
    pub reads: u64,
    /// Reads that returned all ones although the register can't hold that: completed as UR.
    pub reads_ur: u64,
    /// Reads of an edu register with 1 or 2 bytes, which return all ones by the device's specification.
    /// Part of `reads`, never of `reads_ur`.
    pub narrow_reads: u64,
    /// Writes to trapped BARs, whether or not the function claimed them.
    pub trapped_writes: u64,
    /// Writes to mapped BARs, whether or not the function claimed them.
    pub mapped_writes: u64,
    /// `recover`: functions that it found reset, and programmed.
    pub recoveries: u64,
    /// Values that no correct machine returns.
    pub wrong: u64,
    /// The first of them.
    pub first_wrong: Option<WrongValue>,
}

/// How far a program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// The first instructions have not been executed.
    NotStarted,
    /// At work.
    Running,
    /// At its end, with all counters final.
    Finished,
}

/// A value that should not have been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongValue {
    /// Where it was read.
    pub address: GuestAddress,
    /// What was read, zero-extended.
    pub value: u64,
    /// A value that would have been right; not always the only one.
    pub expected: u64,
}

impl StatBlock {
    /// Reads the counters of a virtual CPU.
    ///
    /// # Errors
    /// [`GuestError::TooManyVcpus`] and [`GuestError::Ram`].
    pub fn read(ram: &HostMapping, vcpu: u32) -> Result<StatBlock, GuestError> {
        if vcpu >= MAX_VCPUS {
            return Err(GuestError::TooManyVcpus { vcpu });
        }
        let block = stat_block(vcpu);
        let get = |offset: i32| ram.load_u64(block + u64::from(offset.unsigned_abs()));
        // State first: if it says finished, everything after it is final.
        let state = match get(field::STATE)? {
            0 => RunState::NotStarted,
            state if state == u64::from(FINISHED.unsigned_abs()) => RunState::Finished,
            _ => RunState::Running,
        };
        let wrong = get(field::WRONG)?;
        let first_wrong = WrongValue {
            address: GuestAddress(get(field::WRONG_ADDRESS)?),
            value: get(field::WRONG_VALUE)?,
            expected: get(field::WRONG_EXPECTED)?,
        };
        Ok(StatBlock {
            state,
            progress: get(field::PROGRESS)?,
            reads: get(field::READS)?,
            reads_ur: get(field::READS_UR)?,
            narrow_reads: get(field::NARROW_READS)?,
            trapped_writes: get(field::TRAPPED_WRITES)?,
            mapped_writes: get(field::MAPPED_WRITES)?,
            recoveries: get(field::RECOVERIES)?,
            wrong,
            first_wrong: (wrong > 0).then_some(first_wrong),
        })
    }
}
