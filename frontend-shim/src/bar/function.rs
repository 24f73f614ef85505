use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use barkeep_protocol::wire::{self, DeviceFlags, FaultReport, FaultVerdict, PciRegion};
use tracing::warn;

use super::doorbells::Doorbells;
use super::mapping::BarMapping;
use super::{AddressSpace, Backend};
use crate::client::{Client, ClientError, DeadBackend};
use crate::fault::{BarTarget, FaultAccess, SlotState, Verdict, WindowTable, decide};
use crate::hypervisor::{GuestAddress, Hypervisor, SlotId};
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering, lock};

mod accesses;
mod attach;
mod config;
mod identity;
mod resume;
mod session;
mod slots;
mod tracking;

pub use attach::{AttachError, BarInfo};
pub use resume::ReconnectError;
pub use session::Outages;
pub use tracking::TrackingError;

use config::{Capabilities, Enables, GuestBars, Registers};
use identity::Identity;
use session::Sessions;

/// A function in a backend process, attached to a VM: its BARs lie in the guest's address space, and
/// those that the backend shares are mapped while the function decodes.
#[derive(Debug)]
pub struct AttachedFunction<B = Client> {
    index: usize,
    sessions: Sessions<B>,
    /// Of functions that may be reconnected.
    identity: Option<Identity>,
    bars: Vec<BarInfo>,
    capabilities: Capabilities,
    suspend_order: SuspendOrder,
    windows: Arc<WindowTable>,
    state: Mutex<State>,
    /// Moves with every slot that comes or goes: what a fault may have been about has changed.
    changes: AtomicU64,
    /// Moves when writes become protected again: a fault on them is a new one.
    protections: AtomicU64,
    /// Of the function, as last heard.
    epoch: AtomicU64,
    /// Somebody else stopped decode, as last heard, although the guest wants it. The BARs get their
    /// slots back when one answers again.
    lost: AtomicBool,
    /// Some BAR's writes may be tracked, so that forwarded ones count.
    tracks_writes: AtomicBool,
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
    /// The first two in turn.
    Alternate,
    /// The memory becomes inaccessible and its slots stay, until an access faults: as if somebody
    /// else had stopped decode. For tests of the fault path.
    FaultsOnly,
}

#[derive(Debug)]
struct State {
    /// By BAR number; `None` for those that are trapped.
    mappings: [Option<BarMapping>; 6],
    /// By BAR number; none for those of I/O space.
    doorbells: [Doorbells; 6],
    /// Where the guest has put the BARs.
    placed: GuestBars,
    /// What the function claims, as far as this side knows.
    enables: Enables,
    /// What the guest wrote last into the Command register.
    wanted: Enables,
    /// Whether it is in D0; in D3hot the Command register has no effect.
    in_d0: bool,
    memory_clears: u64,
    /// Calls for a quarantine that changed nothing.
    vain_quarantines: u32,
}

