#![expect(
    unsafe_code,
    reason = "a handler of signals gets pointers, and calls functions of the VMM's by theirs"
)]
//! The handler of `SIGBUS`.
//!
//! It stands in for the kernel where a signal is not about a BAR: `force_sig_fault` and `get_signal` of
//! the kernel say what happens to one that is blocked or ignored, and `setup_rt_frame` how a handler is
//! entered.

use std::arch::naked_asm;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::action::Action;
use super::frame::Frame;
use super::mask::{self, Change};
use super::{BUS, SIGBUS, emulate};
use crate::Shim;
use crate::device::Decode;
use crate::status::{Count, FailOpen};
use crate::system::{Answer, System};

/// `si_code`: an address that is not there, and the last one of a fault of the thread's own
/// (`asm-generic/siginfo.h`). `BUS_MCEERR_AO` comes from elsewhere.
const BUS_ADRERR: c_int = 2;
const BUS_MCEERR_AR: c_int = 4;

/// An access that is refused although the BAR decodes is made again this often, if nothing else
/// happens in the thread meanwhile: BARs may be switched on and off in between, but not each time.
const RETRIES: u32 = 10_000;

thread_local! {
    /// The address that was refused last although its BAR decodes, and how often in a row.
    static REFUSED: Cell<(usize, u32)> = const { Cell::new((0, 0)) };
}

/// The handler's `Shim`.
static SHIM: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

/// Makes the handler the process's.
pub(super) fn install<S: System>(shim: &'static Shim<S>) -> Answer<()> {
    REFUSED.set(REFUSED.get());
    SHIM.store(std::ptr::from_ref(shim).cast_mut().cast(), Ordering::Release);
    let handler: Handler = on_sigbus::<S>;
    let flags = libc::SA_SIGINFO | libc::SA_RESTART;
    let ours = Action { handler: handler as usize, flags, mask: 0, restorer: 0 };
    shim.system.signal_action(SIGBUS, Some(ours)).map(|_| ())
}

/// With `SA_SIGINFO`. The VMM's may end the thread, which unwinds its stack.
type Handler = extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void);

extern "C-unwind" fn on_sigbus<S: System>(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    let errno = errno();
    // SAFETY: `install` stored a shim of the same type, which lives for ever.
    let shim = unsafe { &*SHIM.load(Ordering::Acquire).cast::<Shim<S>>() };
    // SAFETY: both pointers are the kernel's.
    let arrived = unsafe { Arrived::new(info, context) };
    let next = arrived.map_or(Next::Return, |mut arrived| {
        let completed = shim.shielded(|| complete(shim, &mut arrived)).unwrap_or(false);
        if completed { Next::Return } else { stand_in(shim, &mut arrived) }
    });
    set_errno(errno);
    if let Next::Call(action) = next {
        // SAFETY: it is the VMM's, for this signal.
        unsafe { call(&action, signal, info, context) };
        // SAFETY: the VMM's handler is done with it.
        if let Some(mut frame) = unsafe { Frame::new(context) } {
            let mask = frame.mask();
            mask::set_blocked(mask & BUS != 0);
            frame.set_mask(mask & !BUS);
        }
    }
}

/// A signal that arrived.
struct Arrived {
    info: *const libc::siginfo_t,
    code: c_int,
    address: usize,
    frame: Frame,
}

impl Arrived {
    /// # Safety
    /// Both are what the kernel gave a handler of `SIGBUS`, which has not returned.
    unsafe fn new(info: *const libc::siginfo_t, context: *mut c_void) -> Option<Self> {
        // SAFETY: the caller's promise.
        let frame = unsafe { Frame::new(context) }?;
        // SAFETY: the caller's promise.
        let of_signal = unsafe { info.as_ref() }?;
        // SAFETY: a fault has an address; of other signals, the value is not used.
        let address = unsafe { of_signal.si_addr() }.addr();
        Some(Self { info, code: of_signal.si_code, address, frame })
    }

