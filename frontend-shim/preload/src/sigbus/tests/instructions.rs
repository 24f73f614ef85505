//! What instructions do to a BAR that does not decode is what they do to memory full of ones, which
//! forgets what is written: the processor itself says what that is.

use std::ffi::c_void;

use iced_x86::code_asm::*;

use super::machine::{Code, Program, State, widest};
use super::{Bench, PAGE, PAGES, bench, map_over};
use crate::status::Count;

/// Flags: all that arithmetic sets, or without those that the manual leaves undefined.
const ALL: u64 = 0x8d5;
const NO_AF: u64 = ALL & !0x10;
const CF_ONLY: u64 = 1;
const DF: u64 = 1 << 10;

fn start(bench: &Bench, rdi_at: usize) -> State {
    let byte =
        |register: usize, at: usize| u8::try_from((register * 7 + at * 3 + 1) & 0xff).unwrap();
    let vectors = std::array::from_fn(|r| std::array::from_fn(|at| byte(r, at)));
    let mut general: [u64; 16] = std::array::from_fn(|r| {
        0x1122_3344_5566_7788_u64.rotate_left(4 * u32::try_from(r).unwrap())
    });
    let ordinary = bench.bar - PAGE;
    // RCX, RSP, RSI, RDI.
    general[1] = 5;
    general[4] = 0;
    general[6] = (ordinary + 0x100) as u64;
    general[7] = bench.bar.wrapping_add(rdi_at) as u64;
    let masks = std::array::from_fn(|number| {
        0x8123_4567_89ab_cdef_u64.rotate_left(8 * u32::try_from(number).unwrap())
    });
    State { vectors, general, flags: 0x202, masks }
}

/// The pages before and after the BAR.
fn ordinary(bench: &Bench) -> [Vec<u8>; 2] {
    [bench.bar - PAGE, bench.bar + PAGES * PAGE].map(|start| {
        // SAFETY: mapped, and nobody writes to it now.
        unsafe { std::slice::from_raw_parts(start as *const u8, PAGE) }.to_vec()
    })
}

fn fill_ordinary(bench: &Bench) {
    for start in [bench.bar - PAGE, bench.bar + PAGES * PAGE] {
        for at in 0..PAGE {
            let value = u8::try_from((at * 11) & 0xff).unwrap();
            // SAFETY: mapped.
            unsafe { ((start + at) as *mut u8).write_volatile(value) };
        }
    }
}

/// Memory full of ones in the BAR's place.
fn map_ones(bench: &Bench) {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: over a mapping of the test's own.
    let mapped =
        unsafe { libc::mmap(bench.bar as *mut c_void, PAGES * PAGE, protection, flags, -1, 0) };
    assert_eq!(mapped as usize, bench.bar);
    // SAFETY: just mapped.
    unsafe { (bench.bar as *mut u8).write_bytes(0xff, PAGES * PAGE) };
}

fn map_bar(bench: &Bench) {
    use std::os::fd::AsRawFd;
    map_over(bench.bar, bench.host().file.as_raw_fd());
}

/// Runs an instruction on ones and on the BAR; the same must come of it.
fn compare(bench: &Bench, name: &str, before: &State, code: Code, flags: u64) {
    let program = Program::new(code);
    let run = || {
        fill_ordinary(bench);
        let mut state = before.clone();
        program.run(&mut state);
        (state, ordinary(bench))
    };
    map_ones(bench);
    let (mut expected, memory) = run();
    map_bar(bench);
    let completed = bench.shim.status.get(Count::SigbusCompleted);
    let (mut found, found_memory) = run();
    assert!(bench.shim.status.get(Count::SigbusCompleted) > completed, "{name}: no signal");
    for state in [&mut expected, &mut found] {
        state.flags &= flags | DF;
    }
    assert_eq!(found.general.map(Hex), expected.general.map(Hex), "{name}: registers");
    assert_eq!(Hex(found.flags), Hex(expected.flags), "{name}: flags");
    for (number, (found, expected)) in found.vectors.iter().zip(&expected.vectors).enumerate() {
        assert_eq!(found, expected, "{name}: vector register {number}");
    }
    assert!(found_memory == memory, "{name}: memory around the BAR");
}

