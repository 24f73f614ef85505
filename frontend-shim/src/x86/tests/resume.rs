//! Instructions that stop in the middle.

use iced_x86::Register::{RAX, RCX, RDI, RSI, RSP};
use iced_x86::code_asm::*;

use super::*;
use crate::hypervisor::FaultAccess;

#[test]
fn accesses_leave_in_pieces_of_one_page_and_at_most_8_bytes() {
    let rows: [(&str, Code, &[&str]); 15] = [
        ("mov", |a| a.mov(eax, dword_ptr(rdi)), &["read 0x8000 4"]),
        ("two pages", |a| a.mov(rax, qword_ptr(rdi + 0xffd)), &["read 0x8ffd 3", "read 0x9000 5"]),
        ("xmm", |a| a.movups(xmm0, xmmword_ptr(rdi)), &["read 0x8000 8", "read 0x8008 8"]),
        (
            "xmm across pages: cut at the page first",
            |a| a.movups(xmm0, xmmword_ptr(rdi + 0xffc)),
            &["read 0x8ffc 4", "read 0x9000 8", "read 0x9008 4"],
        ),
        (
            "ymm",
            |a| a.vmovdqu(ymmword_ptr(rdi), ymm0),
            &[
                "write 0x8000 [00, 00, 00, 00, 00, 00, 00, 00]",
                "write 0x8008 [00, 00, 00, 00, 00, 00, 00, 00]",
                "write 0x8010 [00, 00, 00, 00, 00, 00, 00, 00]",
                "write 0x8018 [00, 00, 00, 00, 00, 00, 00, 00]",
            ],
        ),
        (
            "ymm across pages",
            |a| a.vmovdqu(ymm0, ymmword_ptr(rdi + 0xfef)),
            &["read 0x8fef 8", "read 0x8ff7 8", "read 0x8fff 1", "read 0x9000 8", "read 0x9008 7"],
        ),
        (
            "each page is translated on its own",
            |a| a.mov(rax, qword_ptr(ALIAS - 4)),
            &["read 0xffffc 4", "read 0x90000 4"],
        ),
        ("from device to RAM", |a| a.movsb(), &["read 0x8800 1"]),
        (
            "from RAM across its end to a device",
            |a| a.mov(qword_ptr(RAM + RAM_SIZE - 2), -0x100),
            &["write 0x4000 [ff, ff, ff, ff, ff, ff]"],
        ),
        (
            "locked, not aligned, no RAM",
            |a| a.lock().add(dword_ptr(rdi + 1), 1),
            &["read 0x8001 4", "write 0x8001 [82, 82, 83, 84]"],
        ),
        (
            "rep stosw",
            |a| a.rep().stosw(),
            &["write 0x8000 [aa, 00]", "write 0x8002 [aa, 00]", "write 0x8004 [aa, 00]"],
        ),
        (
            "lock cmpxchg16b, which fails and writes back",
            |a| a.lock().cmpxchg16b(xmmword_ptr(rdi)),
            &[
                "read 0x8000 8",
                "read 0x8008 8",
                "write 0x8000 [80, 81, 82, 83, 84, 85, 86, 87]",
                "write 0x8008 [88, 89, 8a, 8b, 8c, 8d, 8e, 8f]",
            ],
        ),
        ("push of a device", |a| a.push(qword_ptr(rdi)), &["read 0x8000 8"]),
        ("in", |a| a.in_(ax, 0x60), &["in 0x60 2"]),
        ("out", |a| a.out(0x60, al), &["out 0x60 [aa]"]),
    ];
    for (name, code, expected) in rows {
        let mut start =
            registers(&[(RDI, DEVICE), (RCX, 3), (RAX, 0xaa), (RSI, 0x8800), (RSP, RAM + 64)]);
        if name.contains("to RAM") {
            start.set(RDI, RAM).unwrap();
        }
        let (_, exits) = run(&mut Board::new(), &start, code).unwrap();
        assert_eq!(exits, expected, "{name}");
    }
}

#[test]
fn an_access_that_was_done_is_not_done_again() {
    let mut board = Board::new();
    let last = RAM + RAM_SIZE - 4;
    board.put(last, &[0x10, 0, 0, 0]);
    // The RAM half is read and written, then the other half is: it must not be added to twice.
    let mut add = pending(&registers(&[(RDI, last)]), |a| a.add(qword_ptr(rdi), 1));
    let mut exits = Vec::new();
    while add.attempt(&mut board).unwrap() == Outcome::Exit {
        exits.push(complete(&mut add));
    }
    assert_eq!(exits, ["read 0x4000 4", "write 0x4000 [40, 41, 42, 43]"]);
    assert_eq!(board.bytes(last), [0x11, 0, 0, 0]);

    // Read once, although the source has changed since.
    board.put(RAM, &[1]);
    let mut copy =
        pending(&registers(&[(RSI, RAM), (RDI, DEVICE)]), |a: &mut CodeAssembler| a.movsb());
    assert_eq!(copy.attempt(&mut board), Ok(Outcome::Exit));
    board.put(RAM, &[2]);
    assert_eq!(complete(&mut copy), "write 0x8000 [01]");
    assert_eq!(copy.attempt(&mut board), Ok(Outcome::Retired));
}

/// The device of [`Board`] as RAM, from now on.
struct Mapped(Board);

