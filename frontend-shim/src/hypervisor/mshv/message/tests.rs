use std::mem::offset_of;

use mshv_bindings as hv;
use proptest::prelude::*;

use super::*;
use crate::hypervisor::mshv::recorded::{self, MemoryMessage, bare_message, port_message, put};

/// `mov eax, [rbx]`.
const CODE: [u8; 2] = [0x8b, 0x03];

fn memory_message() -> MemoryMessage<'static> {
    MemoryMessage {
        kind: recorded::UNMAPPED,
        gva: Some(0xffff_8000_0000_1234),
        gpa: Some(0xfebc_0234),
        access: FaultAccess::Read,
        rip: 0x1_0000,
        code: &CODE,
    }
}

#[test]
fn offsets_and_types_are_those_of_the_headers() {
    type Common = hv::hv_x64_intercept_message_header;
    type Memory = hv::hv_x64_memory_intercept_message;
    type Port = hv::hv_x64_io_port_intercept_message;
    let attributes = offset_of!(hv::hv_x64_segment_register, __bindgen_anon_1);
    for (ours, theirs) in [
        (MESSAGE_SIZE, size_of::<hv::hv_message>()),
        (HEADER_SIZE, offset_of!(hv::hv_message, u)),
        (header::TYPE, offset_of!(hv::hv_message_header, message_type)),
        (header::PAYLOAD_SIZE, offset_of!(hv::hv_message_header, payload_size)),
        (intercept::ACCESS_TYPE, offset_of!(Common, intercept_access_type)),
        (intercept::EXECUTION_STATE, offset_of!(Common, execution_state)),
        (intercept::CS_ATTRIBUTES, offset_of!(Common, cs_segment) + attributes),
        (intercept::RIP, offset_of!(Common, rip)),
        (memory::SIZE, size_of::<Memory>()),
        (memory::INSTRUCTION_BYTE_COUNT, offset_of!(Memory, instruction_byte_count)),
        (memory::ACCESS_INFO, offset_of!(Memory, memory_access_info)),
        (memory::GVA, offset_of!(Memory, guest_virtual_address)),
        (memory::GPA, offset_of!(Memory, guest_physical_address)),
        (memory::INSTRUCTION_BYTES, offset_of!(Memory, instruction_bytes)),
        (port::SIZE, offset_of!(Port, instruction_bytes) + INSTRUCTION_ROOM),
        (port::INSTRUCTION_BYTE_COUNT, offset_of!(Port, instruction_byte_count)),
        (port::INSTRUCTION_BYTES, offset_of!(Port, instruction_bytes)),
    ] {
        assert_eq!(ours, theirs);
    }
    for (ours, theirs) in [
        (kind::NONE, hv::hv_message_type_HVMSG_NONE),
        (kind::UNMAPPED_GPA, hv::hv_message_type_HVMSG_UNMAPPED_GPA),
        (kind::GPA_INTERCEPT, hv::hv_message_type_HVMSG_GPA_INTERCEPT),
        (kind::UNACCEPTED_GPA, hv::hv_message_type_HVMSG_UNACCEPTED_GPA),
        (kind::GPA_ATTRIBUTE_INTERCEPT, hv::hv_message_type_HVMSG_GPA_ATTRIBUTE_INTERCEPT),
        (kind::INVALID_VP_REGISTER_VALUE, hv::hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE),
        (kind::UNRECOVERABLE_EXCEPTION, hv::hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION),
        (kind::X64_IO_PORT_INTERCEPT, hv::hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT),
        (kind::X64_HALT, hv::hv_message_type_HVMSG_X64_HALT),
    ] {
        assert_eq!(ours, theirs);
    }
}

#[test]
fn a_memory_intercept_says_where_how_and_by_which_instruction() {
    let recorded = memory_message();
    for (kind, access) in [
        (recorded::UNMAPPED, FaultAccess::Read),
        (recorded::UNMAPPED, FaultAccess::Write),
        (recorded::DENIED, FaultAccess::Execute),
    ] {
        let message = MemoryMessage { kind, access, ..recorded.clone() }.build();
        let Ok(Intercept::Memory(decoded)) = message.decode() else { panic!("{message:?}") };
        assert_eq!(decoded.gva, recorded.gva);
        assert_eq!(decoded.gpa, recorded.gpa.map(GuestAddress));
        assert_eq!(decoded.access, access);
        assert_eq!((decoded.code.rip, decoded.code.bytes()), (0x1_0000, &CODE[..]));
        assert!(decoded.code.long_mode);
    }
}

#[test]
fn an_address_that_is_not_valid_is_not_there() {
    let recorded = memory_message();
    for (gva, gpa) in [(None, recorded.gpa), (recorded.gva, None), (None, None)] {
        let message = MemoryMessage { gva, gpa, ..recorded.clone() }.build();
        let Ok(Intercept::Memory(decoded)) = message.decode() else { panic!("{message:?}") };
        assert_eq!((decoded.gva, decoded.gpa), (gva, gpa.map(GuestAddress)));
    }
}

