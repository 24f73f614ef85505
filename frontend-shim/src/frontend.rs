//! The shim as a VMM sees it: exits in, completed accesses out.

mod attending;
mod interrupts;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::bar::{
    AddressSpace, AttachError, AttachedFunction, Backend, ReconnectError, SuspendOrder, WindowTable,
};
use crate::client::{Client, ClientOptions, DeadBackend};
use crate::fault::{BarTarget, FaultCounters, MemoryFault, Route, Verdict};
use crate::hypervisor::{Hypervisor, SlotId};

pub use attending::SessionEvent;
use interrupts::Interrupts;
pub use interrupts::{HypervisorRoutes, InterruptError, InterruptRoutes, InterruptVector, MsiKind};

/// All functions of a VM that live in backend processes.
///
/// A VMM forwards to it: configuration accesses, MMIO and port exits that none of its own devices
/// claims, and memory faults. All methods but [`attach`](Self::attach) may be called by any number
/// of vCPU threads at a time.
pub struct Frontend<B: Backend = Client> {
    hypervisor: Arc<dyn Hypervisor>,
    windows: Arc<WindowTable>,
    functions: Vec<AttachedFunction<B>>,
    /// By function; of those whose interrupts the VMM has asked for.
    interrupts: BTreeMap<usize, Interrupts>,
    next_slot: u32,
    counters: FaultCounters,
}

/// What a VMM does after a memory fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Run the vCPU again: the instruction can go on, or exits as MMIO.
    Reenter(Verdict),
    /// It is not about a BAR of ours; treat it as without barkeep.
    NotMine,
}

impl FaultOutcome {
    /// The verdict behind it.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Reenter(verdict) => verdict,
            Self::NotMine => Verdict::NotMine,
        }
    }
}

impl Frontend {
    /// Attaches the function that the backend at `path` serves; returns its index.
    ///
    /// # Errors
    /// [`AttachError`] with the reason.
    pub fn attach(
        &mut self,
        path: &Path,
        deadline: Duration,
        suspend_order: SuspendOrder,
    ) -> Result<usize, AttachError> {
        let options = ClientOptions { deadline, ..ClientOptions::default() };
        self.attach_with(path, options, suspend_order)
    }

    /// As [`attach`](Self::attach), with more to choose about the connection.
    ///
    /// # Errors
    /// [`AttachError`] with the reason.
    pub fn attach_with(
        &mut self,
        path: &Path,
        options: ClientOptions,
        suspend_order: SuspendOrder,
    ) -> Result<usize, AttachError> {
        let (reconnect, dead_backend) = (options.reconnect, options.dead_backend);
        let client = Client::connect_with(path, options)?;
        let index = self.attach_backend_with(client, suspend_order, dead_backend)?;
        if reconnect && let Some(function) = self.functions.get_mut(index) {
            let remembered = function.remember_identity();
            if let Err(error) = remembered {
                self.functions.pop();
                return Err(error.into());
            }
        }
        Ok(index)
    }

    /// Takes the message-signalled interrupts of a function to `routes`: an eventfd for each vector, and
    /// the message that it stands for whenever the guest programs it.
    ///
    /// # Errors
    /// [`InterruptError`] with the reason; the function works on without these interrupts.
    pub fn connect_interrupts(
        &mut self,
        function: usize,
        routes: Arc<dyn InterruptRoutes>,
    ) -> Result<(), InterruptError> {
        let attached = self.functions.get(function).ok_or(InterruptError::NoFunction)?;
        // Those of an earlier call take their vectors with them, so they go first.
        drop(self.interrupts.remove(&function));
        let interrupts = Interrupts::connect(function, &attached.client(), routes)?;
        self.interrupts.insert(function, interrupts);
        Ok(())
    }
}

