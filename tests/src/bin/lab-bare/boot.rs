//! From what a loader and a startup interrupt leave to long mode (AMD64 APM volume 2, 14.6).

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, ax, cr0, cr3, cr4, cs, ds, eax, ecx, ptr};

use crate::image::{ENTRY, GDT, PAGE_TABLES, PROGRAM, TASKS};

pub(crate) const CODE_SELECTOR: u16 = 8;
/// A null descriptor, 64-bit code, and the task state that has the stack for traps, in both processors'
/// tables: two words each, available, 104 bytes. There is no need for data in long mode.
const DESCRIPTORS: [u64; 6] = [0, 0x00af_9a00_0000_ffff, task(TASKS[0]), 0, task(TASKS[1]), 0];
pub(crate) const TASK_SELECTORS: [u32; 2] = [0x10, 0x20];
/// What `lgdt` reads stands behind them.
const GDT_POINTER: u32 = GDT + 48;

const fn task(base: u32) -> u64 {
    let base = base as u64;
    0x0000_8900_0000_0067 | (base & 0xff_ffff) << 16 | (base >> 24) << 56
}

/// The same for real mode, in the second processor's segment.
const SECOND_POINTER: u32 = 0x80;

const PAGING_AND_PROTECTION: u32 = 1 << 31 | 1;
/// Caches are off after INIT: CD and NW.
const CACHES_OFF: u32 = 3 << 29;
const PHYSICAL_ADDRESS_EXTENSION: u32 = 1 << 5;
const EFER: u32 = 0xc000_0080;
const LONG_MODE_ENABLE: u32 = 1 << 8;

/// The descriptor table and its pointer.
pub(crate) fn gdt() -> Vec<u8> {
    let mut gdt: Vec<u8> =
        DESCRIPTORS.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    gdt.extend(pointer());
    gdt
}

fn pointer() -> Vec<u8> {
    let limit = u16::try_from(size_of_val(&DESCRIPTORS) - 1).expect("a few descriptors");
    [limit.to_le_bytes().as_slice(), &GDT.to_le_bytes()].concat()
}

/// The lower 4 GiB, one to one, in pages of 2 MiB.
pub(crate) fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 0x1000;
    const GIBS: u64 = 4;
    let root = u64::from(PAGE_TABLES);
    let (pointers, directories) = (root + TABLE, root + 2 * TABLE);
    let mut entries = vec![0; 2 * 512];
    entries[0] = pointers | PRESENT_WRITABLE;
    for (entry, directory) in entries[512..].iter_mut().zip(0..GIBS) {
        *entry = (directories + directory * TABLE) | PRESENT_WRITABLE;
    }
    entries.extend((0..GIBS * 512).map(|page| page << 21 | PRESENT_WRITABLE | LARGE));
    entries.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect()
}

/// What the loader enters, in protected mode without paging. The address of its information stays in `ebx`.
pub(crate) fn first_processor() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.cli()?;
    a.lgdt(ptr(GDT_POINTER))?;
    enter_long_mode(&mut a)?;
    // A far jump to an absolute address: code_asm has none with an immediate.
    a.db(&[&[0xea], far_pointer().as_slice()].concat())?;
    a.assemble(ENTRY.into())
}

/// What a startup interrupt enters, in real mode at the begin of a segment.
pub(crate) fn second_processor() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.mov(ax, cs)?;
    a.mov(ds, ax)?;
    a.lgdt(ptr(SECOND_POINTER))?;
    enter_long_mode(&mut a)?;
    // The same with an operand size of 32 bits.
    a.db(&[&[0x66, 0xea], far_pointer().as_slice()].concat())?;
    let mut code = a.assemble(0)?;
    code.resize(SECOND_POINTER as usize, 0);
    code.extend(pointer());
    Ok(code)
}

fn far_pointer() -> Vec<u8> {
    [PROGRAM.to_le_bytes().as_slice(), &CODE_SELECTOR.to_le_bytes()].concat()
}

fn enter_long_mode(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, PHYSICAL_ADDRESS_EXTENSION)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PAGE_TABLES)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, LONG_MODE_ENABLE.cast_signed())?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.and(eax, (!CACHES_OFF).cast_signed())?;
    a.or(eax, PAGING_AND_PROTECTION.cast_signed())?;
    a.mov(cr0, eax)
}
