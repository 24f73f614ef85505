//! Accesses to what is in no slot: the instruction is completed here, with the right registers and
//! nothing else changed. Reads are answered as UR.

use iced_x86::code_asm::{
    al, ax, byte_ptr, cl, dword_ptr, dx, eax, ebp, ecx, qword_ptr, r8, r15w, rax, rbx, rcx, rdi,
    rsi, word_ptr,
};

use super::*;
use crate::hypervisor::FaultAccess;
use crate::hypervisor::mshv::message::Message;
use crate::hypervisor::mshv::recorded::{self, MemoryMessage, port_message};

const PAGE: u64 = PAGE_SIZE;

/// Registers with something in every one of them, RBX at the BAR, RSI and RDI at the data.
fn registers() -> Registers {
    let mut registers = Registers::new(CODE);
    for (number, register) in (0_u64..).zip(&mut registers.general) {
        *register = 0x0101_0101_0101_0101 * (number + 1);
    }
    (registers.general[3], registers.general[6], registers.general[7]) = (BAR, DATA, DATA + 0x100);
    // IF and a reserved bit beyond the status flags, which no instruction here may lose.
    registers.flags = 0x20_0202;
    registers
}

const RAX: usize = 0;
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;
const ZF: u64 = 1 << 6;

/// The messages that the hypervisor wrote for an instruction at `CODE`, one for each run.
fn recorded_messages(code: &[u8], accesses: &[(u64, FaultAccess)]) -> Vec<Message> {
    let message = |&(address, access): &(u64, FaultAccess)| {
        let (kind, gva, gpa) = (recorded::UNMAPPED, Some(address), Some(address));
        MemoryMessage { kind, gva, gpa, access, rip: CODE, code }.build()
    };
    accesses.iter().map(message).collect()
}

/// An instruction, what it asks for, and what it leaves behind.
struct Case {
    name: &'static str,
    code: fn(&mut CodeAssembler),
    before: fn(&mut Registers),
    message: (u64, FaultAccess),
    exits: Vec<Seen>,
    /// Changes to the registers, but for RIP and flags.
    after: fn(&mut Registers),
    /// Status flags that must be set; `None` where the instruction changes no flag.
    flags: Option<u64>,
}

const UNCHANGED: fn(&mut Registers) = |_| ();
const READ: (u64, FaultAccess) = (BAR, FaultAccess::Read);
const WRITE: (u64, FaultAccess) = (BAR, FaultAccess::Write);

