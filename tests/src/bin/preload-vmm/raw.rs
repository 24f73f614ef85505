//! The C library's functions, as a VMM in C calls them: those that are interposed have to be called
//! through the dynamic loader's binding, which `rustix` goes around.
#![expect(
    unsafe_code,
    reason = "calls the C library's functions with numbers of the scenario's own"
)]
#![expect(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "this program is the VMM that is being wrapped: what it passes is what the kernel checks"
)]

use std::ffi::{CString, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// An errno.
pub(crate) type Errno = i32;
pub(crate) type Answer<T> = Result<T, Errno>;

pub(crate) fn errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub(crate) fn set_errno(value: Errno) {
    unsafe { *libc::__errno_location() = value };
}

fn checked(answer: c_int) -> Answer<i32> {
    if answer == -1 { Err(errno()) } else { Ok(answer) }
}

fn checked_size(answer: isize) -> Answer<usize> {
    usize::try_from(answer).map_err(|_| errno())
}

pub(crate) fn open(path: &str) -> Answer<i32> {
    let path = CString::new(path).map_err(|_| libc::EINVAL)?;
    checked(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })
}

pub(crate) fn ioctl(fd: i32, request: u64, argument: usize) -> Answer<i32> {
    checked(unsafe { libc::ioctl(fd, request, argument) })
}

pub(crate) fn ioctl_with<T>(fd: i32, request: u64, argument: &mut T) -> Answer<i32> {
    checked(unsafe { libc::ioctl(fd, request, ptr::from_mut(argument)) })
}

/// `ioctl` as the library has it that `PRELOAD_VMM_BENEATH` names, else the C library: past what is
/// preloaded before it.
pub(crate) fn ioctl_beneath() -> Option<unsafe extern "C" fn(c_int, u64, usize) -> c_int> {
    let name = std::env::var("PRELOAD_VMM_BENEATH").unwrap_or_else(|_| "libc.so.6".into());
    let name = CString::new(name).ok()?;
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        return None;
    }
    let found = unsafe { libc::dlsym(library, c"ioctl".as_ptr()) };
    (!found.is_null()).then(|| unsafe { std::mem::transmute(found) })
}

/// `ioctl` as a program is bound to it.
pub(crate) fn bound_ioctl() -> Option<unsafe extern "C" fn(c_int, u64, usize) -> c_int> {
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"ioctl".as_ptr()) };
    (!found.is_null()).then(|| unsafe { std::mem::transmute(found) })
}

/// Calls one of the above so often. Returns how many calls did not return 0.
pub(crate) fn repeat_ioctl(
    ioctl: unsafe extern "C" fn(c_int, u64, usize) -> c_int,
    fd: i32,
    request: u64,
    times: u32,
) -> u32 {
    let mut failures = 0;
    for _ in 0..times {
        failures += u32::from(unsafe { ioctl(fd, request, 0) } != 0);
    }
    failures
}

pub(crate) fn memfd(len: u64) -> Answer<i32> {
    let fd = checked(unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) })?;
    truncate(fd, len)?;
    Ok(fd)
}

pub(crate) fn truncate(fd: i32, len: u64) -> Answer<i32> {
    checked(unsafe { libc::ftruncate(fd, len.cast_signed()) })
}

pub(crate) fn close(fd: i32) -> Answer<i32> {
    checked(unsafe { libc::close(fd) })
}

pub(crate) fn close_range(first: i32, last: i32) -> Answer<i32> {
    checked(unsafe { libc::close_range(first.cast_unsigned(), last.cast_unsigned(), 0) })
}

pub(crate) fn close_range_flags(first: i32, last: i32, flags: i32) -> Answer<i32> {
    checked(unsafe { libc::close_range(first.cast_unsigned(), last.cast_unsigned(), flags) })
}

pub(crate) fn dup(fd: i32) -> Answer<i32> {
    checked(unsafe { libc::dup(fd) })
}

pub(crate) fn dup2(fd: i32, to: i32) -> Answer<i32> {
    checked(unsafe { libc::dup2(fd, to) })
}

pub(crate) fn dup3(fd: i32, to: i32, flags: i32) -> Answer<i32> {
    checked(unsafe { libc::dup3(fd, to, flags) })
}

pub(crate) fn fcntl(fd: i32, command: i32, argument: usize) -> Answer<i32> {
    checked(unsafe { libc::fcntl(fd, command, argument) })
}

pub(crate) fn fcntl_with<T>(fd: i32, command: i32, argument: &mut T) -> Answer<i32> {
    checked(unsafe { libc::fcntl(fd, command, ptr::from_mut(argument)) })
}

