use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use barkeep_protocol::wire::{
    DeviceFlags, FaultAccess, FaultReport, FaultVerdict, PciRegion, RegionFlags,
};
use thiserror::Error;
use tracing::{debug, error, warn};

use super::mapping::{BarMapping, MappingError};
use super::table::{AddressSpace, BarWindow, WindowTable};
use crate::client::{Client, ClientError};
use crate::fault::{SlotState, Verdict, decide};
use crate::hypervisor::{GuestAddress, Hypervisor, SlotId};

mod config;

use config::{Capabilities, ConfigChange, Enables, GuestBars, Registers};

/// A function in a backend process, attached to a VM: its BARs lie in the guest's address space, and
/// those that the backend shares are mapped while the function decodes.
#[derive(Debug)]
pub struct AttachedFunction {
    index: usize,
    client: Client,
    bars: Vec<BarInfo>,
    capabilities: Capabilities,
    suspend_order: SuspendOrder,
    windows: Arc<WindowTable>,
    state: Mutex<State>,
    /// Moves with every slot that comes or goes: what a fault may have been about has changed.
    changes: AtomicU64,
    /// The end of the session has been told.
    end_told: AtomicBool,
}

/// One BAR, as the backend describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// BAR number, 0 to 5.
    pub bar: u8,
    /// Memory or I/O.
    pub space: AddressSpace,
    /// Whether a memory BAR takes 64-bit addresses, and with them the next register.
    pub wide: bool,
    /// Whether a memory BAR is prefetchable.
    pub prefetchable: bool,
    /// Length in bytes.
    pub size: u64,
    /// Whether the VM maps it directly.
    pub mapped: bool,
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

/// Why a function can't be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The backend can't be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It serves something that is no PCI function.
    #[error("not a PCI function")]
    NotPci,
    /// It describes a BAR that can't exist.
    #[error("BAR{bar}: {reason}")]
    BadBar {
        /// Which.
        bar: u8,
        /// What is wrong.
        reason: String,
    },
    /// A failure of ours or of the hypervisor.
    #[error("{0}")]
    Setup(String),
}