#[test]
fn any_number_of_instruction_bytes_that_has_room_is_taken() {
    let code: Vec<u8> = (0..16).collect();
    for count in 0..=16 {
        let message = MemoryMessage { code: &code[..count], ..memory_message() }.build();
        let Ok(Intercept::Memory(decoded)) = message.decode() else { panic!("{message:?}") };
        assert_eq!(decoded.code.bytes(), &code[..count]);
    }
}

#[test]
fn code_is_64_bit_only_where_efer_and_cs_agree() {
    for (state, cs, expected) in [
        (0x10_u16, 0x2000_u16, true),
        (0x10, 0x4000, false),
        (0x00, 0x2000, false),
        (0xffef, 0xffff, false),
    ] {
        let mut message = memory_message().build();
        put(&mut message, 6, &state.to_le_bytes());
        put(&mut message, 22, &cs.to_le_bytes());
        let Ok(Intercept::Memory(decoded)) = message.decode() else { panic!("{message:?}") };
        assert_eq!(decoded.code.long_mode, expected, "{state:#x} {cs:#x}");
    }
}

#[test]
fn a_port_intercept_says_by_which_instruction() {
    let message = port_message(0xcf8, 4, false, 0x1000, &[0xed]);
    let Ok(Intercept::Port(code)) = message.decode() else { panic!("{message:?}") };
    assert_eq!((code.rip, code.bytes(), code.long_mode), (0x1000, &[0xed][..], true));
}

#[test]
fn messages_without_details_are_told_apart() {
    for (kind, expected) in [
        (hv::hv_message_type_HVMSG_NONE, Intercept::None),
        (hv::hv_message_type_HVMSG_X64_HALT, Intercept::Halt),
        (hv::hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION, Intercept::UnrecoverableException),
        (
            hv::hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE,
            Intercept::InvalidRegister(0x8000_0020),
        ),
        (hv::hv_message_type_HVMSG_GPA_ATTRIBUTE_INTERCEPT, Intercept::Conversion(None)),
        (hv::hv_message_type_HVMSG_X64_APIC_EOI, Intercept::Other(0x8001_0004)),
    ] {
        assert_eq!(bare_message(kind).decode(), Ok(expected));
    }
    let unaccepted = hv::hv_message_type_HVMSG_UNACCEPTED_GPA;
    let message = MemoryMessage { kind: unaccepted, ..memory_message() }.build();
    let address = GuestAddress(0xfebc_0234);
    assert_eq!(message.decode(), Ok(Intercept::Conversion(Some(address))));
}

#[test]
fn a_message_that_contradicts_its_format_is_an_error() {
    let memory = memory_message().build();
    let port = port_message(0x60, 1, false, 0x1000, &[0xec]);
    let (memory_kind, port_kind) = (recorded::UNMAPPED, 0x8001_0000);
    let edited = |message: &Message, at: usize, value: u8| {
        let mut message = message.clone();
        message.0[at] = value;
        message
    };
    for (name, message, expected) in [
        (
            "payload too short",
            edited(&memory, 4, 79),
            MessageError::PayloadSize { kind: memory_kind, len: 79, expected: 80 },
        ),
        (
            "payload too long",
            edited(&memory, 4, 241),
            MessageError::PayloadSize { kind: memory_kind, len: 241, expected: 80 },
        ),
        (
            "empty port message",
            edited(&port, 4, 0),
            MessageError::PayloadSize { kind: port_kind, len: 0, expected: 72 },
        ),
        (
            "access type",
            edited(&memory, 16 + 5, 3),
            MessageError::AccessType { kind: memory_kind, value: 3 },
        ),
        (
            "instruction bytes",
            edited(&memory, 16 + 44, 17),
            MessageError::InstructionByteCount { kind: memory_kind, value: 17 },
        ),
        (
            "instruction bytes of a port",
            edited(&port, 16 + 43, 255),
            MessageError::InstructionByteCount { kind: port_kind, value: 255 },
        ),
    ] {
        assert_eq!(message.decode(), Err(expected), "{name}");
    }
}

fn any_message() -> impl Strategy<Value = Message> {
    let kind = prop_oneof![
        Just(recorded::UNMAPPED),
        Just(recorded::DENIED),
        Just(0x8000_0003),
        Just(0x8001_0000),
        any::<u32>(),
    ];
    let bytes = proptest::collection::vec(any::<u8>(), MESSAGE_SIZE);
    (kind, any::<bool>(), bytes).prop_map(|(kind, sized, bytes)| {
        let mut message = Message(bytes.try_into().expect("of that length"));
        message.0[..4].copy_from_slice(&kind.to_le_bytes());
        if sized {
            message.0[4] = 128;
        }
        message
    })
}

proptest! {
    #[test]
    fn no_bytes_at_all_make_the_decoder_panic(message in any_message()) {
        if let Ok(Intercept::Memory(intercept)) = message.decode() {
            prop_assert!(intercept.code.bytes().len() <= INSTRUCTION_ROOM);
        }
    }
}
