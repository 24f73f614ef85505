//! Where everything lies in guest RAM, and the flat image of it.

use crate::{Result, boot, program};

/// Where the image is loaded: the first byte above what the firmware uses.
pub(crate) const LOAD: u32 = 0x10_0000;
/// The multiboot header, and behind it what the loader enters.
pub(crate) const ENTRY: u32 = LOAD + 0x40;
pub(crate) const GDT: u32 = LOAD + 0x800;
pub(crate) const PAGE_TABLES: u32 = LOAD + 0x1000;
/// What the second processor starts with. It is copied to [`TRAMPOLINE`].
pub(crate) const TRAMPOLINE_SOURCE: u32 = LOAD + 0x7000;
pub(crate) const TRAMPOLINE_SIZE: u32 = 0x100;
/// Variables of both processors.
pub(crate) const VARIABLES: u32 = LOAD + 0x7800;
pub(crate) const TEXTS: u32 = LOAD + 0x7c00;
/// Both processors come here in long mode.
pub(crate) const PROGRAM: u32 = LOAD + 0x8000;
const LOAD_END: u32 = LOAD + 0xa000;
/// The stacks, which grow down.
pub(crate) const STACKS: [u32; 2] = [LOAD + 0xc000, LOAD + 0xe000];
/// Interrupt descriptors, filled in by the program.
pub(crate) const INTERRUPTS: u32 = LOAD + 0xe000;
/// Task states of both processors, and the stacks for traps: other ones, in case that the stack is what is wrong.
pub(crate) const TASKS: [u32; 2] = [LOAD + 0xf000, LOAD + 0xf100];
pub(crate) const TRAP_STACKS: [u32; 2] = [LOAD + 0x1_0000, LOAD + 0x1_1000];
const RAM_END: u32 = LOAD + 0x1_1000;

/// Below 1 MiB and at a page, as a processor starts in real mode there. Neither the loader's structures
/// nor what the firmware keeps is at 0x8000.
pub(crate) const TRAMPOLINE: u32 = 0x8000;

/// The multiboot header (Multiboot 0.6.96, 3.1.1): 32-bit words, the last of which is the entry.
const MAGIC: u32 = 0x1bad_b002;
const HAS_ADDRESSES: u32 = 1 << 16;

/// The whole image.
pub(crate) fn make() -> Result<Vec<u8>> {
    let mut image = Image { bytes: vec![0; (LOAD_END - LOAD) as usize] };
    let header = [
        MAGIC,
        HAS_ADDRESSES,
        MAGIC.wrapping_add(HAS_ADDRESSES).wrapping_neg(),
        LOAD,
        LOAD,
        LOAD_END,
        RAM_END,
        ENTRY,
    ];
    image.put(LOAD, ENTRY, &words(&header))?;
    image.put(ENTRY, GDT, &boot::first_processor()?)?;
    image.put(GDT, PAGE_TABLES, &boot::gdt())?;
    image.put(PAGE_TABLES, TRAMPOLINE_SOURCE, &boot::page_tables())?;
    image.put(
        TRAMPOLINE_SOURCE,
        TRAMPOLINE_SOURCE + TRAMPOLINE_SIZE,
        &boot::second_processor()?,
    )?;
    let (code, texts) = program::make()?;
    image.put(TEXTS, PROGRAM, &texts)?;
    image.put(PROGRAM, LOAD_END, &code)?;
    Ok(image.bytes)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Puts a part at its address; the next part begins at `end`.
    fn put(&mut self, address: u32, end: u32, part: &[u8]) -> Result<()> {
        if part.len() > (end - address) as usize {
            return Err(format!("{} bytes for {address:#x} to {end:#x}", part.len()).into());
        }
        let at = (address - LOAD) as usize;
        self.bytes[at..at + part.len()].copy_from_slice(part);
        Ok(())
    }
}
