use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use barkeep_protocol::wire::{self, DeviceFlags, FaultReport, FaultVerdict, PciRegion};
use tracing::{debug, error, warn};

use super::Backend;
use super::mapping::BarMapping;
use crate::client::{Client, ClientError};
use crate::fault::{BarTarget, BarWindow, FaultAccess, SlotState, Verdict, WindowTable, decide};
use crate::hypervisor::{GuestAddress, Hypervisor, SlotId};
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering, lock};

mod attach;
mod config;
mod slots;

pub use attach::{AttachError, BarInfo};

use config::{Capabilities, ConfigChange, Enables, GuestBars, Registers};

/// A function in a backend process, attached to a VM: its BARs lie in the guest's address space, and
/// those that the backend shares are mapped while the function decodes.
#[derive(Debug)]
pub struct AttachedFunction<B = Client> {
    index: usize,
    backend: B,
    bars: Vec<BarInfo>,
    capabilities: Capabilities,
    suspend_order: SuspendOrder,
    windows: Arc<WindowTable>,
    state: Mutex<State>,
    /// Moves with every slot that comes or goes: what a fault may have been about has changed.
    changes: AtomicU64,
    /// Of the function, as last heard.
    epoch: AtomicU64,
    /// BARs, one bit each, that lost their slot although the guest wants them to decode: somebody
    /// else stopped them. They get it back when they answer again.
    lost: AtomicU64,
    /// The end of the session has been told.
    end_told: AtomicBool,
}

/// What comes first when a guest's own write clears `PCI_COMMAND.MEM`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SuspendOrder {
    /// The memory slots go first, the write is forwarded second: no access can fault in between.
    #[default]
    SlotsFirst,
    /// The memory becomes inaccessible first and its slots go last, as with vfio-pci in the kernel
    /// and a VMM behind it: accesses in between fault. For tests of what happens then.
    BackingFirst,
    /// Both orders in turn.
    Alternate,
}

#[derive(Debug)]
struct State {
    /// By BAR number; `None` for those that are trapped.
    mappings: [Option<BarMapping>; 6],
    /// Where the guest has put the BARs.
    placed: GuestBars,
    /// What the function claims, as far as this side knows.
    enables: Enables,
    /// What the guest wrote last into the Command register.
    wanted: Enables,
    /// Whether it is in D0; in D3hot the Command register has no effect.
    in_d0: bool,
    memory_clears: u64,
}

impl AttachedFunction {
    /// Connects to the backend at `path` and learns what it serves. `slots` gives out slot numbers
    /// for mapped BARs.
    ///
    /// # Errors
    /// [`AttachError`] with the reason.
    pub fn attach(
        index: usize,
        path: &Path,
        deadline: Duration,
        suspend_order: SuspendOrder,
        windows: Arc<WindowTable>,
        slots: &mut dyn FnMut() -> SlotId,
    ) -> Result<Self, AttachError> {
        Self::over(index, Client::connect(path, deadline)?, suspend_order, windows, slots)
    }

    /// The connection, for what has nothing to do with BARs: DMA windows, interrupts, counters.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.backend
    }
}

impl<B: Backend> AttachedFunction<B> {
    /// Learns what `backend` serves. `slots` gives out slot numbers for mapped BARs.
    ///
    /// # Errors
    /// [`AttachError`] with the reason.
    pub fn over(
        index: usize,
        backend: B,
        suspend_order: SuspendOrder,
        windows: Arc<WindowTable>,
        slots: &mut dyn FnMut() -> SlotId,
    ) -> Result<Self, AttachError> {
        let info = backend.device_info()?;
        if !info.flags.contains(DeviceFlags::PCI) || info.num_regions <= PciRegion::Config.index() {
            return Err(AttachError::NotPci);
        }
        let registers = Registers::read(&backend)?;
        let (bars, mappings) = attach::describe_bars(&backend, &registers, slots)?;
        let capabilities = Capabilities::find(&backend)?;
        let state = State {
            mappings,
            placed: GuestBars::default(),
            enables: Enables::default(),
            wanted: Enables::default(),
            in_d0: true,
            memory_clears: 0,
        };
        let function = Self {
            index,
            backend,
            bars,
            capabilities,
            suspend_order,
            windows,
            state: Mutex::new(state),
            changes: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            end_told: AtomicBool::new(false),
        };
        function.publish(&function.lock(), |_| true);
        Ok(function)
    }

