//! One PCI function.

use super::bar::{Bar, BarIndex, BarKind, BarSet};
use super::capabilities::Capabilities;
use super::capabilities::msi::MsiVectorSet;
use super::capabilities::msix::{MsixStructures, MsixVectorSet};
use super::capabilities::power::{PowerState, Transition};
use super::command::{Command, Status};
use super::config_space::{ConfigSpace, Register};
use super::effects::{Decode, Effects, MsiEffects, MsixEffects, ResetKind};
use super::function_spec::{Decoding, FunctionSpec, SpecError};
use super::header;
use super::rom::Rom;
use super::spec::{self, header as at};

mod bars;
mod errors;
mod interrupts;
mod state;
mod window;

/// One PCI function: its configuration space, and what follows from it.
///
/// All that the function knows is in its configuration space and, with MSI-X, in its table and
/// pending bits. So resetting those resets everything, and no second copy of a bit can disagree
/// with the first.
#[derive(Clone, Debug)]
pub struct Function {
    spec: FunctionSpec,
    capabilities: Capabilities,
    space: ConfigSpace,
    msix: Option<MsixStructures>,
    epoch: u64,
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
        registers.extend(capabilities.registers(&spec));
        let size =
            if spec.express.is_some() { spec::EXTENDED_CONFIG_SIZE } else { spec::CONFIG_SIZE };
        let msix = capabilities.msix.map(|msix| msix.structures());
        Ok(Self { spec, capabilities, space: ConfigSpace::new(size, registers), msix, epoch: 0 })
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
        self.take_deliverable(events);
    }

    /// Completes a write that may have let pending messages out.
    fn take_deliverable(&mut self, events: &mut Events) {
        let (msi_can_send, msix_can_send) = (self.can_send_msi(), self.can_send_msix());
        if let Some(msi) = self.capabilities.msi {
            let deliver = msi.take_deliverable(&mut self.space, msi_can_send);
            events.msi = events.msi.union(deliver);
        }
        if msix_can_send && let Some(msix) = &mut self.msix {
            events.msix.extend(&msix.take_deliverable());
        }
    }

    /// Resets the function: all registers to their power-on values, the INTx pin deasserted.
    ///
    /// A soft and a function level reset leave alone what belongs to the link (PCIe 6.6.2), and only
    /// [`ResetKind::Device`] touches sticky bits (PCIe 7.4).
    pub fn reset(&mut self, kind: ResetKind) -> Effects {
        let before = self.observe();
        let mut events = Events::default();
        self.reset_space(kind, &mut events);
        self.finish(before, events)
    }

    fn reset_space(&mut self, kind: ResetKind, events: &mut Events) {
        self.space.reset(kind);
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        // A function that was reset sends nothing it had in mind before.
        events.msi = MsiVectorSet::EMPTY;
        events.msix = MsixVectorSet::EMPTY;
        events.reset = events.reset.max(Some(kind));
    }

    /// What the function claims: the enables of its Command register, unless
    /// [`Decoding::Always`] stands in for them, and in D0 only (PCIe 5.3.1.4). The expansion ROM
    /// needs its own enable as well (PCI 6.2.5.2).
    pub fn decode(&self) -> Decode {
        let memory = self.enabled(Command::MEMORY_SPACE);
        Decode {
            memory,
            io: self.enabled(Command::IO_SPACE),
            rom: memory && self.rom().is_some_and(|rom| rom.enabled),
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

    /// The expansion ROM, if the function has one.
    pub fn rom(&self) -> Option<Rom> {
        self.spec.rom.map(|rom| rom.placed(&self.space))
    }

    /// Whether the function claims the addresses of its expansion ROM.
    pub fn claims_rom(&self) -> bool {
        self.decode().rom
    }

    /// Whether the function may access memory and send messages: Bus Master Enable, unless
    /// [`Decoding::Always`] stands in for it, and in D0 only.
    pub fn bus_master(&self) -> bool {
        self.enabled(Command::BUS_MASTER)
    }

    /// Whether an enable of the Command register is in force.
    fn enabled(&self, enable: Command) -> bool {
        self.power_state() == PowerState::D0
            && match self.spec.decode {
                Decoding::Strict => self.command().contains(enable),
                Decoding::Always => Command::writable(&self.spec).contains(enable),
            }
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
            rom: self.rom().map(|rom| rom.address),
            intx: self.intx_line(),
            msi_enabled: self.msi_enabled(),
            msix_enabled: self.msix_enabled(),
            power: self.power_state(),
        }
    }

    /// Compares the function with what it was before an operation, and counts the epoch.
    fn finish(&mut self, before: Observed, events: Events) -> Effects {
        // Destructured, so that nothing that can be observed or happen is forgotten here.
        let Observed { decode, bus_master, addresses, rom, intx, msi_enabled, msix_enabled, power } =
            self.observe();
        let Events { msi, msix, reset } = events;

        let bars_moved: BarSet = BarIndex::ALL
            .into_iter()
            .filter(|&bar| before.addresses[usize::from(bar)] != addresses[usize::from(bar)])
            .collect();
        let effects = Effects {
            decode: changed(before.decode, decode),
            bus_master: changed(before.bus_master, bus_master),
            bars_moved,
            rom_moved: before.rom != rom,
            intx: changed(before.intx, intx),
            msi: MsiEffects { enabled: changed(before.msi_enabled, msi_enabled), deliver: msi },
            msix: MsixEffects {
                enabled: changed(before.msix_enabled, msix_enabled),
                deliver: msix,
            },
            power: changed(before.power, power),
            reset,
        };
        if effects.decode.is_some() || !effects.bars_moved.is_empty() || effects.rom_moved {
            // A restored state can hold any number.
            self.epoch = self.epoch.wrapping_add(1);
        }
        effects
    }
}

/// What the world outside can tell about a function, and acts on when it changes.
struct Observed {
    decode: Decode,
    bus_master: bool,
    addresses: [u64; spec::bar::COUNT],
    rom: Option<u32>,
    intx: bool,
    msi_enabled: bool,
    msix_enabled: bool,
    power: PowerState,
}

/// What happened during an operation and does not show in a comparison.
#[derive(Default)]
struct Events {
    msi: MsiVectorSet,
    msix: MsixVectorSet,
    reset: Option<ResetKind>,
}

fn changed<T: PartialEq>(before: T, after: T) -> Option<T> {
    (before != after).then_some(after)
}
