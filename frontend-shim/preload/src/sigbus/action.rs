use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering, fence};

use super::handler::discard_pending;
use super::{BUS, SIGBUS, Signals};
use crate::Shim;
use crate::system::System;

/// What a signal does: `struct sigaction`, with the set of signals as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Action {
    /// `SIG_DFL`, `SIG_IGN`, or a function.
    pub(crate) handler: usize,
    /// `SA_*`.
    pub(crate) flags: i32,
    /// Signals that are blocked while the handler runs.
    pub(crate) mask: u64,
    /// Where the C library has a handler return to.
    pub(crate) restorer: usize,
}

/// The kernel's; the C library sets it for every action, and the headers do not have it.
const SA_RESTORER: i32 = 0x0400_0000;
/// Flags that the kernel knows: others do not come back (since 5.11).
const KNOWN_FLAGS: i32 = libc::SA_NOCLDSTOP
    | libc::SA_NOCLDWAIT
    | libc::SA_SIGINFO
    | libc::SA_ONSTACK
    | libc::SA_RESTART
    | libc::SA_NODEFER
    | libc::SA_RESETHAND
    | SA_EXPOSE_TAGBITS
    | SA_RESTORER;
const SA_EXPOSE_TAGBITS: i32 = 0x800;
/// Signals that can't be blocked.
const UNBLOCKABLE: u64 = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);

impl Action {
    pub(crate) const DEFAULT: Self =
        Self { handler: libc::SIG_DFL, flags: 0, mask: 0, restorer: 0 };

    /// Of `signal`, as the C library declares it: BSD's.
    fn bsd(handler: usize, interrupting: bool) -> Self {
        let flags = if interrupting { 0 } else { libc::SA_RESTART };
        Self { handler, flags, mask: BUS, restorer: 0 }
    }

    /// Of `sysv_signal`.
    fn system_v(handler: usize) -> Self {
        Self { handler, flags: libc::SA_RESETHAND | libc::SA_NODEFER, mask: 0, restorer: 0 }
    }

    pub(super) fn has(&self, flag: i32) -> bool {
        self.flags & flag != 0
    }
}

impl<S: System> Shim<S> {
    /// `sigaction` for `SIGBUS`. Returns what was before. Safe in a signal handler.
    pub(crate) fn signal_action(&self, new: Option<Action>) -> Action {
        if self.elsewhere() {
            return self.action_elsewhere(new);
        }
        let Signals { chained, .. } = &self.signals;
        let Some(new) = new else { return chained.load() };
        let before = chained.replace(Action {
            flags: new.flags & KNOWN_FLAGS | SA_RESTORER,
            mask: new.mask & !UNBLOCKABLE,
            restorer: chained.restorer.load(Ordering::Relaxed),
            ..new
        });
        if new.handler == libc::SIG_IGN {
            discard_pending();
        }
        before
    }

    /// Of another process in our memory: the kernel has its actions apart from ours.
    fn action_elsewhere(&self, new: Option<Action>) -> Action {
        let own = self.signals.own.load(Ordering::Relaxed);
        match self.system.signal_action(SIGBUS, new) {
            Ok(before) if before.handler != own => before,
            _ => self.signals.chained.load(),
        }
    }

    /// `signal` for `SIGBUS`. Returns the handler before.
    pub(crate) fn signal_bsd(&self, handler: usize) -> usize {
        let interrupting = self.signals.interrupting.load(Ordering::Relaxed);
        self.signal_action(Some(Action::bsd(handler, interrupting))).handler
    }

    /// `sysv_signal` for `SIGBUS`, likewise.
    pub(crate) fn signal_system_v(&self, handler: usize) -> usize {
        self.signal_action(Some(Action::system_v(handler))).handler
    }

    /// `siginterrupt` for `SIGBUS`.
    pub(crate) fn signal_interrupts(&self, interrupting: bool) {
        self.signals.interrupting.store(interrupting, Ordering::Relaxed);
        let mut action = self.signal_action(None);
        action.flags &= !libc::SA_RESTART;
        action.flags |= if interrupting { 0 } else { libc::SA_RESTART };
        self.signal_action(Some(action));
    }
}