    /// Whoever owns the function.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The BARs that exist.
    #[must_use]
    pub fn bars(&self) -> &[BarInfo] {
        &self.bars
    }

    /// Where a BAR is mapped now, if it is.
    #[must_use]
    pub fn mapped_at(&self, bar: u8) -> Option<GuestAddress> {
        self.lock().mappings.get(usize::from(bar))?.as_ref()?.mapped_at()
    }

    /// Whether any BAR is mapped directly, so that a memory fault could be about this function.
    #[must_use]
    pub fn has_mapped_bars(&self) -> bool {
        self.bars.iter().any(|bar| bar.mapped)
    }

    /// How often a memory slot of the function has come or gone.
    #[must_use]
    pub fn slot_changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// A counter that moves when a slot comes or goes, or the backend tells of another epoch.
    #[must_use]
    pub fn progress(&self) -> u64 {
        self.slot_changes().wrapping_add(self.epoch.load(Ordering::Relaxed))
    }

    /// Reads configuration space. A backend that does not answer reads as all ones, like a function
    /// that is not there.
    pub fn config_read(&self, hypervisor: &dyn Hypervisor, offset: u16, data: &mut [u8]) {
        let region = PciRegion::Config.index();
        if let Err(error) = self.backend.region_read(region, offset.into(), data) {
            data.fill(0xff);
            self.failed(hypervisor, "configuration read", &error);
        }
    }

    /// Writes configuration space, and follows what the write does to the BARs: memory slots are
    /// gone before a write that stops decode is forwarded, and back before one that starts it
    /// returns.
    pub fn config_write(&self, hypervisor: &dyn Hypervisor, offset: u16, data: &[u8]) {
        // Held across the request: a fault on another vCPU waits until slots and decode agree.
        let mut state = self.lock();
        match self.capabilities.change(offset, data) {
            ConfigChange::Unrelated => {
                self.forward(hypervisor, &mut state, offset, data);
            }
            ConfigChange::Command(enables) if !enables.memory => {
                state.wanted = enables;
                self.disable_memory(hypervisor, &mut state, offset, data);
                state.enables = enables;
                self.lost.store(0, Ordering::Relaxed);
                self.publish(&state, |_| true);
            }
            ConfigChange::Command(enables) => {
                state.wanted = enables;
                let accepted = self.forward(hypervisor, &mut state, offset, data);
                if accepted && !self.has_mapped_bars() {
                    state.enables = enables;
                    self.publish(&state, |_| true);
                } else {
                    self.synchronise(hypervisor, &mut state);
                }
            }
            ConfigChange::Reconfigures => {
                self.suspend_all(hypervisor, &mut state);
                state.placed.write(&self.bars, offset, data);
                if let Some(enables) = config::enables_written(offset, data) {
                    state.wanted = enables;
                }
                self.forward(hypervisor, &mut state, offset, data);
                self.synchronise(hypervisor, &mut state);
            }
        }
    }

    /// Resets the function, as a VMM does when its machine is reset.
    ///
    /// # Errors
    /// [`ClientError`] when the backend did not; its BARs are not mapped then.
    pub fn reset(&self, hypervisor: &dyn Hypervisor) -> Result<(), ClientError> {
        let mut state = self.lock();
        self.suspend_all(hypervisor, &mut state);
        state.wanted = Enables::default();
        let result = self.backend.reset();
        self.synchronise(hypervisor, &mut state);
        result
    }

