//! The hypercalls as rules, and a virtual processor that executes guest code under them.
//!
//! The rules are those of the kernel's driver (`drivers/hv/mshv_root_main.c`), through which a process
//! makes the calls:
//!
//! - A range that overlaps an earlier one is refused, and nothing of it is mapped. Whether this also
//!   holds for the very same range and host pages is said nowhere: [`SecondMap`] has both.
//! - Host pages that can't be accessed are refused, and nothing is mapped.
//! - A range is removed as it was mapped, in one piece.
//! - Host pages that go away take their guest pages along: the next access is an intercept. The driver
//!   remembers the range, until it is removed.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hypercalls::{CallError, CallErrorKind, Partition, Processor};
use super::message::Message;
use super::policy::{GuestFrame, HostFrame, MapPlan};
use super::recorded::{self, MemoryMessage};
use crate::hypervisor::{
    FaultAccess, GuestAddress, HostMapping, PAGE_SIZE, SlotAccess, VcpuEntry, VcpuExit,
};
use crate::x86::{MAX_INSTRUCTION, Memory, Outcome, PendingInstruction, Ram, Registers};

/// Instructions until a processor gives up waiting for an intercept.
const QUANTUM: usize = 10_000;

/// What the hypervisor says to mapping pages again as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SecondMap {
    Refused,
    Accepted,
}

/// A partition in memory. Clones are the same partition.
#[derive(Debug, Clone)]
pub(super) struct ModelPartition {
    state: Arc<Mutex<State>>,
    hook: Arc<Mutex<Hook>>,
    second_map: SecondMap,
}

/// Called by the next `map_gpa`, before it does anything.
#[derive(Default)]
struct Hook(Option<Box<dyn FnOnce() + Send>>);

#[derive(Debug, Default)]
struct State {
    /// What is mapped in this process, by first frame.
    host: BTreeMap<HostFrame, Arc<HostMapping>>,
    /// What the driver remembers, by first frame.
    ranges: BTreeMap<GuestFrame, MapPlan>,
    /// What the hypervisor maps.
    pages: BTreeMap<GuestFrame, Page>,
    /// Pages of the guest's page tables that are not an identity mapping; `None` is not present.
    page_tables: BTreeMap<u64, Option<u64>>,
    scripted: VecDeque<Message>,
    /// Registers as the adapter or the guest set them last.
    registers: Option<Registers>,
    /// Instruction bytes that a message has.
    code_bytes: usize,
    /// Every call that mapped something.
    maps: Vec<MapPlan>,
    translations: u32,
    unmaps_fail: bool,
}

#[derive(Debug, Clone, Copy)]
struct Page {
    host: HostFrame,
    access: SlotAccess,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hook({})", self.0.is_some())
    }
}

impl ModelPartition {
    pub(super) fn new(second_map: SecondMap) -> ModelPartition {
        let state = State { code_bytes: MAX_INSTRUCTION, ..State::default() };
        let (state, hook) = (Arc::new(Mutex::new(state)), Arc::default());
        ModelPartition { state, hook, second_map }
    }

    /// Memory that this process has; mapping anything else is refused.
    pub(super) fn add_host_memory(&self, memory: &Arc<HostMapping>) {
        self.lock().host.insert(HostFrame::of(memory.host_address()), Arc::clone(memory));
    }

    /// Takes the memory away from the process, and with it from the guest.
    pub(super) fn withdraw(&self, memory: &HostMapping) {
        memory.set_accessible(false).unwrap();
        let first = HostFrame::of(memory.host_address());
        let frames = first.0..first.0 + memory.len() / PAGE_SIZE;
        self.lock().pages.retain(|_, page| !frames.contains(&page.host.0));
    }

    /// Gives the memory back to the process. The guest does not have it by that.
    pub(super) fn restore(&self, memory: &HostMapping) {
        memory.set_accessible(true).unwrap();
    }

    pub(super) fn on_next_map(&self, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = Hook(Some(Box::new(hook)));
    }

    /// Whether the hook was not called yet.
    pub(super) fn has_hook(&self) -> bool {
        self.hook.lock().unwrap_or_else(PoisonError::into_inner).0.is_some()
    }

    /// Has the hypervisor refuse to unmap anything, or no more.
    pub(super) fn fail_unmaps(&self, fail: bool) {
        self.lock().unmaps_fail = fail;
    }

    /// Makes this the message of the next run, whatever the guest would do.
    pub(super) fn script(&self, message: Message) {
        self.lock().scripted.push_back(message);
    }

    /// Has messages carry no more than `count` bytes of the instruction.
    pub(super) fn limit_code_bytes(&self, count: usize) {
        self.lock().code_bytes = count;
    }

