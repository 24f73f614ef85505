//! Intercept messages, from the bytes that the hypervisor writes (Hyper-V TLFS, "Intercepts" and "SynIC
//! message format") to plain values.
//!
//! Nothing about a message is believed before it is checked: what is out of range is a [`MessageError`].

use crate::GuestAddress;
use crate::fault::FaultAccess;

/// Size of a message with its header (`hv_message`).
pub(super) const MESSAGE_SIZE: usize = 256;
const HEADER_SIZE: usize = 16;
/// What follows the header.
pub(super) const PAYLOAD_SIZE: usize = MESSAGE_SIZE - HEADER_SIZE;

/// Most instruction bytes that a message has room for.
const INSTRUCTION_ROOM: usize = 16;

/// Message types (`hv_message_type`).
mod kind {
    pub(super) const NONE: u32 = 0;
    pub(super) const UNMAPPED_GPA: u32 = 0x8000_0000;
    pub(super) const GPA_INTERCEPT: u32 = 0x8000_0001;
    pub(super) const UNACCEPTED_GPA: u32 = 0x8000_0003;
    pub(super) const GPA_ATTRIBUTE_INTERCEPT: u32 = 0x8000_0004;
    pub(super) const INVALID_VP_REGISTER_VALUE: u32 = 0x8000_0020;
    pub(super) const UNRECOVERABLE_EXCEPTION: u32 = 0x8000_0021;
    pub(super) const X64_IO_PORT_INTERCEPT: u32 = 0x8001_0000;
    pub(super) const X64_HALT: u32 = 0x8001_0007;
}

/// Offsets in `hv_message_header`.
mod header {
    pub(super) const TYPE: usize = 0;
    pub(super) const PAYLOAD_SIZE: usize = 4;
}

/// Offsets in the payload: `hv_x64_intercept_message_header`, with which every payload that is read here
/// begins.
mod intercept {
    pub(super) const ACCESS_TYPE: usize = 5;
    pub(super) const EXECUTION_STATE: usize = 6;
    pub(super) const EFER_LMA: u16 = 1 << 4;
    pub(super) const CS_ATTRIBUTES: usize = 22;
    pub(super) const CS_LONG: u16 = 1 << 13;
    pub(super) const RIP: usize = 24;
}

/// Offsets in the payload of `hv_x64_memory_intercept_message`.
mod memory {
    pub(super) const SIZE: usize = 80;
    pub(super) const INSTRUCTION_BYTE_COUNT: usize = 44;
    pub(super) const ACCESS_INFO: usize = 45;
    pub(super) const GVA_VALID: u8 = 1 << 0;
    pub(super) const GVA_GPA_VALID: u8 = 1 << 1;
    pub(super) const GVA: usize = 48;
    pub(super) const GPA: usize = 56;
    pub(super) const INSTRUCTION_BYTES: usize = 64;
}

/// Offsets in the payload of `hv_x64_io_port_intercept_message`, as far as it is read.
mod port {
    pub(super) const SIZE: usize = 72;
    pub(super) const INSTRUCTION_BYTE_COUNT: usize = 43;
    pub(super) const INSTRUCTION_BYTES: usize = 56;
}

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message(pub(super) [u8; MESSAGE_SIZE]);

/// Why the hypervisor stopped a virtual processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Intercept {
    /// Nothing happened.
    None,
    /// The guest accessed a page that is not mapped, or mapped without that permission.
    Memory(MemoryIntercept),
    /// IN, OUT, INS or OUTS. The instruction says which port and how wide.
    Port(Code),
    Halt,
    /// Triple fault.
    UnrecoverableException,
    /// The hypervisor does not enter a guest with such registers: the message type, which is all it says.
    InvalidRegister(u32),
    /// A confidential guest wants memory converted between private and shared; the first address, where
    /// the message says it.
    Conversion(Option<GuestAddress>),
    /// Something that none of our guests causes: its message type.
    Other(u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MemoryIntercept {
    /// The linear address accessed, where the hypervisor knows it.
    pub(super) gva: Option<u64>,
    /// The address that it is translated to, where that is known.
    pub(super) gpa: Option<GuestAddress>,
    pub(super) access: FaultAccess,
    pub(super) code: Code,
}

/// The instruction that was intercepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Code {
    pub(super) rip: u64,
    /// Whether it was fetched in 64-bit mode.
    pub(super) long_mode: bool,
    bytes: [u8; INSTRUCTION_ROOM],
    len: usize,
}

