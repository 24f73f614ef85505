//! The shim as a VMM sees it: exits in, completed accesses out.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barkeep_protocol::wire;

use crate::bar::{AddressSpace, AttachError, AttachedFunction, SuspendOrder, WindowTable};
use crate::fault::Verdict;
use crate::hypervisor::{FaultAccess, Hypervisor, MemoryFault, SlotId};

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
    /// A VM without functions yet. `ram` are the `(start, length)` ranges that no BAR can claim;
    /// memory slots are numbered from `first_slot` on.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, ram: Vec<(u64, u64)>, first_slot: SlotId) -> Self {
        Self {
            hypervisor,
            windows: Arc::new(WindowTable::new(ram)),
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
            Some(function) => function.config_read(offset, data),
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
                    function.bar_read(self.hypervisor.as_ref(), window.bar, offset, now);
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
                function.bar_write(self.hypervisor.as_ref(), window.bar, offset, now);
            }
        }
    }

    /// Resolves a memory fault. The caller bounds repetition with a
    /// [`ProgressGuard`](crate::fault::ProgressGuard) for each vCPU.
    pub fn memory_fault(&self, fault: &MemoryFault) -> FaultOutcome {
        if fault.private {
            return FaultOutcome::NotMine;
        }
        let hypervisor = self.hypervisor.as_ref();
        let Some(address) = fault.address else {
            return self.unlocated_fault();
        };
        let Some((window, offset)) = self.windows.find(AddressSpace::Memory, address.0) else {
            return FaultOutcome::NotMine;
        };
        let Some(function) = self.functions.get(window.function) else {
            return FaultOutcome::NotMine;
        };
        self.memory_faults.fetch_add(1, Ordering::Relaxed);
        let access = wire_access(fault.access);
        let verdict = function.memory_fault(hypervisor, window.bar, offset, fault.size, access);
        FaultOutcome::Reenter(verdict)
    }

    /// The bare EFAULT of released kernels tells no address. Every function whose memory could have
    /// faulted is asked; if the fault was about something else, it comes again, and the caller's
    /// bound ends it.
    fn unlocated_fault(&self) -> FaultOutcome {
        let mut suspects = self.functions.iter().filter(|f| f.has_mapped_bars()).peekable();
        if suspects.peek().is_none() {
            return FaultOutcome::NotMine;
        }
        self.memory_faults.fetch_add(1, Ordering::Relaxed);
        suspects.for_each(|function| function.recheck(self.hypervisor.as_ref()));
        FaultOutcome::Reenter(Verdict::Retry)
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