    /// Reads from a BAR. Where no live backend answers, `data` is all ones: an Unsupported Request.
    pub fn bar_read(
        &self,
        hypervisor: &dyn Hypervisor,
        window: &BarWindow,
        offset: u64,
        data: &mut [u8],
    ) {
        if !self.forwards_to(window) {
            return data.fill(0xff);
        }
        if let Err(error) = self.backend.region_read(window.bar.into(), offset, data) {
            data.fill(0xff);
            self.failed(hypervisor, "read", &error);
        } else if self.is_lost(window.bar) && data.iter().any(|byte| *byte != 0xff) {
            // Somebody answers again.
            self.recheck(hypervisor);
        }
    }

    /// Writes to a BAR. Where no live backend takes it, the write is dropped.
    pub fn bar_write(
        &self,
        hypervisor: &dyn Hypervisor,
        window: &BarWindow,
        offset: u64,
        data: &[u8],
    ) {
        if !self.forwards_to(window) {
            return;
        }
        if let Err(error) = self.backend.region_write(window.bar.into(), offset, data) {
            self.failed(hypervisor, "write", &error);
        } else if self.is_lost(window.bar) && self.answers_again(window.bar) {
            self.recheck(hypervisor);
        }
    }

    /// Resolves a memory fault in one of our windows or slots.
    pub fn memory_fault(&self, hypervisor: &dyn Hypervisor, target: &BarTarget) -> Verdict {
        // First the lock, then the question: the answer can't be outdated by a write of this VM.
        let mut state = self.lock();
        let bar = target.bar;
        let answer = self.ask_about(&mut state, target);
        if let Some(answer) = answer {
            self.epoch.store(answer.epoch(), Ordering::Relaxed);
        }
        let verdict = decide(answer, state.slot(bar));
        if matches!(answer, None | Some(FaultVerdict::UnsupportedRequest { .. })) {
            // Decode is the whole function's: no other BAR of it may stay mapped either.
            self.suspend_all(hypervisor, &mut state);
            self.note_lost(&state, true);
        }
        match verdict {
            Verdict::UnsupportedRequest => {
                self.suspend(hypervisor, &mut state, bar);
            }
            Verdict::Map => {
                self.synchronise(hypervisor, &mut state);
                if state.slot(bar) != SlotState::Mapped {
                    // It is somewhere else, or shadowed, or off again: trapped works in any case.
                    return Verdict::Retry;
                }
            }
            Verdict::Relax => {
                if let Some(mapping) = &state.mappings[usize::from(bar)]
                    && let Err(failure) = mapping.restore_access()
                {
                    debug!(function = self.index, bar, "memory slot: {failure}");
                    self.suspend(hypervisor, &mut state, bar);
                    return Verdict::Retry;
                }
            }
            Verdict::Retry | Verdict::NotMine => {}
        }
        verdict
    }

    /// Makes every slot of the function agree with what the backend says now: for a memory fault of
    /// unknown address, and for a function that answers again.
    pub fn recheck(&self, hypervisor: &dyn Hypervisor) {
        let mut state = self.lock();
        self.synchronise(hypervisor, &mut state);
    }

    /// Gives up on mapping a BAR for the rest of the session: it goes on trapped. For one whose
    /// memory faults again and again although its backend says that it may be mapped.
    pub fn quarantine(&self, hypervisor: &dyn Hypervisor, bar: u8) {
        let mut state = self.lock();
        if self.suspend(hypervisor, &mut state, bar)
            && state.mappings[usize::from(bar)].take().is_some()
        {
            let socket = self.backend.name();
            warn!(%socket, bar, "its memory faults without end: not mapped any more");
        }
    }

    /// Takes every memory slot of the function away.
    pub fn detach(&self, hypervisor: &dyn Hypervisor) {
        self.suspend_all(hypervisor, &mut self.lock());
    }

    /// Whether an access is the backend's to complete. A barkeep backend answers UR itself, and
    /// counts and records it; any other server may not look at the Command register at all.
    fn forwards_to(&self, window: &BarWindow) -> bool {
        window.decodes || self.backend.extensions().region_state
    }

    fn is_lost(&self, bar: u8) -> bool {
        self.lost.load(Ordering::Relaxed) & (1 << bar) != 0
    }

