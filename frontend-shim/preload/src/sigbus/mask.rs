use std::cell::Cell;

use rustix::io::Errno;

use super::BUS;
use crate::Shim;
use crate::system::{Answer, System};

/// `how` and `set` of `sigprocmask`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// `SIG_BLOCK`, `SIG_UNBLOCK` or `SIG_SETMASK`.
    pub(crate) how: i32,
    /// As the kernel has it.
    pub(crate) set: u64,
}

impl Change {
    /// Of one signal, by its number.
    ///
    /// # Errors
    /// `EINVAL` for a number that is no signal's.
    pub(crate) fn of_one(how: i32, signal: i32) -> Answer<Self> {
        let bit = signal.checked_sub(1).and_then(|bit| u32::try_from(bit).ok());
        let set = bit.and_then(|bit| 1_u64.checked_shl(bit)).ok_or(Errno::INVAL)?;
        Ok(Self { how, set })
    }
}

thread_local! {
    /// Whether this thread asked for `SIGBUS` to be blocked. The kernel is not told.
    static BLOCKED: Cell<bool> = const { Cell::new(false) };
    /// Whether the kernel blocks it nevertheless, since one that was sent is to stay pending.
    static HELD: Cell<bool> = const { Cell::new(false) };
}

/// Has the handler find the thread's variables made.
pub(super) fn warm_up() {
    BLOCKED.set(blocked());
    HELD.set(HELD.get());
}

/// Whether this thread asked for `SIGBUS` to be blocked.
pub(super) fn blocked() -> bool {
    BLOCKED.get()
}

pub(super) fn set_blocked(blocked: bool) {
    BLOCKED.set(blocked);
}

/// Notes that the kernel blocks `SIGBUS` in this thread from now on, with one pending.
pub(super) fn hold() {
    HELD.set(true);
}

/// What a new thread gets from the one that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inherited {
    blocked: bool,
}

/// What a thread that this one makes now inherits. `None` for nothing.
pub(crate) fn inherited() -> Option<Inherited> {
    blocked().then_some(Inherited { blocked: true })
}

impl<S: System> Shim<S> {
    /// `sigprocmask` and `pthread_sigmask`. Returns the mask before, as the thread asked for it. Safe in
    /// a signal handler.
    ///
    /// # Errors
    /// What the kernel says, of a `how` that it does not know.
    pub(crate) fn signal_mask(&self, change: Option<Change>) -> Answer<u64> {
        let asked = blocked();
        let before = match change {
            None => self.system.signal_mask(None)?,
            // The thread's variables are the VMM's, the mask is not.
            Some(change) if self.elsewhere() => self.system.signal_mask(Some(change))?,
            Some(change) => self.change_mask(change, asked)?,
        };
        Ok(before | if asked { BUS } else { 0 })
    }

    /// The first that a new thread does.
    pub(crate) fn thread_begins(&self, Inherited { blocked }: Inherited) {
        // It has a mask like any other even if this fails: a BAR's SIGBUS ends it then, as it would have.
        let _ = self.adopt_mask(blocked);
    }

    /// Takes the mask that the kernel has for this thread as what it asked for, and makes it ours.
    pub(super) fn adopt_mask(&self, inherited: bool) -> Answer<()> {
        let found = self.system.signal_mask(None)?;
        BLOCKED.set(inherited || found & BUS != 0);
        HELD.set(false);
        if found & BUS != 0 {
            self.system.signal_mask(Some(Change { how: libc::SIG_UNBLOCK, set: BUS }))?;
        }
        Ok(())
    }

    fn change_mask(&self, change: Change, asked: bool) -> Answer<u64> {
        let has = change.set & BUS != 0;
        let (blocked, kernels) = match change.how {
            libc::SIG_BLOCK | libc::SIG_SETMASK if has && !asked && self.is_blocked_anyway() => {
                (false, change.set)
            }
            libc::SIG_BLOCK => (asked || has, change.set & !BUS),
            libc::SIG_UNBLOCK => (asked && !has, change.set),
            libc::SIG_SETMASK => {
                let held = if has && self.still_held() { BUS } else { 0 };
                (has, change.set & !BUS | held)
            }
            _ => return self.system.signal_mask(Some(change)),
        };
        // Known first: what is pending may arrive before the call has returned.
        BLOCKED.set(blocked);
        let before = self.system.signal_mask(Some(Change { set: kernels, ..change }));
        if before.is_err() {
            BLOCKED.set(asked);
        } else if !blocked {
            HELD.set(false);
        } else if HELD.get() && !self.still_held() {
            self.system.signal_mask(Some(Change { how: libc::SIG_UNBLOCK, set: BUS }))?;
        }
        before
    }

    /// Whether the kernel blocks `SIGBUS` in a thread that did not ask for it: while a handler runs whose own
    /// mask has it. What blocks it once more, or brings back the mask that the handler began with, ends with the
    /// handler, where the kernel is the only one to know.
    fn is_blocked_anyway(&self) -> bool {
        self.system.signal_mask(None).is_ok_and(|mask| mask & BUS != 0)
    }

    /// Whether a sent `SIGBUS` still waits for this thread, or for any.
    fn still_held(&self) -> bool {
        if HELD.get() {
            HELD.set(self.system.signals_pending().is_ok_and(|pending| pending & BUS != 0));
        }
        HELD.get()
    }
}