pub(crate) fn pread(fd: i32, data: &mut [u8], offset: i64) -> Answer<usize> {
    checked_size(unsafe { libc::pread(fd, data.as_mut_ptr().cast(), data.len(), offset) })
}

pub(crate) fn pwrite(fd: i32, data: &[u8], offset: i64) -> Answer<usize> {
    checked_size(unsafe { libc::pwrite64(fd, data.as_ptr().cast(), data.len(), offset) })
}

pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(crate) const ANONYMOUS: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;

pub(crate) fn mmap(
    at: usize,
    len: usize,
    protection: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> Answer<usize> {
    let at = ptr::without_provenance_mut(at);
    let found = unsafe { libc::mmap(at, len, protection, flags, fd, offset) };
    if found == libc::MAP_FAILED { Err(errno()) } else { Ok(found.expose_provenance()) }
}

pub(crate) fn mmap64(at: usize, len: usize, flags: i32, fd: i32, offset: i64) -> Answer<usize> {
    let at = ptr::without_provenance_mut(at);
    let found = unsafe { libc::mmap64(at, len, READ_WRITE, flags, fd, offset) };
    if found == libc::MAP_FAILED { Err(errno()) } else { Ok(found.expose_provenance()) }
}

/// New memory.
pub(crate) fn anonymous(len: usize) -> Answer<usize> {
    mmap(0, len, READ_WRITE, ANONYMOUS, -1, 0)
}

/// A file's memory.
pub(crate) fn shared(fd: i32, len: usize) -> Answer<usize> {
    mmap(0, len, READ_WRITE, libc::MAP_SHARED, fd, 0)
}

pub(crate) fn munmap(at: usize, len: usize) -> Answer<i32> {
    checked(unsafe { libc::munmap(ptr::without_provenance_mut(at), len) })
}

pub(crate) fn mremap(at: usize, from: usize, to: usize, flags: i32, place: usize) -> Answer<usize> {
    let at = ptr::without_provenance_mut(at);
    let place: *mut c_void = ptr::without_provenance_mut(place);
    let found = unsafe { libc::mremap(at, from, to, flags, place) };
    if found == libc::MAP_FAILED { Err(errno()) } else { Ok(found.expose_provenance()) }
}

pub(crate) fn load(at: usize) -> u32 {
    unsafe { ptr::with_exposed_provenance::<u32>(at).read_volatile() }
}

pub(crate) fn store(at: usize, value: u32) {
    unsafe { ptr::with_exposed_provenance_mut::<u32>(at).write_volatile(value) };
}

pub(crate) fn load_byte(at: usize) -> u8 {
    unsafe { ptr::with_exposed_provenance::<u8>(at).read_volatile() }
}

pub(crate) fn load_16_bytes(at: usize) -> u128 {
    let at = ptr::with_exposed_provenance::<u8>(at);
    let value: std::arch::x86_64::__m128i;
    unsafe {
        std::arch::asm!("movdqu {value}, [{at}]", at = in(reg) at, value = out(xmm_reg) value);
        std::mem::transmute(value)
    }
}

/// `rep movsb` out of memory.
pub(crate) fn copy_out(at: usize, data: &mut [u8]) {
    unsafe {
        std::arch::asm!("rep movsb", inout("rsi") at => _, inout("rdi") data.as_mut_ptr() => _,
            inout("rcx") data.len() => _, options(nostack));
    }
}

pub(crate) fn put(at: usize, data: &[u8]) {
    let to = ptr::with_exposed_provenance_mut::<u8>(at);
    unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
}

/// Runs `work` in a child, which ends with its answer. Returns how it ended.
pub(crate) fn in_child(work: impl FnOnce() -> i32) -> Answer<Ended> {
    let child = checked(unsafe { libc::fork() })?;
    if child == 0 {
        let status = work();
        unsafe { libc::_exit(status) };
    }
    ended(child)
}

/// Waits for a child to end.
fn ended(child: i32) -> Answer<Ended> {
    let mut status = 0;
    checked(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    Ok(if libc::WIFSIGNALED(status) {
        Ended::Signal(libc::WTERMSIG(status))
    } else {
        Ended::Exit(libc::WEXITSTATUS(status))
    })
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Ended {
    Exit(i32),
    Signal(#[expect(dead_code, reason = "printed")] i32),
}

/// A set of signals, by number.
pub(crate) fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

pub(crate) fn contains(set: &libc::sigset_t, signal: i32) -> bool {
    unsafe { libc::sigismember(set, signal) == 1 }
}

pub(crate) fn sigprocmask(how: i32, signals: Option<&[i32]>) -> Answer<libc::sigset_t> {
    let set = signals.map(set_of);
    let set = set.as_ref().map_or(ptr::null(), ptr::from_ref);
    let mut before = set_of(&[]);
    checked(unsafe { libc::sigprocmask(how, set, &raw mut before) }).map(|_| before)
}

pub(crate) fn pthread_sigmask(how: i32, signals: Option<&[i32]>) -> Answer<libc::sigset_t> {
    let set = signals.map(set_of);
    let set = set.as_ref().map_or(ptr::null(), ptr::from_ref);
    let mut before = set_of(&[]);
    match unsafe { libc::pthread_sigmask(how, set, &raw mut before) } {
        0 => Ok(before),
        error => Err(error),
    }
}

pub(crate) fn sigpending() -> Answer<libc::sigset_t> {
    let mut set = set_of(&[]);
    checked(unsafe { libc::sigpending(&raw mut set) }).map(|_| set)
}

pub(crate) fn sigaction(signal: i32, action: Option<&libc::sigaction>) -> Answer<libc::sigaction> {
    let mut before = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    let action = action.map_or(ptr::null(), ptr::from_ref);
    checked(unsafe { libc::sigaction(signal, action, &raw mut before) }).map(|_| before)
}

/// What a handler is set by.
pub(crate) fn action(handler: usize, flags: i32, mask: &[i32]) -> libc::sigaction {
    libc::sigaction {
        sa_sigaction: handler,
        sa_mask: set_of(mask),
        sa_flags: flags,
        sa_restorer: None,
    }
}

pub(crate) fn signal(signal: i32, handler: usize) -> usize {
    unsafe { libc::signal(signal, handler) }
}

pub(crate) fn raise(signal: i32) -> i32 {
    unsafe { libc::raise(signal) }
}

pub(crate) fn kill_self(signal: i32) -> Answer<i32> {
    checked(unsafe { libc::kill(libc::getpid(), signal) })
}

/// Waits for one of the signals, which are blocked. Returns which one came within 5 s.
pub(crate) fn await_signal(signals: &[i32]) -> Answer<i32> {
    let patience = libc::timespec { tv_sec: 5, tv_nsec: 0 };
    checked(unsafe { libc::sigtimedwait(&set_of(signals), ptr::null_mut(), &raw const patience) })
}

/// A descriptor from which signals are read. It does not wait for them.
pub(crate) fn signalfd(signals: &[i32]) -> Answer<i32> {
    checked(unsafe { libc::signalfd(-1, &set_of(signals), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
}

/// The next signal, and whether another process or a thread of this one sent it.
pub(crate) fn read_signal(fd: i32) -> Answer<(u32, i32)> {
    let mut told: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let place = ptr::from_mut(&mut told).cast();
    checked_size(unsafe { libc::read(fd, place, size_of_val(&told)) })?;
    Ok((told.ssi_signo, told.ssi_code))
}

/// Gives this thread a stack for signals.
pub(crate) fn use_signal_stack(at: usize, len: usize) -> Answer<i32> {
    let stack =
        libc::stack_t { ss_sp: ptr::with_exposed_provenance_mut(at), ss_flags: 0, ss_size: len };
    checked(unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) })
}

/// How often [`handler`] ran, and what it saw the last time.
pub(crate) static HANDLED: AtomicUsize = AtomicUsize::new(0);
pub(crate) static CODE: AtomicU64 = AtomicU64::new(0);
pub(crate) static PLACE: AtomicUsize = AtomicUsize::new(0);
pub(crate) static STACK: AtomicUsize = AtomicUsize::new(0);
/// Which signals were blocked in it, of SIGUSR1 and SIGBUS.
pub(crate) static BLOCKED: AtomicU64 = AtomicU64::new(0);

/// A VMM's own handler. It mends what a page lost: memory takes its place.
pub(crate) extern "C" fn handler(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let (code, place) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    note(code, place);
    assert!(signal == libc::SIGBUS && !context.is_null());
    if code == BUS_ADRERR {
        let page = place & !0xfff;
        let mended = mmap(page, 0x1000, READ_WRITE, ANONYMOUS | libc::MAP_FIXED, -1, 0);
        assert_eq!(mended, Ok(page));
        store(page, 0x4d45_4e44);
    }
}

/// The same without information.
pub(crate) extern "C" fn plain_handler(signal: c_int) {
    note(0, usize::try_from(signal).unwrap_or(0));
}

/// A VMM's handler that gives up: the signal ends the process.
pub(crate) extern "C" fn reraising_handler(signal: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let _ = sigaction(signal, Some(&action(libc::SIG_DFL, 0, &[])));
    raise(signal);
    let _ = pthread_sigmask(libc::SIG_UNBLOCK, Some(&[signal]));
    // Not reached.
    unsafe { libc::_exit(9) };
}

/// Does nothing: the signal is there to interrupt.
pub(crate) extern "C" fn ignore_signal(_: c_int) {}

/// Sends SIGALRM once, so many milliseconds from now.
pub(crate) fn alarm_in_ms(ms: i64) {
    let once = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
        it_value: libc::timeval { tv_sec: 0, tv_usec: ms * 1000 },
    };
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const once, ptr::null_mut()) };
}

fn note(code: i32, place: usize) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
    CODE.store(u64::from(code.cast_unsigned()), Ordering::SeqCst);
    PLACE.store(place, Ordering::SeqCst);
    let here = 0u8;
    STACK.store(ptr::from_ref(&here).addr(), Ordering::SeqCst);
    let mask = sigprocmask(libc::SIG_BLOCK, None).unwrap_or_else(|_| set_of(&[]));
    let bits =
        u64::from(contains(&mask, libc::SIGUSR1)) | u64::from(contains(&mask, libc::SIGBUS)) << 1;
    BLOCKED.store(bits, Ordering::SeqCst);
}

/// Nothing is behind an address any more.
const BUS_ADRERR: i32 = 2;

/// `sendmsg` of bytes and descriptors, as QEMU's channels do it: in one or in two pieces.
pub(crate) fn sendmsg(fd: i32, pieces: &[&[u8]], fds: &[i32]) -> Answer<usize> {
    let mut parts: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.as_ptr().cast_mut().cast(),
            iov_len: piece.len(),
        })
        .collect();
    let mut control = [0u64; 64];
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    if !fds.is_empty() {
        let len = u32::try_from(size_of_val(fds)).unwrap_or(u32::MAX);
        message.msg_control = control.as_mut_ptr().cast();
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(header).cast(), fds.len());
        }
    }
    checked_size(unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) })
}

