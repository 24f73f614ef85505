//! One PCI function.

use super::bar::{Bar, BarIndex, BarKind, BarSet};
use super::capabilities::Capabilities;
use super::capabilities::msi::{MsiOutcome, MsiVectorSet};
use super::capabilities::power::{PowerState, Transition};
use super::command::{Command, Status};
use super::config_space::{ConfigSpace, Register};
use super::effects::{Decode, Effects, MsiEffects, ResetKind};
use super::function_spec::{FunctionSpec, SpecError};
use super::header;
use super::spec::{self, header as at};

/// One PCI function: its configuration space, and what follows from it.
///
/// All that the function knows is in its configuration space, even its pending interrupts. So
/// resetting that resets everything, and no second copy of a bit can disagree with the first.
#[derive(Clone, Debug)]
pub struct Function {
    spec: FunctionSpec,
    capabilities: Capabilities,
    space: ConfigSpace,
    epoch: u64,
}

/// How a request ends for its requester (PCIe 2.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Without a completion: a memory write.
    Posted,
    /// With a completion: a read, or an I/O write.
    NonPosted,
}

impl Function {
    /// A function at power-on.
    ///
    /// # Errors
    /// If no function can be like `spec`: see [`SpecError`].
    pub fn new(spec: FunctionSpec) -> Result<Self, SpecError> {
        spec.validate()?;
        let capabilities = Capabilities::lay_out(&spec);
        let mut registers = header::registers(&spec, capabilities.first());
        registers.extend(capabilities.registers());
        let size =
            if spec.express.is_some() { spec::EXTENDED_CONFIG_SIZE } else { spec::CONFIG_SIZE };
        Ok(Self { spec, capabilities, space: ConfigSpace::new(size, registers), epoch: 0 })
    }

    /// What the function is.
    pub fn spec(&self) -> &FunctionSpec {
        &self.spec
    }

    /// The registers of configuration space, by offset; the rest of it reads 0.
    pub fn registers(&self) -> &[Register] {
        self.space.registers()
    }

    /// Size of configuration space in bytes: 4096 with a PCI Express capability, else 256.
    pub fn config_size(&self) -> usize {
        self.space.size()
    }

    /// Reads configuration space from `offset` on, at any alignment and of any length. Bytes past
    /// its end are all ones.
    pub fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    /// Writes configuration space from `offset` on, at any alignment and of any length. Bytes past
    /// its end are dropped.
    ///
    /// The bytes that `data` leaves out of a register keep their values, as with byte enables. A
    /// write longer than a doubleword is what the bus makes of it: one request per doubleword, in
    /// ascending order.
    pub fn config_write(&mut self, offset: usize, data: &[u8]) -> Effects {
        let before = self.observe();
        let mut events = Events::default();
        let (mut offset, mut rest) = (offset, data);
        while offset < self.config_size() && !rest.is_empty() {
            let (request, later) = rest.split_at(rest.len().min(4 - offset % 4));
            self.write_request(offset, request, &mut events);
            offset += request.len();
            rest = later;
        }
        self.finish(before, events)
    }

    /// One configuration write request: at most a doubleword, and within one.
    fn write_request(&mut self, offset: usize, data: &[u8], events: &mut Events) {
        let power_before = self.power_state();
        self.space.write(offset, data);

        let express = self.capabilities.express;
        if express.is_some_and(|express| express.initiates_flr(offset, data)) {
            return self.reset_space(ResetKind::FunctionLevel, events);
        }
        if let Some(power) = self.capabilities.power
            && power.complete_write(&mut self.space, power_before) == Transition::ContextLost
        {
            return self.reset_space(ResetKind::Soft, events);
        }
        if let Some(msi) = self.capabilities.msi {
            let bus_master = self.bus_master();
            let deliver = msi.take_deliverable(&mut self.space, bus_master);
            events.deliver = events.deliver.union(deliver);
        }
    }

    /// Resets the function: all registers to their power-on values, the INTx pin deasserted.
    ///
    /// Only [`ResetKind::Device`] takes the link down, so the others leave Link Control as it is
    /// (PCIe 6.6.2).
    pub fn reset(&mut self, kind: ResetKind) -> Effects {
        let before = self.observe();
        let mut events = Events::default();
        self.reset_space(kind, &mut events);
        self.finish(before, events)
    }

    fn reset_space(&mut self, kind: ResetKind, events: &mut Events) {
        self.space.reset(kind);
        // A function that was reset sends nothing it had in mind before.
        events.deliver = MsiVectorSet::EMPTY;
        events.reset = events.reset.max(Some(kind));
    }

    /// What the function claims: the Command register's enables, in D0 only (PCIe 5.3.1.4).
    pub fn decode(&self) -> Decode {
        let command = self.command();
        let on = self.power_state() == PowerState::D0;
        Decode {
            memory: on && command.contains(Command::MEMORY_SPACE),
            io: on && command.contains(Command::IO_SPACE),
        }
    }

    /// Whether the function claims the addresses of this BAR. It never does for a BAR it does not
    /// have, nor for the upper half of one.
    pub fn claims(&self, index: BarIndex) -> bool {
        self.bar(index).is_some_and(|bar| match bar.kind {
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => self.decode().memory,
            BarKind::Io => self.decode().io,
        })
    }

    /// The BAR with this index, unless the function has none, or the index is the upper half of
    /// one.
    pub fn bar(&self, index: BarIndex) -> Option<Bar> {
        self.bars().find(|bar| bar.index == index)
    }

    /// The BARs of the function, in the order of its specification.
    pub fn bars(&self) -> impl Iterator<Item = Bar> {
        self.spec.bars.iter().map(|bar| bar.placed(&self.space))
    }

