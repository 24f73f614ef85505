//! `SIGBUS` inside a BAR's mapping: the load or store completes as an Unsupported Request.
//!
//! The handler is ours from the beginning to the end of the process, and every thread can be reached by
//! it. What the VMM asks for, a disposition and masks, is kept beside, told when it asks, and done for
//! every `SIGBUS` that is not about a BAR: [`Shim::signal_action`] and [`Shim::signal_mask`] stand in
//! for the kernel's calls, and the [`handler`] for the kernel where it delivers a signal.
//!
//! Where this differs from a process without it:
//! - A system call that a sent `SIGBUS` interrupts is restarted, whether or not the VMM's handler
//!   asked for that (`SA_RESTART`).
//! - A `SIGBUS` that was sent to the process while nobody wants it, and came by way of a thread other
//!   than the first, has the process itself as its sender.
//! - A mask for the time of one call (`sigsuspend`, `ppoll`) that admits a `SIGBUS` which the thread
//!   blocks otherwise does not make the handler run: the signal stays pending.
//! - While a handler runs whose own mask has `SIGBUS`, and in a thread that has left a sent one pending,
//!   `SIGBUS` is blocked indeed: an access to a BAR ends the process there, as without the library.
//! - What a handler of another signal changes about `SIGBUS` in its thread's mask stays when it returns, and when it
//!   leaves by `siglongjmp`, but for blocking what is blocked while it runs: the kernel brings its mask back
//!   without us.
//! - A child in the VMM's memory (`vfork`) has its disposition and masks from the kernel as soon as it changes
//!   them, and what it asks for changes nothing here.
//! - A program that the VMM executes starts with `SIGBUS` neither blocked nor ignored.

mod action;
mod emulate;
mod frame;
mod handler;
mod mask;
#[cfg(test)]
mod tests;
mod vectors;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub(crate) use self::action::Action;
use self::action::Chained;
#[cfg(not(test))]
pub(crate) use self::mask::Inherited;
pub(crate) use self::mask::{Change, inherited};
use crate::Shim;
use crate::system::{Answer, System};

pub(crate) const SIGBUS: i32 = libc::SIGBUS;

/// In a set of signals, as the kernel has it: bit `n` is signal `n + 1`.
const BUS: u64 = 1 << (SIGBUS - 1);

/// What the VMM asked of `SIGBUS`. Masks are the threads' own.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    chained: Chained,
    /// What `siginterrupt` said last: whether `signal` makes handlers that interrupt system calls.
    interrupting: AtomicBool,
    /// Our handler, as the kernel knows it.
    own: AtomicUsize,
    /// Whether the handler is ours, and not yet the VMM's own.
    installed: AtomicBool,
}

impl<S: System> Shim<S> {
    /// Begins to receive `SIGBUS`. What it did so far is what it does for all that is not about a BAR.
    ///
    /// # Errors
    /// What `sigaction` says; then nothing has changed.
    pub(crate) fn sigbus_install(&'static self) -> Answer<()> {
        vectors::learn_layout();
        emulate::warm_up();
        mask::warm_up();
        let before = self.system.signal_action(SIGBUS, None)?;
        self.signals.chained.replace(before);
        handler::install(self)?;
        // What the C library adds to every action, the VMM sees in those that it made.
        let ours = self.system.signal_action(SIGBUS, None)?;
        self.signals.chained.set_restorer(ours.restorer);
        self.signals.own.store(ours.handler, Ordering::Relaxed);
        self.signals.installed.store(true, Ordering::Release);
        self.adopt_mask(false)
    }

    /// Whether `SIGBUS` is ours. Until then, what the VMM asks for is the kernel's affair.
    pub(crate) fn has_sigbus(&self) -> bool {
        self.signals.installed.load(Ordering::Acquire)
    }
}
