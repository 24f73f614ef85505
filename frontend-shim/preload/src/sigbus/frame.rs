#![expect(
    unsafe_code,
    reason = "what the kernel saved of a thread is memory that only the kernel vouches for"
)]
//! What the kernel saved of the thread that a signal interrupted (`ucontext_t`), and loads again.

use std::ffi::c_void;
use std::ptr::{NonNull, addr_of, addr_of_mut};

/// In `uc_flags`: there may be more than FXSAVE's area (`asm/ucontext.h`).
const UC_FP_XSTATE: u64 = 1 << 0;
/// Length in bytes of FXSAVE's area.
const FXSAVE: usize = 512;
/// Where FXSAVE's area leaves room for software, `struct _fpx_sw_bytes` (`asm/sigcontext.h`).
const MAGIC1: usize = 464;
const EXTENDED_SIZE: usize = 468;
const FEATURES: usize = 472;
const XSTATE_SIZE: usize = 480;
/// `FP_XSTATE_MAGIC1`, and `FP_XSTATE_MAGIC2` that comes after the area.
const MAGIC1_VALUE: u32 = 0x4650_5853;
const MAGIC2_VALUE: u32 = 0x4650_5845;
/// XSAVE's area: its header follows FXSAVE's.
const SMALLEST: usize = FXSAVE + 64;
/// No processor has this much state.
const LARGEST: usize = 1 << 16;

/// The order of `Registers::general` in `gregs`.
const GENERAL: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Selectors of 64-bit mode in user space, `__USER_CS`.
const USER_CS: u64 = 0x33;

/// A frame of a signal, for as long as its handler runs.
#[derive(Debug)]
pub(super) struct Frame {
    context: NonNull<libc::ucontext_t>,
}

/// The state of vector registers, as FXSAVE or XSAVE saved it.
#[derive(Debug)]
pub(super) struct Area<'a> {
    pub(super) bytes: &'a mut [u8],
    /// State components that are in it, by bit. FXSAVE's area, which has no header, has none.
    pub(super) features: u64,
}

impl Frame {
    /// # Safety
    /// `context` is what the kernel gave a handler with `SA_SIGINFO`, which does not return before the
    /// frame is dropped and has no other use of it meanwhile.
    pub(super) unsafe fn new(context: *mut c_void) -> Option<Self> {
        Some(Self { context: NonNull::new(context.cast())? })
    }

    pub(super) fn general(&self) -> [u64; 16] {
        GENERAL.map(|register| self.register(register))
    }

    pub(super) fn set_general(&mut self, values: &[u64; 16]) {
        for (register, value) in GENERAL.into_iter().zip(values) {
            self.set_register(register, *value);
        }
    }

    pub(super) fn rip(&self) -> u64 {
        self.register(libc::REG_RIP)
    }

    pub(super) fn set_rip(&mut self, value: u64) {
        self.set_register(libc::REG_RIP, value);
    }

    pub(super) fn flags(&self) -> u64 {
        self.register(libc::REG_EFL)
    }

    pub(super) fn set_flags(&mut self, value: u64) {
        self.set_register(libc::REG_EFL, value);
    }

    /// Whether the thread was in 64-bit mode.
    pub(super) fn is_64_bit(&self) -> bool {
        self.register(libc::REG_CSGSFS) & 0xffff == USER_CS
    }

    /// The signals that are blocked once the handler has returned.
    pub(super) fn mask(&self) -> u64 {
        // SAFETY: as in `register`; the kernel's set has 8 bytes.
        unsafe { self.mask_place().read() }
    }

    pub(super) fn set_mask(&mut self, mask: u64) {
        // SAFETY: as in `mask`.
        unsafe { self.mask_place().write(mask) }
    }

    /// The state of the vector registers. `None` where the kernel saved none, or what is there does not
    /// look as it should.
    pub(super) fn area(&mut self) -> Option<Area<'_>> {
        let context = self.context.as_ptr();
        // SAFETY: the frame is there for as long as `self`.
        let start = unsafe { addr_of!((*context).uc_mcontext.fpregs) };
        // SAFETY: likewise; nothing else refers to it.
        let start = unsafe { start.read() }.cast::<u8>();
        if start.is_null() {
            return None;
        }
        // SAFETY: where there is an area at all, it has at least FXSAVE's part.
        let fxsave = unsafe { std::slice::from_raw_parts_mut(start, FXSAVE) };
        // SAFETY: as above.
        let flags = unsafe { addr_of!((*context).uc_flags) };
        // SAFETY: as above.
        let flags = unsafe { flags.read() };
        if flags & UC_FP_XSTATE == 0 || word(fxsave, MAGIC1)? != MAGIC1_VALUE {
            return Some(Area { bytes: fxsave, features: 0 });
        }
        let len = usize::try_from(word(fxsave, XSTATE_SIZE)?).ok()?;
        let all = usize::try_from(word(fxsave, EXTENDED_SIZE)?).ok()?;
        let features =
            u64::from(word(fxsave, FEATURES)?) | u64::from(word(fxsave, FEATURES + 4)?) << 32;
        if !(SMALLEST..=LARGEST).contains(&len) || all < len + 4 {
            return None;
        }
        // SAFETY: the kernel says that this much is there; with the magic number at the end, it can be
        // believed.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, len + 4) };
        let (bytes, magic2) = bytes.split_at_mut(len);
        (word(magic2, 0)? == MAGIC2_VALUE).then_some(Area { bytes, features })
    }

    fn register(&self, register: i32) -> u64 {
        // SAFETY: the frame is there for as long as `self`; nothing else refers to it.
        unsafe { self.place(register).read() }.cast_unsigned()
    }

    fn set_register(&mut self, register: i32, value: u64) {
        // SAFETY: as in `register`.
        unsafe { self.place(register).write(value.cast_signed()) }
    }

    /// Not through a reference: the C library's structure is longer than the kernel's.
    fn place(&self, register: i32) -> *mut i64 {
        let index = usize::try_from(register).unwrap_or(0);
        // SAFETY: `REG_*` are indices into `gregs`.
        unsafe { addr_of_mut!((*self.context.as_ptr()).uc_mcontext.gregs[index]) }
    }

    fn mask_place(&self) -> *mut u64 {
        // SAFETY: the frame is there for as long as `self`.
        unsafe { addr_of_mut!((*self.context.as_ptr()).uc_sigmask) }.cast()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}
