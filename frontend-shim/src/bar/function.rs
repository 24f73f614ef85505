use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use barkeep_protocol::wire::{
    DeviceFlags, FaultAccess, FaultReport, FaultVerdict, PciRegion, RegionFlags,
};
use thiserror::Error;
use tracing::{error, warn};

use super::mapping::BarMapping;
use super::table::{AddressSpace, BarWindow, WindowTable};
use crate::client::{Client, ClientError};
use crate::fault::{SlotState, Verdict, decide};
use crate::hypervisor::{GuestAddress, Hypervisor, SlotId};

mod config;

use config::{Capabilities, ConfigChange, Registers};

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
    registers: Registers,
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
        let state = State { mappings, registers, memory_clears: 0 };
        let function = Self {
            index,
            client,
            bars,
            capabilities,
            suspend_order,
            windows,
            state: Mutex::new(state),
        };
        function.publish(&function.lock());
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

    /// Reads configuration space. A backend that does not answer reads as all ones, like a function
    /// that is not there.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        let region = PciRegion::Config.index();
        if let Err(error) = self.client.region_read(region, offset.into(), data) {
            data.fill(0xff);
            self.report("configuration read", &error);
        }
    }

    /// Writes configuration space, and follows what the write does to the BARs: memory slots are
    /// gone before a write that stops decode is forwarded, and back before one that starts it
    /// returns.
    pub fn config_write(&self, hypervisor: &dyn Hypervisor, offset: u16, data: &[u8]) {
        // Held across the request: a fault on another vCPU waits until slots and decode agree.
        let mut state = self.lock();
        match self.capabilities.change(offset, data) {
            ConfigChange::Unrelated => self.forward(hypervisor, &mut state, offset, data),
            ConfigChange::Command { memory: false, io } => {
                self.disable_memory(hypervisor, &mut state, offset, data);
                state.registers.set_command(false, io);
                self.publish(&state);
            }
            ConfigChange::Command { memory: true, io } => {
                self.forward(hypervisor, &mut state, offset, data);
                if state.mappings.iter().all(Option::is_none) {
                    state.registers.set_command(true, io);
                    self.publish(&state);
                } else {
                    self.synchronise(hypervisor, &mut state);
                }
            }
            ConfigChange::Reconfigures => {
                self.suspend_all(hypervisor, &mut state);
                self.forward(hypervisor, &mut state, offset, data);
                self.synchronise(hypervisor, &mut state);
            }
        }
    }

    /// Reads from a BAR. Where no live backend answers, `data` is all ones: an Unsupported Request.
    pub fn bar_read(&self, hypervisor: &dyn Hypervisor, bar: u8, offset: u64, data: &mut [u8]) {
        if let Err(error) = self.client.region_read(bar.into(), offset, data) {
            data.fill(0xff);
            self.failed(hypervisor, "read", &error);
        }
    }

    /// Writes to a BAR. Where no live backend takes it, the write is dropped.
    pub fn bar_write(&self, hypervisor: &dyn Hypervisor, bar: u8, offset: u64, data: &[u8]) {
        if let Err(error) = self.client.region_write(bar.into(), offset, data) {
            self.failed(hypervisor, "write", &error);
        }
    }

    /// Resolves a memory fault in one of our windows.
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
        let slot = state.slot(bar);
        if self.client.is_dead() {
            // Not only this BAR: nothing of a dead function may stay mapped.
            self.suspend_all(hypervisor, &mut state);
        }
        let verdict = decide(answer, slot);
        let outcome = match verdict {
            Verdict::UnsupportedRequest => state.suspend(hypervisor, bar),
            Verdict::Map | Verdict::Relax => state.map(hypervisor, self, bar),
            Verdict::Retry | Verdict::NotMine => Ok(()),
        };
        if let Err(failure) = outcome {
            error!(function = self.index, bar, "memory slot: {failure}");
        }
        verdict
    }

    /// Resolves a memory fault of unknown address: makes every slot of the function agree with what
    /// the backend says now.
    pub fn recheck(&self, hypervisor: &dyn Hypervisor) {
        let mut state = self.lock();
        self.synchronise(hypervisor, &mut state);
    }

    /// Whether any BAR is mapped directly, so that a memory fault could be about this function.
    #[must_use]
    pub fn has_mapped_bars(&self) -> bool {
        self.bars.iter().any(|bar| bar.mapped)
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
            state.set_backing(false);
            self.forward(hypervisor, state, offset, data);
            self.suspend_all(hypervisor, state);
        } else {
            self.suspend_all(hypervisor, state);
            self.forward(hypervisor, state, offset, data);
        }
    }

    fn forward(&self, hypervisor: &dyn Hypervisor, state: &mut State, offset: u16, data: &[u8]) {
        let region = PciRegion::Config.index();
        if let Err(error) = self.client.region_write(region, offset.into(), data) {
            self.report("configuration write", &error);
            if error.ends_session() {
                self.suspend_all(hypervisor, state);
            }
        }
    }

    /// Reads decode and addresses back from the function and maps, moves or suspends accordingly.
    fn synchronise(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        let registers = Registers::read(&self.client)
            .and_then(|registers| Ok((registers, self.capabilities.in_d0(&self.client)?)));
        match registers {
            Ok((registers, in_d0)) => {
                state.registers = registers;
                if !in_d0 {
                    state.registers.set_command(false, false);
                }
            }
            Err(error) => {
                self.report("configuration read", &error);
                state.registers.set_command(false, false);
            }
        }
        for info in &self.bars {
            let outcome = if state.registers.memory() {
                state.map(hypervisor, self, info.bar)
            } else {
                state.suspend(hypervisor, info.bar)
            };
            // Without its slot the BAR works all the same, trapped: slower, and never wrong. A guest
            // can cause this at will by placing a BAR over RAM.
            if let Err(failure) = outcome {
                tracing::debug!(function = self.index, bar = info.bar, "not mapped: {failure}");
            }
        }
        self.publish(state);
    }

    fn suspend_all(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        for info in &self.bars {
            if let Err(failure) = state.suspend(hypervisor, info.bar) {
                error!(function = self.index, bar = info.bar, "can't suspend: {failure}");
            }
        }
    }

    /// What a barkeep backend would answer to a memory fault, from the registers of one that does
    /// not know the question.
    fn ask_plainly(&self, state: &State, bar: u8) -> Option<FaultVerdict> {
        let registers = Registers::read(&self.client).ok()?;
        let decodes = registers.memory() && self.capabilities.in_d0(&self.client).ok()?;
        Some(match (decodes, &state.mappings[usize::from(bar)]) {
            (false, _) => FaultVerdict::UnsupportedRequest { epoch: 0 },
            (true, Some(_)) => FaultVerdict::Map { epoch: 0 },
            (true, None) => FaultVerdict::Trap { epoch: 0 },
        })
    }

    fn publish(&self, state: &State) {
        let window = |info: &BarInfo| {
            let (space, decodes) = match info.space {
                AddressSpace::Memory => (AddressSpace::Memory, state.registers.memory()),
                AddressSpace::Io => (AddressSpace::Io, state.registers.io()),
            };
            let start = state.registers.bar_address(info);
            // An address that wraps is nothing that a bus could route.
            start.checked_add(info.size - 1)?;
            let function = self.index;
            Some(BarWindow { space, start, len: info.size, function, bar: info.bar, decodes })
        };
        self.windows.publish(self.index, self.bars.iter().filter_map(window).collect());
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
        match error {
            ClientError::Gone if self.client.is_dead() => {
                tracing::debug!(%socket, "{what}: {error}");
            }
            error if error.ends_session() => warn!(%socket, "{what}: {error}"),
            error => tracing::debug!(%socket, "{what}: {error}"),
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
            Some(mapping) if mapping.is_mapped() => SlotState::Mapped,
            Some(_) => SlotState::Suspended,
        }
    }

    fn map(
        &mut self,
        hypervisor: &dyn Hypervisor,
        function: &AttachedFunction,
        bar: u8,
    ) -> Result<(), String> {
        let Some(mapping) = &mut self.mappings[usize::from(bar)] else { return Ok(()) };
        let Some(info) = function.bars.iter().find(|info| info.bar == bar) else { return Ok(()) };
        let address = self.registers.bar_address(info);
        mapping.set_backing(true).map_err(|failure| failure.to_string())?;
        mapping.map(hypervisor, GuestAddress(address)).map_err(|failure| failure.to_string())
    }

    fn suspend(&mut self, hypervisor: &dyn Hypervisor, bar: u8) -> Result<(), String> {
        match &mut self.mappings[usize::from(bar)] {
            Some(mapping) => mapping.suspend(hypervisor).map_err(|failure| failure.to_string()),
            None => Ok(()),
        }
    }

    fn set_backing(&self, accessible: bool) {
        for mapping in self.mappings.iter().flatten() {
            if let Err(failure) = mapping.set_backing(accessible) {
                error!("mprotect: {failure}");
            }
        }
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