    /// Has the guest's page tables map a page elsewhere, or nowhere.
    pub(super) fn translate_page(&self, linear: u64, guest: Option<u64>) {
        self.lock().page_tables.insert(linear, guest);
    }

    pub(super) fn set_registers(&self, registers: Registers) {
        self.lock().registers = Some(registers);
    }

    pub(super) fn registers(&self) -> Registers {
        self.lock().registers.clone().expect("a processor was created")
    }

    /// Guest pages that are mapped, with the host frame of each.
    pub(super) fn mapped_pages(&self) -> Vec<(u64, u64)> {
        self.lock().pages.iter().map(|(guest, page)| (guest.0, page.host.0)).collect()
    }

    /// Ranges that the driver remembers.
    pub(super) fn ranges(&self) -> usize {
        self.lock().ranges.len()
    }

    /// Every call that mapped something.
    pub(super) fn maps(&self) -> Vec<MapPlan> {
        self.lock().maps.clone()
    }

    pub(super) fn translations(&self) -> u32 {
        self.lock().translations
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn host_page(&self, frame: HostFrame) -> Option<Ram<'_>> {
        let (first, memory) = self.host.range(..=frame).next_back()?;
        let offset = (frame.0 - first.0) * PAGE_SIZE;
        (offset < memory.len()).then_some(Ram { memory, offset })
    }

    fn is_accessible(&self, frame: HostFrame) -> bool {
        self.host_page(frame).is_some_and(|ram| ram.memory.read(ram.offset, &mut [0]).is_ok())
    }

    fn map(&mut self, plan: MapPlan, access: SlotAccess, second: SecondMap) -> CallResult {
        let same = self.ranges.get(&plan.guest) == Some(&plan)
            && self.pages.get(&plan.guest).is_some_and(|page| page.access == access);
        let overlaps = self.ranges.values().any(|range| {
            range.guest.0 < plan.guest.0 + plan.pages && plan.guest.0 < range.guest.0 + range.pages
        });
        if overlaps && !(same && second == SecondMap::Accepted) {
            return Err(CallErrorKind::Mapped);
        }
        if !(0..plan.pages).all(|page| self.is_accessible(HostFrame(plan.host.0 + page))) {
            return Err(CallErrorKind::NoBacking);
        }
        for page in 0..plan.pages {
            let host = HostFrame(plan.host.0 + page);
            self.pages.insert(GuestFrame(plan.guest.0 + page), Page { host, access });
        }
        self.ranges.insert(plan.guest, plan);
        self.maps.push(plan);
        Ok(())
    }

    fn unmap(&mut self, plan: MapPlan) -> CallResult {
        if self.unmaps_fail {
            return Err(CallErrorKind::Other(io::ErrorKind::Other.into()));
        }
        let containing = self.ranges.values().find(|range| range.contains(plan.guest));
        match containing {
            None => Err(CallErrorKind::NotMapped),
            Some(range) if *range != plan => {
                Err(CallErrorKind::Other(io::ErrorKind::InvalidInput.into()))
            }
            Some(_) => {
                self.ranges.remove(&plan.guest);
                self.pages.retain(|guest, _| !plan.contains(*guest));
                Ok(())
            }
        }
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        let page = linear & !(PAGE_SIZE - 1);
        let guest = self.page_tables.get(&page).copied().unwrap_or(Some(page))?;
        Some(guest | (linear % PAGE_SIZE))
    }

    fn fetch(&self, rip: u64) -> Result<([u8; MAX_INSTRUCTION], usize), u64> {
        let mut bytes = [0; MAX_INSTRUCTION];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let address = self.translate(rip + at as u64).ok_or(rip)?;
            let ram = self.ram(GuestAddress(address), false);
            let Some(Ram { memory, offset }) = ram else {
                return if at == 0 { Err(address) } else { Ok((bytes, at)) };
            };
            memory.read(offset, std::slice::from_mut(byte)).expect("mapped pages are accessible");
        }
        Ok((bytes, MAX_INSTRUCTION))
    }

    fn ram(&self, address: GuestAddress, write: bool) -> Option<Ram<'_>> {
        let page = self.pages.get(&GuestFrame::of(address.0))?;
        let takes = !write || page.access == SlotAccess::ReadWrite;
        let Ram { memory, offset } = self.host_page(page.host)?;
        takes.then_some(Ram { memory, offset: offset + address.0 % PAGE_SIZE })
    }
}

type CallResult = Result<(), CallErrorKind>;

impl Partition for ModelPartition {
    type Processor = ModelProcessor;

    fn map_gpa(&self, plan: MapPlan, access: SlotAccess) -> Result<(), CallError> {
        let hook = std::mem::take(&mut *self.hook.lock().unwrap_or_else(PoisonError::into_inner));
        if let Hook(Some(hook)) = hook {
            hook();
        }
        let result = self.lock().map(plan, access, self.second_map);
        result.map_err(|kind| CallError { call: "map", kind })
    }