fn cases() -> Vec<Case> {
    let read = |len| Seen::Read(BAR, len);
    let write = |data: &[u8]| Seen::Write(BAR, data.to_vec());
    let case = |name, code, message, exits, after, flags| Case {
        name,
        code,
        before: UNCHANGED,
        message,
        exits,
        after,
        flags,
    };
    vec![
        case(
            "mov clears the upper half of a 4 byte destination",
            |a| a.mov(eax, dword_ptr(rbx)).unwrap(),
            READ,
            vec![read(4)],
            |r| r.general[RAX] = 0xffff_ffff,
            None,
        ),
        case(
            "mov of 8 bytes",
            |a| a.mov(r8, qword_ptr(rbx)).unwrap(),
            READ,
            vec![read(8)],
            |r| r.general[8] = u64::MAX,
            None,
        ),
        case(
            "mov of 2 bytes keeps the rest",
            |a| a.mov(r15w, word_ptr(rbx)).unwrap(),
            READ,
            vec![read(2)],
            |r| r.general[15] |= 0xffff,
            None,
        ),
        case(
            "mov of 1 byte keeps the rest",
            |a| a.mov(cl, byte_ptr(rbx)).unwrap(),
            READ,
            vec![read(1)],
            |r| r.general[RCX] |= 0xff,
            None,
        ),
        case(
            "movzx",
            |a| a.movzx(eax, word_ptr(rbx)).unwrap(),
            READ,
            vec![read(2)],
            |r| r.general[RAX] = 0xffff,
            None,
        ),
        case(
            "movzx of 1 byte",
            |a| a.movzx(ebp, byte_ptr(rbx)).unwrap(),
            READ,
            vec![read(1)],
            |r| r.general[5] = 0xff,
            None,
        ),
        case(
            "movsx",
            |a| a.movsx(rcx, byte_ptr(rbx)).unwrap(),
            READ,
            vec![read(1)],
            |r| r.general[RCX] = u64::MAX,
            None,
        ),
        case(
            "a write of a register",
            |a| a.mov(dword_ptr(rbx), ecx).unwrap(),
            WRITE,
            vec![write(&[2, 2, 2, 2])],
            UNCHANGED,
            None,
        ),
        case(
            "a write of an immediate",
            |a| a.mov(word_ptr(rbx), 0x1234).unwrap(),
            WRITE,
            vec![write(&[0x34, 0x12])],
            UNCHANGED,
            None,
        ),
        case(
            "a read-modify-write is a read and a write",
            |a| a.or(byte_ptr(rbx), 1).unwrap(),
            READ,
            vec![read(1), write(&[0xff])],
            UNCHANGED,
            Some(0x84),
        ),
        case(
            "a locked add, which the hypervisor may report as a write",
            |a| a.lock().add(dword_ptr(rbx), 1).unwrap(),
            WRITE,
            vec![read(4), write(&[0, 0, 0, 0])],
            UNCHANGED,
            Some(0x55),
        ),
        case(
            "xchg",
            |a| a.xchg(dword_ptr(rbx), eax).unwrap(),
            WRITE,
            vec![read(4), write(&[1, 1, 1, 1])],
            |r| r.general[RAX] = 0xffff_ffff,
            None,
        ),
        case(
            "cmp",
            |a| a.cmp(dword_ptr(rbx), -1).unwrap(),
            READ,
            vec![read(4)],
            UNCHANGED,
            Some(0x44),
        ),
        Case {
            name: "rep movsd from the BAR fills memory, one read an element",
            code: |a| a.rep().movsd().unwrap(),
            before: |r| (r.general[RCX], r.general[RSI]) = (3, BAR),
            message: READ,
            exits: vec![read(4), Seen::Read(BAR + 4, 4), Seen::Read(BAR + 8, 4)],
            after: |r| {
                r.general[RCX] = 0;
                r.general[RSI] += 12;
                r.general[RDI] += 12;
            },
            flags: None,
        },
        Case {
            name: "rep stosw to the BAR",
            code: |a| a.rep().stosw().unwrap(),
            before: |r| (r.general[RCX], r.general[RDI]) = (2, BAR),
            message: WRITE,
            exits: vec![write(&[1, 1]), Seen::Write(BAR + 2, vec![1, 1])],
            after: |r| {
                r.general[RCX] = 0;
                r.general[RDI] += 4;
            },
            flags: None,
        },
    ]
}

#[test]
fn an_instruction_completes_with_exactly_its_registers() {
    for case in cases() {
        let machine = Machine::new(MapPolicy::Whole);
        let mut before = registers();
        (case.before)(&mut before);
        let mut assembler = CodeAssembler::new(64).unwrap();
        (case.code)(&mut assembler);
        let code = assembler.assemble(CODE).unwrap();
        machine.ram.write(CODE, &[&code[..], &[0xf4]].concat()).unwrap();
        for message in recorded_messages(&code, &[case.message]) {
            machine.partition.script(message);
        }
        let mut vcpu = machine.vcpu_with(before.clone());
        assert_eq!(run_to_halt(&mut vcpu), case.exits, "{}", case.name);

        let mut expected = before;
        (case.after)(&mut expected);
        // HLT, which ends the test, is one byte.
        expected.rip = CODE + code.len() as u64 + 1;
        if let Some(flags) = case.flags {
            expected.flags |= flags;
        }
        assert_eq!(machine.partition.registers(), expected, "{}", case.name);
    }
}

#[test]
fn rep_movs_from_a_bar_fills_memory_with_ones_and_nothing_beyond() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut vcpu = machine.vcpu(|a| {
        a.mov(rsi, rbx).unwrap();
        a.mov(rcx, 5_u64).unwrap();
        a.rep().movsb().unwrap();
    });
    assert_eq!(run_to_halt(&mut vcpu).len(), 5);
    let mut data = [0; 8];
    machine.ram.read(DATA + 0x100, &mut data).unwrap();
    assert_eq!(data, [0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]);
}

#[test]
fn a_repeated_instruction_that_reaches_a_slot_goes_on_there() {
    let machine = Machine::new(MapPolicy::Page);
    machine.map_bar();
    let mut vcpu = machine.vcpu(|a| {
        a.lea(rdi, qword_ptr(rbx - 8)).unwrap();
        a.mov(rcx, 6_u64).unwrap();
        a.mov(eax, 0x2a).unwrap();
        a.rep().stosd().unwrap();
    });
    let writes = [BAR - 8, BAR - 4].map(|address| Seen::Write(address, vec![0x2a, 0, 0, 0]));
    assert_eq!(run_to_halt(&mut vcpu), writes);
    let stored: Vec<_> = (0..5).map(|at| machine.bar.load_u32(4 * at).unwrap()).collect();
    assert_eq!(stored, [0x2a, 0x2a, 0x2a, 0x2a, 0]);
    assert_eq!(machine.mapped_bar_pages(), [0]);
}

