use iced_x86::{CodeSize, Register};

/// Registers of a virtual CPU that addresses are made of.
#[derive(Debug, Clone, Default)]
pub struct VcpuState {
    /// General-purpose registers by their number in an instruction: rax, rcx, rdx, rbx, rsp, rbp, rsi,
    /// rdi, r8 to r15.
    pub general: [u64; 16],
    /// Offset of the next instruction in the code segment.
    pub rip: u64,
    /// Bases of the segments.
    pub segments: SegmentBases,
    /// What the code segment says about instructions.
    pub code: CodeWidth,
    /// The stack segment's B bit: pushes use esp, not sp. Without meaning in 64-bit mode.
    pub stack32: bool,
}

/// Bases of the six segments.
#[derive(Debug, Clone, Default)]
pub struct SegmentBases {
    /// Base of ES.
    pub es: u64,
    /// Base of CS.
    pub cs: u64,
    /// Base of SS.
    pub ss: u64,
    /// Base of DS.
    pub ds: u64,
    /// Base of FS.
    pub fs: u64,
    /// Base of GS.
    pub gs: u64,
}

/// Default width of addresses and operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CodeWidth {
    /// Real mode, virtual 8086 mode, and code segments without the D bit.
    Bits16,
    /// Code segments with the D bit, outside of 64-bit mode.
    Bits32,
    /// 64-bit mode: long mode is active and the code segment has the L bit.
    #[default]
    Bits64,
}

impl CodeWidth {
    pub(super) fn bits(self) -> u32 {
        match self {
            CodeWidth::Bits16 => 16,
            CodeWidth::Bits32 => 32,
            CodeWidth::Bits64 => 64,
        }
    }
}

impl VcpuState {
    /// Value of a general-purpose register of any width, zero-extended; `None` for any other register.
    pub(super) fn get(&self, register: Register) -> Option<u64> {
        if !register.is_gpr() {
            return None;
        }
        let full = *self.general.get(register.full_register().number())?;
        // AH and its like are in no address.
        Some(if register.size() == 8 { full } else { full & ((1 << (8 * register.size())) - 1) })
    }

    /// Linear address of an offset in a segment.
    pub(super) fn linear(&self, segment: Register, offset: u64) -> u64 {
        let base = match segment {
            Register::FS => self.segments.fs,
            Register::GS => self.segments.gs,
            // The others are flat in 64-bit mode, whatever is in them (AMD64 APM volume 2, 4.8).
            _ if self.code == CodeWidth::Bits64 => 0,
            Register::ES => self.segments.es,
            Register::CS => self.segments.cs,
            Register::SS => self.segments.ss,
            Register::DS => self.segments.ds,
            _ => 0,
        };
        self.wrap(base.wrapping_add(offset))
    }

    /// Linear address of the next instruction.
    pub(super) fn code_address(&self) -> u64 {
        self.linear(Register::CS, self.rip)
    }

    /// Linear addresses have 32 bits outside of 64-bit mode.
    pub(super) fn wrap(&self, linear: u64) -> u64 {
        if self.code == CodeWidth::Bits64 { linear } else { linear & u64::from(u32::MAX) }
    }

    /// Width of the stack pointer.
    pub(super) fn stack_width(&self) -> CodeSize {
        match (self.code, self.stack32) {
            (CodeWidth::Bits64, _) => CodeSize::Code64,
            (_, true) => CodeSize::Code32,
            (_, false) => CodeSize::Code16,
        }
    }
}