/// Waits until something can be done, or 10 s have passed.
pub(crate) fn poll(fd: i32, events: i16) -> Answer<()> {
    let mut entry = libc::pollfd { fd, events, revents: 0 };
    checked(unsafe { libc::poll(&raw mut entry, 1, 10_000) }).map(drop)
}

/// `recvmsg`, with the descriptors that came.
pub(crate) fn recvmsg(fd: i32, data: &mut [u8], flags: i32) -> Answer<(usize, Vec<i32>)> {
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut control = [0u64; 64];
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    let count = checked_size(unsafe { libc::recvmsg(fd, &raw mut message, flags) })?;
    let mut fds = Vec::new();
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let len = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let first: *const i32 = libc::CMSG_DATA(header).cast();
                fds.extend((0..len / 4).map(|index| first.add(index).read_unaligned()));
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((count, fds))
}

/// A request to the kernel that no library sees.
pub(crate) fn hidden_ioctl(fd: i32, request: u64) -> Answer<()> {
    let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, 0) };
    if answer == -1 { Err(errno()) } else { Ok(()) }
}

/// A system call that no library sees.
pub(crate) fn hidden_dup2(fd: i32, to: i32) -> Answer<i32> {
    let answer = unsafe { libc::syscall(libc::SYS_dup2, fd, to) };
    if answer == -1 { Err(errno()) } else { Ok(to) }
}