#[test]
fn an_access_that_ends_in_a_slot_is_cut_at_its_border() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    machine.bar.write(0, &[1, 2]).unwrap();
    let mut vcpu = machine.vcpu(|a| a.mov(eax, dword_ptr(rbx - 2)).unwrap());
    assert_eq!(run_to_halt(&mut vcpu), [Seen::Read(BAR - 2, 2)]);
    assert_eq!(machine.partition.registers().general[RAX], 0x0201_ffff);
}

#[test]
fn missing_instruction_bytes_are_fetched_from_ram() {
    for count in [0, 1, 2, 15] {
        let machine = Machine::new(MapPolicy::Whole);
        machine.partition.limit_code_bytes(count);
        let mut vcpu = machine.vcpu(|a| a.mov(eax, dword_ptr(rbx + 0x40)).unwrap());
        assert_eq!(run_to_halt(&mut vcpu), [Seen::Read(BAR + 0x40, 4)], "{count} bytes");
        assert_eq!(machine.partition.registers().general[RAX], 0xffff_ffff);
    }
}

#[test]
fn instruction_bytes_are_fetched_by_the_guests_page_tables_across_pages() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.partition.limit_code_bytes(0);
    // `mov eax, [rbx+0x40]` begins in one page and ends in another one that lies elsewhere.
    machine.ram.write(2 * PAGE - 1, &[0x8b]).unwrap();
    machine.ram.write(5 * PAGE, &[0x43, 0x40, 0xf4]).unwrap();
    machine.partition.translate_page(2 * PAGE, Some(5 * PAGE));
    let mut vcpu = machine.vcpu(|a| a.jmp(2 * PAGE - 1).unwrap());
    assert_eq!(run_to_halt(&mut vcpu), [Seen::Read(BAR + 0x40, 4)]);
}

#[test]
fn code_that_can_not_be_fetched_or_is_none_is_an_error_with_its_bytes() {
    let machine = Machine::new(MapPolicy::Whole);
    let (kind, gva, gpa, access) = (recorded::UNMAPPED, None, Some(BAR), FaultAccess::Read);
    // Not in RAM at all, and an undefined opcode.
    let undefined = [0x0f, 0x0b, 0xff, 0xff];
    for (rip, code) in [(BAR, &[][..]), (DATA, &[0x06, 0x06][..])] {
        machine.ram.write(DATA, &[0x06; 16]).unwrap();
        machine.partition.script(MemoryMessage { kind, gva, gpa, access, rip, code }.build());
        let mut vcpu = machine.vcpu(|_| ());
        let error = vcpu.run().expect_err("no instruction");
        assert!(
            matches!(error, HypervisorError::UnsupportedInstruction { rip: at, .. } if at == rip),
            "{error}"
        );
    }
    // UD2 is an instruction, but not one that accesses memory.
    machine
        .partition
        .script(MemoryMessage { kind, gva, gpa, access, rip: DATA, code: &undefined }.build());
    let error = machine.vcpu(|_| ()).run().map(|exit| exit.to_string()).expect_err("ud2");
    assert!(error.to_string().contains("0f, 0b"), "{error}");
}

#[test]
fn a_device_s_memory_is_not_read_for_code() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    machine.bar.write(0, &[0x8b, 0x03]).unwrap();
    let (kind, gva, access) = (recorded::UNMAPPED, None, FaultAccess::Read);
    let gpa = Some(BAR + BAR_PAGES * PAGE);
    machine.partition.script(MemoryMessage { kind, gva, gpa, access, rip: BAR, code: &[] }.build());
    let error = machine.vcpu(|_| ()).run().map(|exit| exit.to_string()).expect_err("not read");
    assert!(matches!(error, HypervisorError::UnsupportedInstruction { .. }), "{error}");
}

#[test]
fn code_of_another_mode_is_an_error() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut message = recorded_messages(&[0x8b, 0x03], &[READ]).remove(0);
    message.0[16 + 6] = 0;
    machine.partition.script(message);
    let error = machine.vcpu(|_| ()).run().map(|exit| exit.to_string()).expect_err("32-bit");
    assert!(error.to_string().contains("not 64-bit"), "{error}");
}