impl<B: Backend> Frontend<B> {
    /// A VM without functions yet. `claimed` are the `(start, length)` ranges of memory that the VMM
    /// itself claims before any BAR: RAM, ECAM and the like. Memory slots are numbered from
    /// `first_slot` on.
    #[must_use]
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        claimed: Vec<(u64, u64)>,
        first_slot: SlotId,
    ) -> Self {
        Self {
            hypervisor,
            windows: Arc::new(WindowTable::new(claimed)),
            functions: Vec::new(),
            interrupts: BTreeMap::new(),
            next_slot: first_slot.0,
            counters: FaultCounters::default(),
        }
    }

    /// Attaches the function that `backend` owns; returns its index.
    ///
    /// # Errors
    /// [`AttachError`] with the reason.
    pub fn attach_backend(
        &mut self,
        backend: B,
        suspend_order: SuspendOrder,
    ) -> Result<usize, AttachError> {
        self.attach_backend_with(backend, suspend_order, DeadBackend::default())
    }

    /// As [`attach_backend`](Self::attach_backend), and says what becomes of accesses while the backend
    /// is gone.
    ///
    /// # Errors
    /// [`AttachError`] with the reason.
    pub fn attach_backend_with(
        &mut self,
        backend: B,
        suspend_order: SuspendOrder,
        dead_backend: DeadBackend,
    ) -> Result<usize, AttachError> {
        let index = self.functions.len();
        let windows = Arc::clone(&self.windows);
        let next_slot = &mut self.next_slot;
        let mut slots = || {
            let slot = SlotId(*next_slot);
            *next_slot += 1;
            slot
        };
        let function = AttachedFunction::over(index, backend, suspend_order, windows, &mut slots)?;
        self.functions.push(function.with_dead_backend(dead_backend));
        Ok(index)
    }

    /// The attached functions, by index.
    #[must_use]
    pub fn functions(&self) -> &[AttachedFunction<B>] {
        &self.functions
    }

    /// What memory faults there were so far, and what became of them.
    #[must_use]
    pub fn fault_counters(&self) -> &FaultCounters {
        &self.counters
    }

    /// Whether the VMM itself claims this address of memory, so that no BAR can be there. An exit as
    /// MMIO there is a genuine fault of the VMM's own memory.
    #[must_use]
    pub fn is_claimed(&self, address: u64) -> bool {
        self.windows.is_claimed(address)
    }

    /// Reads configuration space of a function. One that does not exist reads as all ones.
    pub fn config_read(&self, function: usize, offset: u16, data: &mut [u8]) {
        match self.functions.get(function) {
            Some(function) => function.config_read(self.hypervisor.as_ref(), offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space of a function.
    pub fn config_write(&self, function: usize, offset: u16, data: &[u8]) {
        let Some(attached) = self.functions.get(function) else { return };
        attached.config_write(self.hypervisor.as_ref(), offset, data);
        if let Some(interrupts) = self.interrupts.get(&function)
            && interrupts.in_config(offset, data.len())
        {
            interrupts.follow(attached);
        }
    }

    /// Completes a read exit. Bytes that no BAR claims are all ones.
    pub fn read(&self, space: AddressSpace, address: u64, data: &mut [u8]) {
        let mut rest = data;
        for piece in self.windows.pieces(space, address, rest.len()) {
            let (now, later) = rest.split_at_mut(piece.len);
            rest = later;
            match piece.target.and_then(|(w, at)| Some((self.functions.get(w.function)?, w, at))) {
                Some((function, window, offset)) => {
                    function.bar_read(self.hypervisor.as_ref(), &window, offset, now);
                }
                None => now.fill(0xff),
            }
        }
    }

    /// Completes a write exit. Bytes that no BAR claims are dropped.
    pub fn write(&self, space: AddressSpace, address: u64, data: &[u8]) {
        let mut rest = data;
        for piece in self.windows.pieces(space, address, rest.len()) {
            let (now, later) = rest.split_at(piece.len);
            rest = later;
            if let Some((window, offset)) = piece.target
                && let Some(function) = self.functions.get(window.function)
            {
                function.bar_write(self.hypervisor.as_ref(), &window, offset, now);
                if let Some(interrupts) = self.interrupts.get(&window.function)
                    && interrupts.in_bar(&window, offset, now.len())
                {
                    interrupts.follow(function);
                }
            }
        }
    }

    /// Resolves a memory fault. The caller bounds repetition with a
    /// [`ProgressGuard`](crate::fault::ProgressGuard) for each vCPU.
    pub fn memory_fault(&self, fault: &MemoryFault) -> FaultOutcome {
        let outcome = match self.windows.route(fault) {
            Route::NotMine => FaultOutcome::NotMine,
            Route::Bars(targets) => FaultOutcome::Reenter(self.resolve(&targets)),
            // Nothing of the VMM's own is there, so the access exits as MMIO now, or faults again
            // and is bounded.
            Route::Nowhere if self.has_mapped_bars() => FaultOutcome::Reenter(Verdict::Retry),
            Route::Anywhere if self.has_mapped_bars() => {
                // If the fault was about something else it comes again, and the caller's bound
                // ends it.
                let mapped = self.functions.iter().filter(|function| function.has_mapped_bars());
                mapped.for_each(|function| function.unlocated_fault(self.hypervisor.as_ref()));
                FaultOutcome::Reenter(Verdict::Retry)
            }
            Route::Nowhere | Route::Anywhere => FaultOutcome::NotMine,
        };
        self.counters.count(fault, outcome.verdict());
        outcome
    }

    /// Asks about all BARs that the fault can be about: to resolve one that has not faulted does no
    /// harm. Returns what changed something, if anything did.
    fn resolve(&self, targets: &[BarTarget]) -> Verdict {
        let mut result = Verdict::Retry;
        for target in targets {
            let Some(function) = self.functions.get(target.function) else { continue };
            let verdict = function.memory_fault(self.hypervisor.as_ref(), target);
            if result == Verdict::Retry {
                result = verdict;
            }
        }
        result
    }

    /// A counter that moves whenever a memory slot of the functions that a fault may be about comes or
    /// goes, or one of them tells of another epoch: a fault that repeats while it stands still makes
    /// no progress.
    #[must_use]
    pub fn progress(&self, fault: &MemoryFault) -> u64 {
        let about: Vec<&AttachedFunction<B>> = match self.windows.route(fault) {
            Route::Bars(targets) => {
                targets.iter().filter_map(|target| self.functions.get(target.function)).collect()
            }
            Route::Anywhere | Route::Nowhere => self.functions.iter().collect(),
            Route::NotMine => Vec::new(),
        };
        about.iter().fold(0, |sum, function| sum.wrapping_add(function.progress()))
    }

    /// How often a memory slot came or went.
    #[must_use]
    pub fn slot_changes(&self) -> u64 {
        self.functions.iter().map(AttachedFunction::slot_changes).sum()
    }

    /// The way out for a fault that repeats without progress: if it is about a BAR, the BAR is not
    /// mapped any more and goes on trapped. `false` if it is not, if the address is unknown, or if
    /// the fault goes on although the BAR is trapped.
    pub fn quarantine(&self, fault: &MemoryFault) -> bool {
        let Route::Bars(targets) = self.windows.route(fault) else { return false };
        // Each BAR once: a gather may have all of its lanes in one.
        let bars: BTreeSet<_> =
            targets.iter().map(|target| (target.function, target.bar)).collect();
        let mut helps = false;
        for (function, bar) in bars {
            if let Some(function) = self.functions.get(function) {
                helps |= function.quarantine(self.hypervisor.as_ref(), bar);
            }
        }
        helps
    }

    /// Puts `backend` in the place of a function's whose session has ended
    /// ([`AttachedFunction::resume`]). What it was told about memory and interrupts is the caller's
    /// affair; what the guest has programmed of the latter is routed anew.
    ///
    /// # Errors
    /// [`ReconnectError`]; the function is as it was then, without a backend.
    pub fn resume(&self, function: usize, backend: B) -> Result<(), ReconnectError> {
        let attached = self.functions.get(function).ok_or(ReconnectError::NotWanted)?;
        attached.resume(self.hypervisor.as_ref(), backend)?;
        if let Some(interrupts) = self.interrupts.get(&function) {
            interrupts.follow(attached);
        }
        Ok(())
    }

    /// Resets every function, as a reset of the machine does.
    pub fn reset(&self) {
        for function in &self.functions {
            // It has been reported; whatever became of it, the function is not mapped now.
            drop(function.reset(self.hypervisor.as_ref()));
        }
    }

    fn has_mapped_bars(&self) -> bool {
        self.functions.iter().any(|function| function.has_mapped_bars())
    }
}

impl<B: Backend> Drop for Frontend<B> {
    /// The memory of backends leaves the VM with their functions.
    fn drop(&mut self) {
        for function in &self.functions {
            function.detach(self.hypervisor.as_ref());
        }
    }
}

impl<B: Backend> std::fmt::Debug for Frontend<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend").field("functions", &self.functions).finish_non_exhaustive()
    }
}

/// Locks what every holder leaves valid.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
