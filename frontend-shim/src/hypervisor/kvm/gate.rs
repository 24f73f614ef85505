//! No virtual CPU runs while a slot of device memory appears.
//!
//! An access that finds no slot goes to KVM's emulator. Before the emulator makes an MMIO exit of it, it
//! looks the address up again, and if there is a slot by then it copies from or to the slot's host memory
//! as if that were RAM: byte by byte. A device then sees several accesses where the guest made one, and
//! the guest gets a value put together from them. So no virtual CPU may be between its lookup and its
//! exit when such a slot is added: [`Gate::close`] brings all of them out of `KVM_RUN` and keeps them out
//! until the slot is there.
//!
//! An exit for a read leaves an emulation half way: the next `KVM_RUN` takes the answer and goes on with
//! the same instruction. What else that accesses (the write of a read-modify-write, the next iterations of
//! `rep movs`) is looked up then. While a virtual CPU has such an exit in hand, a new slot waits: it is in
//! the table, and the kernel gets it when that instruction is done. Until then its accesses exit as MMIO,
//! which is correct and only slower. The thread that adds the slot does not wait, as it may be the one
//! that has the exit in hand. After an exit for a write nothing is looked up any more: the parts of an
//! access that crosses pages are told apart before the first of them exits, and the next iteration is a
//! new instruction to KVM.
//!
//! # The signal
//!
//! `SIGURG` brings a thread out of `KVM_RUN`, by the signal mask of the virtual CPU
//! (`KVM_SET_SIGNAL_MASK`): the threads that run virtual CPUs block it, and the kernel unblocks it for as
//! long as they are inside. One that arrives too early is still pending when they go in, so that none is
//! lost; it is taken back when they come out, so that it interrupts nothing else. It never has an
//! effect: no handler is installed, one of the VMM's is not called, and where it is not blocked `SIGURG` is
//! ignored by default. In return the VMM must not unblock it in these threads. While a virtual CPU runs, its
//! thread blocks what it blocked when it began to run this virtual CPU; it blocks `SIGURG` for good, and so
//! do the threads that it starts.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use kvm_bindings::{KVMIO, kvm_signal_mask};
use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SigSet, Signal};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::signal::{clear_signal, get_blocked_signals};

use crate::hypervisor::{HypervisorError, SlotId};

const KICK: Signal = Signal::SIGURG;

/// How long a virtual CPU lets others finish their instructions while a slot waits for that. Without it
/// many of them that poll one register could keep the slot waiting; with it one that takes long, or that
/// is run by the same thread, delays the others no more than this.
const PATIENCE: Duration = Duration::from_millis(1);

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// Where all virtual CPUs of a machine pass on their way into `KVM_RUN`.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    /// The gate was opened.
    opened: Condvar,
    /// The last virtual CPU came out.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    passes: u64,
    inside: Vec<Inside>,
    /// Virtual CPUs with an exit for a read in hand.
    reading: Vec<u64>,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Inside {
    pass: u64,
    thread: Pthread,
    kicked: bool,
}

/// A slot that is in the table and not in the kernel.
#[derive(Debug)]
struct Waiting {
    slot: SlotId,
    /// The kernel did not want it, and is not asked again.
    refused: bool,
}

/// One virtual CPU at the gate.
#[derive(Debug)]
pub(super) struct Pass {
    id: u64,
    /// The thread that the signal mask was made for.
    thread: Option<ThreadId>,
}

/// How to run, once inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Run,
    /// Only finish the instruction that an exit is in hand for: a slot waits for it.
    Finish,
}

impl Gate {
    pub(super) fn pass(&self) -> Pass {
        let mut state = self.state();
        state.passes += 1;
        Pass { id: state.passes, thread: None }
    }

