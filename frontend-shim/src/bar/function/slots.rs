//! Memory slots, and how they follow what the function says.

use tracing::debug;

use super::config::{Enables, Registers};
use super::{AttachedFunction, BarInfo, State};
use crate::bar::mapping::{BarMapping, MappingError};
use crate::bar::{AddressSpace, Backend, BarWindow};
use crate::client::ClientError;
use crate::fault::{BarTarget, FaultAccess, GuestAccess, SlotState};
use crate::hypervisor::{GuestAddress, Hypervisor};
use crate::sync::Ordering;

impl<B: Backend> AttachedFunction<B> {
    /// Reads decode back from the function; suspends what does not decode, and maps what does where
    /// the guest has put it.
    pub(super) fn synchronise(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        let registers = self.update(state);
        self.follow(hypervisor, state, registers.as_ref());
    }

    /// The same after what may have been a reset by the guest or the VMM, which takes the BARs away.
    /// One by somebody else does not: its driver may restore them, and the guest never knows.
    pub(super) fn synchronise_after_reset(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        let registers = self.update(state);
        for info in &self.bars {
            if registers.as_ref().is_some_and(|registers| registers.address(info) == 0) {
                state.placed.clear(info);
            }
        }
        self.follow(hypervisor, state, registers.as_ref());
    }

    fn update(&self, state: &mut State) -> Option<Registers> {
        let session = self.session();
        match self.ask_registers() {
            Ok((registers, in_d0)) => {
                state.enables = registers.enables();
                state.in_d0 = in_d0;
                Some(registers)
            }
            Err(error) => {
                self.report(&session, "configuration read", &error);
                state.enables = Enables::default();
                None
            }
        }
    }

    fn follow(
        &self,
        hypervisor: &dyn Hypervisor,
        state: &mut State,
        registers: Option<&Registers>,
    ) {
        let agreeing = self.agreeing(state, registers);
        let mut in_memory = self.bars.iter().filter(|info| info.space == AddressSpace::Memory);
        let stopped = !state.decodes(AddressSpace::Memory)
            || !in_memory.all(|info| agreeing.contains(&info.bar));
        if stopped {
            // Before anybody can see a window that does not decode.
            self.note_lost(state, true);
        }
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
        self.note_lost(state, stopped);
    }

    /// The BARs that are where the guest has put them. A backend that names another address does not
    /// decode there.
    pub(super) fn agreeing(&self, state: &State, registers: Option<&Registers>) -> Vec<u8> {
        let Some(registers) = registers else { return Vec::new() };
        let agrees = |info: &&BarInfo| registers.address(info) == state.placed.address(info);
        self.bars.iter().filter(agrees).map(|info| info.bar).collect()
    }

    /// Command and BARs, and whether the function is in D0.
    pub(super) fn ask_registers(&self) -> Result<(Registers, bool), ClientError> {
        let backend = &*self.backend();
        Ok((Registers::read(backend)?, self.capabilities.in_d0(backend)?))
    }

    /// Remembers whether somebody else `stopped` decode that the guest wants.
    pub(super) fn note_lost(&self, state: &State, stopped: bool) {
        let lost = stopped && state.wanted.memory && !self.backend().is_dead();
        self.lost.store(lost, Ordering::Relaxed);
    }

    /// Maps a BAR where the guest has put it; whether it is reachable now.
    fn map(&self, hypervisor: &dyn Hypervisor, state: &mut State, bar: u8) -> bool {
        let Some(info) = self.bars.iter().find(|info| info.bar == bar) else { return true };
        let address = GuestAddress(state.placed.address(info));
        let mapped = self.change(state, bar, |mapping| mapping.map(hypervisor, address));
        if let Err(failure) = state.doorbells[usize::from(bar)].connect(hypervisor, address) {
            debug!(function = self.index, bar, "doorbell: {failure}");
        }
        mapped
    }

    /// Has every write to a BAR forwarded: none must ring a doorbell of a function that does not decode
    /// there.
    pub(super) fn silence(&self, hypervisor: &dyn Hypervisor, state: &mut State, bar: u8) {
        if let Err(failure) = state.doorbells[usize::from(bar)].disconnect(hypervisor) {
            // The next change of decode tries again.
            tracing::error!(function = self.index, bar, "doorbell: {failure}");
        }
    }

    /// Gives the memory of a mapped BAR what this access lacks; whether that is done. A slot that the
    /// hypervisor failed to remove may be where the BAR was before: it gets no access.
    pub(super) fn relax(&self, state: &mut State, target: &BarTarget) -> bool {
        let bar = target.bar;
        let info = self.bars.iter().find(|info| info.bar == bar);
        let (Some(info), Some(mapping)) = (info, &mut state.mappings[usize::from(bar)]) else {
            return false;
        };
        if mapping.mapped_at() != Some(GuestAddress(state.placed.address(info))) {
            return false;
        }
        let GuestAccess { size, kind, .. } = target.access;
        // Where nobody tells the direction, a write may be waiting.
        let writes = matches!(kind, None | Some(FaultAccess::Write));
        let result = mapping.relax(target.offset, size, writes);
        if let Err(failure) = &result {
            debug!(function = self.index, bar, "memory slot: {failure}");
        }
        result.is_ok()
    }

    /// A write may have faulted for being tracked, and nobody knows where: lets all of them through.
    pub(super) fn note_writes_anywhere(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
        for info in &self.bars {
            let tracked =
                |mapping: &BarMapping| mapping.mapped_at().is_some() && mapping.tracks_writes();
            if state.mappings[usize::from(info.bar)].as_ref().is_some_and(tracked)
                && !self.change(state, info.bar, BarMapping::note_all)
            {
                self.suspend(hypervisor, state, info.bar);
            }
        }
    }

    /// Takes a BAR's slot and doorbells away; whether the slot is gone.
    pub(super) fn suspend(&self, hypervisor: &dyn Hypervisor, state: &mut State, bar: u8) -> bool {
        self.silence(hypervisor, state, bar);
        self.change(state, bar, |mapping| mapping.suspend(hypervisor))
    }

    pub(super) fn suspend_all(&self, hypervisor: &dyn Hypervisor, state: &mut State) {
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

    /// Publishes the windows; `claims` narrows which BARs decode, beyond the Command register.
    pub(super) fn publish(&self, state: &State, claims: impl Fn(u8) -> bool) {
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
            offset: 0,
            decodes: state.decodes(info.space),
        })
    }

    fn slots(&self, state: &State) -> Vec<BarWindow> {
        let mut slots = Vec::new();
        for info in &self.bars {
            let Some(mapping) = &state.mappings[usize::from(info.bar)] else { continue };
            let (Some(at), Some(window)) = (mapping.mapped_at(), self.window(state, info)) else {
                continue;
            };
            slots.extend(mapping.parts().map(|(offset, len)| BarWindow {
                start: at.0 + offset,
                len,
                offset,
                ..window
            }));
        }
        slots
    }
}

impl State {
    pub(super) fn slot(&self, bar: u8) -> SlotState {
        match &self.mappings[usize::from(bar)] {
            None => SlotState::Trapped,
            Some(mapping) if mapping.is_quarantined() => SlotState::Trapped,
            Some(mapping) if mapping.mapped_at().is_some() => SlotState::Mapped,
            Some(_) => SlotState::Suspended,
        }
    }

    /// Whether the function claims a space: it says so, and the guest wants it. A backend that says so
    /// by itself could place BARs that the guest is only sizing, or has put aside, over its neighbours.
    pub(super) fn decodes(&self, space: AddressSpace) -> bool {
        self.in_d0 && self.enables.of(space) && self.wanted.of(space)
    }
}