impl Memory for Mapped {
    fn translate(&mut self, linear: u64, write: bool) -> Option<GuestAddress> {
        self.0.translate(linear, write)
    }

    fn ram(&self, address: GuestAddress, _write: bool) -> Option<Ram<'_>> {
        Some(Ram { memory: &self.0.memory, offset: address.0 % PAGE_SIZE })
    }
}

#[test]
fn memory_that_appears_meanwhile_is_left_to_the_next_instruction() {
    let rows: [(&str, Code); 2] = [
        ("read-modify-write", |a| a.add(dword_ptr(rdi), 1)),
        ("locked", |a| a.lock().xadd(dword_ptr(rdi), ecx)),
    ];
    for (name, code) in rows {
        let mut board = Mapped(Board::new());
        let mut pending = pending(&registers(&[(RDI, DEVICE), (RCX, 1)]), code);
        assert_eq!(pending.attempt(&mut board.0), Ok(Outcome::Exit), "{name}");
        assert_eq!(complete(&mut pending), "read 0x8000 4");
        assert_eq!(pending.attempt(&mut board), Ok(Outcome::Retired), "{name}");
        assert_eq!(board.0.bytes(RAM), [0x81, 0x81, 0x82, 0x83], "{name}: what was read, plus one");
    }
}

#[test]
fn what_the_page_tables_refuse_changes_nothing() {
    let rows: [(&str, Code, u64, bool); 6] = [
        ("read", |a| a.mov(eax, dword_ptr(NOT_MAPPED)), NOT_MAPPED, false),
        ("write", |a| a.mov(dword_ptr(READ_ONLY), eax), READ_ONLY, true),
        ("read of read-modify-write", |a| a.inc(dword_ptr(READ_ONLY)), READ_ONLY, true),
        ("the same, not aligned", |a| a.inc(dword_ptr(READ_ONLY - 2)), READ_ONLY, true),
        ("second page of a read", |a| a.mov(rax, qword_ptr(NOT_MAPPED - 1)), NOT_MAPPED, false),
        ("second page of a write", |a| a.mov(qword_ptr(READ_ONLY - 7), rax), READ_ONLY, true),
    ];
    for (name, code, linear, write) in rows {
        let start = registers(&[(RAX, 7)]);
        let mut pending = pending(&start, code);
        let outcome = pending.attempt(&mut Board::new());
        assert_eq!(outcome, Ok(Outcome::NotMapped { linear, write }), "{name}");
        assert!(pending.exit().is_none(), "{name}");
        assert_eq!(*pending.registers(), start, "{name}");
    }
}

#[test]
fn a_fault_names_the_byte_and_the_next_attempt_goes_on() {
    let mut board = Board::new();
    board.memory.set_accessible(false).unwrap();
    let at = GuestAddress(RAM + 8);
    let start = registers(&[(RDI, at.0), (RSI, DEVICE)]);
    let mut copy = pending(&start, |a: &mut CodeAssembler| a.movsq());
    assert_eq!(copy.attempt(&mut board), Ok(Outcome::Exit));
    assert_eq!(complete(&mut copy), "read 0x8000 8");
    for _ in 0..2 {
        let fault = Outcome::Fault { address: at, access: FaultAccess::Write };
        assert_eq!(copy.attempt(&mut board), Ok(fault));
    }
    board.memory.set_accessible(true).unwrap();
    assert_eq!(copy.attempt(&mut board), Ok(Outcome::Retired));
    assert_eq!(board.bytes::<8>(at.0), device_bytes::<8>(DEVICE));
}

#[test]
fn each_iteration_of_a_repeated_instruction_retires() {
    let mut board = Board::new();
    let start = registers(&[(RDI, DEVICE), (RCX, 2)]);
    let mut fill = pending(&start, |a| a.rep().stosb());
    for (at, left, repeats) in [(DEVICE + 1, 1, true), (DEVICE + 2, 0, false)] {
        assert_eq!(fill.attempt(&mut board), Ok(Outcome::Exit));
        assert_eq!(fill.registers().get(RDI), Some(at - 1), "unchanged until it is done");
        complete(&mut fill);
        assert_eq!(fill.attempt(&mut board), Ok(Outcome::Retired));
        assert_eq!(fill.registers().get(RDI), Some(at));
        assert_eq!(fill.registers().get(RCX), Some(left));
        assert_eq!(fill.repeats(), repeats);
    }
    assert_eq!(fill.registers().rip, CODE + 2);
    assert!(fill.attempt(&mut board).is_err(), "it has retired");
}

#[test]
fn bytes_that_are_no_whole_instruction_are_refused() {
    let rows: [(&str, &[u8]); 4] = [
        ("none", &[]),
        ("cut off", &[0x48, 0x8b]),
        ("undefined", &[0x06]),
        ("too long", &[0x66; 20]),
    ];
    for (name, bytes) in rows {
        assert!(PendingInstruction::new(Registers::new(CODE), bytes).is_err(), "{name}");
    }
}

#[test]
fn halt_is_told_apart() {
    let mut halt = pending(&Registers::new(CODE), |a: &mut CodeAssembler| a.hlt());
    assert_eq!(halt.attempt(&mut Board::new()), Ok(Outcome::Halted));
    assert_eq!(halt.registers().rip, CODE + 1);
}