    /// To be called before `KVM_RUN`, by the thread that makes the call. Waits while the gate is closed.
    ///
    /// # Errors
    /// [`HypervisorError::Call`] where the signal mask can't be set.
    pub(super) fn enter(&self, pass: &mut Pass, fd: &VcpuFd) -> Result<Entry, HypervisorError> {
        let thread = thread::current().id();
        if pass.thread != Some(thread) {
            set_signal_mask(fd)?;
            pass.thread = Some(thread);
        }
        let mut state = self.state();
        let mut patient = true;
        loop {
            let finishes = state.reading.contains(&pass.id);
            if state.closed {
                state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else if patient && !finishes && state.slot_waits() && !state.reading.is_empty() {
                let waited = self.opened.wait_timeout(state, PATIENCE);
                let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                (state, patient) = (guard, !timeout.timed_out());
            } else {
                state.inside.push(Inside { pass: pass.id, thread: pthread_self(), kicked: false });
                let finish = finishes && state.slot_waits();
                return Ok(if finish { Entry::Finish } else { Entry::Run });
            }
        }
    }

    /// To be called after `KVM_RUN`, by the same thread. `reading` tells whether it came back with an exit
    /// for a read. Returns whether a slot waits and could be added now.
    pub(super) fn leave(&self, pass: &Pass, reading: bool) -> bool {
        let mut state = self.state();
        let at = state.inside.iter().position(|inside| inside.pass == pass.id);
        let inside = state.inside.swap_remove(at.expect("it entered"));
        if state.closed && state.inside.is_empty() {
            self.emptied.notify_one();
        }
        let due = state.set_reading(pass, reading);
        drop(state);
        if inside.kicked {
            // It fails for no signal that exists.
            let _ = clear_signal(KICK as i32);
        }
        due
    }

    /// To be called when a virtual CPU goes away. Returns what [`leave`](Self::leave) does.
    pub(super) fn forget(&self, pass: &Pass) -> bool {
        self.state().set_reading(pass, false)
    }

    /// Closes the gate and waits until no virtual CPU is inside. There is one such caller at a time.
    pub(super) fn close(&self) -> Closed<'_> {
        let mut state = self.state();
        state.closed = true;
        for inside in &mut state.inside {
            inside.kicked = true;
            // Whoever is inside can't have ended: it has to pass the lock that is held here first.
            let _ = pthread_kill(inside.thread, KICK);
        }
        while !state.inside.is_empty() {
            state = self.emptied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Closed { gate: self }
    }

    /// Whether a slot is not in the kernel yet.
    pub(super) fn holds_back(&self, slot: SlotId) -> bool {
        self.state().waiting.iter().any(|waiting| waiting.slot == slot)
    }

    /// Lets a slot wait no more; false if it did not.
    pub(super) fn withdraw(&self, slot: SlotId) -> bool {
        let mut state = self.state();
        let at = state.waiting.iter().position(|waiting| waiting.slot == slot);
        at.map(|at| state.waiting.swap_remove(at)).is_some()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn slot_waits(&self) -> bool {
        self.waiting.iter().any(|waiting| !waiting.refused)
    }

    fn set_reading(&mut self, pass: &Pass, reading: bool) -> bool {
        match (self.reading.iter().position(|id| *id == pass.id), reading) {
            (None, true) => self.reading.push(pass.id),
            (Some(at), false) => drop(self.reading.swap_remove(at)),
            (None, false) | (Some(_), true) => {}
        }
        self.reading.is_empty() && self.slot_waits()
    }
}

/// The closed gate: no virtual CPU is inside of `KVM_RUN`. Opens when it is dropped.
pub(super) struct Closed<'a> {
    gate: &'a Gate,
}

impl Closed<'_> {
    /// Whether an instruction is half way.
    pub(super) fn is_half_way(&self) -> bool {
        !self.gate.state().reading.is_empty()
    }

    /// Lets a slot wait until no instruction is half way.
    pub(super) fn hold_back(&self, slot: SlotId) {
        self.gate.state().waiting.push(Waiting { slot, refused: false });
    }

    /// Hands every slot to `add` that waits, unless an instruction is half way. Those that it returns an
    /// error for are not tried again.
    pub(super) fn release<E>(&self, mut add: impl FnMut(SlotId) -> Result<(), E>) {
        let mut state = self.gate.state();
        if state.reading.is_empty() {
            state.waiting.retain_mut(|waiting| {
                waiting.refused = waiting.refused || add(waiting.slot).is_err();
                waiting.refused
            });
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.state().closed = false;
        self.gate.opened.notify_all();
    }
}

/// Blocks [`KICK`] in this thread, but for `KVM_RUN` of this virtual CPU.
fn set_signal_mask(fd: &VcpuFd) -> Result<(), HypervisorError> {
    /// `struct kvm_signal_mask` with the set as the kernel has it on x86-64: bit n is signal n + 1.
    #[repr(C)]
    struct SignalMask {
        len: u32,
        set: [u8; 8],
    }
    let call = |call, source| HypervisorError::Call { call, source };
    SigSet::from(KICK).thread_block().map_err(|errno| call("pthread_sigmask", errno.into()))?;
    let blocked = get_blocked_signals()
        .map_err(|error| call("pthread_sigmask", io::Error::other(error.to_string())))?;
    let mut set = 0_u64;
    for signal in blocked.into_iter().filter(|signal| *signal != KICK as i32) {
        set |= u32::try_from(signal - 1).ok().and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0);
    }
    let mask = SignalMask { len: 8, set: set.to_le_bytes() };
    // SAFETY: the kernel reads `len` and as many bytes behind it, which is all of the structure.
    match unsafe { ioctl_with_ref(fd, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => Err(call("KVM_SET_SIGNAL_MASK", io::Error::last_os_error())),
    }
}