    /// Whether the function may access memory and send messages: Bus Master Enable, in D0 only.
    pub fn bus_master(&self) -> bool {
        self.power_state() == PowerState::D0 && self.command().contains(Command::BUS_MASTER)
    }

    /// The power state. A function without power management is always in D0.
    pub fn power_state(&self) -> PowerState {
        self.capabilities.power.map_or(PowerState::D0, |power| power.state(&self.space))
    }

    /// A counter that moves with every operation that changes what the function claims or where a
    /// BAR is, and with no other.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Records that a request to the function was completed as an Unsupported Request, as far as
    /// it has registers for that.
    ///
    /// In D3hot too (PCIe 5.3.1.4). A conventional function just does not claim the request, and
    /// the initiator's master abort is not its business.
    pub fn record_unsupported_request(&mut self, kind: RequestKind) {
        let Some(express) = self.capabilities.express else { return };
        express.record_unsupported_request(&mut self.space, kind);

        // SERR# Enable stands in for both Unsupported Request and Non-Fatal Error Reporting Enable
        // (PCIe 6.2.5), so with it set, the error message goes out and is noted as sent. An
        // advisory error has no such message.
        if kind == RequestKind::Posted && self.command().contains(Command::SERR_ENABLE) {
            self.set_status(Status::SIGNALED_SYSTEM_ERROR, true);
        }
    }

    /// Asserts or deasserts the function's INTx interrupt. Returns the level of the line if that
    /// changed. Without an interrupt pin, nothing happens.
    pub fn set_intx(&mut self, asserted: bool) -> Option<bool> {
        self.spec.interrupt_pin?;
        let before = self.intx_line();
        self.set_status(Status::INTERRUPT_STATUS, asserted);
        changed(before, self.intx_line())
    }

    /// The level of the INTx line: `true` is asserted.
    ///
    /// The interrupt stays pending, and Interrupt Status set, while Interrupt Disable, a power state
    /// other than D0 or MSI keeps the function from using its pin (PCI 6.2.2 and 6.8.1.3).
    pub fn intx_line(&self) -> bool {
        self.status().contains(Status::INTERRUPT_STATUS)
            && !self.command().contains(Command::INTERRUPT_DISABLE)
            && self.power_state() == PowerState::D0
            && !self.msi_enabled()
    }

    /// Whether software enabled MSI.
    pub fn msi_enabled(&self) -> bool {
        self.capabilities.msi.is_some_and(|msi| msi.enabled(&self.space))
    }

    /// How many MSI vectors the function can use now: those that software granted, at most those
    /// the function asked for, and 0 while MSI is disabled.
    pub fn msi_vectors(&self) -> u8 {
        self.capabilities
            .msi
            .filter(|msi| msi.enabled(&self.space))
            .map_or(0, |msi| msi.granted(&self.space).count())
    }

    /// Raises an MSI interrupt.
    pub fn raise_msi(&mut self, vector: u8) -> MsiOutcome {
        let bus_master = self.bus_master();
        self.capabilities
            .msi
            .map_or(MsiOutcome::Dropped, |msi| msi.raise(&mut self.space, vector, bus_master))
    }

    fn command(&self) -> Command {
        Command::from_bits_retain(self.space.u16_at(at::COMMAND))
    }

    fn status(&self) -> Status {
        Status::from_bits_retain(self.space.u16_at(at::STATUS))
    }

    fn set_status(&mut self, bits: Status, value: bool) {
        let mut status = self.status();
        status.set(bits, value);
        self.space.set_u16(at::STATUS, status.bits());
    }

    fn observe(&self) -> Observed {
        let mut addresses = [0; spec::bar::COUNT];
        for bar in self.bars() {
            addresses[usize::from(bar.index)] = bar.address;
        }
        Observed {
            decode: self.decode(),
            bus_master: self.bus_master(),
            addresses,
            intx: self.intx_line(),
            msi_enabled: self.msi_enabled(),
            power: self.power_state(),
        }
    }

    /// Compares the function with what it was before an operation, and counts the epoch.
    fn finish(&mut self, before: Observed, events: Events) -> Effects {
        // Destructured, so that nothing that can be observed or happen is forgotten here.
        let Observed { decode, bus_master, addresses, intx, msi_enabled, power } = self.observe();
        let Events { deliver, reset } = events;

        let bars_moved: BarSet = BarIndex::ALL
            .into_iter()
            .filter(|&bar| before.addresses[usize::from(bar)] != addresses[usize::from(bar)])
            .collect();
        let effects = Effects {
            decode: changed(before.decode, decode),
            bus_master: changed(before.bus_master, bus_master),
            bars_moved,
            intx: changed(before.intx, intx),
            msi: MsiEffects { enabled: changed(before.msi_enabled, msi_enabled), deliver },
            power: changed(before.power, power),
            reset,
        };
        if effects.decode.is_some() || !effects.bars_moved.is_empty() {
            self.epoch += 1;
        }
        effects
    }
}

/// What the world outside can tell about a function, and acts on when it changes.
struct Observed {
    decode: Decode,
    bus_master: bool,
    addresses: [u64; spec::bar::COUNT],
    intx: bool,
    msi_enabled: bool,
    power: PowerState,
}

/// What happened during an operation and does not show in a comparison.
#[derive(Default)]
struct Events {
    deliver: MsiVectorSet,
    reset: Option<ResetKind>,
}

fn changed<T: PartialEq>(before: T, after: T) -> Option<T> {
    (before != after).then_some(after)
}
