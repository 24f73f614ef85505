//! Instructions beyond those that the tests on every hypervisor cover.

use iced_x86::Register::{self, EAX, ECX, EDX, RAX, RBX, RCX, RDI, RDX, RSI, RSP};
use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::*;
use crate::x86::alu::{CF, DF, IF, RF, ZF};

#[test]
fn segments_have_their_base_and_lea_has_none() {
    let rows: [(&str, Code, &[&str], u64); 4] = [
        ("ds", |a| a.mov(al, byte_ptr(rdi)), &["read 0x8000 1"], 0x80),
        ("fs", |a| a.mov(al, byte_ptr(rdi).fs()), &["read 0x8100 1"], 0x80),
        ("gs", |a| a.mov(al, byte_ptr(rdi).gs()), &["read 0x8210 1"], 0x90),
        ("lea", |a| a.lea(rax, ptr(rdi).gs()), &[], 0x8000),
    ];
    for (name, code, expected, result) in rows {
        let start = Registers { fs_base: 0x100, gs_base: 0x210, ..registers(&[(RDI, DEVICE)]) };
        let (end, exits) = run(&mut Board::new(), &start, code).unwrap();
        assert_eq!(exits, expected, "{name}");
        assert_eq!(end.get(RAX), Some(result), "{name}");
    }
}

