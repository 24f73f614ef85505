use super::{BarAddress, DeviceId, Placement};

/// The live windows of all BARs, as they were when it was made. It never changes.
#[derive(Debug, Default)]
pub(super) struct Windows {
    /// By their first addresses.
    windows: Vec<Window>,
    /// Connections whose devices have windows, and what their epochs were.
    epochs: Vec<(u32, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    first: u64,
    last: u64,
    /// The highest last address of this window and all before it.
    reach: u64,
    device: DeviceId,
    bar: u8,
    decodes: bool,
    /// The VM that has slots with the device's memory.
    vm: Option<u32>,
}

impl Windows {
    /// Adds a BAR if it is where it last decoded.
    pub(super) fn add(
        &mut self,
        (device, bar): (DeviceId, u8),
        placement: &Placement,
        decodes: bool,
        vm: Option<u32>,
    ) {
        let Placement { size, address, live } = *placement;
        let Some(last) = size.checked_sub(1).and_then(|last| live.checked_add(last)) else {
            return;
        };
        if live != 0 && live == address {
            self.windows.push(Window { first: live, last, reach: last, device, bar, decodes, vm });
        }
    }

    /// Has the windows of a connection's device, at an epoch.
    pub(super) fn add_epoch(&mut self, stream: u32, epoch: u64) {
        self.epochs.push((stream, epoch));
    }

    /// Puts what was added in order.
    pub(super) fn sorted(mut self) -> Self {
        self.windows.sort_by_key(|window| window.first);
        let mut reach = 0;
        for window in &mut self.windows {
            reach = window.last.max(reach);
            window.reach = reach;
        }
        self
    }

    pub(super) fn epochs(&self) -> &[(u32, u64)] {
        &self.epochs
    }

    /// The window that an address is in. `mine` says whether one without a VM is this VM's. Where
    /// windows overlap, one that decoded comes first: it claims the address.
    pub(super) fn at(&self, vm: u32, gpa: u64, mine: impl Fn() -> bool) -> Option<BarAddress> {
        let end = self.windows.partition_point(|window| window.first <= gpa);
        let mut found: Option<&Window> = None;
        for window in self.windows[..end].iter().rev() {
            if window.reach < gpa || found.is_some_and(|found| found.decodes) {
                break;
            }
            let of_vm = || window.vm.map_or_else(&mine, |owner| owner == vm);
            if gpa <= window.last && (found.is_none() || window.decodes) && of_vm() {
                found = Some(window);
            }
        }
        found.map(|window| BarAddress {
            device: window.device,
            bar: window.bar,
            offset: gpa - window.first,
        })
    }
}