#[derive(Debug)]
struct State {
    /// By BAR number; `None` for those that are trapped.
    mappings: [Option<BarMapping>; 6],
    /// Where the guest has put the BARs.
    placed: GuestBars,
    /// What the function claims, as far as this side knows.
    enables: Enables,
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
        let client = Client::connect(path, deadline)?;
        let info = client.device_info()?;
        if !info.flags.contains(DeviceFlags::PCI) || info.num_regions <= PciRegion::Config.index() {
            return Err(AttachError::NotPci);
        }
        let registers = Registers::read(&client)?;
        let mut bars = Vec::new();
        let mut mappings = [const { None }; 6];
        let mut bar = 0;
        while bar < 6 {
            let Some((described, mapping)) = describe_bar(&client, bar, &registers, slots)? else {
                bar += 1;
                continue;
            };
            mappings[usize::from(bar)] = mapping;
            bars.push(described);
            bar += if described.wide { 2 } else { 1 };
        }
        let capabilities = Capabilities::find(&client)?;
        let state = State {
            mappings,
            placed: GuestBars::default(),
            enables: Enables::default(),
            in_d0: true,
            memory_clears: 0,
        };
        let function = Self {
            index,
            client,
            bars,
            capabilities,
            suspend_order,
            windows,
            state: Mutex::new(state),
            changes: AtomicU64::new(0),
            end_told: AtomicBool::new(false),
        };
        function.publish(&function.lock(), |_| true);
        Ok(function)
    }

    /// The connection, for what has nothing to do with BARs: DMA windows, interrupts, counters.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The BARs that exist.
    #[must_use]
    pub fn bars(&self) -> &[BarInfo] {
        &self.bars
    }

    /// How often a memory slot of the function has come or gone.
    #[must_use]
    pub fn slot_changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Reads configuration space. A backend that does not answer reads as all ones, like a function
    /// that is not there.
    pub fn config_read(&self, hypervisor: &dyn Hypervisor, offset: u16, data: &mut [u8]) {
        let region = PciRegion::Config.index();
        if let Err(error) = self.client.region_read(region, offset.into(), data) {
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
                self.disable_memory(hypervisor, &mut state, offset, data);
                state.enables = enables;
                self.publish(&state, |_| true);
            }
            ConfigChange::Command(enables) => {
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
        let result = self.client.reset();
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
        if let Err(error) = self.client.region_read(window.bar.into(), offset, data) {
            data.fill(0xff);
            self.failed(hypervisor, "read", &error);
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
        if let Err(error) = self.client.region_write(window.bar.into(), offset, data) {
            self.failed(hypervisor, "write", &error);
        }
    }

    /// Resolves a memory fault in one of our windows or slots.
    pub fn memory_fault(
        &self,
        hypervisor: &dyn Hypervisor,
        bar: u8,
        offset: u64,
        size: u64,
        access: FaultAccess,
    ) -> Verdict {
        // First the lock, then the question: the answer can't be outdated by a write of this VM.
        let mut state = self.lock();
        let report = FaultReport { region: bar.into(), access, offset, size };
        let answer = match self.client.memory_fault(&report) {
            Ok(answer) => Some(answer),
            Err(ClientError::NotOffered(_)) => self.ask_plainly(&state, bar),
            Err(error) => {
                self.report("memory fault", &error);
                None
            }
        };
        let verdict = decide(answer, state.slot(bar));
        if self.client.is_dead() {
            // Not only this BAR: nothing of a dead function may stay mapped.
            self.suspend_all(hypervisor, &mut state);
        }
        let resolved = match verdict {
            Verdict::UnsupportedRequest => self.suspend(hypervisor, &mut state, bar),
            Verdict::Map | Verdict::Relax => self.map(hypervisor, &mut state, bar),
            Verdict::Retry | Verdict::NotMine => true,
        };
        if resolved {
            return verdict;
        }
        // Trapped works in any case.
        self.suspend(hypervisor, &mut state, bar);
        Verdict::Retry
    }

    /// Resolves a memory fault of unknown address: makes every slot of the function agree with what
    /// the backend says now.
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
            let socket = self.client.path().display();
            warn!(%socket, bar, "its memory faults without end: not mapped any more");
        }
    }

    /// Takes every memory slot of the function away.
    pub fn detach(&self, hypervisor: &dyn Hypervisor) {
        self.suspend_all(hypervisor, &mut self.lock());
    }

    /// Whether any BAR is mapped directly, so that a memory fault could be about this function.
    #[must_use]
    pub fn has_mapped_bars(&self) -> bool {
        self.bars.iter().any(|bar| bar.mapped)
    }

    /// Whether an access is the backend's to complete. A barkeep backend answers UR itself, and
    /// counts and records it; any other server may not look at the Command register at all.
    fn forwards_to(&self, window: &BarWindow) -> bool {
        window.decodes || self.client.extensions().region_state
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
        let result = self.client.region_write(region, offset.into(), data);
        if let Err(error) = &result {
            self.report("configuration write", error);
            if error.ends_session() {
                self.suspend_all(hypervisor, state);
            }
        }
        result.is_ok()
    }

    /// Reads decode back from the function; suspends what does not decode, and maps what does where
    /// the guest has put it.
    fn synchronise(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        let registers = match self.ask_registers() {
            Ok((registers, in_d0)) => {
                state.enables = registers.enables();
                state.in_d0 = in_d0;
                Some(registers)
            }
            Err(error) => {
                self.report("configuration read", &error);
                state.enables = Enables::default();
                None
            }
        };
        for info in &self.bars {
            if registers.as_ref().is_some_and(|registers| registers.address(info) == 0) {
                state.placed.clear(info);
            }
        }
        // A backend that names another address than the guest wrote does not decode there.
        let agrees = |info: &BarInfo| {
            registers.as_ref().is_some_and(|r| r.address(info) == state.placed.address(info))
        };
        let agreeing: Vec<u8> =
            self.bars.iter().filter(|info| agrees(info)).map(|info| info.bar).collect();
        self.publish(state, |bar| agreeing.contains(&bar));
        for info in &self.bars {
            let window = self.window(state, info);
            let decodes = state.decodes(info.space) && agreeing.contains(&info.bar);
            if decodes && window.is_some_and(|window| self.windows.owns(&window)) {
                self.map(hypervisor, state, info.bar);
            } else {
                self.suspend(hypervisor, state, info.bar);
            }
        }
    }

    /// Command and BARs, and whether the function is in D0.
    fn ask_registers(&self) -> Result<(Registers, bool), ClientError> {
        Ok((Registers::read(&self.client)?, self.capabilities.in_d0(&self.client)?))
    }

    /// Maps a BAR where the guest has put it; whether it is reachable now.
    fn map(&self, hypervisor: &dyn Hypervisor, state: &mut State, bar: u8) -> bool {
        let Some(info) = self.bars.iter().find(|info| info.bar == bar) else { return true };
        let address = GuestAddress(state.placed.address(info));
        self.change(state, bar, |mapping| mapping.map(hypervisor, address))
    }

    /// Takes a BAR's slot away; whether it is gone.
    fn suspend(&self, hypervisor: &dyn Hypervisor, state: &mut State, bar: u8) -> bool {
        self.change(state, bar, |mapping| mapping.suspend(hypervisor))
    }

    fn suspend_all(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        for info in &self.bars {
            self.suspend(hypervisor, state, info.bar);
        }
    }

    /// Changes a slot and publishes where it is now. Without its slot a BAR works all the same,
    /// trapped: slower, and never wrong. A guest can cause failures at will, by placing BARs over
    /// each other.
    fn change(
        &self,
        state: &mut State,
        bar: u8,
        action: impl FnOnce(&mut BarMapping) -> Result<(), MappingError>,
    ) -> bool {
        let Some(mapping) = &mut state.mappings[usize::from(bar)] else { return true };
        let before = mapping.mapped_at();
        let result = action(mapping);
        if mapping.mapped_at() != before {
            self.changes.fetch_add(1, Ordering::Relaxed);
            self.windows.publish_slots(self.index, self.slots(state));
        }
        if let Err(failure) = &result {
            debug!(function = self.index, bar, "memory slot: {failure}");
        }
        result.is_ok()
    }

    /// What a barkeep backend would answer to a memory fault, from the registers of one that does
    /// not know the question.
    fn ask_plainly(&self, state: &State, bar: u8) -> Option<FaultVerdict> {
        let (registers, in_d0) = self.ask_registers().ok()?;
        let decodes = registers.enables().memory && in_d0;
        Some(match (decodes, &state.mappings[usize::from(bar)]) {
            (false, _) => FaultVerdict::UnsupportedRequest { epoch: 0 },
            (true, Some(_)) => FaultVerdict::Map { epoch: 0 },
            (true, None) => FaultVerdict::Trap { epoch: 0 },
        })
    }

    /// Publishes the windows; `claims` narrows which BARs decode, beyond the Command register.
    fn publish(&self, state: &State, claims: impl Fn(u8) -> bool) {
        let windows = self.bars.iter().filter_map(|info| self.window(state, info));
        let windows = windows
            .map(|window| BarWindow { decodes: window.decodes && claims(window.bar), ..window });
        self.windows.publish(self.index, windows.collect());
    }

    /// Where the guest has put a BAR.
    fn window(&self, state: &State, info: &BarInfo) -> Option<BarWindow> {
        let start = state.placed.address(info);
        // An address that wraps is nothing that a bus could route.
        start.checked_add(info.size - 1)?;
        Some(BarWindow {
            space: info.space,
            start,
            len: info.size,
            function: self.index,
            bar: info.bar,
            decodes: state.decodes(info.space),
        })
    }

    fn slots(&self, state: &State) -> Vec<BarWindow> {
        let slot = |info: &BarInfo| {
            let start = state.mappings[usize::from(info.bar)].as_ref()?.mapped_at()?.0;
            Some(BarWindow { start, ..self.window(state, info)? })
        };
        self.bars.iter().filter_map(slot).collect()
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
        let socket = self.client.path().display();
        if error.ends_session() && !self.end_told.swap(true, Ordering::Relaxed) {
            warn!(%socket, "{what}: {error}; the function is dead to this VM");
        } else {
            debug!(%socket, "{what}: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // State is changed in single steps that each leave it valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn slot(&self, bar: u8) -> SlotState {
        match &self.mappings[usize::from(bar)] {
            None => SlotState::Trapped,
            Some(mapping) if mapping.mapped_at().is_some() => SlotState::Mapped,
            Some(_) => SlotState::Suspended,
        }
    }

    fn decodes(&self, space: AddressSpace) -> bool {
        self.in_d0 && self.enables.of(space)
    }
}

/// What the backend says about a BAR, checked: it may be as hostile as a guest.
fn describe_bar(
    client: &Client,
    bar: u8,
    registers: &Registers,
    slots: &mut dyn FnMut() -> SlotId,
) -> Result<Option<(BarInfo, Option<BarMapping>)>, AttachError> {
    let (region, file) = client.region_info(bar.into())?;
    if region.size == 0 {
        return Ok(None);
    }
    let bad = |reason: &str| AttachError::BadBar { bar, reason: reason.to_owned() };
    if !region.size.is_power_of_two() {
        return Err(bad("its size is no power of two"));
    }
    let mut info = registers.describe(bar, region.size);
    if info.wide && bar == 5 {
        return Err(bad("it is 64 bits wide and has no upper half"));
    }
    let largest = match info.space {
        AddressSpace::Io => 1 << 16,
        AddressSpace::Memory if info.wide => 1 << 63,
        AddressSpace::Memory => 1 << 31,
    };
    if region.size > largest {
        return Err(bad("it is larger than its address space"));
    }
    let whole = region.flags.contains(RegionFlags::MMAP) && region.sparse.is_empty();
    let mapping = match file {
        Some(file) if whole && info.space == AddressSpace::Memory && region.size >= 4096 => {
            let mapping = BarMapping::new(&region, &file, slots());
            Some(mapping.map_err(|failure| bad(&failure.to_string()))?)
        }
        _ => None,
    };
    info.mapped = mapping.is_some();
    Ok(Some((info, mapping)))
}
