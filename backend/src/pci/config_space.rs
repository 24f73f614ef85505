//! Configuration space: bytes, and for each bit what software can do to it.

use std::fmt;

use super::effects::ResetKind;

/// One register: its name, where it is, and what its bits do.
///
/// The registers of a function are the only description of its configuration space, used to run
/// it and fit to be printed. A bit in no mask is read-only. Configuration space that no register
/// covers reads 0 and ignores writes, as reserved registers do (PCI 6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Register {
    /// The specification's name.
    pub name: &'static str,
    /// Offset in configuration space, in bytes.
    pub offset: usize,
    /// Size of the register.
    pub width: RegisterWidth,
    /// Value at power-on.
    pub reset: u32,
    /// Bits that software sets and clears.
    pub read_write: u32,
    /// Bits that the function sets, and software clears by writing 1.
    pub write_one_to_clear: u32,
    /// Bits that the function itself changes: all read-only bits that ever move, and those
    /// write-1-to-clear bits that are ever set.
    pub volatile: u32,
    /// Bits that belong to the link and not to the function: a soft and a function level reset do
    /// not touch them (PCIe 6.6.2), a hot reset does.
    pub reset_retains: u32,
    /// Sticky bits (PCIe 7.4: ROS, RWS, RW1CS): no reset touches them, but for power-on.
    pub sticky: u32,
}

/// Size of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RegisterWidth {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Dword,
}

impl RegisterWidth {
    /// Size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
        }
    }
}

impl Register {
    pub(super) const fn byte(name: &'static str, offset: usize) -> Self {
        Self::read_only(name, offset, RegisterWidth::Byte)
    }

    pub(super) const fn word(name: &'static str, offset: usize) -> Self {
        Self::read_only(name, offset, RegisterWidth::Word)
    }

    pub(super) const fn dword(name: &'static str, offset: usize) -> Self {
        Self::read_only(name, offset, RegisterWidth::Dword)
    }

    const fn read_only(name: &'static str, offset: usize, width: RegisterWidth) -> Self {
        Self {
            name,
            offset,
            width,
            reset: 0,
            read_write: 0,
            write_one_to_clear: 0,
            volatile: 0,
            reset_retains: 0,
            sticky: 0,
        }
    }

    pub(super) fn reset(self, value: impl Into<u32>) -> Self {
        Self { reset: value.into(), ..self }
    }

    pub(super) fn read_write(self, mask: impl Into<u32>) -> Self {
        Self { read_write: mask.into(), ..self }
    }

    pub(super) fn write_one_to_clear(self, mask: impl Into<u32>) -> Self {
        Self { write_one_to_clear: mask.into(), ..self }
    }

    pub(super) fn volatile(self, mask: impl Into<u32>) -> Self {
        Self { volatile: mask.into(), ..self }
    }

    pub(super) fn reset_retains(self, mask: impl Into<u32>) -> Self {
        Self { reset_retains: mask.into(), ..self }
    }

    pub(super) fn sticky(self, mask: impl Into<u32>) -> Self {
        Self { sticky: mask.into(), ..self }
    }

    /// What the register says about each of its bytes, lowest first.
    fn byte_rules(&self) -> impl Iterator<Item = ByteRule> {
        let reset = self.reset.to_le_bytes();
        let read_write = self.read_write.to_le_bytes();
        let write_one_to_clear = self.write_one_to_clear.to_le_bytes();
        let volatile = self.volatile.to_le_bytes();
        let reset_retains = self.reset_retains.to_le_bytes();
        let sticky = self.sticky.to_le_bytes();
        (0..self.width.bytes()).map(move |i| ByteRule {
            reset: reset[i],
            read_write: read_write[i],
            write_one_to_clear: write_one_to_clear[i],
            volatile: volatile[i],
            reset_retains: reset_retains[i],
            sticky: sticky[i],
        })
    }
}

/// The bytes of configuration space and the rule for each.
///
/// By bytes, not by registers: a request carries byte enables, so every write is a write of bytes,
/// and one that covers half a register or parts of two needs no case of its own.
#[derive(Clone)]
pub(super) struct ConfigSpace {
    registers: Vec<Register>,
    bytes: Vec<u8>,
    rules: Vec<ByteRule>,
}

#[derive(Clone, Copy, Default)]
struct ByteRule {
    reset: u8,
    read_write: u8,
    write_one_to_clear: u8,
    volatile: u8,
    reset_retains: u8,
    sticky: u8,
}

impl ConfigSpace {
    /// Configuration space of `size` bytes at power-on. All registers lie inside it.
    pub(super) fn new(size: usize, registers: Vec<Register>) -> Self {
        let mut rules = vec![ByteRule::default(); size];
        for register in &registers {
            for (rule, byte) in rules[register.offset..].iter_mut().zip(register.byte_rules()) {
                *rule = byte;
            }
        }
        let bytes = rules.iter().map(|rule| rule.reset).collect();
        Self { registers, bytes, rules }
    }

    pub(super) fn registers(&self) -> &[Register] {
        &self.registers
    }

    pub(super) fn size(&self) -> usize {
        self.bytes.len()
    }

    /// A read by software. What lies past the end is all ones.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        let present = self.bytes.get(offset..).unwrap_or_default();
        let length = present.len().min(data.len());
        data[..length].copy_from_slice(&present[..length]);
    }

    /// A write by software. What lies past the end is dropped.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        let bytes = self.bytes.get_mut(offset..).unwrap_or_default();
        let rules = self.rules.get(offset..).unwrap_or_default();
        for ((byte, rule), &value) in bytes.iter_mut().zip(rules).zip(data) {
            let written = *byte & !rule.read_write | value & rule.read_write;
            *byte = written & !(value & rule.write_one_to_clear);
        }
    }

    /// All bytes, as software reads them.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over bytes that were saved. Gives back the first offset at which a bit differs from
    /// its power-on value that nothing ever changes; then nothing was taken over.
    pub(super) fn restore(&mut self, bytes: &[u8]) -> Result<(), usize> {
        let wrong = |(byte, rule): (&u8, &ByteRule)| {
            (byte ^ rule.reset) & !(rule.read_write | rule.volatile) != 0
        };
        if bytes.len() != self.bytes.len() {
            return Err(bytes.len().min(self.bytes.len()));
        }
        if let Some(offset) = bytes.iter().zip(&self.rules).position(wrong) {
            return Err(offset);
        }
        self.bytes.copy_from_slice(bytes);
        Ok(())
    }

    /// Back to power-on values, but for what this kind of reset leaves alone.
    pub(super) fn reset(&mut self, kind: ResetKind) {
        for (byte, rule) in self.bytes.iter_mut().zip(&self.rules) {
            let retained = match kind {
                // The link stays up through both, and with it what was agreed for the link.
                ResetKind::Soft | ResetKind::FunctionLevel => rule.reset_retains | rule.sticky,
                ResetKind::Hot => rule.sticky,
                ResetKind::Device => 0,
            };
            *byte = *byte & retained | rule.reset & !retained;
        }
    }

    pub(super) fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    pub(super) fn u32_at(&self, offset: usize) -> u32 {
        let low = u32::from(self.u16_at(offset));
        u32::from(self.u16_at(offset + 2)) << 16 | low
    }

    /// A change by the function itself, which no mask limits.
    pub(super) fn set_u16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// A change by the function itself, which no mask limits.
    pub(super) fn set_u32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
}

impl fmt::Debug for ConfigSpace {
    /// The bytes only: the rest follows from the function's specification.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
