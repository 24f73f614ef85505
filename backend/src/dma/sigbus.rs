//! Survival of memory that its owner takes away (docs/decisions/0012-sigbus.md).
//!
//! Touching a mapped page that the file does not hold raises SIGBUS. A handler for the whole process
//! puts a page of zeros in its place, notes that the page is lost, and lets the access go on.
//! Whoever made the access asks afterwards whether it was lost.
//!
//! The handler runs in the middle of any code of this thread: it uses atomics and system calls, takes
//! no lock and allocates nothing. It finds the mapping in a table of slots whose addresses never
//! change. A slot that an access depends on can't change meanwhile, because the access borrows its
//! mapping; of others, a half written one is told by its version and skipped.
#![expect(unsafe_code, reason = "handles a signal and replaces pages")]

use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering, compiler_fence, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::mm::ProtFlags;

/// A part of this process's memory where SIGBUS does not kill. Dropping it ends that.
#[derive(Debug)]
pub(super) struct Guarded {
    index: usize,
    slot: &'static Slot,
}

/// What is guarded.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuardedRange {
    /// Its address, a multiple of the page size.
    pub(super) start: usize,
    /// Its length in bytes, a multiple of the page size.
    pub(super) len: usize,
    /// What the kernel maps and replaces at once.
    pub(super) page_size: usize,
    pub(super) protection: ProtFlags,
}

/// A place in the table that guards nothing yet.
#[derive(Debug)]
pub(super) struct Reserved(Guarded);

impl Guarded {
    /// Takes a place in the table, and sees to it that the handler is there.
    ///
    /// # Errors
    /// `NOMEM` when the process may not have more mappings: the kernel bounds them
    /// (`vm.max_map_count`), and without a few to spare the process could not go on.
    pub(super) fn reserve() -> Result<Reserved, Errno> {
        static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
        (*INSTALLED.get_or_init(install))?;
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.taken >= most_mappings() {
            return Err(Errno::NOMEM);
        }
        let index = free.indices.pop().unwrap_or(free.next);
        let chunk = CHUNKS.get(index / CHUNK).ok_or(Errno::NOMEM)?;
        let slots = chunk.get_or_init(|| (0..CHUNK).map(|_| Slot::default()).collect());
        free.next = free.next.max(index + 1);
        free.taken += 1;
        Ok(Reserved(Self { index, slot: &slots[index % CHUNK] }))
    }

    /// Whether an access to a part of the range met a page that was not there, since the beginning.
    /// It may say so of a page between two such pages. Ask after the access.
    pub(super) fn lost(&self, offset: usize, len: usize) -> bool {
        // The handler ran in the middle of the access, as far as the compiler can see.
        compiler_fence(Ordering::SeqCst);
        let from = self.slot.lost_from.load(Ordering::Acquire);
        from != NOTHING
            && from < offset.saturating_add(len)
            && self.slot.lost_to.load(Ordering::Acquire) > offset
    }
}

impl Reserved {
    /// Guards a mapping from now on, until it is dropped: before the mapping is.
    pub(super) fn arm(self, range: GuardedRange) -> Guarded {
        self.0.slot.set(range);
        self.0
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let nothing =
            GuardedRange { start: 0, len: 0, page_size: 1, protection: ProtFlags::empty() };
        self.slot.set(nothing);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.indices.push(self.index);
        free.taken -= 1;
    }
}

/// Slots that are allocated at once, and never freed: the handler may be looking at them.
const CHUNK: usize = 1024;

static CHUNKS: [OnceLock<Box<[Slot]>>; 1024] = [const { OnceLock::new() }; 1024];

/// Which slots are free. Not for the handler.
static FREE: Mutex<FreeSlots> = Mutex::new(FreeSlots { indices: Vec::new(), next: 0, taken: 0 });

#[derive(Debug)]
struct FreeSlots {
    indices: Vec<usize>,
    /// The first slot that was never taken.
    next: usize,
    taken: usize,
}

/// Mappings that this process may have: all that the kernel allows but some for the replaced pages,
/// each of which splits its mapping in three, and for threads, allocator and files.
fn most_mappings() -> usize {
    const SPARE: usize = 4096;
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let setting = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        let most = setting.and_then(|text| text.trim().parse().ok()).unwrap_or(65530_usize);
        most.saturating_sub(SPARE).max(most / 2)
    })
}

/// Pages that are replaced singly, of all mappings together; after that, a whole mapping is, which
/// splits nothing.
const MOST_SINGLE_PAGES: usize = 512;

static SINGLE_PAGES: AtomicUsize = AtomicUsize::new(0);

/// In `lost_from`: everything is there.
const NOTHING: usize = usize::MAX;

/// One guarded range, as the handler sees it.
#[derive(Debug)]
struct Slot {
    /// Odd while the rest is being written.
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    page_size: AtomicUsize,
    protection: AtomicUsize,
    /// Offset of the first page that was lost, or `NOTHING`.
    lost_from: AtomicUsize,
    /// Offset of the end of the last one.
    lost_to: AtomicUsize,
    /// Pages that count in `SINGLE_PAGES`.
    single_pages: AtomicUsize,
}

impl Default for Slot {
    fn default() -> Self {
        let zero = || AtomicUsize::new(0);
        Self {
            version: zero(),
            start: zero(),
            len: zero(),
            page_size: AtomicUsize::new(1),
            protection: zero(),
            lost_from: AtomicUsize::new(NOTHING),
            lost_to: zero(),
            single_pages: zero(),
        }
    }
}

