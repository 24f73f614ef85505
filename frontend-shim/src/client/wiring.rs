//! What a client has set up at its server, kept to be set up again in another session.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use barkeep_protocol::wire::{DmaMap, DmaUnmap, DmaUnmapFlags, IrqAction, IrqData, SetIrqs};

use super::connection::Connection;

/// Shared by the sessions of one function, one after the other. Held across each request that
/// changes it, so that what is set up again is what was set up, and a window that was withdrawn
/// meanwhile does not come back.
#[derive(Debug, Default)]
pub(super) struct Wiring(Mutex<Wired>);

/// Windows of guest memory, and interrupts, as successful requests have left them.
#[derive(Debug, Default)]
pub(super) struct Wired {
    windows: Vec<Window>,
    eventfds: BTreeMap<(Signal, Vector), OwnedFd>,
    masked: BTreeSet<Vector>,
    /// The session that has all of it.
    latest: Option<Arc<Connection>>,
}

/// Interrupt index, and the vector in it.
type Vector = (u32, u32);

/// What an eventfd of an interrupt is for. In the order in which they are set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Signal {
    Trigger,
    Mask,
    Unmask,
}

#[derive(Clone, Debug)]
pub(super) struct Window {
    pub(super) map: DmaMap,
    pub(super) file: Option<Arc<OwnedFd>>,
}

/// A SET_IRQS request with its eventfds.
#[derive(Debug)]
pub(super) struct IrqStep<'a> {
    pub(super) set: SetIrqs<'static>,
    pub(super) eventfds: Vec<&'a OwnedFd>,
}

impl Wiring {
    pub(super) fn lock(&self) -> MutexGuard<'_, Wired> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wired {
    /// The session that has taken the place of `old`, if one has.
    pub(super) fn successor(&self, old: &Arc<Connection>) -> Option<Arc<Connection>> {
        self.latest.clone().filter(|latest| !Arc::ptr_eq(latest, old))
    }

    /// `session` has all of it.
    pub(super) fn set_latest(&mut self, session: &Arc<Connection>) {
        self.latest = Some(Arc::clone(session));
    }

    pub(super) fn windows(&self) -> &[Window] {
        &self.windows
    }

    pub(super) fn add_window(&mut self, map: DmaMap, file: Option<OwnedFd>) {
        self.windows.push(Window { map, file: file.map(Arc::new) });
    }

    /// A server may agree to a part of a window.
    pub(super) fn remove_windows(&mut self, unmap: &DmaUnmap) {
        if unmap.flags.contains(DmaUnmapFlags::ALL) {
            return self.windows.clear();
        }
        let Some(more) = unmap.size.checked_sub(1) else { return };
        let gone = (unmap.address, unmap.address.saturating_add(more));
        self.windows = self.windows.iter().flat_map(|window| window.without(gone)).collect();
    }

    /// Notes what a SET_IRQS that succeeded has changed. Interrupts that it raised are no state.
    pub(super) fn note_irqs(&mut self, set: &SetIrqs<'_>, eventfds: Vec<OwnedFd>) {
        let SetIrqs { action, index, start, count, .. } = *set;
        let range = (index, start)..(index, start.saturating_add(count));
        let signal = match action {
            IrqAction::Trigger => Signal::Trigger,
            IrqAction::Mask => Signal::Mask,
            IrqAction::Unmask => Signal::Unmask,
        };
        match (set.data, action) {
            (IrqData::Eventfd, _) => {
                self.eventfds.retain(|(of, at), _| *of != signal || !range.contains(at));
                let vectors = (start..).map(|vector| (signal, (index, vector)));
                self.eventfds.extend(vectors.zip(eventfds));
            }
            (IrqData::None, IrqAction::Trigger) if (start, count) == (0, 0) => {
                // The whole index is disabled.
                self.eventfds.retain(|(_, (of, _)), _| *of != index);
                self.masked.retain(|(of, _)| *of != index);
            }
            (_, IrqAction::Trigger) => {}
            (data, action) => {
                for (at, vector) in (start..start.saturating_add(count)).enumerate() {
                    let meant = match data {
                        IrqData::Bool(bytes) => bytes.get(at).is_some_and(|byte| *byte != 0),
                        _ => true,
                    };
                    if meant && action == IrqAction::Mask {
                        self.masked.insert((index, vector));
                    } else if meant {
                        self.masked.remove(&(index, vector));
                    }
                }
            }
        }
    }