/// Ends the process that was started, and goes on in a child.
pub(crate) fn go_to_background() -> Answer<()> {
    match checked(unsafe { libc::fork() })? {
        0 => Ok(()),
        _ => unsafe { libc::_exit(0) },
    }
}

/// Runs a program that has a signal's default action. Until it runs, the child has this process's memory.
pub(crate) fn helper(signal: i32, program: &str) -> Answer<Ended> {
    struct What {
        signal: i32,
        program: CString,
    }
    extern "C" fn child(what: *mut c_void) -> c_int {
        let what: &What = unsafe { &*what.cast() };
        let _ = sigaction(what.signal, Some(&action(libc::SIG_DFL, 0, &[])));
        let arguments = [what.program.as_ptr(), ptr::null()];
        unsafe { libc::execv(what.program.as_ptr(), arguments.as_ptr()) };
        unsafe { libc::_exit(9) }
    }
    let program = CString::new(program).map_err(|_| libc::EINVAL)?;
    let mut what = What { signal, program };
    let mut stack = vec![0_u128; 1 << 12];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let end = stack.as_mut_ptr_range().end.cast();
    let pid = unsafe { libc::clone(child, end, flags, ptr::from_mut(&mut what).cast()) };
    ended(checked(pid)?)
}

/// Has this thread end at the next point at which it can.
pub(crate) fn cancel_this_thread() {
    unsafe { libc::pthread_cancel(libc::pthread_self()) };
}

/// From now on there is no such point.
pub(crate) fn stop_cancelling() {
    const DISABLE: c_int = 1;
    unsafe extern "C" {
        fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
    }
    unsafe { pthread_setcancelstate(DISABLE, ptr::null_mut()) };
}
