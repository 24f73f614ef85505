use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::*;
use crate::fault::FaultPlace;

const CODE: u64 = 0x40_0000;
/// What the guest's page tables of these tests add to a linear address.
const PHYSICAL: u64 = 0x10_0000_0000;

/// A virtual CPU whose general-purpose register n is `0x11000 + n * 0x1100`, but rsp, which is 0x8000.
struct Stopped {
    state: VcpuState,
    code: Vec<u8>,
    /// Linear pages that the guest does not map.
    unmapped: Vec<u64>,
    /// Linear pages that are not RAM.
    device: Vec<u64>,
    vectors: Option<[[u8; 64]; 32]>,
    masks: Option<[u64; 8]>,
}

impl StoppedVcpu for Stopped {
    fn state(&self) -> &VcpuState {
        &self.state
    }

    fn translate(&self, linear: u64) -> Option<GuestAddress> {
        let mapped = !self.unmapped.contains(&(linear & !(PAGE_SIZE - 1)));
        mapped.then(|| GuestAddress(linear.wrapping_add(PHYSICAL)))
    }

    fn read_ram(&self, address: GuestAddress, data: &mut [u8]) -> bool {
        assert_eq!(address.0 / PAGE_SIZE, (address.0 + data.len() as u64 - 1) / PAGE_SIZE);
        let linear = address.0 - PHYSICAL;
        if self.device.contains(&(linear & !(PAGE_SIZE - 1))) {
            return false;
        }
        for (at, byte) in (linear..).zip(data) {
            let offset = at.wrapping_sub(self.state.code_address());
            *byte = self.code.get(usize::try_from(offset).unwrap()).copied().unwrap_or(0x90);
        }
        true
    }

    fn vector(&self, number: usize) -> Option<[u8; 64]> {
        self.vectors.map(|vectors| vectors[number])
    }

    fn mask(&self, number: usize) -> Option<u64> {
        self.masks.map(|masks| masks[number])
    }
}

fn stopped(code: CodeWidth, bytes: &[u8]) -> Stopped {
    let mut state = VcpuState { code, rip: CODE, stack32: true, ..VcpuState::default() };
    for (number, register) in (0..).zip(&mut state.general) {
        *register = 0x11000 + number * 0x1100;
    }
    state.general[4] = 0x8000;
    state.segments = SegmentBases {
        es: 0x1000,
        cs: 0x2000,
        ss: 0x3000,
        ds: 0x4000,
        fs: 0x7000_0000,
        gs: 0xffff_8000_0000_0000,
    };
    if code != CodeWidth::Bits64 {
        state.segments = SegmentBases {
            es: 0x10_0000,
            cs: 0x20_0000,
            ss: 0x30_0000,
            ds: 0x50_0000,
            fs: 0x60_0000,
            gs: 0xffff_f000,
        };
        state.rip = 0x100;
        state.stack32 = code == CodeWidth::Bits32;
    }
    let (unmapped, device) = (Vec::new(), Vec::new());
    Stopped { state, code: bytes.to_vec(), unmapped, device, vectors: None, masks: None }
}