impl Code {
    /// As much of it as the hypervisor had fetched: perhaps nothing, perhaps less than the instruction.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Replaces them by what was fetched instead; no instruction is longer than there is room.
    pub(super) fn set_bytes(&mut self, bytes: &[u8]) {
        self.len = bytes.len().min(INSTRUCTION_ROOM);
        self.bytes[..self.len].copy_from_slice(&bytes[..self.len]);
    }
}

/// A message that can't be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    #[error("message {kind:#x} has {len} bytes of payload instead of {expected} to {PAYLOAD_SIZE}")]
    PayloadSize { kind: u32, len: usize, expected: usize },
    #[error("message {kind:#x} has access type {value}")]
    AccessType { kind: u32, value: u8 },
    #[error("message {kind:#x} has {value} instruction bytes, but room for {INSTRUCTION_ROOM}")]
    InstructionByteCount { kind: u32, value: u8 },
}

impl Message {
    /// What it says.
    ///
    /// # Errors
    /// Where the message contradicts its own format.
    pub(super) fn decode(&self) -> Result<Intercept, MessageError> {
        let kind = u32::from_le_bytes(self.header(header::TYPE));
        Ok(match kind {
            kind::NONE => Intercept::None,
            kind::UNMAPPED_GPA | kind::GPA_INTERCEPT => Intercept::Memory(self.memory(kind)?),
            kind::UNACCEPTED_GPA => Intercept::Conversion(self.memory(kind)?.gpa),
            kind::GPA_ATTRIBUTE_INTERCEPT => Intercept::Conversion(None),
            kind::X64_IO_PORT_INTERCEPT => Intercept::Port(self.port(kind)?),
            kind::X64_HALT => Intercept::Halt,
            kind::UNRECOVERABLE_EXCEPTION => Intercept::UnrecoverableException,
            kind::INVALID_VP_REGISTER_VALUE => Intercept::InvalidRegister(kind),
            other => Intercept::Other(other),
        })
    }

    fn memory(&self, kind: u32) -> Result<MemoryIntercept, MessageError> {
        self.expect_payload(kind, memory::SIZE)?;
        let [info] = self.payload(memory::ACCESS_INFO);
        let address = |valid, at| (info & valid != 0).then(|| u64::from_le_bytes(self.payload(at)));
        Ok(MemoryIntercept {
            gva: address(memory::GVA_VALID, memory::GVA),
            gpa: address(memory::GVA_GPA_VALID, memory::GPA).map(GuestAddress),
            access: self.access(kind)?,
            code: self.code(kind, memory::INSTRUCTION_BYTE_COUNT, memory::INSTRUCTION_BYTES)?,
        })
    }

    fn port(&self, kind: u32) -> Result<Code, MessageError> {
        self.expect_payload(kind, port::SIZE)?;
        self.code(kind, port::INSTRUCTION_BYTE_COUNT, port::INSTRUCTION_BYTES)
    }

    fn expect_payload(&self, kind: u32, expected: usize) -> Result<(), MessageError> {
        let [len] = self.header(header::PAYLOAD_SIZE);
        let len = usize::from(len);
        if (expected..=PAYLOAD_SIZE).contains(&len) {
            Ok(())
        } else {
            Err(MessageError::PayloadSize { kind, len, expected })
        }
    }

    /// `hv_intercept_access_type`.
    fn access(&self, kind: u32) -> Result<FaultAccess, MessageError> {
        match self.payload(intercept::ACCESS_TYPE) {
            [0] => Ok(FaultAccess::Read),
            [1] => Ok(FaultAccess::Write),
            [2] => Ok(FaultAccess::Execute),
            [value] => Err(MessageError::AccessType { kind, value }),
        }
    }

    fn code(&self, kind: u32, count: usize, bytes: usize) -> Result<Code, MessageError> {
        let [value] = self.payload(count);
        let len = usize::from(value);
        if len > INSTRUCTION_ROOM {
            return Err(MessageError::InstructionByteCount { kind, value });
        }
        let state = u16::from_le_bytes(self.payload(intercept::EXECUTION_STATE));
        let cs = u16::from_le_bytes(self.payload(intercept::CS_ATTRIBUTES));
        Ok(Code {
            rip: u64::from_le_bytes(self.payload(intercept::RIP)),
            long_mode: state & intercept::EFER_LMA != 0 && cs & intercept::CS_LONG != 0,
            bytes: self.payload(bytes),
            len,
        })
    }

    fn header<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("a slice of N bytes")
    }

    fn payload<const N: usize>(&self, at: usize) -> [u8; N] {
        self.header(HEADER_SIZE + at)
    }
}

#[cfg(test)]
mod tests;