    /// The requests that set the interrupts up, each with at most `most` eventfds.
    pub(super) fn irq_steps(&self, most: usize) -> Vec<IrqStep<'_>> {
        let mut steps: Vec<IrqStep<'_>> = Vec::new();
        for ((signal, (index, vector)), eventfd) in &self.eventfds {
            let action = match signal {
                Signal::Trigger => IrqAction::Trigger,
                Signal::Mask => IrqAction::Mask,
                Signal::Unmask => IrqAction::Unmask,
            };
            let goes_on = |step: &&mut IrqStep<'_>| {
                let SetIrqs { start, count, .. } = step.set;
                (step.set.action, step.set.index, start + count) == (action, *index, *vector)
                    && step.eventfds.len() < most.max(1)
            };
            if let Some(step) = steps.last_mut().filter(goes_on) {
                step.set.count += 1;
                step.eventfds.push(eventfd);
            } else {
                let (data, index, start) = (IrqData::Eventfd, *index, *vector);
                let set = SetIrqs { action, data, index, start, count: 1 };
                steps.push(IrqStep { set, eventfds: vec![eventfd] });
            }
        }
        let masked = self.masked.iter().map(|(index, vector)| {
            let (action, data) = (IrqAction::Mask, IrqData::None);
            let set = SetIrqs { action, data, index: *index, start: *vector, count: 1 };
            IrqStep { set, eventfds: Vec::new() }
        });
        steps.extend(masked);
        steps
    }
}

impl Window {
    /// What lies before and behind a range of addresses.
    fn without(&self, (address, last): (u64, u64)) -> impl Iterator<Item = Self> + use<> {
        let start = self.map.address;
        let end = start.saturating_add(self.map.size - 1);
        let before = address.checked_sub(1).map(|to| (start, end.min(to)));
        let behind = last.checked_add(1).map(|from| (start.max(from), end));
        let window = self.clone();
        [before, behind].into_iter().flatten().filter(|(from, to)| from <= to).map(
            move |(from, to)| {
                let file_offset = window.map.file_offset + (from - start);
                let map = DmaMap { file_offset, address: from, size: to - from + 1, ..window.map };
                Self { map, file: window.file.clone() }
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use barkeep_protocol::wire::DmaAccess;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn map(address: u64, size: u64) -> DmaMap {
        DmaMap { access: DmaAccess::READ, file_offset: 0x100, address, size }
    }

    fn fd() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    fn set(action: IrqAction, data: IrqData<'static>, start: u32, count: u32) -> SetIrqs<'static> {
        SetIrqs { action, data, index: 2, start, count }
    }

    #[test]
    fn a_window_of_which_a_part_was_withdrawn_is_kept_on_both_sides_of_it() {
        let mut wired = Wired::default();
        wired.add_window(map(0x1000, 0x4000), None);
        wired.remove_windows(&DmaUnmap::range(0x2000, 0x1000));
        let left: Vec<_> = wired.windows().iter().map(|window| window.map).collect();
        assert_eq!(
            left,
            [map(0x1000, 0x1000), DmaMap { file_offset: 0x2100, ..map(0x3000, 0x2000) }]
        );
        wired.remove_windows(&DmaUnmap::range(0, u64::MAX));
        assert!(wired.windows().is_empty());
    }

    #[test]
    fn eventfds_are_kept_by_vector_and_sent_in_runs_up_to_the_servers_limit() {
        let mut wired = Wired::default();
        let (trigger, eventfds) = (IrqAction::Trigger, IrqData::Eventfd);
        wired.note_irqs(&set(trigger, eventfds, 0, 5), (0..5).map(|_| fd()).collect());
        // Without a descriptor, a vector is taken away.
        wired.note_irqs(&set(trigger, eventfds, 3, 1), Vec::new());
        let steps = |wired: &Wired| -> Vec<_> {
            let sum = |step: &IrqStep<'_>| (step.set.start, step.set.count, step.eventfds.len());
            wired.irq_steps(2).iter().map(sum).collect()
        };
        assert_eq!(steps(&wired), [(0, 2, 2), (2, 1, 1), (4, 1, 1)]);
        wired.note_irqs(&set(trigger, IrqData::None, 0, 3), Vec::new());
        assert_eq!(steps(&wired).len(), 3, "they were raised, and stay");
        wired.note_irqs(&set(trigger, IrqData::None, 0, 0), Vec::new());
        assert_eq!(steps(&wired), [], "disabled");
    }

    #[test]
    fn masks_are_kept_until_they_are_taken_back() {
        let mut wired = Wired::default();
        wired.note_irqs(&set(IrqAction::Mask, IrqData::Bool(&[1, 0, 1]), 4, 3), Vec::new());
        let masked = |wired: &Wired| -> Vec<_> {
            wired.irq_steps(8).iter().map(|step| (step.set.action, step.set.start)).collect()
        };
        assert_eq!(masked(&wired), [(IrqAction::Mask, 4), (IrqAction::Mask, 6)]);
        wired.note_irqs(&set(IrqAction::Unmask, IrqData::None, 6, 1), Vec::new());
        assert_eq!(masked(&wired), [(IrqAction::Mask, 4)]);
    }
}
