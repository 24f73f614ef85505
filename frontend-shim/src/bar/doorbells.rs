use std::os::fd::AsFd;

use crate::client::Doorbell;
use crate::hypervisor::{DoorbellLen, DoorbellWrite, GuestAddress, Hypervisor, HypervisorError};

/// The doorbells of a BAR: while it decodes, the hypervisor rings them without an exit.
#[derive(Debug)]
pub(super) struct Doorbells {
    bells: Vec<Bell>,
}

#[derive(Debug)]
struct Bell {
    doorbell: Doorbell,
    len: Option<DoorbellLen>,
    /// Where the hypervisor has it now.
    connected: Option<DoorbellWrite>,
}

impl Doorbells {
    pub(super) const fn none() -> Self {
        Self { bells: Vec::new() }
    }

    /// Those of what a backend offers that can be rung in a BAR of `size` bytes. Writes to the others
    /// are forwarded, as all writes are without a hypervisor that knows doorbells.
    pub(super) fn new(offered: Vec<Doorbell>, size: u64) -> Self {
        let bell = |doorbell: Doorbell| {
            let len = match doorbell.size {
                0 => None,
                1 => Some(DoorbellLen::One),
                2 => Some(DoorbellLen::Two),
                4 => Some(DoorbellLen::Four),
                8 => Some(DoorbellLen::Eight),
                _ => return None,
            };
            let end = doorbell.offset.checked_add(doorbell.size.max(1))?;
            let possible = end <= size && (len.is_some() || doorbell.value.is_none());
            possible.then_some(Bell { doorbell, len, connected: None })
        };
        Self { bells: offered.into_iter().filter_map(bell).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bells.is_empty()
    }

    /// Whether the hypervisor rings any of them now.
    pub(super) fn is_connected(&self) -> bool {
        self.bells.iter().any(|bell| bell.connected.is_some())
    }

    /// Has the hypervisor ring them, with the BAR at `address`. Idempotent. One that it does not take
    /// is forwarded.
    pub(super) fn connect(
        &mut self,
        hypervisor: &dyn Hypervisor,
        address: GuestAddress,
    ) -> Result<(), HypervisorError> {
        let mut result = Ok(());
        for bell in &mut self.bells {
            let at = address.0.wrapping_add(bell.doorbell.offset);
            let (address, len, value) = (GuestAddress(at), bell.len, bell.doorbell.value);
            let write = DoorbellWrite { address, len, value };
            if bell.connected == Some(write) {
                continue;
            }
            match bell.disconnect(hypervisor).and_then(|()| bell.connect(hypervisor, write)) {
                // It says the same of all.
                Err(HypervisorError::NotSupported { .. }) => return Ok(()),
                Err(error) => result = Err(error),
                Ok(()) => {}
            }
        }
        result
    }

    /// When it returns without an error, no write rings them any more: all are forwarded. Idempotent.
    pub(super) fn disconnect(
        &mut self,
        hypervisor: &dyn Hypervisor,
    ) -> Result<(), HypervisorError> {
        // All of them, whatever becomes of one.
        self.bells.iter_mut().map(|bell| bell.disconnect(hypervisor)).fold(Ok(()), Result::and)
    }
}

impl Bell {
    fn connect(
        &mut self,
        hypervisor: &dyn Hypervisor,
        write: DoorbellWrite,
    ) -> Result<(), HypervisorError> {
        hypervisor.add_ioeventfd(&write, self.doorbell.eventfd.as_fd())?;
        self.connected = Some(write);
        Ok(())
    }

    fn disconnect(&mut self, hypervisor: &dyn Hypervisor) -> Result<(), HypervisorError> {
        if let Some(write) = self.connected {
            hypervisor.remove_ioeventfd(&write, self.doorbell.eventfd.as_fd())?;
            self.connected = None;
        }
        Ok(())
    }
}