#[test]
fn what_the_hypervisor_has_translated_is_not_asked_again() {
    let machine = Machine::new(MapPolicy::Whole);
    // The BAR is at another linear address, so that confusing the two shows.
    let linear = 0x7000_0000;
    for page in 0..2 {
        machine.partition.translate_page(linear + page * PAGE, Some(BAR + page * PAGE));
    }
    let mut vcpu = machine.vcpu(|a| {
        a.mov(rbx, linear).unwrap();
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.mov(dword_ptr(rbx + 12), ecx).unwrap();
    });
    let expected = [Seen::Read(BAR + 8, 4), Seen::Write(BAR + 12, vec![0; 4])];
    assert_eq!(run_to_halt(&mut vcpu), expected);
    assert_eq!(machine.partition.translations(), 0);

    // A write of the other page was not translated by the hypervisor.
    let mut vcpu = machine.vcpu(|a| {
        a.mov(rbx, linear).unwrap();
        a.mov(qword_ptr(rbx + PAGE - 4), rax).unwrap();
    });
    assert_eq!(run_to_halt(&mut vcpu).len(), 2);
    assert_ne!(machine.partition.translations(), 0);
}

#[test]
fn page_tables_that_keep_refusing_an_access_end_in_an_internal_error() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.partition.translate_page(BAR, None);
    let mut vcpu = machine.vcpu(|_| ());
    let (kind, gva, gpa, access) = (recorded::UNMAPPED, None, Some(BAR), FaultAccess::Read);
    let message = MemoryMessage { kind, gva, gpa, access, rip: CODE, code: &[0x8b, 0x03] };
    for _ in 0..100 {
        machine.partition.script(message.build());
    }
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, VcpuExit::InternalError { suberror: 1, rip: Some(CODE) }), "{exit}");
}

#[test]
fn a_destination_without_backing_is_a_fault_and_the_device_is_read_once() {
    let machine = Machine::new(MapPolicy::Whole);
    machine.map_bar();
    machine.partition.withdraw(&machine.bar);
    let source = BAR + BAR_PAGES * PAGE;
    let mut vcpu = machine.vcpu(|a| {
        a.mov(rdi, rbx).unwrap();
        a.mov(rsi, source).unwrap();
        a.movsd().unwrap();
    });
    assert_eq!(run(&mut vcpu), Seen::Read(source, 4));
    assert_eq!(run(&mut vcpu), fault(BAR, "write"));
    assert_eq!(run(&mut vcpu), fault(BAR, "write"));
    machine.partition.restore(&machine.bar);
    assert_eq!(run_to_halt(&mut vcpu), []);
    assert_eq!(machine.bar.load_u32(0), Ok(0xffff_ffff));
}

#[test]
fn ports_are_accessed_with_their_width() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut before = registers();
    before.general[2] = 0x3f8;
    let code = |a: &mut CodeAssembler| {
        a.in_(ax, dx).unwrap();
        a.out(0x80, eax).unwrap();
        a.in_(al, 0x60).unwrap();
    };
    let mut assembler = CodeAssembler::new(64).unwrap();
    code(&mut assembler);
    assembler.hlt().unwrap();
    machine.ram.write(CODE, &assembler.assemble(CODE).unwrap()).unwrap();
    // The first as recorded, the others as the model writes them.
    machine.partition.script(port_message(0x3f8, 2, false, CODE, &[0x66, 0xed]));
    let mut vcpu = machine.vcpu_with(before);
    let expected = [
        Seen::PortRead(0x3f8, 2),
        Seen::PortWrite(0x80, vec![0xff, 0xff, 0x01, 0x01]),
        Seen::PortRead(0x60, 1),
    ];
    assert_eq!(run_to_halt(&mut vcpu), expected);
    assert_eq!(machine.partition.registers().general[RAX], 0x0101_0101_0101_ffff);
}

#[test]
fn compare_and_exchange_leaves_what_it_found() {
    let machine = Machine::new(MapPolicy::Whole);
    let mut vcpu = machine.vcpu(|a| {
        a.mov(eax, 5).unwrap();
        a.mov(ecx, 6).unwrap();
        a.lock().cmpxchg(dword_ptr(rbx), ecx).unwrap();
    });
    let expected = [Seen::Read(BAR, 4), Seen::Write(BAR, vec![0xff; 4])];
    assert_eq!(run_to_halt(&mut vcpu), expected);
    let after = machine.partition.registers();
    assert_eq!((after.general[RAX], after.flags & ZF), (0xffff_ffff, 0));
}
