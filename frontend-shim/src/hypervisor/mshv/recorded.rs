//! Messages as the hypervisor writes them, at the offsets that its headers have for C.

use std::mem::offset_of;

use mshv_bindings::{
    hv_message, hv_message_header, hv_x64_intercept_message_header,
    hv_x64_io_port_access_info__bindgen_ty_1, hv_x64_io_port_intercept_message,
    hv_x64_memory_access_info__bindgen_ty_1, hv_x64_memory_intercept_message,
    hv_x64_segment_register, hv_x64_segment_register__bindgen_ty_1__bindgen_ty_1,
    hv_x64_vp_execution_state__bindgen_ty_1,
};

use super::message::{MESSAGE_SIZE, Message};
use crate::hypervisor::FaultAccess;

pub(super) const UNMAPPED: u32 = mshv_bindings::hv_message_type_HVMSG_UNMAPPED_GPA;
pub(super) const DENIED: u32 = mshv_bindings::hv_message_type_HVMSG_GPA_INTERCEPT;

/// What a memory intercept tells.
#[derive(Debug, Clone)]
pub(super) struct MemoryMessage<'a> {
    pub(super) kind: u32,
    pub(super) gva: Option<u64>,
    pub(super) gpa: Option<u64>,
    pub(super) access: FaultAccess,
    pub(super) rip: u64,
    pub(super) code: &'a [u8],
}

impl MemoryMessage<'_> {
    pub(super) fn build(&self) -> Message {
        type Layout = hv_x64_memory_intercept_message;
        let mut info = hv_x64_memory_access_info__bindgen_ty_1::default();
        info.set_gva_valid(self.gva.is_some().into());
        info.set_gva_gpa_valid(self.gpa.is_some().into());
        let info = info._bitfield_1.get(0, 8).to_le_bytes();

        let mut message = Message([0; MESSAGE_SIZE]);
        header(&mut message, self.kind, size_of::<Layout>());
        intercept(&mut message, offset_of!(Layout, header), self.access, self.rip);
        let count = [u8::try_from(self.code.len()).unwrap()];
        put(&mut message, offset_of!(Layout, instruction_byte_count), &count);
        put(&mut message, offset_of!(Layout, memory_access_info), &info[..1]);
        let (gva, gpa) = (self.gva.unwrap_or(0xbad_bad), self.gpa.unwrap_or(0xbad_bad));
        put(&mut message, offset_of!(Layout, guest_virtual_address), &gva.to_le_bytes());
        put(&mut message, offset_of!(Layout, guest_physical_address), &gpa.to_le_bytes());
        put(&mut message, offset_of!(Layout, instruction_bytes), self.code);
        message
    }
}

/// IN or OUT.
pub(super) fn port_message(port: u16, width: u8, write: bool, rip: u64, code: &[u8]) -> Message {
    type Layout = hv_x64_io_port_intercept_message;
    let mut info = hv_x64_io_port_access_info__bindgen_ty_1::default();
    info.set_access_size(width);
    let info = info._bitfield_1.get(0, 8).to_le_bytes();
    let access = if write { FaultAccess::Write } else { FaultAccess::Read };

    let mut message = Message([0; MESSAGE_SIZE]);
    let kind = mshv_bindings::hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT;
    header(&mut message, kind, size_of::<Layout>());
    intercept(&mut message, offset_of!(Layout, header), access, rip);
    put(&mut message, offset_of!(Layout, port_number), &port.to_le_bytes());
    put(&mut message, offset_of!(Layout, access_info), &info[..1]);
    let count = [u8::try_from(code.len()).unwrap()];
    put(&mut message, offset_of!(Layout, instruction_byte_count), &count);
    put(&mut message, offset_of!(Layout, instruction_bytes), code);
    message
}

/// A message that tells no more than its type.
pub(super) fn bare_message(kind: u32) -> Message {
    let mut message = Message([0; MESSAGE_SIZE]);
    header(&mut message, kind, size_of::<hv_x64_intercept_message_header>());
    message
}

fn header(message: &mut Message, kind: u32, payload: usize) {
    message.0[offset_of!(hv_message_header, message_type)..][..4]
        .copy_from_slice(&kind.to_le_bytes());
    message.0[offset_of!(hv_message_header, payload_size)] = u8::try_from(payload).unwrap();
}

fn intercept(message: &mut Message, at: usize, access: FaultAccess, rip: u64) {
    type Layout = hv_x64_intercept_message_header;
    let mut state = hv_x64_vp_execution_state__bindgen_ty_1::default();
    state.set_efer_lma(1);
    let state = state._bitfield_1.get(0, 16).to_le_bytes();
    let mut cs = hv_x64_segment_register__bindgen_ty_1__bindgen_ty_1::default();
    cs.set__long(1);
    let cs = cs._bitfield_1.get(0, 16).to_le_bytes();
    let access = match access {
        FaultAccess::Read => mshv_bindings::HV_INTERCEPT_ACCESS_READ,
        FaultAccess::Write => mshv_bindings::HV_INTERCEPT_ACCESS_WRITE,
        FaultAccess::Execute => mshv_bindings::HV_INTERCEPT_ACCESS_EXECUTE,
    };
    put(message, at + offset_of!(Layout, intercept_access_type), &access.to_le_bytes()[..1]);
    put(message, at + offset_of!(Layout, execution_state), &state[..2]);
    let attributes = offset_of!(hv_x64_segment_register, __bindgen_anon_1);
    put(message, at + offset_of!(Layout, cs_segment) + attributes, &cs[..2]);
    put(message, at + offset_of!(Layout, rip), &rip.to_le_bytes());
}

/// Writes into the payload.
pub(super) fn put(message: &mut Message, at: usize, bytes: &[u8]) {
    message.0[offset_of!(hv_message, u) + at..][..bytes.len()].copy_from_slice(bytes);
}
