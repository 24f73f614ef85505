//! Doorbells and interrupts without the VMM, in the kernel's words.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_IRQFD_FLAG_DEASSIGN, KVMIO, KvmIrqRouting, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_irq_routing_entry,
    kvm_irq_routing_msi, kvm_irqfd,
};
use vmm_sys_util::ioctl_iow_nr;

use crate::hypervisor::{DoorbellWrite, HypervisorError, MsiMessage};

ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// Which message each interrupt number stands for. The kernel takes only whole tables: the pins of its
/// own interrupt controllers are not in this one, no guest here uses them.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes(BTreeMap<u32, MsiMessage>);

impl Routes {
    pub(super) fn with(&self, gsi: u32, message: Option<MsiMessage>) -> Self {
        let mut routes = self.0.clone();
        match message {
            Some(message) => routes.insert(gsi, message),
            None => routes.remove(&gsi),
        };
        Self(routes)
    }

    pub(super) fn to_kvm(&self) -> Result<KvmIrqRouting, HypervisorError> {
        let entries: Vec<_> = self.0.iter().map(|(gsi, message)| entry(*gsi, *message)).collect();
        KvmIrqRouting::from_entries(&entries).map_err(|_| HypervisorError::Call {
            call: "KVM_SET_GSI_ROUTING",
            source: io::ErrorKind::InvalidInput.into(),
        })
    }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let [low, high] =
        [message.address, message.address >> 32].map(|half| (half & 0xffff_ffff) as u32);
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: low,
        address_hi: high,
        data: message.data,
        ..Default::default()
    };
    entry
}

pub(super) fn irqfd(gsi: u32, eventfd: BorrowedFd<'_>, add: bool) -> kvm_irqfd {
    let flags = if add { 0 } else { KVM_IRQFD_FLAG_DEASSIGN };
    kvm_irqfd { fd: number(eventfd), gsi, flags, ..Default::default() }
}

pub(super) fn ioeventfd(
    write: &DoorbellWrite,
    eventfd: BorrowedFd<'_>,
    add: bool,
) -> Result<kvm_ioeventfd, HypervisorError> {
    let mut flags = 0;
    if !add {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    if write.value.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        if write.len.is_none() {
            return Err(HypervisorError::Call {
                call: "KVM_IOEVENTFD",
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
    }
    Ok(kvm_ioeventfd {
        datamatch: write.value.unwrap_or(0),
        addr: write.address.0,
        len: write.len.map_or(0, |len| len as u32),
        fd: eventfd.as_raw_fd(),
        flags,
        ..Default::default()
    })
}

/// Descriptors are not negative.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

#[cfg(test)]
mod tests;
