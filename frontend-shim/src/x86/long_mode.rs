//! What makes 64-bit mode, and the bits of its page tables (AMD64 APM volume 2).

use super::alu;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
/// Read-only pages bind the kernel too (3.1.1).
pub(crate) const CR0_WP: u64 = 1 << 16;
/// CR0 with paging, as virtual CPUs start (14.6).
pub(crate) const CR0: u64 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
pub(crate) const CR4_PAE: u64 = 1 << 5;
/// Page tables of five levels: linear addresses have 57 bits instead of 48 (3.1.3).
pub(crate) const CR4_LA57: u64 = 1 << 12;
const EFER_LME: u64 = 1 << 8;
/// Long mode is active (3.1.7).
pub(crate) const EFER_LMA: u64 = 1 << 10;
/// EFER in long mode.
pub(crate) const EFER: u64 = EFER_LME | EFER_LMA;

/// RFLAGS with nothing but the bit that is always one.
pub(crate) const RFLAGS_RESERVED: u64 = alu::ALWAYS;

/// Selectors that a GDT would have; nothing reloads a segment, so there is none.
pub(crate) const CODE_SELECTOR: u16 = 0x08;
pub(crate) const DATA_SELECTOR: u16 = 0x10;

/// Segment types (4.7 and 4.8).
pub(crate) const TYPE_CODE_READ_ACCESSED: u8 = 0xb;
pub(crate) const TYPE_DATA_WRITE_ACCESSED: u8 = 0x3;

/// Bits of a page table's entry (5.4.1).
pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const LARGE: u64 = 1 << 7;