impl Slot {
    /// Writes a new range. Only the owner of the slot does, and nobody accesses the old range or the
    /// new one meanwhile.
    fn set(&self, range: GuardedRange) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.page_size.store(range.page_size, Ordering::Relaxed);
        self.protection.store(range.protection.bits() as usize, Ordering::Relaxed);
        self.lost_from.store(NOTHING, Ordering::Relaxed);
        self.lost_to.store(0, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
        let pages = self.single_pages.swap(0, Ordering::Relaxed);
        SINGLE_PAGES.fetch_sub(pages, Ordering::Relaxed);
    }

    /// The range that `address` lies in, if it is this one's.
    fn range_around(&self, address: usize) -> Option<GuardedRange> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        // Nearly always, there is no more to do.
        if address.wrapping_sub(start) >= len {
            return None;
        }
        let page_size = self.page_size.load(Ordering::Relaxed);
        let protection = self.protection.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        let protection = ProtFlags::from_bits_retain(u32::try_from(protection).unwrap_or(0));
        whole.then_some(GuardedRange { start, len, page_size, protection })
    }

    /// Puts zeros where a page is not there. Tells whether it is done.
    fn replace(&self, range: GuardedRange, address: usize) -> bool {
        let offset = (address - range.start) & !(range.page_size - 1);
        // Noted first: a thread that sees the zeros must see that they are none of the client's.
        self.lose(offset, range.page_size);
        let page = GuardedRange { start: range.start + offset, len: range.page_size, ..range };
        if SINGLE_PAGES.fetch_add(1, Ordering::Relaxed) < MOST_SINGLE_PAGES && map_zeros(page) {
            self.single_pages.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        SINGLE_PAGES.fetch_sub(1, Ordering::Relaxed);
        self.lose(0, range.len);
        // Zeros for all of it can be refused where memory can't be overcommitted.
        map_zeros(range) || map_zeros(page)
    }

    fn lose(&self, offset: usize, len: usize) {
        self.lost_to.fetch_max(offset + len, Ordering::SeqCst);
        self.lost_from.fetch_min(offset, Ordering::SeqCst);
    }
}

/// What SIGBUS did before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

fn install() -> Result<(), Errno> {
    let mut previous = no_action();
    // SAFETY: it asks, and `previous` is valid for the answer.
    let result = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) };
    if result != 0 {
        return Err(Errno::INVAL);
    }
    let _ = PREVIOUS.set(previous);
    if set_action(handler()) { Ok(()) } else { Err(Errno::INVAL) }
}

fn handler() -> libc::sigaction {
    let mut action = no_action();
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    action
}

/// The default action.
fn no_action() -> libc::sigaction {
    // SAFETY: all zeros is a valid value: the default action, without flags and mask.
    unsafe { mem::zeroed() }
}

fn set_action(action: libc::sigaction) -> bool {
    // SAFETY: `action` is valid; a handler in it is either ours, which does only what a handler may,
    // or what was there before.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0 }
}

/// `si_code` of an access that is not aligned, of `asm-generic/siginfo.h`.
const BUS_ADRALN: c_int = 1;

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid one to a handler with SA_SIGINFO.
    let info_of_fault = unsafe { &*info };
    // SAFETY: every thread has one.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: nobody else refers to it: the code that was interrupted is not running.
    let errno = unsafe { &mut *location };
    let saved = *errno;
    // Positive codes are the kernel's own: the signal is for an access of this thread's. The first
    // is for an alignment fault, which no page would mend.
    let fault = info_of_fault.si_code > BUS_ADRALN;
    // SAFETY: a SIGBUS of the kernel's has an address; of any other, the value is not used.
    let address = unsafe { info_of_fault.si_addr() }.addr();
    let survived = fault && survive(address);
    *errno = saved;
    if !survived {
        chain(fault, signal, info, context);
    }
}

/// Whether the address is guarded, and can be touched now.
fn survive(address: usize) -> bool {
    let chunks = CHUNKS.iter().map_while(OnceLock::get);
    let mut slots = chunks.flat_map(|chunk| chunk.iter());
    let found = slots.find_map(|slot| Some((slot, slot.range_around(address)?)));
    found.is_some_and(|(slot, range)| slot.replace(range, address))
}

fn map_zeros(range: GuardedRange) -> bool {
    let protection = range.protection.bits().cast_signed();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let address = ptr::without_provenance_mut(range.start);
    // SAFETY: the range is a part of a mapping that the access under way borrows, and which holds
    // memory of a client's that may change at any time.
    let result = unsafe { libc::mmap(address, range.len, protection, flags, -1, 0) };
    result != libc::MAP_FAILED
}

/// The signal is none of ours: what would have happened without this handler.
fn chain(fault: bool, signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.get().copied().unwrap_or_else(no_action);
    match previous.sa_sigaction {
        // The kernel ignores no fault either.
        libc::SIG_IGN if !fault => return,
        libc::SIG_DFL | libc::SIG_IGN => {
            set_action(no_action());
            // SAFETY: it may be called in a handler. The signal arrives when this one returns.
            unsafe { libc::raise(signal) };
            return;
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
            // SAFETY: with SA_SIGINFO, that is what it is.
            let handler: Handler = unsafe { mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without SA_SIGINFO, that is what it is.
            let handler: extern "C" fn(c_int) = unsafe { mem::transmute(handler) };
            handler(signal);
        }
    }
    // Rust's own handler takes itself away, for a fault to be fatal when it repeats. What somebody
    // sent does not repeat.
    if !fault {
        set_action(handler());
    }
}
