//! Vector registers, with the bytes of YMM0 as the result that counts.

use std::array::from_fn;

use iced_x86::Register::{RAX, RDI};
use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::*;

/// Byte `at` of YMM register `number` before each test.
fn before(number: usize, at: usize) -> u8 {
    u8::try_from(0x20 * (number + 1) + at).unwrap()
}

fn start(address: u64) -> Registers {
    let vectors = from_fn(|number| from_fn(|at| if number < 3 { before(number, at) } else { 0 }));
    let general = registers(&[(RDI, address), (RAX, 0x1122_3344_5566_7788)]);
    Registers { vectors: Some(Arc::new(Vectors(vectors))), ..general }
}

fn ymm(registers: &Registers, number: usize) -> [u8; 32] {
    registers.vectors.as_ref().unwrap().0[number]
}

/// Where a byte of the result comes from.
#[derive(Clone, Copy)]
enum Source {
    Zero,
    Ones,
    /// The same byte of a register.
    Ymm(usize),
    /// The byte of the device that this many bytes lie before.
    Device,
    /// The byte of RAX.
    Rax,
}
use Source::{Device, Ones, Rax, Ymm, Zero};

#[test]
fn loads_and_moves_fill_keep_and_clear_the_bytes_they_should() {
    // Sources of bytes 0-3, 4-7, 8-15 and 16-31.
    type Row = (&'static str, Code, [Source; 4]);
    let legacy = [Device, Device, Device, Ymm(0)];
    let vex = [Device, Device, Device, Zero];
    let all = [Device; 4];
    let rows: Vec<Row> = vec![
        ("movups", |a| a.movups(xmm0, xmmword_ptr(rdi)), legacy),
        ("movupd", |a| a.movupd(xmm0, xmmword_ptr(rdi)), legacy),
        ("movdqu", |a| a.movdqu(xmm0, xmmword_ptr(rdi)), legacy),
        ("lddqu", |a| a.lddqu(xmm0, xmmword_ptr(rdi)), legacy),
        ("movaps", |a| a.movaps(xmm0, xmmword_ptr(rdi)), legacy),
        ("movapd", |a| a.movapd(xmm0, xmmword_ptr(rdi)), legacy),
        ("movdqa", |a| a.movdqa(xmm0, xmmword_ptr(rdi)), legacy),
        ("movntdqa", |a| a.movntdqa(xmm0, xmmword_ptr(rdi)), legacy),
        ("movaps register", |a| a.movaps(xmm0, xmm1), [Ymm(1), Ymm(1), Ymm(1), Ymm(0)]),
        ("vmovups xmm", |a| a.vmovups(xmm0, xmmword_ptr(rdi)), vex),
        ("vmovdqa xmm", |a| a.vmovdqa(xmm0, xmmword_ptr(rdi)), vex),
        ("vmovups ymm", |a| a.vmovups(ymm0, ymmword_ptr(rdi)), all),
        ("vmovupd ymm", |a| a.vmovupd(ymm0, ymmword_ptr(rdi)), all),
        ("vmovaps ymm", |a| a.vmovaps(ymm0, ymmword_ptr(rdi)), all),
        ("vmovapd ymm", |a| a.vmovapd(ymm0, ymmword_ptr(rdi)), all),
        ("vmovdqu ymm", |a| a.vmovdqu(ymm0, ymmword_ptr(rdi)), all),
        ("vmovdqa ymm", |a| a.vmovdqa(ymm0, ymmword_ptr(rdi)), all),
        ("vlddqu ymm", |a| a.vlddqu(ymm0, ymmword_ptr(rdi)), all),
        ("vmovntdqa ymm", |a| a.vmovntdqa(ymm0, ymmword_ptr(rdi)), all),
        ("vmovdqu register", |a| a.vmovdqu(ymm0, ymm1), [Ymm(1); 4]),
        ("movd", |a| a.movd(xmm0, dword_ptr(rdi)), [Device, Zero, Zero, Ymm(0)]),
        ("movd register", |a| a.movd(xmm0, eax), [Rax, Zero, Zero, Ymm(0)]),
        ("vmovd", |a| a.vmovd(xmm0, dword_ptr(rdi)), [Device, Zero, Zero, Zero]),
        ("movq", |a| a.movq(xmm0, qword_ptr(rdi)), [Device, Device, Zero, Ymm(0)]),
        ("movq register", |a| a.movq(xmm0, xmm1), [Ymm(1), Ymm(1), Zero, Ymm(0)]),
        ("movq integer", |a| a.movq(xmm0, rax), [Rax, Rax, Zero, Ymm(0)]),
        ("vmovq register", |a| a.vmovq(xmm0, xmm1), [Ymm(1), Ymm(1), Zero, Zero]),
        ("movss", |a| a.movss(xmm0, dword_ptr(rdi)), [Device, Zero, Zero, Ymm(0)]),
        ("movss register", |a| a.movss(xmm0, xmm1), [Ymm(1), Ymm(0), Ymm(0), Ymm(0)]),
        ("vmovss", |a| a.vmovss(xmm0, dword_ptr(rdi)), [Device, Zero, Zero, Zero]),
        ("vmovss registers", |a| a.vmovss_3(xmm0, xmm1, xmm2), [Ymm(2), Ymm(1), Ymm(1), Zero]),
        ("movsd", |a| a.movsd_2(xmm0, qword_ptr(rdi)), [Device, Device, Zero, Ymm(0)]),
        ("movsd register", |a| a.movsd_2(xmm0, xmm1), [Ymm(1), Ymm(1), Ymm(0), Ymm(0)]),
        ("vmovsd registers", |a| a.vmovsd_3(xmm0, xmm1, xmm2), [Ymm(2), Ymm(2), Ymm(1), Zero]),
        ("movlps", |a| a.movlps(xmm0, qword_ptr(rdi)), [Device, Device, Ymm(0), Ymm(0)]),
        ("vmovlps", |a| a.vmovlps_3(xmm0, xmm1, qword_ptr(rdi)), [Device, Device, Ymm(1), Zero]),
        (
            "movhpd, from 8 bytes on",
            |a| a.movhpd(xmm0, qword_ptr(rdi + 8)),
            [Ymm(0), Ymm(0), Device, Ymm(0)],
        ),
        (
            "vmovhps",
            |a| a.vmovhps_3(xmm0, xmm1, qword_ptr(rdi + 8)),
            [Ymm(1), Ymm(1), Device, Zero],
        ),
        ("pxor", |a| a.pxor(xmm0, xmm0), [Zero, Zero, Zero, Ymm(0)]),
        ("xorps", |a| a.xorps(xmm0, xmm0), [Zero, Zero, Zero, Ymm(0)]),
        ("vpxor", |a| a.vpxor(xmm0, xmm1, xmm1), [Zero; 4]),
        ("vpxor with memory", |a| a.vpxor(ymm0, ymm3, ymmword_ptr(rdi)), all),
        ("pcmpeqd", |a| a.pcmpeqd(xmm0, xmm0), [Ones, Ones, Ones, Ymm(0)]),
        ("vpcmpeqb xmm", |a| a.vpcmpeqb(xmm0, xmm1, xmm1), [Ones, Ones, Ones, Zero]),
        ("vpcmpeqw ymm", |a| a.vpcmpeqw(ymm0, ymm1, ymm1), [Ones; 4]),
        ("vzeroupper", |a| a.vzeroupper(), [Ymm(0), Ymm(0), Ymm(0), Zero]),
        ("vzeroall", |a| a.vzeroall(), [Zero; 4]),
    ];
    for (name, code, sources) in rows {
        let start = start(DEVICE);
        let (end, _) =
            run(&mut Board::new(), &start, code).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let expected: [u8; 32] = from_fn(|at| match sources[[0, 1, 2, 2, 3, 3, 3, 3][at / 4]] {
            Zero => 0,
            Ones => 0xff,
            Ymm(number) => before(number, at),
            Device => device_byte(DEVICE + at as u64),
            Rax => start.get(RAX).unwrap().to_le_bytes()[at],
        });
        assert_eq!(ymm(&end, 0), expected, "{name}");
        if !name.starts_with("vzero") {
            assert_eq!(ymm(&end, 1), ymm(&start, 1), "{name}: another register");
        }
    }
}

#[test]
fn stores_write_their_width_and_nothing_else() {
    let rows: [(&str, Code, usize, usize); 19] = [
        ("movups", |a| a.movups(xmmword_ptr(rdi), xmm1), 0, 16),
        ("movdqu", |a| a.movdqu(xmmword_ptr(rdi), xmm1), 0, 16),
        ("movapd", |a| a.movapd(xmmword_ptr(rdi), xmm1), 0, 16),
        ("movntdq", |a| a.movntdq(xmmword_ptr(rdi), xmm1), 0, 16),
        ("movntps", |a| a.movntps(xmmword_ptr(rdi), xmm1), 0, 16),
        ("vmovntpd", |a| a.vmovntpd(ymmword_ptr(rdi), ymm1), 0, 32),
        ("vmovdqu xmm", |a| a.vmovdqu(xmmword_ptr(rdi), xmm1), 0, 16),
        ("vmovdqu ymm", |a| a.vmovdqu(ymmword_ptr(rdi), ymm1), 0, 32),
        ("vmovntdq ymm", |a| a.vmovntdq(ymmword_ptr(rdi), ymm1), 0, 32),
        ("movd", |a| a.movd(dword_ptr(rdi), xmm1), 0, 4),
        ("movq", |a| a.movq(qword_ptr(rdi), xmm1), 0, 8),
        ("movss", |a| a.movss(dword_ptr(rdi), xmm1), 0, 4),
        ("vmovss", |a| a.vmovss(dword_ptr(rdi), xmm1), 0, 4),
        ("movsd", |a| a.movsd_2(qword_ptr(rdi), xmm1), 0, 8),
        ("vmovsd", |a| a.vmovsd(qword_ptr(rdi), xmm1), 0, 8),
        ("movlpd", |a| a.movlpd(qword_ptr(rdi), xmm1), 0, 8),
        ("movhps", |a| a.movhps(qword_ptr(rdi), xmm1), 8, 8),
        ("vmovlps", |a| a.vmovlps(qword_ptr(rdi), xmm1), 0, 8),
        ("vmovhps", |a| a.vmovhps(qword_ptr(rdi), xmm1), 8, 8),
    ];
    for (name, code, first, len) in rows {
        let mut board = Board::new();
        board.put(RAM, &[0xee; 64]);
        let start = start(RAM + 32);
        let (end, _) = run(&mut board, &start, code).unwrap();
        assert_eq!(end, Registers { rip: end.rip, ..start.clone() }, "{name}: no register changes");
        let mut expected = [0xee; 64];
        expected[32..32 + len].copy_from_slice(&ymm(&start, 1)[first..first + len]);
        assert_eq!(board.bytes::<64>(RAM), expected, "{name}");
    }
}

#[test]
fn moves_to_integer_registers_extend_with_zeroes() {
    let start = start(0);
    let low = u64::from_le_bytes(from_fn(|at| before(1, at)));
    let rows: [(&str, Code, u64); 3] = [
        ("movd", |a| a.movd(eax, xmm1), low & 0xffff_ffff),
        ("movq", |a| a.movq(rax, xmm1), low),
        ("vmovq", |a| a.vmovq(rax, xmm1), low),
    ];
    for (name, code, expected) in rows {
        let (end, _) = run(&mut Board::new(), &start, code).unwrap();
        assert_eq!(end.get(RAX), Some(expected), "{name}");
    }
}

#[test]
fn what_would_raise_an_exception_or_is_not_known_is_unsupported() {
    let rows: [(&str, Code); 12] = [
        ("movaps", |a| a.movaps(xmm0, xmmword_ptr(rdi + 8))),
        ("movdqa store", |a| a.movdqa(xmmword_ptr(rdi + 1), xmm0)),
        ("movntdq", |a| a.movntdq(xmmword_ptr(rdi + 4), xmm0)),
        ("vmovaps ymm on 16", |a| a.vmovaps(ymm0, ymmword_ptr(rdi + 16))),
        ("vmovntps", |a| a.vmovntps(ymmword_ptr(rdi + 16), ymm0)),
        ("pxor with memory", |a| a.pxor(xmm0, xmmword_ptr(rdi + 4))),
        ("MMX", |a| a.movq(mm0, qword_ptr(rdi))),
        ("AVX-512", |a| a.vmovdqu64(zmm0, zmmword_ptr(rdi))),
        ("AVX-512 mask", |a| a.evex().vmovups(ymm0.k1(), ymmword_ptr(rdi))),
        ("xmm16", |a| a.evex().vmovups(xmm16, xmmword_ptr(rdi))),
        ("addps", |a| a.addps(xmm0, xmm1)),
        ("VEX integer", |a| a.andn(rax, rcx, rdx)),
    ];
    for (name, code) in rows {
        assert!(run(&mut Board::new(), &start(DEVICE), code).is_err(), "{name}");
    }
    let unknown = Registers { vectors: None, ..start(DEVICE) };
    let load: Code = |a| a.movups(xmm0, xmmword_ptr(rdi));
    let mut board = Board::new();
    assert!(run(&mut board, &unknown, load).is_err(), "no vector registers");
    assert!(pending(&unknown, load).uses_vectors());
    assert!(!pending(&unknown, |a: &mut CodeAssembler| a.lodsb()).uses_vectors());
    let mut known = pending(&unknown, load);
    known.set_vectors(Vectors::default());
    assert_eq!(known.attempt(&mut board), Ok(Outcome::Exit));
}

proptest! {
    /// Against arithmetic on arrays.
    #[test]
    fn operations_on_elements_match_arrays(a in any::<[u8; 32]>(), b in any::<[u8; 32]>(), equal in any::<u32>()) {
        // Elements that happen to be equal are rare: make some.
        let b: [u8; 32] = from_fn(|at| if equal >> at & 1 == 1 { a[at] } else { b[at] });
        let mut vectors = Vectors::default();
        vectors.0[1] = a;
        vectors.0[2] = b;
        let start = Registers { vectors: Some(Arc::new(vectors)), ..Registers::new(CODE) };
        let same = |size: usize| -> [u8; 32] {
            from_fn(|at| {
                let element = at / size * size..at / size * size + size;
                if a[element.clone()] == b[element] { 0xff } else { 0 }
            })
        };
        let xor: [u8; 32] = from_fn(|at| a[at] ^ b[at]);
        let rows: [(Code, [u8; 32]); 5] = [
            (|a| a.vpxor(ymm0, ymm1, ymm2), xor),
            (|a| a.vxorpd(ymm0, ymm1, ymm2), xor),
            (|a| a.vpcmpeqb(ymm0, ymm1, ymm2), same(1)),
            (|a| a.vpcmpeqw(ymm0, ymm1, ymm2), same(2)),
            (|a| a.vpcmpeqd(ymm0, ymm1, ymm2), same(4)),
        ];
        for (code, expected) in rows {
            let (end, _) = run(&mut Board::new(), &start, code).unwrap();
            prop_assert_eq!(ymm(&end, 0), expected);
        }
    }

    /// Wherever a load lies, its bytes are those of memory, device or RAM or both.
    #[test]
    fn loads_and_stores_are_copies_at_every_address(at in RAM - 40..RAM + RAM_SIZE + 8, content in any::<[u8; 64]>()) {
        let mut board = Board::new();
        board.put(RAM, &content);
        board.put(RAM + RAM_SIZE - 64, &content);
        let expected: [u8; 32] = from_fn(|index| {
            let address = at + index as u64;
            if (RAM..RAM + RAM_SIZE).contains(&address) {
                board.bytes::<1>(address)[0]
            } else {
                device_byte(address)
            }
        });
        let (end, _) = run(&mut board, &start(at), |a: &mut CodeAssembler| a.vmovdqu(ymm0, ymmword_ptr(rdi))).unwrap();
        prop_assert_eq!(ymm(&end, 0), expected);
    }
}