#[derive(PartialEq)]
struct Hex(u64);

impl std::fmt::Debug for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

fn compare_all(rows: &[(&str, Code, u64)]) {
    let bench = bench();
    for (name, code, flags) in rows {
        compare(&bench, name, &start(&bench, 0x40), *code, *flags);
    }
}

#[test]
fn integer_loads_and_stores_of_all_widths_complete() {
    let bench_rows: &[(&str, Code, u64)] = &[
        ("load 1", |a| a.mov(al, byte_ptr(rdi)), ALL),
        ("load 1 high", |a| a.mov(ah, byte_ptr(rdi)), ALL),
        ("load 2", |a| a.mov(ax, word_ptr(rdi + 2)), ALL),
        ("load 4", |a| a.mov(eax, dword_ptr(rdi + 4)), ALL),
        ("load 8", |a| a.mov(rax, qword_ptr(rdi + 8)), ALL),
        ("load by index", |a| a.mov(r9d, dword_ptr(rdi + rcx * 8 + 0x10)), ALL),
        ("load into its address", |a| a.mov(rdi, qword_ptr(rdi)), ALL),
        ("movzx 1", |a| a.movzx(ecx, byte_ptr(rdi)), ALL),
        ("movzx 2", |a| a.movzx(rcx, word_ptr(rdi)), ALL),
        ("movsx 1", |a| a.movsx(r8w, byte_ptr(rdi)), ALL),
        ("movsxd", |a| a.movsxd(r8, dword_ptr(rdi)), ALL),
        ("movbe", |a| a.movbe(r8, qword_ptr(rdi)), ALL),
        ("store 1", |a| a.mov(byte_ptr(rdi), dl), ALL),
        ("store 2", |a| a.mov(word_ptr(rdi), dx), ALL),
        ("store 4", |a| a.mov(dword_ptr(rdi), edx), ALL),
        ("store 8", |a| a.mov(qword_ptr(rdi), r15), ALL),
        ("store immediate", |a| a.mov(dword_ptr(rdi), 0x1234), ALL),
        ("movnti", |a| a.movnti(dword_ptr(rdi), eax), ALL),
        ("cmov", |a| a.cmovne(eax, dword_ptr(rdi)), ALL),
        ("setcc", |a| a.sete(byte_ptr(rdi)), ALL),
    ];
    compare_all(bench_rows);
}

#[test]
fn arithmetic_on_a_bar_sets_registers_and_flags() {
    compare_all(&[
        ("add from", |a| a.add(rax, qword_ptr(rdi)), ALL),
        ("adc from", |a| a.adc(eax, dword_ptr(rdi)), ALL),
        ("sub from", |a| a.sub(ax, word_ptr(rdi)), ALL),
        ("and from", |a| a.and(al, byte_ptr(rdi)), NO_AF),
        ("or to", |a| a.or(dword_ptr(rdi), 1), NO_AF),
        ("xor to", |a| a.xor(qword_ptr(rdi), rax), NO_AF),
        ("add to", |a| a.add(byte_ptr(rdi), 1), ALL),
        ("inc", |a| a.inc(dword_ptr(rdi)), ALL),
        ("dec", |a| a.dec(word_ptr(rdi)), ALL),
        ("neg", |a| a.neg(qword_ptr(rdi)), ALL),
        ("not", |a| a.not(dword_ptr(rdi)), ALL),
        ("cmp", |a| a.cmp(dword_ptr(rdi), 7), ALL),
        ("cmp register", |a| a.cmp(rax, qword_ptr(rdi)), ALL),
        ("test", |a| a.test(dword_ptr(rdi), eax), NO_AF),
        ("test immediate", |a| a.test(byte_ptr(rdi), 0x80), NO_AF),
        ("bt", |a| a.bt(dword_ptr(rdi), 3), CF_ONLY),
        ("imul", |a| a.imul_2(rax, qword_ptr(rdi)), 0x801),
        ("shl 1", |a| a.shl(dword_ptr(rdi), 1), NO_AF),
    ]);
}

