//! Processes that are made to see how they end, with the handler and without.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use super::{Bench, PAGE, without_handler};
use crate::sigbus::{Action, Change, SIGBUS, inherited};

/// How a process ended, and what it logged.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) status: Status,
    pub(super) log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Exited(c_int),
    Killed(c_int),
}

/// A process that is being tested, from inside.
pub(super) struct Process {
    pub(super) bench: Bench,
    pub(super) wrapped: bool,
    /// Memory of a file that is shorter than its mapping, and no BAR.
    pub(super) lost: usize,
}

pub(super) const LOST_PAGES: usize = 4;

static PROCESS: OnceLock<Process> = OnceLock::new();
static LOG: AtomicI32 = AtomicI32::new(-1);
/// What the handlers below do.
static MODE: AtomicUsize = AtomicUsize::new(0);
/// How often the handler was called.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The process of a handler.
pub(super) fn process() -> &'static Process {
    PROCESS.get().unwrap()
}

/// Runs a scenario in a process of its own, without the handler.
pub(super) fn as_shipped(scenario: fn(&Process)) -> End {
    child(false, scenario)
}

/// The same with it.
pub(super) fn wrapped(scenario: fn(&Process)) -> End {
    child(true, scenario)
}

fn child(wrapped: bool, scenario: fn(&Process)) -> End {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the child has this thread alone, and does not return.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        LOG.store(ends[1], Ordering::SeqCst);
        let run = std::panic::catch_unwind(|| {
            let process = PROCESS.get_or_init(|| Process::new(wrapped));
            scenario(process);
        });
        // SAFETY: it ends the process, whatever is left in it.
        unsafe { libc::_exit(if run.is_ok() { 0 } else { 99 }) };
    }
    // SAFETY: the descriptor is this test's own.
    unsafe { libc::close(ends[1]) };
    let mut log = String::new();
    // SAFETY: likewise.
    unsafe { File::from_raw_fd(ends[0]) }.read_to_string(&mut log).unwrap();
    let mut status = 0;
    // SAFETY: the pointer is valid.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    let status = if libc::WIFSIGNALED(status) {
        Status::Killed(libc::WTERMSIG(status))
    } else {
        Status::Exited(libc::WEXITSTATUS(status))
    };
    End { status, log }
}

impl Process {
    fn new(wrapped: bool) -> Process {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the structure is valid; no core is to be left behind.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
        // Whatever the test's process does with SIGBUS.
        // SAFETY: no handler.
        unsafe { libc::signal(SIGBUS, libc::SIG_DFL) };
        let bench = without_handler();
        if wrapped {
            bench.shim.sigbus_install().unwrap();
        }
        let flags = libc::MAP_SHARED;
        let fd = bench.host().file.as_raw_fd();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let lost = unsafe {
            libc::mmap(std::ptr::null_mut(), LOST_PAGES * PAGE, protection, flags, fd, 0)
        };
        Process { bench, wrapped, lost: lost as usize }
    }

    pub(super) fn action(&self, new: Option<Action>) -> Action {
        let shim = self.bench.shim;
        if self.wrapped {
            return shim.signal_action(new);
        }
        shim.system.functions.action(SIGBUS, new).unwrap()
    }

    pub(super) fn mask(&self, change: Option<Change>) -> u64 {
        let shim = self.bench.shim;
        if self.wrapped { shim.signal_mask(change) } else { shim.system.functions.mask(change) }
            .unwrap()
    }

    pub(super) fn block(&self, signal: c_int) {
        self.mask(Some(Change::of_one(libc::SIG_BLOCK, signal).unwrap()));
    }

    pub(super) fn unblock(&self, signal: c_int) {
        self.mask(Some(Change::of_one(libc::SIG_UNBLOCK, signal).unwrap()));
    }

    pub(super) fn is_blocked(&self, signal: c_int) -> bool {
        self.mask(None) >> (signal - 1) & 1 != 0
    }

