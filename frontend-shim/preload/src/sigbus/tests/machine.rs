//! Single instructions on this processor, with all registers given and told.

use std::ffi::c_void;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::PAGE;

/// One instruction.
pub(super) type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Registers before or after it. `rsp` is the test's own.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub(super) struct State {
    pub(super) vectors: [[u8; 64]; 32],
    pub(super) general: [u64; 16],
    pub(super) flags: u64,
    /// K0 to K7.
    pub(super) masks: [u64; 8],
}

const GENERAL: usize = 64 * 32;
const FLAGS: usize = GENERAL + 8 * 16;
const MASKS: usize = FLAGS + 8;

/// Widest vector registers that this processor has, in bytes.
pub(super) fn widest() -> usize {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    match (avx512, is_x86_feature_detected!("avx2")) {
        (true, _) => 64,
        (false, true) => 32,
        _ => 16,
    }
}

/// An instruction as a function.
pub(super) struct Program {
    code: *mut c_void,
}

impl Program {
    pub(super) fn new(instruction: Code) -> Program {
        // SAFETY: a new mapping.
        let code = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0)
        };
        assert_ne!(code, libc::MAP_FAILED);
        // Of two encodings, the newer one for the registers that only it has.
        let assemble = |vex| assemble(instruction, code as u64, vex);
        let bytes = assemble(true).or_else(|_| assemble(false)).unwrap();
        assert!(bytes.len() <= PAGE);
        // SAFETY: the mapping is as long.
        unsafe { code.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        // SAFETY: the test's own memory.
        let made = unsafe { libc::mprotect(code, PAGE, libc::PROT_READ | libc::PROT_EXEC) };
        assert_eq!(made, 0);
        Program { code }
    }

    pub(super) fn run(&self, state: &mut State) {
        // SAFETY: the code is a function of this type, which keeps what the C ABI says.
        let function: extern "C" fn(*mut State) = unsafe { std::mem::transmute(self.code) };
        function(state);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: nothing runs in it any more.
        unsafe { libc::munmap(self.code, PAGE) };
    }
}

fn assemble(instruction: Code, at: u64, vex: bool) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.set_prefer_vex(vex);
    for saved in [rbx, rbp, r12, r13, r14, r15] {
        a.push(saved)?;
    }
    a.push(rdi)?;
    vectors(&mut a, true)?;
    a.push(qword_ptr(rdi + FLAGS))?;
    a.popfq()?;
    for (register, offset) in general() {
        a.mov(register, qword_ptr(rdi + offset))?;
    }
    a.mov(rdi, qword_ptr(rdi + GENERAL + 8 * 7))?;
    instruction(&mut a)?;
    a.xchg(qword_ptr(rsp), rdi)?;
    for (register, offset) in general() {
        a.mov(qword_ptr(rdi + offset), register)?;
    }
    a.pushfq()?;
    a.pop(qword_ptr(rdi + FLAGS))?;
    a.cld()?;
    a.pop(rax)?;
    a.mov(qword_ptr(rdi + GENERAL + 8 * 7), rax)?;
    vectors(&mut a, false)?;
    for saved in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(saved)?;
    }
    a.ret()?;
    a.assemble(at)
}

/// All but RSP and RDI, and where they are in the state.
fn general() -> impl Iterator<Item = (AsmRegister64, usize)> {
    let registers = [
        (rax, 0),
        (rcx, 1),
        (rdx, 2),
        (rbx, 3),
        (rbp, 5),
        (rsi, 6),
        (r8, 8),
        (r9, 9),
        (r10, 10),
        (r11, 11),
        (r12, 12),
        (r13, 13),
        (r14, 14),
        (r15, 15),
    ];
    registers.into_iter().map(|(register, number)| (register, GENERAL + 8 * number))
}

fn vectors(a: &mut CodeAssembler, load: bool) -> Result<(), IcedError> {
    if widest() == 64 && load {
        for (number, mask) in (0..).zip([k0, k1, k2, k3, k4, k5, k6, k7]) {
            a.kmovq(mask, qword_ptr(rdi + MASKS + 8 * number))?;
        }
    }
    let xmm = [
        xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13,
        xmm14, xmm15,
    ];
    let ymm = [
        ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13,
        ymm14, ymm15,
    ];
    let zmm = [
        zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13,
        zmm14, zmm15, zmm16, zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26,
        zmm27, zmm28, zmm29, zmm30, zmm31,
    ];
    match (widest(), load) {
        (64, true) => {
            (0..).zip(zmm).try_for_each(|(n, r)| a.vmovdqu64(r, zmmword_ptr(rdi + 64 * n)))
        }
        (64, false) => {
            (0..).zip(zmm).try_for_each(|(n, r)| a.vmovdqu64(zmmword_ptr(rdi + 64 * n), r))
        }
        (32, true) => (0..).zip(ymm).try_for_each(|(n, r)| a.vmovdqu(r, ymmword_ptr(rdi + 64 * n))),
        (32, false) => {
            (0..).zip(ymm).try_for_each(|(n, r)| a.vmovdqu(ymmword_ptr(rdi + 64 * n), r))
        }
        (_, true) => (0..).zip(xmm).try_for_each(|(n, r)| a.movdqu(r, xmmword_ptr(rdi + 64 * n))),
        (_, false) => (0..).zip(xmm).try_for_each(|(n, r)| a.movdqu(xmmword_ptr(rdi + 64 * n), r)),
    }
}