#[test]
fn locked_instructions_read_ones_and_write_nothing() {
    compare_all(&[
        ("lock or", |a| a.lock().or(dword_ptr(rdi), 4), NO_AF),
        ("lock add", |a| a.lock().add(qword_ptr(rdi), rax), ALL),
        ("lock xadd", |a| a.lock().xadd(dword_ptr(rdi), eax), ALL),
        ("xchg", |a| a.xchg(qword_ptr(rdi), rax), ALL),
        ("lock bts", |a| a.lock().bts(dword_ptr(rdi), 5), CF_ONLY),
        ("lock cmpxchg, unequal", |a| a.lock().cmpxchg(dword_ptr(rdi), edx), ALL),
        ("lock cmpxchg8b, unequal", |a| a.lock().cmpxchg8b(qword_ptr(rdi)), ALL),
        ("lock cmpxchg16b, unequal", |a| a.lock().cmpxchg16b(xmmword_ptr(rdi)), ALL),
    ]);
    let bench = bench();
    let mut equal = start(&bench, 0x80);
    equal.general[0] = u64::MAX;
    equal.general[2] = u64::MAX;
    let rows: &[(&str, Code)] = &[
        ("lock cmpxchg, equal", |a| a.lock().cmpxchg(dword_ptr(rdi), ecx)),
        ("lock cmpxchg16b, equal", |a| a.lock().cmpxchg16b(xmmword_ptr(rdi))),
    ];
    for (name, code) in rows {
        compare(&bench, name, &equal, *code, ALL);
    }
}

#[test]
fn string_instructions_do_all_their_iterations() {
    let bench = bench();
    let swapped = |state: &mut State| state.general.swap(6, 7);
    let rows: &[(&str, Code, bool)] = &[
        ("stosb", |a| a.stosb(), false),
        ("stosd", |a| a.stosd(), false),
        ("rep stosb", |a| a.rep().stosb(), false),
        ("rep stosq", |a| a.rep().stosq(), false),
        ("movsb to", |a| a.movsb(), false),
        ("rep movsb to", |a| a.rep().movsb(), false),
        ("rep movsq to", |a| a.rep().movsq(), false),
        ("movsd from", |a| a.movsd(), true),
        ("rep movsb from", |a| a.rep().movsb(), true),
        ("rep movsq from", |a| a.rep().movsq(), true),
        ("lodsw", |a| a.lodsw(), true),
        ("rep lodsb", |a| a.rep().lodsb(), true),
        ("repne scasb", |a| a.repne().scasb(), false),
        ("repe cmpsb", |a| a.repe().cmpsb(), false),
    ];
    for (name, code, from) in rows {
        for (count, flags) in [(5, 0x202), (1, 0x202), (5, 0x202 | DF), (700, 0x202)] {
            let mut before = start(&bench, 0x400);
            before.general[1] = count;
            before.flags = flags;
            // Room for the count in the ordinary page.
            before.general[6] = (bench.bar - PAGE) as u64 + if count > 100 { 0 } else { 0x200 };
            if *from {
                swapped(&mut before);
            }
            let long = count > 100 && name.ends_with('q');
            if !long {
                compare(&bench, name, &before, *code, ALL);
            }
        }
    }
    // Across the BAR's end, and more iterations than are done at once.
    let mut across = start(&bench, PAGES * PAGE - 6);
    across.general[1] = 60;
    compare(&bench, "out of the BAR", &across, |a| a.rep().stosd(), ALL);
    let mut many = start(&bench, 0);
    many.general[1] = (PAGES * PAGE) as u64;
    compare(&bench, "the whole BAR", &many, |a| a.rep().stosb(), ALL);
}