    /// Whether it is of an access that this thread was making.
    fn is_fault(&self) -> bool {
        (1..=BUS_MCEERR_AR).contains(&self.code)
    }
}

/// Whether the access was to a BAR and is complete, or is to be made again.
fn complete<S: System>(shim: &Shim<S>, arrived: &mut Arrived) -> bool {
    if arrived.code != BUS_ADRERR {
        return false;
    }
    let Some(mapping) = shim.mapping_at(arrived.address) else { return false };
    match shim.decode(mapping.device, mapping.bar) {
        Decode::Unknown => false,
        Decode::On => {
            let again = may_retry(arrived.address);
            if !again {
                shim.status.fail_open(FailOpen::SigbusRepeats);
            }
            again
        }
        Decode::Off => {
            REFUSED.set((0, 0));
            let completed = emulate::complete(shim, &mut arrived.frame, &mapping).is_ok();
            if completed {
                shim.status.count(Count::SigbusCompleted);
            } else {
                shim.status.fail_open(FailOpen::SigbusInstruction);
            }
            completed
        }
    }
}

fn may_retry(address: usize) -> bool {
    let times = match REFUSED.get() {
        (last, times) if last == address => times + 1,
        _ => 1,
    };
    REFUSED.set(if times > RETRIES { (0, 0) } else { (address, times) });
    times <= RETRIES
}

/// What is left to do when the handler is about to return.
enum Next {
    Return,
    Call(Action),
}

/// What the kernel would do, were the VMM's action its own.
fn stand_in<S: System>(shim: &Shim<S>, arrived: &mut Arrived) -> Next {
    let fault = arrived.is_fault();
    if mask::blocked() {
        // A fault can't wait, and does not ask the handler then.
        if fault {
            die(shim, arrived);
        } else {
            keep_pending(arrived);
        }
        return Next::Return;
    }
    let action = shim.signals.chained.take();
    match action.handler {
        libc::SIG_IGN if !fault => Next::Return,
        libc::SIG_DFL | libc::SIG_IGN => {
            // The first process of a namespace has no default action for what others send it.
            if fault || process() != 1 {
                die(shim, arrived);
            }
            Next::Return
        }
        _ => {
            block_for(shim, &action);
            Next::Call(action)
        }
    }
}

/// Sees to it that the process ends by this signal, with the registers and the cause that it came with.
fn die<S: System>(shim: &Shim<S>, arrived: &Arrived) {
    let _ = shim.system.signal_action(SIGBUS, Some(Action::DEFAULT));
    // It is blocked until this handler returns, right behind the instruction that it is about.
    if !send_to_thread(arrived) && !arrived.is_fault() {
        // SAFETY: it has no memory for an argument.
        unsafe { libc::syscall(libc::SYS_tgkill, process(), thread(), SIGBUS) };
    }
}

/// Puts a signal back that a thread gets which blocks it, as far as the VMM knows.
fn keep_pending(arrived: &mut Arrived) {
    arrived.frame.set_mask(arrived.frame.mask() | BUS);
    mask::hold();
    // The rest is sent to threads, or by somebody who can't know of any but the first.
    if !matches!(arrived.code, libc::SI_USER | libc::SI_QUEUE) {
        send_to_thread(arrived);
        return;
    }
    // Another thread may want it.
    // SAFETY: the kernel's own information goes back to the kernel.
    let sent = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, process(), SIGBUS, arrived.info) };
    if sent != 0 {
        // Only the first thread may say that somebody else sent it.
        // SAFETY: it has no memory for an argument.
        unsafe { libc::syscall(libc::SYS_kill, process(), SIGBUS) };
    }
}