    /// A thread that inherits what one does.
    pub(super) fn thread(&self, work: impl FnOnce() + Send) {
        let inherited = inherited();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                if let (true, Some(inherited)) = (self.wrapped, inherited) {
                    self.bench.shim.thread_begins(inherited);
                }
                work();
            });
        });
    }

    pub(super) fn handle(&self, flags: c_int, mask: u64, what: Mode) {
        MODE.store(what as usize, Ordering::SeqCst);
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_signal;
        self.action(Some(Action { handler: handler as usize, flags, mask, restorer: 0 }));
    }

    /// Touches a page that was lost.
    pub(super) fn touch(&self, page: usize) -> u8 {
        // SAFETY: mapped; whatever comes of it.
        unsafe { ((self.lost + page * PAGE) as *const u8).read_volatile() }
    }

    /// Waits for a signal that another thread may receive.
    pub(super) fn wait_for_call(&self) {
        while CALLS.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
    }

    /// Whether a `SIGBUS` waits for this thread, or for any.
    pub(super) fn is_pending(&self) -> bool {
        // SAFETY: an array of zeros is a set.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is valid.
        unsafe { libc::sigpending(&raw mut set) };
        // SAFETY: likewise.
        unsafe { libc::sigismember(&raw const set, SIGBUS) == 1 }
    }
}

/// What a handler does after it has logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Mode {
    Return,
    /// Puts memory where it was lost.
    Mend,
    Exit,
    /// Touches another lost page, and mends.
    Fault,
    /// As QEMU's handler does with what is not for it.
    Reraise,
    /// Goes on elsewhere.
    Leave,
    /// Has the signal blocked from now on, and mends.
    BlockAfterwards,
}

pub(super) fn log(line: &str) {
    let line = format!("{line}\n");
    // SAFETY: the buffer is as long.
    unsafe { libc::write(LOG.load(Ordering::SeqCst), line.as_ptr().cast(), line.len()) };
}

extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let process = process();
    let mode = MODE.load(Ordering::SeqCst);
    let action = process.action(None);
    let with_info = action.flags & libc::SA_SIGINFO != 0;
    // SAFETY: of this thread, or null: it asks.
    let on_stack = unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &raw mut stack);
        stack.ss_flags & libc::SS_ONSTACK != 0
    };
    let (mut code, mut page, mut value) = (0, None, 0);
    if with_info {
        // SAFETY: with SA_SIGINFO, it is there.
        unsafe {
            code = (*info).si_code;
            page = ((*info).si_addr() as usize).checked_sub(process.lost).map(|at| at / PAGE);
            if code == libc::SI_QUEUE {
                value = (*info).si_value().sival_ptr as usize;
            }
        }
    }
    let page = page.filter(|page| code > 0 && *page < LOST_PAGES);
    let mask = process.mask(None);
    log(&format!("handler {signal} {code} {page:?} {value} mask {mask:#x} stack {on_stack}"));
    CALLS.fetch_add(1, Ordering::SeqCst);
    match mode {
        mode if mode == Mode::Mend as usize => mend(page),
        mode if mode == Mode::Fault as usize => {
            MODE.store(Mode::Mend as usize, Ordering::SeqCst);
            process.touch(1);
            mend(page);
        }
        // SAFETY: it may be called in a handler.
        mode if mode == Mode::Exit as usize => unsafe { libc::_exit(7) },
        mode if mode == Mode::Reraise as usize => {
            process.action(Some(Action::DEFAULT));
            // SAFETY: it may be called in a handler.
            unsafe { libc::raise(SIGBUS) };
            process.unblock(SIGBUS);
            log("still here");
        }
        mode if mode == Mode::Leave as usize => {
            let leave: extern "C" fn() -> ! = leave;
            let context = context.cast::<libc::ucontext_t>();
            // SAFETY: the kernel's; a function that does not return may be gone to with an aligned stack.
            unsafe {
                let registers = &raw mut (*context).uc_mcontext.gregs;
                (*registers)[libc::REG_RIP as usize] = leave as usize as i64;
                let stack = &mut (*registers)[libc::REG_RSP as usize];
                *stack = ((*stack - 256) & !0xf) - 8;
            }
        }
        mode if mode == Mode::BlockAfterwards as usize => {
            // SAFETY: the kernel's.
            unsafe {
                *(&raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<u64>() |= 1 << 6
            };
            mend(page);
        }
        _ => {}
    }
}

extern "C" fn leave() -> ! {
    log(&format!("left, blocked {}", process().is_blocked(SIGBUS)));
    // SAFETY: it ends the process.
    unsafe { libc::_exit(9) }
}

fn mend(page: Option<usize>) {
    let Some(page) = page else { return };
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS;
    let at = (process().lost + page * PAGE) as *mut c_void;
    // SAFETY: over a mapping of the test's own.
    unsafe { libc::mmap(at, PAGE, libc::PROT_READ, flags, -1, 0) };
}