#[test]
fn sse_moves_complete() {
    compare_all(&[
        ("movups", |a| a.movups(xmm3, xmmword_ptr(rdi + 1)), ALL),
        ("movaps", |a| a.movaps(xmm3, xmmword_ptr(rdi)), ALL),
        ("movdqu", |a| a.movdqu(xmm15, xmmword_ptr(rdi + 3)), ALL),
        ("movdqa", |a| a.movdqa(xmm0, xmmword_ptr(rdi)), ALL),
        ("movq", |a| a.movq(xmm1, qword_ptr(rdi)), ALL),
        ("movd", |a| a.movd(xmm1, dword_ptr(rdi)), ALL),
        ("movss", |a| a.movss(xmm2, dword_ptr(rdi)), ALL),
        ("movsd", |a| a.movsd_2(xmm2, qword_ptr(rdi)), ALL),
        ("movlps", |a| a.movlps(xmm2, qword_ptr(rdi)), ALL),
        ("movhps", |a| a.movhps(xmm2, qword_ptr(rdi)), ALL),
        ("pxor", |a| a.pxor(xmm4, xmmword_ptr(rdi)), ALL),
        ("pcmpeqb", |a| a.pcmpeqb(xmm4, xmmword_ptr(rdi)), ALL),
        ("movups to", |a| a.movups(xmmword_ptr(rdi + 1), xmm3), ALL),
        ("movntdq to", |a| a.movntdq(xmmword_ptr(rdi), xmm3), ALL),
        ("movq to", |a| a.movq(qword_ptr(rdi), xmm3), ALL),
        ("movhpd to", |a| a.movhpd(qword_ptr(rdi), xmm3), ALL),
    ]);
}

#[test]
fn avx_moves_complete_and_clear_the_rest_of_their_register() {
    if widest() < 32 {
        return;
    }
    compare_all(&[
        ("vmovdqu xmm", |a| a.vmovdqu(xmm3, xmmword_ptr(rdi + 1)), ALL),
        ("vmovdqu ymm", |a| a.vmovdqu(ymm3, ymmword_ptr(rdi + 1)), ALL),
        ("vmovdqa ymm", |a| a.vmovdqa(ymm15, ymmword_ptr(rdi)), ALL),
        ("vmovups ymm", |a| a.vmovups(ymm0, ymmword_ptr(rdi)), ALL),
        ("vmovq", |a| a.vmovq(xmm5, qword_ptr(rdi)), ALL),
        ("vmovd", |a| a.vmovd(xmm5, dword_ptr(rdi)), ALL),
        ("vmovss", |a| a.vmovss(xmm5, dword_ptr(rdi)), ALL),
        ("vmovhps", |a| a.vmovhps_3(xmm5, xmm6, qword_ptr(rdi)), ALL),
        ("vpxor", |a| a.vpxor(ymm4, ymm5, ymmword_ptr(rdi)), ALL),
        ("vmovdqu to", |a| a.vmovdqu(ymmword_ptr(rdi + 1), ymm3), ALL),
        ("vmovntdq to", |a| a.vmovntdq(ymmword_ptr(rdi), ymm3), ALL),
    ]);
}

#[test]
fn avx_512_moves_without_a_mask_complete() {
    if widest() < 64 {
        return;
    }
    compare_all(&[
        ("vmovdqu64 zmm", |a| a.vmovdqu64(zmm3, zmmword_ptr(rdi + 1)), ALL),
        ("vmovdqu64 zmm31", |a| a.vmovdqu64(zmm31, zmmword_ptr(rdi + 64)), ALL),
        ("vmovdqu64 ymm16", |a| a.vmovdqu64(ymm16, ymmword_ptr(rdi)), ALL),
        ("vmovdqu8 xmm17", |a| a.vmovdqu8(xmm17, xmmword_ptr(rdi)), ALL),
        ("vmovdqu32 ymm2", |a| a.vmovdqu32(ymm2, ymmword_ptr(rdi)), ALL),
        ("vmovups zmm", |a| a.vmovups(zmm18, zmmword_ptr(rdi)), ALL),
        ("vmovdqa64 zmm", |a| a.vmovdqa64(zmm19, zmmword_ptr(rdi)), ALL),
        ("vmovaps ymm20", |a| a.vmovaps(ymm20, ymmword_ptr(rdi)), ALL),
        ("vmovdqu64 to", |a| a.vmovdqu64(zmmword_ptr(rdi + 1), zmm16), ALL),
        ("vmovdqu64 ymm to", |a| a.vmovdqu64(ymmword_ptr(rdi), ymm16), ALL),
        ("vmovntdq to", |a| a.vmovntdq(zmmword_ptr(rdi), zmm16), ALL),
        ("vmovups to", |a| a.vmovups(zmmword_ptr(rdi), zmm1), ALL),
    ]);
}