    fn unmap_gpa(&self, plan: MapPlan) -> Result<(), CallError> {
        self.lock().unmap(plan).map_err(|kind| CallError { call: "unmap", kind })
    }

    fn create_processor(&self, _index: u32) -> Result<ModelProcessor, CallError> {
        Ok(ModelProcessor { partition: self.clone(), registers: Registers::new(0) })
    }
}

/// A processor that executes what it finds in mapped memory.
pub(super) struct ModelProcessor {
    partition: ModelPartition,
    registers: Registers,
}

impl ModelProcessor {
    /// Executes one instruction, or says why not.
    fn execute(&mut self) -> Option<Message> {
        let mut memory = ModelMemory { state: self.partition.lock(), last: None };
        let rip = self.registers.rip;
        let (bytes, len) = match memory.state.fetch(rip) {
            Ok(fetched) => fetched,
            Err(address) => {
                let message = MemoryMessage {
                    kind: recorded::UNMAPPED,
                    gva: Some(rip),
                    gpa: Some(address),
                    access: FaultAccess::Execute,
                    rip,
                    code: &[],
                };
                return Some(message.build());
            }
        };
        let mut instruction =
            PendingInstruction::new(self.registers.clone(), &bytes[..len]).expect("test code");
        let outcome = instruction.attempt(&mut memory).expect("test code");
        let code = &bytes[..len.min(memory.state.code_bytes)];
        let message = match outcome {
            Outcome::Retired | Outcome::Halted => {
                self.registers = instruction.registers().clone();
                memory.state.registers = Some(self.registers.clone());
                let halt = mshv_bindings::hv_message_type_HVMSG_X64_HALT;
                return (outcome == Outcome::Halted).then(|| recorded::bare_message(halt));
            }
            Outcome::Exit => {
                let (address, access) = match instruction.exit().expect("it stopped at one") {
                    VcpuExit::MmioRead { address, .. } => (address, FaultAccess::Read),
                    VcpuExit::MmioWrite { address, .. } => (address, FaultAccess::Write),
                    VcpuExit::PioRead { port, width, .. } => {
                        let width = u8::try_from(width).expect("of a port");
                        return Some(recorded::port_message(port, width, false, rip, code));
                    }
                    VcpuExit::PioWrite { port, width, .. } => {
                        let width = u8::try_from(width).expect("of a port");
                        return Some(recorded::port_message(port, width, true, rip, code));
                    }
                    other => panic!("{other}"),
                };
                let mapped = memory.state.pages.contains_key(&GuestFrame::of(address.0));
                let kind = if mapped { recorded::DENIED } else { recorded::UNMAPPED };
                MemoryMessage { kind, gva: memory.last, gpa: Some(address.0), access, rip, code }
            }
            other => panic!("{other:?} at {rip:#x}"),
        };
        Some(message.build())
    }
}

impl Processor for ModelProcessor {
    fn run(&mut self) -> Result<Message, CallError> {
        if let Some(message) = self.partition.lock().scripted.pop_front() {
            return Ok(message);
        }
        let message = (0..QUANTUM).find_map(|_| self.execute());
        Ok(message.unwrap_or_else(|| recorded::bare_message(0)))
    }

    fn registers(&self) -> Result<Registers, CallError> {
        Ok(Registers { vectors: None, ..self.registers.clone() })
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), CallError> {
        self.registers = Registers { vectors: Some(Arc::default()), ..registers.clone() };
        self.partition.lock().registers = Some(self.registers.clone());
        Ok(())
    }

    fn enter_long_mode(&mut self, entry: &VcpuEntry) -> Result<(), CallError> {
        let mut registers = self.partition.lock().registers.take().unwrap_or(Registers::new(0));
        registers.rip = entry.rip;
        self.set_registers(&registers)
    }

    fn translate(&self, gva: u64, _: FaultAccess) -> Result<Option<GuestAddress>, CallError> {
        let mut state = self.partition.lock();
        state.translations += 1;
        Ok(state.translate(gva).map(GuestAddress))
    }
}

/// Guest memory while the hypervisor executes an instruction: nothing is unmapped meanwhile.
struct ModelMemory<'a> {
    state: MutexGuard<'a, State>,
    /// Linear address of the last access.
    last: Option<u64>,
}

impl Memory for ModelMemory<'_> {
    fn translate(&mut self, linear: u64, _write: bool) -> Option<GuestAddress> {
        self.last = Some(linear);
        self.state.translate(linear).map(GuestAddress)
    }

    fn ram(&self, address: GuestAddress, write: bool) -> Option<Ram<'_>> {
        self.state.ram(address, write)
    }
}

#[cfg(test)]
mod tests;