/// Takes away what this thread left pending, or the process: what is ignored from now on does not wait.
pub(super) fn discard_pending() {
    let set = BUS;
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let none = null_mut::<libc::siginfo_t>();
    let errno = errno();
    let wait = || {
        // SAFETY: the pointers are valid, or null where that is allowed.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigtimedwait,
                &raw const set,
                none,
                &raw const now,
                size_of::<u64>(),
            )
        }
    };
    while wait() == i64::from(SIGBUS) {}
    set_errno(errno);
}

fn send_to_thread(arrived: &Arrived) -> bool {
    let (process, thread) = (process(), thread());
    // SAFETY: the kernel's own information goes back to the kernel.
    let sent = unsafe {
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, SIGBUS, arrived.info)
    };
    sent == 0
}

/// Blocks what is blocked while a handler runs. `SIGBUS` is already.
fn block_for<S: System>(shim: &Shim<S>, action: &Action) {
    if action.mask & !BUS != 0 {
        let _ = shim.system.signal_mask(Some(Change { how: libc::SIG_BLOCK, set: action.mask }));
    }
    if action.has(libc::SA_NODEFER) && action.mask & BUS == 0 {
        let _ = shim.system.signal_mask(Some(Change { how: libc::SIG_UNBLOCK, set: BUS }));
    }
}

/// Calls the VMM's handler, on its alternate stack if it wants that.
///
/// # Safety
/// `action` is the VMM's, with a function; the rest is what the kernel gave this handler.
unsafe fn call(action: &Action, signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    if let Some(top) = action.has(libc::SA_ONSTACK).then(alternate_stack).flatten() {
        // SAFETY: the stack is the thread's and not in use; the handler gets what it declares, or, without
        // SA_SIGINFO, more.
        unsafe { call_on(signal, info, context, action.handler, top) };
        return;
    }
    // SAFETY: with SA_SIGINFO it is such a function; without, one that takes the first argument, and leaves
    // the other registers alone.
    let handler: Handler = unsafe { std::mem::transmute::<usize, Handler>(action.handler) };
    handler(signal, info, context);
}

/// Calls a handler with the stack pointer at `top`, which is aligned as before a call. A handler that ends
/// the thread unwinds both stacks: the frame of this one is found by RBP.
///
/// # Safety
/// Below `top` is a stack that nobody uses, and `handler` is a function that takes the first three arguments.
#[unsafe(naked)]
unsafe extern "C-unwind" fn call_on(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    handler: usize,
    top: usize,
) {
    naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "mov rsp, r8",
        "call rcx",
        "mov rsp, rbp",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
    )
}

/// The top of this thread's alternate stack. `None` if it has none, or is on it.
fn alternate_stack() -> Option<usize> {
    /// Linux's: the stack is taken away while a handler is on it, so that it may leave it.
    const SS_AUTODISARM: c_int = c_int::MIN;
    let mut stack = libc::stack_t { ss_sp: null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    // SAFETY: it asks, and `stack` is valid for the answer.
    unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    if stack.ss_flags & (libc::SS_DISABLE | libc::SS_ONSTACK) != 0 {
        return None;
    }
    let top = (stack.ss_sp.addr() + stack.ss_size) & !0xf;
    if stack.ss_flags & SS_AUTODISARM != 0 {
        stack.ss_flags = libc::SS_DISABLE;
        // SAFETY: the thread leaves it to the handler; returning from this one brings it back.
        unsafe { libc::sigaltstack(&raw const stack, null_mut()) };
    }
    Some(top)
}

fn process() -> c_int {
    // SAFETY: it can't fail.
    unsafe { libc::getpid() }
}

fn thread() -> c_int {
    // SAFETY: it can't fail.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    c_int::try_from(thread).unwrap_or(0)
}

fn errno() -> c_int {
    // SAFETY: it is this thread's own, for as long as the thread lives.
    unsafe { *errno_place() }
}

fn set_errno(errno: c_int) {
    // SAFETY: as in `errno`.
    unsafe { *errno_place() = errno };
}

fn errno_place() -> *mut c_int {
    // SAFETY: every thread has one.
    unsafe { libc::__errno_location() }
}