#[test]
fn avx_512_moves_with_a_mask_access_what_it_tells() {
    if widest() < 64 {
        return;
    }
    compare_all(&[
        ("vmovdqu8", |a| a.vmovdqu8(zmm3.k1(), zmmword_ptr(rdi + 1)), ALL),
        ("vmovdqu8 zeroing", |a| a.vmovdqu8(ymm3.k2().z(), ymmword_ptr(rdi + 1)), ALL),
        ("vmovdqu16", |a| a.vmovdqu16(zmm30.k3(), zmmword_ptr(rdi)), ALL),
        ("vmovdqu32", |a| a.vmovdqu32(xmm16.k4().z(), xmmword_ptr(rdi)), ALL),
        ("vmovdqu64", |a| a.vmovdqu64(zmm17.k5(), zmmword_ptr(rdi)), ALL),
        ("vmovups", |a| a.vmovups(ymm18.k6(), ymmword_ptr(rdi)), ALL),
        ("vmovaps", |a| a.vmovaps(zmm18.k7().z(), zmmword_ptr(rdi)), ALL),
        ("vmovdqu8 to", |a| a.vmovdqu8(zmmword_ptr(rdi).k1(), zmm16), ALL),
        ("vmovdqa64 to", |a| a.vmovdqa64(zmmword_ptr(rdi).k2(), zmm16), ALL),
    ]);
    let bench = bench();
    for at in [PAGES * PAGE - 20, 0_usize.wrapping_sub(20)] {
        let across = start(&bench, at);
        compare(&bench, "load", &across, |a| a.vmovdqu8(zmm3.k1(), zmmword_ptr(rdi)), ALL);
        compare(&bench, "store", &across, |a| a.vmovdqu8(zmmword_ptr(rdi).k1(), zmm3), ALL);
    }
}

#[test]
fn an_access_across_the_end_of_a_bar_is_memory_on_one_side_and_ones_on_the_other() {
    let bench = bench();
    for at in [PAGES * PAGE - 3, 0_usize.wrapping_sub(3)] {
        let before = start(&bench, at);
        compare(&bench, "load", &before, |a| a.mov(rax, qword_ptr(rdi)), ALL);
        compare(&bench, "store", &before, |a| a.mov(qword_ptr(rdi), rdx), ALL);
        compare(&bench, "load of a vector", &before, |a| a.movups(xmm0, xmmword_ptr(rdi)), ALL);
        compare(&bench, "store of a vector", &before, |a| a.movups(xmmword_ptr(rdi), xmm0), ALL);
    }
}

#[test]
fn what_completes_is_counted() {
    let bench = bench();
    assert_eq!(bench.read::<u32>(8), u32::MAX);
    bench.write::<u16>(6, 1);
    let counts = [Count::SigbusCompleted, Count::UrReads, Count::UrWrites, Count::FailOpens];
    let counted = || counts.map(|count| bench.shim.status.get(count));
    assert_eq!(counted(), [2, 1, 1, 0]);
    // Iterations are accesses of one instruction.
    Program::new(|a| a.rep().stosd()).run(&mut start(&bench, 0));
    assert_eq!(counted(), [3, 1, 6, 0]);
}