/// How many vCPUs may ask for a quarantine after the one that got it. More are faults that no BAR
/// causes.
const VAIN_QUARANTINES: u32 = 64;

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

    /// The connection of the last session, for what has nothing to do with BARs: DMA windows,
    /// interrupts, counters. Another one may take its place, so it is not for keeping.
    #[must_use]
    pub fn client(&self) -> Arc<Client> {
        self.backend()
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
        let doorbells = attach::find_doorbells(&backend, &bars)?;
        let state = State {
            mappings,
            doorbells,
            placed: GuestBars::default(),
            enables: Enables::default(),
            wanted: Enables::default(),
            in_d0: true,
            memory_clears: 0,
            vain_quarantines: 0,
        };
        let function = Self {
            index,
            sessions: Sessions::new(backend, DeadBackend::default()),
            identity: None,
            bars,
            capabilities,
            suspend_order,
            windows,
            state: Mutex::new(state),
            changes: AtomicU64::new(0),
            protections: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            tracks_writes: AtomicBool::new(false),
        };
        function.publish(&function.lock(), |_| true);
        Ok(function)
    }

    /// Says what becomes of accesses while the backend is gone. To be said before any is made.
    #[must_use]
    pub fn with_dead_backend(self, dead_backend: DeadBackend) -> Self {
        Self { sessions: self.sessions.with_dead_backend(dead_backend), ..self }
    }

    /// Whoever owns the function, in the last session.
    #[must_use]
    pub fn backend(&self) -> Arc<B> {
        Arc::clone(&self.session().backend)
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

    /// A counter that moves when a slot comes or goes, writes are to be tracked anew, or the backend
    /// tells of another epoch.
    #[must_use]
    pub fn progress(&self) -> u64 {
        let protections = self.protections.load(Ordering::Relaxed);
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.slot_changes().wrapping_add(protections).wrapping_add(epoch)
    }

    /// Resets the function, as a VMM does when its machine is reset.
    ///
    /// # Errors
    /// [`ClientError`] when the backend did not; its BARs are not mapped then.
    pub fn reset(&self, hypervisor: &dyn Hypervisor) -> Result<(), ClientError> {
        let mut state = self.lock();
        self.suspend_all(hypervisor, &mut state);
        state.wanted = Enables::default();
        let session = self.session();
        let result = session.backend.reset();
        if let Err(error) = &result {
            self.report(&session, "reset", error);
        }
        self.synchronise_after_reset(hypervisor, &mut state);
        result
    }

    /// Starts to track the guest's writes to a mapped BAR, as migration does: its memory is
    /// write-protected, and the first write to each part faults, is noted and relaxes that part.
    /// Forwarded writes are noted too, decoding or not.
    ///
    /// # Errors
    /// [`TrackingError::Trapped`] for a BAR without memory, [`TrackingError::Host`] where the host
    /// can't change protections.
    pub fn track_writes(&self, bar: u8) -> Result<(), TrackingError> {
        let mut state = self.lock();
        // First the flag: a forwarded write that does not see it yet comes before the tracking.
        self.tracks_writes.store(true, Ordering::Relaxed);
        self.protections.fetch_add(1, Ordering::Relaxed);
        Ok(state.mapping(bar)?.track_writes()?)
    }

    /// Ends tracking.
    ///
    /// # Errors
    /// As for [`track_writes`](Self::track_writes).
    pub fn stop_tracking_writes(&self, bar: u8) -> Result<(), TrackingError> {
        Ok(self.lock().mapping(bar)?.stop_tracking()?)
    }

    /// The parts of a BAR, as byte ranges of whole pages, that the guest wrote since tracking began or
    /// this was asked last. A part has at least 4 KiB and at least a 1024th of the BAR.
    ///
    /// # Errors
    /// As for [`track_writes`](Self::track_writes), and [`TrackingError::NotTracked`].
    pub fn take_written(&self, bar: u8) -> Result<Vec<Range<u64>>, TrackingError> {
        let mut state = self.lock();
        self.protections.fetch_add(1, Ordering::Relaxed);
        state.mapping(bar)?.take_written()?.ok_or(TrackingError::NotTracked)
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
                if !self.relax(&mut state, target) {
                    self.suspend(hypervisor, &mut state, bar);
                    return Verdict::Retry;
                }
            }
            Verdict::Retry | Verdict::NotMine => {}
        }
        verdict
    }

    /// Resolves a memory fault of unknown address as far as it can be about this function: its slots
    /// agree with what the backend says now, and no write is refused for being tracked.
    pub fn unlocated_fault(&self, hypervisor: &dyn Hypervisor) {
        let mut state = self.lock();
        self.synchronise(hypervisor, &mut state);
        self.note_writes_anywhere(hypervisor, &mut state);
    }

    /// Makes every slot of the function agree with what the backend says now: for one that answers
    /// again.
    pub fn recheck(&self, hypervisor: &dyn Hypervisor) {
        let mut state = self.lock();
        self.synchronise(hypervisor, &mut state);
    }

    /// Gives up on mapping a BAR for the rest of the session: it goes on trapped. For one whose
    /// memory faults again and again although its backend says that it may be mapped. `false` if
    /// that can't help: it is not mapped, and has not been for long.
    pub fn quarantine(&self, hypervisor: &dyn Hypervisor, bar: u8) -> bool {
        let mut state = self.lock();
        if self.suspend(hypervisor, &mut state, bar)
            && state.mappings[usize::from(bar)].as_mut().is_some_and(BarMapping::quarantine)
        {
            let socket = self.backend().name();
            warn!(%socket, bar, "its memory faults without end: not mapped any more");
            return true;
        }
        // Another vCPU may have been first, or the slot may go at the next attempt.
        state.vain_quarantines = state.vain_quarantines.saturating_add(1);
        state.vain_quarantines <= VAIN_QUARANTINES
    }

    /// Takes every memory slot of the function away.
    pub fn detach(&self, hypervisor: &dyn Hypervisor) {
        self.suspend_all(hypervisor, &mut self.lock());
    }

    /// Asks the backend about a fault; `None` if it is dead.
    fn ask_about(&self, state: &mut State, target: &BarTarget) -> Option<FaultVerdict> {
        let report = FaultReport {
            region: target.bar.into(),
            access: wire_access(target.access.kind),
            offset: target.offset,
            size: target.access.size,
        };
        let session = self.session();
        match session.backend.memory_fault(&report) {
            Ok(answer) => Some(answer),
            Err(ClientError::NotOffered(_)) => self.ask_plainly(state, target.bar),
            Err(error) => {
                self.report(&session, "memory fault", &error);
                None
            }
        }
    }

    /// What a barkeep backend would answer to a memory fault, from the registers of one that does
    /// not know the question.
    fn ask_plainly(&self, state: &mut State, bar: u8) -> Option<FaultVerdict> {
        let (registers, in_d0) = self.ask_registers().ok()?;
        (state.enables, state.in_d0) = (registers.enables(), in_d0);
        let agreeing = self.agreeing(state, Some(&registers));
        let decodes = state.decodes(AddressSpace::Memory) && agreeing.contains(&bar);
        if !decodes {
            self.note_lost(state, true);
        }
        self.publish(state, |bar| agreeing.contains(&bar));
        Some(match (decodes, &state.mappings[usize::from(bar)]) {
            (false, _) => FaultVerdict::UnsupportedRequest { epoch: 0 },
            (true, Some(_)) => FaultVerdict::Map { epoch: 0 },
            (true, None) => FaultVerdict::Trap { epoch: 0 },
        })
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