/// More calls of `sigaction` than can be under way at once.
const SLOTS: usize = 256;

/// The VMM's action for `SIGBUS`.
///
/// `sigaction` may be called in any handler, in the middle of another call of it, and a fork may leave
/// one half done for ever: so there is no lock, and nobody waits. Each new action gets a place of its
/// own, and takes effect by its number.
#[derive(Debug)]
pub(super) struct Chained {
    /// Number of the action in effect.
    current: AtomicU64,
    /// The last number given away.
    last: AtomicU64,
    /// Number `n` is in slot `n` modulo their count.
    slots: Box<[Slot]>,
    restorer: AtomicUsize,
}

#[derive(Debug)]
struct Slot {
    /// The number, or `u64::MAX` while the rest is being written.
    number: AtomicU64,
    handler: AtomicUsize,
    flags: AtomicI32,
    mask: AtomicU64,
    restorer: AtomicUsize,
}

impl Default for Chained {
    fn default() -> Self {
        let slot = |number| Slot {
            number: AtomicU64::new(number),
            handler: AtomicUsize::new(libc::SIG_DFL),
            flags: AtomicI32::new(0),
            mask: AtomicU64::new(0),
            restorer: AtomicUsize::new(0),
        };
        Self {
            current: AtomicU64::new(0),
            last: AtomicU64::new(0),
            slots: (0..SLOTS as u64).map(slot).collect(),
            restorer: AtomicUsize::new(0),
        }
    }
}

impl Chained {
    pub(super) fn load(&self) -> Action {
        self.load_numbered().1
    }

    /// Returns the action before.
    pub(super) fn replace(&self, new: Action) -> Action {
        let before = self.current.swap(self.put(new), Ordering::AcqRel);
        // Gone only if as many calls as there are slots came between these two lines.
        self.get(before).unwrap_or(Action::DEFAULT)
    }

    /// Takes the action to deliver a signal by. One with `SA_RESETHAND` is none from then on.
    pub(super) fn take(&self) -> Action {
        loop {
            let (number, action) = self.load_numbered();
            if !action.has(libc::SA_RESETHAND) || is_no_function(action.handler) {
                return action;
            }
            let reset = self.put(Action { handler: libc::SIG_DFL, ..action });
            let taken =
                self.current.compare_exchange(number, reset, Ordering::AcqRel, Ordering::Relaxed);
            if taken.is_ok() {
                return action;
            }
        }
    }

    pub(super) fn set_restorer(&self, restorer: usize) {
        self.restorer.store(restorer, Ordering::Relaxed);
    }

    fn load_numbered(&self) -> (u64, Action) {
        loop {
            let number = self.current.load(Ordering::Acquire);
            if let Some(action) = self.get(number) {
                return (number, action);
            }
        }
    }

    /// `None` if the slot has been used again.
    fn get(&self, number: u64) -> Option<Action> {
        let slot = self.slot(number);
        let before = slot.number.load(Ordering::Acquire);
        let action = Action {
            handler: slot.handler.load(Ordering::Relaxed),
            flags: slot.flags.load(Ordering::Relaxed),
            mask: slot.mask.load(Ordering::Relaxed),
            restorer: slot.restorer.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let after = slot.number.load(Ordering::Relaxed);
        ((before, after) == (number, number)).then_some(action)
    }

    fn put(&self, action: Action) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let slot = self.slot(number);
        slot.number.store(u64::MAX, Ordering::Relaxed);
        fence(Ordering::Release);
        slot.handler.store(action.handler, Ordering::Relaxed);
        slot.flags.store(action.flags, Ordering::Relaxed);
        slot.mask.store(action.mask, Ordering::Relaxed);
        slot.restorer.store(action.restorer, Ordering::Relaxed);
        slot.number.store(number, Ordering::Release);
        number
    }

    #[expect(clippy::cast_possible_truncation, reason = "the remainder is small")]
    fn slot(&self, number: u64) -> &Slot {
        &self.slots[(number % SLOTS as u64) as usize]
    }
}

fn is_no_function(handler: usize) -> bool {
    matches!(handler, libc::SIG_DFL | libc::SIG_IGN)
}