fn assemble(bits: u32, write: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    write(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

const R: FaultAccess = FaultAccess::Read;
const W: FaultAccess = FaultAccess::Write;
const X: FaultAccess = FaultAccess::Execute;

type Expected = [(FaultAccess, u64, u64)];

/// Linear address, size and kind of what `locate` found, without the fetch.
fn data_accesses(vcpu: &Stopped) -> Vec<(FaultAccess, u64, u64)> {
    let found = locate(vcpu).unwrap();
    let found = found
        .iter()
        .map(|access| (access.kind.unwrap(), access.address.0.wrapping_sub(PHYSICAL), access.size));
    let (fetch, data): (Vec<_>, _) = found.partition(|(kind, ..)| *kind == X);
    assert_eq!(fetch, [(X, vcpu.state.code_address(), vcpu.code.len() as u64)]);
    data
}

const RAX: u64 = 0x1_1000;
const RCX: u64 = 0x1_2100;
const RBX: u64 = 0x1_4300;
const RSP: u64 = 0x8000;
const RBP: u64 = 0x1_6500;
const RSI: u64 = 0x1_7600;
const RDI: u64 = 0x1_8700;

type Row<'a> = (&'a str, fn(&mut CodeAssembler) -> Result<(), IcedError>, &'a Expected);

const GENERAL: &[Row<'_>] = &[
    ("load", |a| a.mov(eax, dword_ptr(rbx + rcx * 4 - 1)), &[(R, RBX + 4 * RCX - 1, 4)]),
    ("store", |a| a.mov(byte_ptr(rdi), al), &[(W, RDI, 1)]),
    ("wide immediate", |a| a.mov(qword_ptr(rdi + 8), 5), &[(W, RDI + 8, 8)]),
    ("sign extension", |a| a.movsx(rax, word_ptr(rsi)), &[(R, RSI, 2)]),
    ("read-modify-write", |a| a.add(dword_ptr(rdi), eax), &[(W, RDI, 4)]),
    ("locked", |a| a.lock().or(qword_ptr(rdi), rax), &[(W, RDI, 8)]),
    ("compare", |a| a.cmp(word_ptr(rdi), 5), &[(R, RDI, 2)]),
    ("test", |a| a.test(byte_ptr(rdi), al), &[(R, RDI, 1)]),
    ("exchange", |a| a.xchg(dword_ptr(rdi), eax), &[(W, RDI, 4)]),
    ("exchange and add", |a| a.lock().xadd(word_ptr(rdi), ax), &[(W, RDI, 2)]),
    ("cmpxchg", |a| a.cmpxchg(qword_ptr(rdi), rcx), &[(W, RDI, 8)]),
    ("cmpxchg8b", |a| a.lock().cmpxchg8b(qword_ptr(rdi)), &[(W, RDI, 8)]),
    ("cmpxchg16b", |a| a.lock().cmpxchg16b(xmmword_ptr(rdi)), &[(W, RDI, 16)]),
    ("conditional move reads anyway", |a| a.cmovb(eax, dword_ptr(rdi)), &[(R, RDI, 4)]),
    ("setcc", |a| a.setb(byte_ptr(rdi)), &[(W, RDI, 1)]),
    ("multiply", |a| a.imul_3(rax, qword_ptr(rdi), 16), &[(R, RDI, 8)]),
    ("divide", |a| a.div(dword_ptr(rdi)), &[(R, RDI, 4)]),
    ("xlat", |a| a.xlatb(), &[(R, RBX, 1)]),
    ("no access: lea", |a| a.lea(rax, qword_ptr(rdi)), &[]),
    ("no access: nop", |a| a.nop_1(dword_ptr(rdi)), &[]),
    ("no access: prefetch", |a| a.prefetcht0(byte_ptr(rdi)), &[]),
    ("no access: prefetchw", |a| a.prefetchw(byte_ptr(rdi)), &[]),
    ("no access: invlpg", |a| a.invlpg(byte_ptr(rdi)), &[]),
    ("clflush is a load", |a| a.clflush(byte_ptr(rdi)), &[(R, RDI, 1)]),
    ("rip-relative", |a| a.mov(eax, dword_ptr(CODE + 0x1234)), &[(R, CODE + 0x1234, 4)]),
    ("67h wraps", |a| a.mov(eax, dword_ptr(ebx - 0x100)), &[(R, RBX - 0x100, 4)]),
    ("fs", |a| a.mov(eax, dword_ptr(rbx).fs()), &[(R, 0x7000_0000 + RBX, 4)]),
    ("gs", |a| a.mov(qword_ptr(0x10).gs(), rax), &[(W, 0xffff_8000_0000_0010, 8)]),
    ("es has no base in 64-bit mode", |a| a.mov(eax, dword_ptr(rbx).es()), &[(R, RBX, 4)]),
    (
        "moffs",
        |a| a.mov(rax, qword_ptr(0x1122_3344_5566_7788_u64)),
        &[(R, 0x1122_3344_5566_7788, 8)],
    ),
    ("bit test, immediate", |a| a.bts(dword_ptr(rdi), 35), &[(W, RDI, 4)]),
    ("bit test, register", |a| a.bt(dword_ptr(rdi), eax), &[(R, RDI + RAX / 32 * 4, 4)]),
    ("bit set, 8 bytes", |a| a.bts(qword_ptr(rdi), rax), &[(W, RDI + RAX / 64 * 8, 8)]),
    ("bit reset, 2 bytes", |a| a.btr(word_ptr(rdi), ax), &[(W, RDI + 0x1000 / 16 * 2, 2)]),
    ("push", |a| a.push(rax), &[(W, RSP - 8, 8)]),
    ("push memory", |a| a.push(qword_ptr(rdi)), &[(R, RDI, 8), (W, RSP - 8, 8)]),
    ("push 2 bytes", |a| a.push(ax), &[(W, RSP - 2, 2)]),
    ("pop", |a| a.pop(rax), &[(R, RSP, 8)]),
    ("pop memory", |a| a.pop(qword_ptr(rdi)), &[(R, RSP, 8), (W, RDI, 8)]),
    (
        "pop to where rsp is after it",
        |a| a.pop(qword_ptr(rsp + 8)),
        &[(R, RSP, 8), (W, RSP + 16, 8)],
    ),
    ("pushfq", |a| a.pushfq(), &[(W, RSP - 8, 8)]),
    ("call", |a| a.call(CODE + 5), &[(W, RSP - 8, 8)]),
    ("call memory", |a| a.call(qword_ptr(rdi)), &[(R, RDI, 8), (W, RSP - 8, 8)]),
    ("jump memory", |a| a.jmp(qword_ptr(rdi)), &[(R, RDI, 8)]),
    ("ret", |a| a.ret(), &[(R, RSP, 8)]),
    ("leave", |a| a.leave(), &[(R, RBP, 8)]),
    ("enter 0", |a| a.enter(0x20, 0), &[(W, RSP - 8, 8)]),
    (
        "enter 2",
        |a| a.enter(0x20, 2),
        &[(R, RBP - 8, 8), (W, RSP - 8, 8), (W, RSP - 16, 8), (W, RSP - 24, 8)],
    ),
    (
        "iretq",
        |a| a.iretq(),
        &[(R, RSP, 8), (R, RSP + 8, 8), (R, RSP + 16, 8), (R, RSP + 24, 8), (R, RSP + 32, 8)],
    ),
    ("movs", |a| a.movsd(), &[(R, RSI, 4), (W, RDI, 4)]),
    ("rep movs", |a| a.rep().movsq(), &[(R, RSI, 8), (W, RDI, 8)]),
    ("rep stos", |a| a.rep().stosb(), &[(W, RDI, 1)]),
    ("rep lods", |a| a.rep().lodsw(), &[(R, RSI, 2)]),
    ("repne scas", |a| a.repne().scasd(), &[(R, RDI, 4)]),
    ("repe cmps", |a| a.repe().cmpsb(), &[(R, RSI, 1), (R, RDI, 1)]),
    ("ins", |a| a.insd(), &[(W, RDI, 4)]),
    ("rep ins", |a| a.rep().insb(), &[(W, RDI, 1)]),
    ("outs", |a| a.outsw(), &[(R, RSI, 2)]),
    ("rep outs", |a| a.rep().outsd(), &[(R, RSI, 4)]),
    ("port alone", |a| a.in_(al, dx), &[]),
    ("sgdt", |a| a.sgdt(fword_ptr(rdi)), &[(W, RDI, 10)]),
    ("movbe", |a| a.movbe(dword_ptr(rdi), eax), &[(W, RDI, 4)]),
    ("movnti", |a| a.movnti(qword_ptr(rdi), rax), &[(W, RDI, 8)]),
    ("movdiri", |a| a.movdiri(dword_ptr(rdi), eax), &[(W, RDI, 4)]),
    ("movdir64b", |a| a.movdir64b(rdi, zmmword_ptr(rsi)), &[(R, RSI, 64), (W, RDI, 64)]),
    ("clzero", |a| a.clzero(), &[(W, RAX, 64)]),
    ("monitor", |a| a.monitor(), &[(R, RAX, 1)]),
    ("fld", |a| a.fld(tbyte_ptr(rdi)), &[(R, RDI, 10)]),
    ("fxsave", |a| a.fxsave(ptr(rdi)), &[(W, RDI, 512)]),
    ("fxrstor64", |a| a.fxrstor64(ptr(rdi)), &[(R, RDI, 512)]),
    ("ldmxcsr", |a| a.ldmxcsr(dword_ptr(rdi)), &[(R, RDI, 4)]),
];

const VECTORS: &[Row<'_>] = &[
    ("movd", |a| a.movd(xmm0, dword_ptr(rdi)), &[(R, RDI, 4)]),
    ("movups", |a| a.movups(xmm0, xmmword_ptr(rdi)), &[(R, RDI, 16)]),
    ("movntdq", |a| a.movntdq(xmmword_ptr(rdi), xmm0), &[(W, RDI, 16)]),
    ("paddd", |a| a.paddd(xmm0, xmmword_ptr(rdi)), &[(R, RDI, 16)]),
    ("pinsrb", |a| a.pinsrb(xmm0, byte_ptr(rdi), 3), &[(R, RDI, 1)]),
    ("addsd", |a| a.addsd(xmm0, qword_ptr(rdi)), &[(R, RDI, 8)]),
    ("vmovdqu", |a| a.vmovdqu(ymmword_ptr(rdi), ymm0), &[(W, RDI, 32)]),
    ("vbroadcastss", |a| a.vbroadcastss(ymm0, dword_ptr(rdi)), &[(R, RDI, 4)]),
    ("vmovdqu64", |a| a.vmovdqu64(zmm0, zmmword_ptr(rdi)), &[(R, RDI, 64)]),
    (
        "displacement in elements",
        |a| a.vmovdqu64(zmm0, zmmword_ptr(rdi + 128)),
        &[(R, RDI + 128, 64)],
    ),
    ("broadcast operand", |a| a.vpaddd(zmm0, zmm1, dword_bcst(rdi)), &[(R, RDI, 4)]),
    ("vextracti128", |a| a.vextracti128(xmmword_ptr(rdi), ymm0, 1), &[(W, RDI, 16)]),
    // k1 is 0b1010_0011, k2 is 0; the signs of xmm3 are those of 4 byte lanes 0, 2 and 3.
    (
        "masked store",
        |a| a.vmovdqu32(ymmword_ptr(rdi).k1(), ymm0),
        &[(W, RDI, 8), (W, RDI + 20, 4), (W, RDI + 28, 4)],
    ),
    (
        "masked load",
        |a| a.vmovups(zmm0.k1().z(), zmmword_ptr(rdi)),
        &[(R, RDI, 8), (R, RDI + 20, 4), (R, RDI + 28, 4)],
    ),
    ("nothing selected", |a| a.vmovdqu8(zmmword_ptr(rdi).k2(), zmm0), &[]),
    (
        "truncating store",
        |a| a.vpmovqb(qword_ptr(rdi).k1(), zmm0),
        &[(W, RDI, 2), (W, RDI + 5, 1), (W, RDI + 7, 1)],
    ),
    ("compress", |a| a.vpcompressd(ymmword_ptr(rdi).k1(), ymm0), &[(W, RDI, 16)]),
    ("expand", |a| a.vpexpandd(ymm0.k1(), ymmword_ptr(rdi)), &[(R, RDI, 16)]),
    ("masked arithmetic", |a| a.vpaddd(ymm0.k1(), ymm1, ymmword_ptr(rdi)), &[(R, RDI, 32)]),
    ("vmaskmovps", |a| a.vmaskmovps(xmm0, xmm3, xmmword_ptr(rdi)), &[(R, RDI, 4), (R, RDI + 8, 8)]),
    ("vpmaskmovd", |a| a.vpmaskmovd(xmmword_ptr(rdi), xmm3, xmm0), &[(W, RDI, 4), (W, RDI + 8, 8)]),
    (
        "maskmovdqu",
        |a| a.maskmovdqu(xmm0, xmm3),
        &[(W, RDI + 3, 1), (W, RDI + 11, 1), (W, RDI + 15, 1)],
    ),
    // Lanes of xmm4 are 1, -2, 3, -4 (4 bytes); those of zmm5 are 0x1000, 0x2000, ... (8 bytes).
    (
        "vpgatherdd xmm0, [rdi + xmm4 * 8], xmm3",
        |a| a.db(&[0xc4, 0xe2, 0x61, 0x90, 0x04, 0xe7]),
        &[(R, RDI + 8, 4), (R, RDI + 24, 4), (R, RDI - 32, 4)],
    ),
    (
        "vpgatherqd xmm0, [rdi + xmm5], xmm6: as many lanes as indices",
        |a| a.db(&[0xc4, 0xe2, 0x49, 0x91, 0x04, 0x2f]),
        &[(R, RDI + 0x1000, 4), (R, RDI + 0x2000, 4)],
    ),
    (
        "vgatherdpd xmm0, [rdi + xmm4 * 2], xmm6: as many lanes as data",
        |a| a.db(&[0xc4, 0xe2, 0xc9, 0x92, 0x04, 0x67]),
        &[(R, RDI + 2, 8), (R, RDI - 4, 8)],
    ),
    (
        "scatter",
        |a| a.vpscatterqq(qword_ptr(rdi + zmm5).k1(), zmm0),
        &[(W, RDI + 0x1000, 8), (W, RDI + 0x2000, 8), (W, RDI + 0x6000, 8), (W, RDI + 0x8000, 8)],
    ),
];

fn with_vectors(mut vcpu: Stopped) -> Stopped {
    let mut vectors = [[0; 64]; 32];
    for lane in [0, 2, 3] {
        vectors[3][4 * lane + 3] = 0x80;
    }
    for (lane, index) in [1_i32, -2, 3, -4].into_iter().enumerate() {
        vectors[4][4 * lane..4 * lane + 4].copy_from_slice(&index.to_le_bytes());
    }
    for lane in 0..8 {
        let index = 0x1000 * (lane as u64 + 1);
        vectors[5][8 * lane..8 * lane + 8].copy_from_slice(&index.to_le_bytes());
    }
    vectors[6] = [0xff; 64];
    vcpu.vectors = Some(vectors);
    vcpu.masks = Some([u64::MAX, 0b1010_0011, 0, 0, 0, 0, 0, 0]);
    vcpu
}

fn wrong(rows: &[Row<'_>]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, write, expected) in rows {
        let vcpu = with_vectors(stopped(CodeWidth::Bits64, &assemble(64, write)));
        let found = data_accesses(&vcpu);
        if found != *expected {
            wrong.push(format!("{name}: {found:x?}, not {expected:x?}"));
        }
    }
    wrong
}

#[test]
fn general_instructions_access_what_the_manual_says() {
    let wrong = wrong(GENERAL);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn vector_instructions_access_the_elements_that_are_selected() {
    let wrong = wrong(VECTORS);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn without_the_masks_every_element_may_be_accessed() {
    let bytes = assemble(64, |a| a.vmovdqu32(ymmword_ptr(rdi).k1(), ymm0));
    let vcpu = stopped(CodeWidth::Bits64, &bytes);
    assert_eq!(data_accesses(&vcpu), [(W, RDI, 32)]);

    let gather = assemble(64, |a| a.vpgatherqq(zmm0.k1(), qword_ptr(rdi + zmm5)));
    let mut vcpu = with_vectors(stopped(CodeWidth::Bits64, &gather));
    vcpu.masks = None;
    assert_eq!(data_accesses(&vcpu).len(), 8);
    vcpu.vectors = None;
    assert_eq!(locate(&vcpu), Err(Unlocated::VectorRegisters(CODE)));
}

#[test]
fn a_count_of_zero_accesses_nothing() {
    let rep = assemble(64, |a| a.rep().movsb());
    let rep32 = [0x67, 0xf3, 0xa4];
    // The count is as wide as the addresses.
    for (bytes, count, expected) in
        [(&rep[..], 0, 0), (&rep, 1 << 32, 2), (&rep32, 1 << 32, 0), (&rep32, 1, 2)]
    {
        let mut vcpu = stopped(CodeWidth::Bits64, bytes);
        vcpu.state.general[1] = count;
        assert_eq!(data_accesses(&vcpu).len(), expected, "{bytes:x?} {count:#x}");
    }
}

#[test]
fn a_bit_offset_reaches_backwards_too() {
    let bytes = assemble(64, |a| a.bts(dword_ptr(rdi), eax));
    for (bit, offset) in [(0_i32, 0_i64), (31, 0), (32, 4), (-1, -4), (-32, -4), (-33, -8)] {
        let mut vcpu = stopped(CodeWidth::Bits64, &bytes);
        vcpu.state.general[0] = u64::from(bit.cast_unsigned());
        let expected = RDI.wrapping_add_signed(offset);
        assert_eq!(data_accesses(&vcpu), [(W, expected, 4)], "{bit}");
    }
}

#[test]
fn clzero_clears_the_line_that_its_address_is_in() {
    let mut vcpu = stopped(CodeWidth::Bits64, &assemble(64, |a| a.clzero()));
    vcpu.state.general[0] = RAX + 0x7f;
    assert_eq!(data_accesses(&vcpu), [(W, RAX + 0x40, 64)]);
}

#[test]
fn xsave_reaches_to_the_last_component_asked_for() {
    let bytes = assemble(64, |a| a.xsave(ptr(rdi)));
    for (wanted, size) in [(0_u64, 576), (0b11, 576), (0b111, 832), (0xe7, 2688), (1 << 9, 2696)] {
        let mut vcpu = stopped(CodeWidth::Bits64, &bytes);
        (vcpu.state.general[0], vcpu.state.general[2]) = (wanted, 0);
        vcpu.state.general[7] = 0x2_0000;
        assert_eq!(data_accesses(&vcpu), [(W, 0x2_0000, size)], "{wanted:#x}");
    }
}

#[test]
fn narrow_code_has_segments_and_wraps() {
    type Assemble = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let rows: [(&str, CodeWidth, Assemble, &Expected); 12] = [
        ("ds", CodeWidth::Bits32, |a| a.mov(eax, dword_ptr(ebx)), &[(R, 0x50_0000 + RBX, 4)]),
        (
            "ss by ebp",
            CodeWidth::Bits32,
            |a| a.mov(dword_ptr(ebp), eax),
            &[(W, 0x30_0000 + RBP, 4)],
        ),
        ("es", CodeWidth::Bits32, |a| a.mov(dword_ptr(ebx).es(), eax), &[(W, 0x10_0000 + RBX, 4)]),
        ("cs", CodeWidth::Bits32, |a| a.mov(eax, dword_ptr(ebx).cs()), &[(R, 0x20_0000 + RBX, 4)]),
        ("fs", CodeWidth::Bits32, |a| a.mov(eax, dword_ptr(ebx).fs()), &[(R, 0x60_0000 + RBX, 4)]),
        (
            "linear addresses wrap",
            CodeWidth::Bits32,
            |a| a.mov(eax, dword_ptr(ebx).gs()),
            &[(R, RBX - 0x1000, 4)],
        ),
        (
            "movs",
            CodeWidth::Bits32,
            |a| a.movsb(),
            &[(R, 0x50_0000 + RSI, 1), (W, 0x10_0000 + RDI, 1)],
        ),
        ("push", CodeWidth::Bits32, |a| a.push(eax), &[(W, 0x30_7ffc, 4)]),
        (
            "pusha",
            CodeWidth::Bits32,
            |a| a.pushad(),
            &[
                (W, 0x30_7ffc, 4),
                (W, 0x30_7ff8, 4),
                (W, 0x30_7ff4, 4),
                (W, 0x30_7ff0, 4),
                (W, 0x30_7fec, 4),
                (W, 0x30_7fe8, 4),
                (W, 0x30_7fe4, 4),
                (W, 0x30_7fe0, 4),
            ],
        ),
        (
            "16 bits",
            CodeWidth::Bits16,
            |a| a.mov(ax, word_ptr(bx + si)),
            &[(R, 0x50_0000 + 0x4300 + 0x7600, 2)],
        ),
        (
            "offsets wrap",
            CodeWidth::Bits16,
            |a| a.mov(ax, word_ptr(bx + 0xc000)),
            &[(R, 0x50_0300, 2)],
        ),
        (
            "67h in 16 bits",
            CodeWidth::Bits16,
            |a| a.mov(ax, word_ptr(ebx)),
            &[(R, 0x50_0000 + RBX, 2)],
        ),
    ];
    for (name, width, write, expected) in rows {
        let bytes = assemble(width.bits(), write);
        assert_eq!(data_accesses(&stopped(width, &bytes)), expected, "{name}");
    }
}

#[test]
fn the_stack_segment_says_how_wide_the_stack_pointer_is() {
    let push = assemble(32, |a| a.push(eax));
    let mut vcpu = stopped(CodeWidth::Bits32, &push);
    (vcpu.state.general[4], vcpu.state.stack32) = (0x1_0004, false);
    assert_eq!(data_accesses(&vcpu), [(W, 0x30_0000, 4)]);
    vcpu.state.stack32 = true;
    assert_eq!(data_accesses(&vcpu), [(W, 0x31_0000, 4)]);
}

#[test]
fn an_access_across_pages_is_cut_and_translated_twice() {
    let bytes = assemble(64, |a| a.mov(qword_ptr(rdi), rax));
    let mut vcpu = stopped(CodeWidth::Bits64, &bytes);
    vcpu.state.general[7] = 0x1_8ffd;
    assert_eq!(data_accesses(&vcpu), [(W, 0x1_8ffd, 3), (W, 0x1_9000, 5)]);
    // The guest takes a page fault for the second half first.
    vcpu.unmapped.push(0x1_9000);
    assert_eq!(data_accesses(&vcpu), [(W, 0x1_8ffd, 3)]);
    vcpu.unmapped.push(0x1_8000);
    assert_eq!(locate(&vcpu), Err(Unlocated::NotMapped(0x1_8ffd)));
}

#[test]
fn an_operand_that_is_not_mapped_leaves_the_other_one() {
    let bytes = assemble(64, |a| a.movsb());
    let mut vcpu = stopped(CodeWidth::Bits64, &bytes);
    vcpu.unmapped.push(RDI & !(PAGE_SIZE - 1));
    assert_eq!(data_accesses(&vcpu), [(R, RSI, 1)]);
}

#[test]
fn code_outside_of_ram_is_known_by_its_fetch_alone() {
    let bytes = assemble(64, |a| a.mov(eax, dword_ptr(rdi)));
    let execute = |address: u64, size| GuestAccess {
        address: GuestAddress(address + PHYSICAL),
        size,
        kind: Some(X),
    };
    let mut vcpu = stopped(CodeWidth::Bits64, &bytes);
    vcpu.device.push(CODE);
    assert_eq!(locate(&vcpu), Ok(vec![execute(CODE, 15)]));
    vcpu.unmapped.push(CODE);
    assert_eq!(locate(&vcpu), Err(Unlocated::NotMapped(CODE)));

    // Two bytes at the end of a page: the second page matters only if there are more.
    let mut vcpu = stopped(CodeWidth::Bits64, &[0x8b, 0x07]);
    vcpu.state.rip = CODE + 0xffe;
    vcpu.device.push(CODE + 0x1000);
    let load = GuestAccess { address: GuestAddress(RDI + PHYSICAL), size: 4, kind: Some(R) };
    assert_eq!(locate(&vcpu), Ok(vec![execute(CODE + 0xffe, 2), load]));
    vcpu.code = vec![0x8b, 0x47, 0];
    assert_eq!(locate(&vcpu), Ok(vec![execute(CODE + 0xffe, 2), execute(CODE + 0x1000, 13)]));
    vcpu.device.clear();
    assert_eq!(locate(&vcpu), Ok(vec![execute(CODE + 0xffe, 2), execute(CODE + 0x1000, 1), load]));
    vcpu.unmapped.push(CODE + 0x1000);
    assert_eq!(locate(&vcpu), Err(Unlocated::NotMapped(CODE + 0x1000)));
}

#[test]
fn what_is_no_instruction_or_not_understood_is_unknown() {
    let unknown = Err(Unlocated::UnknownInstruction(CODE));
    // A bad opcode; 15 prefixes; a tile load, whose size is in the tile configuration.
    let tile = assemble(64, |a| a.tileloadd(tmm0, ptr(rdi + rcx)));
    for bytes in [&[0x0f, 0x04][..], &[0x66; 15], &tile] {
        assert_eq!(locate(&stopped(CodeWidth::Bits64, bytes)), unknown, "{bytes:x?}");
    }
}

#[test]
fn memory_that_may_have_refused_is_told_from_memory_that_can_not_have() {
    let access = |page: u64, kind| GuestAccess {
        address: GuestAddress(page * PAGE_SIZE + 8),
        size: 4,
        kind: Some(kind),
    };
    // Pages: 0 nothing, 1 RAM, 2 broken RAM, 3 and 4 devices, 5 RAM that refuses only writes.
    let classify = |address: GuestAddress, write| match (address.0 / PAGE_SIZE, write) {
        _ if !address.0.is_multiple_of(PAGE_SIZE) => panic!("{address} is not a page"),
        (0, _) => Backing::NoSlot,
        (2, _) | (5, true) => Backing::Refused,
        (3 | 4, _) => Backing::Device,
        _ => Backing::Usable,
    };
    let (code, none, ram, broken) = (access(1, X), access(0, R), access(1, R), access(2, R));
    let (also_none, gone_code) = (access(0, W), access(0, X));
    let (bar, other_bar) = (access(3, W), access(4, R));
    let unknown = FaultPlace::Unknown(Unlocated::NoSlot(7));
    let rows: &[(&[GuestAccess], FaultPlace)] = &[
        (&[], unknown.clone()),
        (&[code, ram], unknown.clone()),
        // The slot was there when the access faulted.
        (&[code, none], FaultPlace::Located(none)),
        (&[code, none, ram, also_none], FaultPlace::OneOf(vec![none, also_none])),
        (&[gone_code], FaultPlace::Located(gone_code)),
        (&[code, none, broken], FaultPlace::Located(broken)),
        (&[code, bar], FaultPlace::Located(bar)),
        (&[code, ram, bar, none], FaultPlace::Located(bar)),
        (&[code, other_bar, bar], FaultPlace::OneOf(vec![other_bar, bar])),
        (&[code, bar, broken], FaultPlace::Located(broken)),
        (&[access(5, R)], unknown),
        (&[access(5, R), access(5, W)], FaultPlace::Located(access(5, W))),
        (&[access(3, X)], FaultPlace::Located(access(3, X))),
    ];
    for (accesses, expected) in rows {
        assert_eq!(narrow(7, accesses, classify), *expected, "{accesses:?}");
    }
}