    fn answers_again(&self, bar: u8) -> bool {
        self.backend.region_state(bar.into()).is_ok_and(|state| state.claimed())
    }

    fn disable_memory(
        &self,
        hypervisor: &dyn Hypervisor,
        state: &mut State,
        offset: u16,
        data: &[u8],
    ) {
        state.memory_clears += 1;
        let backing_first = match self.suspend_order {
            SuspendOrder::SlotsFirst => false,
            SuspendOrder::BackingFirst => true,
            SuspendOrder::Alternate => state.memory_clears.is_multiple_of(2),
        };
        if backing_first {
            for mapping in state.mappings.iter().flatten() {
                if let Err(failure) = mapping.refuse_access() {
                    error!(function = self.index, "mprotect: {failure}");
                }
            }
            self.forward(hypervisor, state, offset, data);
            self.suspend_all(hypervisor, state);
        } else {
            self.suspend_all(hypervisor, state);
            self.forward(hypervisor, state, offset, data);
        }
    }

    /// Forwards a configuration write; whether the backend took it.
    fn forward(
        &self,
        hypervisor: &dyn Hypervisor,
        state: &mut State,
        offset: u16,
        data: &[u8],
    ) -> bool {
        let region = PciRegion::Config.index();
        let result = self.backend.region_write(region, offset.into(), data);
        if let Err(error) = &result {
            self.report("configuration write", error);
            if error.ends_session() {
                self.suspend_all(hypervisor, state);
            }
        }
        result.is_ok()
    }

    /// Asks the backend about a fault; `None` if it is dead.
    fn ask_about(&self, state: &mut State, target: &BarTarget) -> Option<FaultVerdict> {
        let report = FaultReport {
            region: target.bar.into(),
            access: wire_access(target.access.kind),
            offset: target.offset,
            size: target.access.size,
        };
        match self.backend.memory_fault(&report) {
            Ok(answer) => Some(answer),
            Err(ClientError::NotOffered(_)) => self.ask_plainly(state, target.bar),
            Err(error) => {
                self.report("memory fault", &error);
                None
            }
        }
    }

    /// What a barkeep backend would answer to a memory fault, from the registers of one that does
    /// not know the question.
    fn ask_plainly(&self, state: &mut State, bar: u8) -> Option<FaultVerdict> {
        let (registers, in_d0) = self.ask_registers().ok()?;
        (state.enables, state.in_d0) = (registers.enables(), in_d0);
        self.publish(state, |_| true);
        let decodes = registers.enables().memory && in_d0;
        Some(match (decodes, &state.mappings[usize::from(bar)]) {
            (false, _) => FaultVerdict::UnsupportedRequest { epoch: 0 },
            (true, Some(_)) => FaultVerdict::Map { epoch: 0 },
            (true, None) => FaultVerdict::Trap { epoch: 0 },
        })
    }

    /// An access that the backend did not complete. If it is gone, its memory must not stay mapped:
    /// all of the function answers UR now, not only what is trapped.
    fn failed(&self, hypervisor: &dyn Hypervisor, what: &str, error: &ClientError) {
        self.report(what, error);
        if error.ends_session() {
            self.suspend_all(hypervisor, &mut self.lock());
        }
    }

    /// One line when a session dies. What follows is the same news again, at the guest's pace.
    fn report(&self, what: &str, error: &ClientError) {
        let socket = self.backend.name();
        if error.ends_session() && !self.end_told.swap(true, Ordering::Relaxed) {
            warn!(%socket, "{what}: {error}; the function is dead to this VM");
        } else {
            debug!(%socket, "{what}: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // State is changed in single steps that each leave it valid.
        lock(&self.state)
    }
}

fn wire_access(kind: Option<FaultAccess>) -> wire::FaultAccess {
    match kind {
        None => wire::FaultAccess::empty(),
        Some(FaultAccess::Read) => wire::FaultAccess::READ,
        Some(FaultAccess::Write) => wire::FaultAccess::WRITE,
        Some(FaultAccess::Execute) => wire::FaultAccess::EXECUTE,
    }
}