#[test]
fn string_instructions_go_where_the_direction_flag_says() {
    // name, code, DF, RCX; then RSI, RDI and RCX as differences, and whether equal
    type Row = (&'static str, Code, bool, u64, (i64, i64, i64), Option<bool>);
    let rows: [Row; 14] = [
        ("movsb", |a| a.movsb(), false, 9, (1, 1, 0), None),
        ("movsq down", |a| a.movsq(), true, 9, (-8, -8, 0), None),
        ("stosd down", |a| a.stosd(), true, 9, (0, -4, 0), None),
        ("lodsw", |a| a.lodsw(), false, 9, (2, 0, 0), None),
        ("lodsd down", |a| a.lodsd(), true, 9, (-4, 0, 0), None),
        ("rep lodsb", |a| a.rep().lodsb(), false, 5, (5, 0, -5), None),
        ("rep movsd", |a| a.rep().movsd(), true, 3, (-12, -12, -3), None),
        ("rep stosb, none", |a| a.rep().stosb(), false, 0, (0, 0, 0), None),
        ("scasb", |a| a.scasb(), false, 9, (0, 1, 0), Some(false)),
        // RAM at RSI is 1 1 1 2 0..., at RDI 1 1 1 3 0...; AL is 0.
        (
            "repe cmpsb stops at a difference",
            |a| a.repe().cmpsb(),
            false,
            9,
            (4, 4, -4),
            Some(false),
        ),
        ("repe cmpsb runs out", |a| a.repe().cmpsb(), false, 3, (3, 3, -3), Some(true)),
        ("repne cmpsb", |a| a.repne().cmpsb(), false, 9, (1, 1, -1), Some(true)),
        ("repne scasb finds a zero", |a| a.repne().scasb(), false, 9, (0, 5, -5), Some(true)),
        ("repe scasd, none", |a| a.repe().scasd(), false, 0, (0, 0, 0), None),
    ];
    for (name, code, down, count, moves, equal) in rows {
        let mut board = Board::new();
        let (from, to) = (RAM + 0x100, RAM + 0x200);
        board.put(from, &[1, 1, 1, 2]);
        board.put(to, &[1, 1, 1, 3]);
        let mut start = registers(&[(RSI, from), (RDI, to), (RCX, count)]);
        start.flags |= if down { DF } else { 0 };
        let (end, exits) = run(&mut board, &start, code).unwrap();
        let moved = |register: Register, before: u64| {
            end.get(register).unwrap().wrapping_sub(before).cast_signed()
        };
        assert_eq!((moved(RSI, from), moved(RDI, to), moved(RCX, count)), moves, "{name}");
        assert!(exits.is_empty(), "{name}: {exits:?}");
        match equal {
            Some(equal) => assert_eq!(end.flags & ZF != 0, equal, "{name}"),
            None => assert_eq!(end.flags, start.flags, "{name}: no flag changes"),
        }
    }
}

#[test]
fn strings_carry_the_right_bytes() {
    let mut board = Board::new();
    let start = registers(&[(RSI, DEVICE + 3), (RDI, RAM), (RCX, 5)]);
    run(&mut board, &start, |a| a.rep().movsb()).unwrap();
    assert_eq!(board.bytes::<5>(RAM), device_bytes::<5>(DEVICE + 3));

    let start = registers(&[(RSI, DEVICE + 8), (RAX, u64::MAX)]);
    let (end, _) = run(&mut board, &start, |a: &mut CodeAssembler| a.lodsw()).unwrap();
    assert_eq!(end.get(RAX), Some(0xffff_ffff_ffff_8988));
}

#[test]
fn flags_that_arithmetic_does_not_set_stay() {
    let kept = IF | DF | 1 << 18;
    let mut start = registers(&[(RSP, RAM)]);
    start.flags |= kept | RF;
    let (end, _) = run(&mut Board::new(), &start, |a: &mut CodeAssembler| a.xor(eax, eax)).unwrap();
    assert_eq!(
        end.flags & (kept | RF | ZF),
        kept | ZF,
        "and the resume flag ends with the instruction"
    );

    let rows: [(&str, Code, u64); 3] = [
        ("cld", |a| a.cld(), kept & !DF),
        ("std", |a| a.std(), kept),
        ("cli", |a| a.cli(), kept & !IF),
    ];
    for (name, code, expected) in rows {
        let (end, _) = run(&mut Board::new(), &start, code).unwrap();
        assert_eq!(end.flags & kept, expected, "{name}");
    }

    let mut board = Board::new();
    board.put(RAM, &(start.flags & !DF | CF).to_le_bytes());
    let (end, _) = run(&mut board, &start, |a: &mut CodeAssembler| a.popfq()).unwrap();
    assert_eq!(end.flags & (kept | CF), kept & !DF | CF);
    board.put(RAM, &(start.flags & !IF).to_le_bytes());
    assert!(run(&mut board, &start, |a: &mut CodeAssembler| a.popfq()).is_err(), "system flag");
}

#[test]
fn movbe_swaps_and_movnti_stores() {
    let start = registers(&[(RDI, DEVICE), (RAX, u64::MAX), (RCX, 0x1122_3344_5566_7788)]);
    let rows: [(&str, Code, &[&str], u64); 5] = [
        ("load 2", |a| a.movbe(ax, word_ptr(rdi)), &["read 0x8000 2"], 0xffff_ffff_ffff_8081),
        ("load 4", |a| a.movbe(eax, dword_ptr(rdi)), &["read 0x8000 4"], 0x8081_8283),
        ("load 8", |a| a.movbe(rax, qword_ptr(rdi)), &["read 0x8000 8"], 0x8081_8283_8485_8687),
        ("store 4", |a| a.movbe(dword_ptr(rdi), ecx), &["write 0x8000 [55, 66, 77, 88]"], u64::MAX),
        ("movnti", |a| a.movnti(dword_ptr(rdi), ecx), &["write 0x8000 [88, 77, 66, 55]"], u64::MAX),
    ];
    for (name, code, expected, result) in rows {
        let (end, exits) = run(&mut Board::new(), &start, code).unwrap();
        assert_eq!(exits, expected, "{name}");
        assert_eq!(end.get(RAX), Some(result), "{name}");
    }
}

#[test]
fn cmpxchg8b_compares_and_exchanges_a_pair() {
    let upper = 0xdead_beef_0000_0000;
    for (found, equal) in [(0x0000_0002_0000_0001, true), (0x0000_0002_0000_0009, false)] {
        let mut board = Board::new();
        board.put(RAM, &u64::to_le_bytes(found));
        let start =
            registers(&[(RDI, RAM), (RAX, upper | 1), (RDX, upper | 2), (RBX, 3), (RCX, 4)]);
        let code: Code = |a| a.lock().cmpxchg8b(qword_ptr(rdi));
        let (end, _) = run(&mut board, &start, code).unwrap();
        assert_eq!(end.flags & ZF != 0, equal);
        let after = u64::from_le_bytes(board.bytes(RAM));
        if equal {
            assert_eq!(after, 0x0000_0004_0000_0003);
            assert_eq!((end.get(RAX), end.get(RDX)), (Some(upper | 1), Some(upper | 2)));
        } else {
            assert_eq!(after, found);
            assert_eq!((end.get(RAX), end.get(RDX)), (Some(9), Some(2)), "upper halves cleared");
        }
    }
}

#[test]
fn cmpxchg16b_compares_and_exchanges_a_pair_of_a_device() {
    let low = u64::from_le_bytes(device_bytes(DEVICE));
    let high = u64::from_le_bytes(device_bytes(DEVICE + 8));
    for (compared, equal) in [(low, true), (low ^ 1, false)] {
        let start = registers(&[(RDI, DEVICE), (RAX, compared), (RDX, high), (RBX, 3), (RCX, 4)]);
        let code: Code = |a| a.lock().cmpxchg16b(xmmword_ptr(rdi));
        let (end, exits) = run(&mut Board::new(), &start, code).unwrap();
        assert_eq!(end.flags & ZF != 0, equal);
        assert_eq!((end.get(RAX), end.get(RDX)), (Some(low), Some(high)));
        let exchanged = exits[2..].concat().contains("write 0x8000 [03, 00");
        assert_eq!(exchanged, equal, "{exits:?}");
    }
}

#[test]
fn what_is_not_known_is_unsupported() {
    let rows: [(&str, Code); 9] = [
        ("bit string, 32-bit address", |a| a.bt(dword_ptr(edi), ecx)),
        ("cmpxchg16b not aligned", |a| a.cmpxchg16b(xmmword_ptr(rdi + 8))),
        ("cmpxchg16b in RAM", |a| a.cmpxchg16b(xmmword_ptr(RAM))),
        ("locked, not aligned, RAM", |a| a.lock().inc(dword_ptr(RAM + 1))),
        ("locked, half in RAM", |a| a.lock().inc(dword_ptr(RAM - 2))),
        ("rep insb", |a| a.rep().insb()),
        ("32-bit address size string", |a| a.db(&[0x67, 0xa4])),
        ("div", |a| a.div(rcx)),
        ("far jump", |a| a.jmp(fword_ptr(rdi))),
    ];
    for (name, code) in rows {
        let start = registers(&[(RDI, DEVICE), (RCX, 1)]);
        assert!(run(&mut Board::new(), &start, code).is_err(), "{name}");
    }
}

proptest! {
    /// A bit string is an array of bits, whatever the operand width that reaches into it.
    #[test]
    fn bit_tests_reach_every_bit_of_a_string(
        content in any::<[u8; 64]>(), bit in -256_i64..256, width in 0..3_usize, kind in 0..4_usize,
    ) {
        let codes: [[Code; 4]; 3] = [
            [
                |a| a.bt(word_ptr(rdi), cx), |a| a.bts(word_ptr(rdi), cx),
                |a| a.btr(word_ptr(rdi), cx), |a| a.btc(word_ptr(rdi), cx),
            ],
            [
                |a| a.bt(dword_ptr(rdi), ecx), |a| a.bts(dword_ptr(rdi), ecx),
                |a| a.btr(dword_ptr(rdi), ecx), |a| a.btc(dword_ptr(rdi), ecx),
            ],
            [
                |a| a.bt(qword_ptr(rdi), rcx), |a| a.bts(qword_ptr(rdi), rcx),
                |a| a.btr(qword_ptr(rdi), rcx), |a| a.btc(qword_ptr(rdi), rcx),
            ],
        ];
        let mut board = Board::new();
        board.put(RAM, &content);
        let start = registers(&[(RDI, RAM + 32), (RCX, bit.cast_unsigned())]);
        let (end, _) = run(&mut board, &start, codes[width][kind]).unwrap();

        let index = usize::try_from(bit + 256).unwrap();
        let was = content[index / 8] >> (index % 8) & 1 == 1;
        prop_assert_eq!(end.flags & CF != 0, was);
        let now = [was, true, false, !was][kind];
        let mut expected = content;
        expected[index / 8] = content[index / 8] & !(1 << (index % 8)) | u8::from(now) << (index % 8);
        prop_assert_eq!(board.bytes::<64>(RAM), expected);
    }

    #[test]
    fn bit_tests_of_registers_and_immediates_stay_within_them(
        value in any::<u64>(), bit in any::<u64>(),
    ) {
        let start = registers(&[(RAX, value), (RCX, bit), (RDI, RAM)]);
        let mut board = Board::new();
        let (end, _) = run(&mut board, &start, |a: &mut CodeAssembler| a.btc(eax, ecx)).unwrap();
        prop_assert_eq!(end.get(EAX).unwrap(), (value ^ 1 << (bit % 32)) & 0xffff_ffff);
        board.put(RAM, &value.to_le_bytes());
        let immediate = i32::try_from(bit % 128).unwrap();
        run(&mut board, &start, |a: &mut CodeAssembler| a.bts(qword_ptr(rdi), immediate)).unwrap();
        prop_assert_eq!(u64::from_le_bytes(board.bytes(RAM)), value | 1 << (bit % 64));
        prop_assert_eq!((end.get(ECX), end.get(EDX)), (Some(bit & 0xffff_ffff), Some(0)));
    }
}
