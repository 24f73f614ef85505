//! The shim as a VMM sees it: exits in, completed accesses out.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barkeep_protocol::wire;

use crate::bar::{AddressSpace, AttachError, AttachedFunction, SuspendOrder, WindowTable};
use crate::fault::Verdict;
use crate::hypervisor::{FaultAccess, GuestAccess, Hypervisor, MemoryFault, SlotId};

/// All functions of a VM that live in backend processes.
///
/// A VMM forwards to it: configuration accesses, MMIO and port exits that none of its own devices
/// claims, and memory faults. All methods but [`attach`](Self::attach) may be called by any number
/// of vCPU threads at a time.
pub struct Frontend {
    hypervisor: Arc<dyn Hypervisor>,
    windows: Arc<WindowTable>,
    functions: Vec<AttachedFunction>,
    next_slot: u32,
    memory_faults: AtomicU64,
}

/// What a VMM does after a memory fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Run the vCPU again: the instruction can go on, or exits as MMIO.
    Reenter(Verdict),
    /// It is not about a BAR of ours; treat it as without barkeep.
    NotMine,
}

impl Frontend {
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
            next_slot: first_slot.0,
            memory_faults: AtomicU64::new(0),
        }
    }

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
        let index = self.functions.len();
        let windows = Arc::clone(&self.windows);
        let next_slot = &mut self.next_slot;
        let mut slots = || {
            let slot = SlotId(*next_slot);
            *next_slot += 1;
            slot
        };
        let function =
            AttachedFunction::attach(index, path, deadline, suspend_order, windows, &mut slots)?;
        self.functions.push(function);
        Ok(index)
    }

    /// The attached functions, by index.
    #[must_use]
    pub fn functions(&self) -> &[AttachedFunction] {
        &self.functions
    }

    /// Memory faults that were resolved so far.
    #[must_use]
    pub fn memory_faults(&self) -> u64 {
        self.memory_faults.load(Ordering::Relaxed)
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
        if let Some(function) = self.functions.get(function) {
            function.config_write(self.hypervisor.as_ref(), offset, data);
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
            }
        }
    }

    /// Resolves a memory fault. The caller bounds repetition with a
    /// [`ProgressGuard`](crate::fault::ProgressGuard) for each vCPU.
    pub fn memory_fault(&self, fault: &MemoryFault) -> FaultOutcome {
        if fault.private {
            return FaultOutcome::NotMine;
        }
        let outcome = match fault.candidates() {
            [] => self.unlocated_fault(),
            candidates => self.located_fault(candidates),
        };
        if outcome != FaultOutcome::NotMine {
            self.memory_faults.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// A counter that moves whenever a memory slot comes or goes: a fault that repeats while it
    /// stands still makes no progress.
    #[must_use]
    pub fn slot_changes(&self) -> u64 {
        self.functions.iter().map(AttachedFunction::slot_changes).sum()
    }

    /// The way out for a fault that repeats without progress: if it is about a BAR, the BAR is not
    /// mapped any more and goes on trapped. `false` if it is not, or the address is unknown.
    pub fn quarantine(&self, fault: &MemoryFault) -> bool {
        let mut found = false;
        for access in fault.candidates() {
            if let Some((window, _)) = self.windows.find_faulting(access.address.0)
                && let Some(function) = self.functions.get(window.function)
            {
                function.quarantine(self.hypervisor.as_ref(), window.bar);
                found = true;
            }
        }
        found
    }

    /// Resets every function, as a reset of the machine does.
    pub fn reset(&self) {
        for function in &self.functions {
            if let Err(error) = function.reset(self.hypervisor.as_ref()) {
                tracing::warn!(socket = %function.client().path().display(), "reset: {error}");
            }
        }
    }

    /// One of `candidates` has faulted. All that could have are asked about: resolving one that has
    /// not faulted does no harm.
    fn located_fault(&self, candidates: &[GuestAccess]) -> FaultOutcome {
        let mut verdict = None;
        for access in candidates {
            let address = access.address.0;
            let Some((window, offset)) = self.windows.find_faulting(address) else { continue };
            let Some(function) = self.functions.get(window.function) else { continue };
            let hypervisor = self.hypervisor.as_ref();
            let kind = wire_access(access.kind);
            let found = function.memory_fault(hypervisor, window.bar, offset, access.size, kind);
            verdict = verdict.or(Some(found));
        }
        if let Some(verdict) = verdict {
            return FaultOutcome::Reenter(verdict);
        }
        // Another vCPU may have moved the BAR away while this fault was on its way here. Nothing of
        // the VMM's own is there, so the access exits as MMIO now, or faults again and is bounded.
        let claimed = candidates.iter().any(|access| self.windows.is_claimed(access.address.0));
        if self.has_mapped_bars() && !claimed {
            return FaultOutcome::Reenter(Verdict::Retry);
        }
        FaultOutcome::NotMine
    }

    /// The bare EFAULT of released kernels tells no address. Every function whose memory could have
    /// faulted is asked; if the fault was about something else, it comes again, and the caller's
    /// bound ends it.
    fn unlocated_fault(&self) -> FaultOutcome {
        if !self.has_mapped_bars() {
            return FaultOutcome::NotMine;
        }
        for function in self.functions.iter().filter(|function| function.has_mapped_bars()) {
            function.recheck(self.hypervisor.as_ref());
        }
        FaultOutcome::Reenter(Verdict::Retry)
    }

    fn has_mapped_bars(&self) -> bool {
        self.functions.iter().any(AttachedFunction::has_mapped_bars)
    }
}

impl Drop for Frontend {
    /// The memory of backends leaves the VM with their functions.
    fn drop(&mut self) {
        for function in &self.functions {
            function.detach(self.hypervisor.as_ref());
        }
    }
}

fn wire_access(access: Option<FaultAccess>) -> wire::FaultAccess {
    match access {
        None => wire::FaultAccess::empty(),
        Some(FaultAccess::Read) => wire::FaultAccess::READ,
        Some(FaultAccess::Write) => wire::FaultAccess::WRITE,
        Some(FaultAccess::Execute) => wire::FaultAccess::EXECUTE,
    }
}

impl std::fmt::Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend").field("functions", &self.functions).finish_non_exhaustive()
    }
}
