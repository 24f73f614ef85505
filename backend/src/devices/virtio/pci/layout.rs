//! What the function looks like from PCI: where its structures are, and the capabilities that say so
//! (4.1.4).

use crate::devices::virtio::spec::DeviceType;
use crate::pci::{
    BarIndex, BarKind, BarOffset, BarSpec, ClassCode, ExpressSpec, FunctionSpec, Ids, InterruptPin,
    MsixSpec, MsixVectors, PowerSpec, VendorSpec,
};

/// The BAR of all structures but MSI-X.
pub(super) const STRUCTURES: BarIndex = BarIndex::BAR0;
/// The BAR of the MSI-X table and pending bits.
const MSIX: BarIndex = BarIndex::BAR2;

const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
/// No device has a longer configuration.
const DEVICE_LENGTH: u64 = 0x1000;
const NOTIFY: u64 = 0x4000;
/// One page for each queue: a VMM can map it or hand it to KVM by itself.
const NOTIFY_STRIDE: u64 = 0x1000;
/// The MSI-X table has at least half a page.
const MSIX_HALF_MIN: usize = 0x800;

/// The most queues of a function. Each has a page in the BAR, a vector, and an eventfd that wakes the
/// device, of which the device itself needs a few.
pub(super) const MAX_QUEUES: u16 = 512;

/// `struct virtio_pci_common_cfg`: offsets of its fields (4.1.4.3).
pub(super) mod common {
    pub(in super::super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(in super::super) const DEVICE_FEATURE: u64 = 0x04;
    pub(in super::super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(in super::super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(in super::super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(in super::super) const NUM_QUEUES: u64 = 0x12;
    pub(in super::super) const DEVICE_STATUS: u64 = 0x14;
    pub(in super::super) const CONFIG_GENERATION: u64 = 0x15;
    pub(in super::super) const QUEUE_SELECT: u64 = 0x16;
    pub(in super::super) const QUEUE_SIZE: u64 = 0x18;
    pub(in super::super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(in super::super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(in super::super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// Three addresses of 64 bits: descriptors, available and used ring.
    pub(in super::super) const QUEUE_DESC: u64 = 0x20;
    pub(in super::super) const QUEUE_DRIVER: u64 = 0x28;
    pub(in super::super) const QUEUE_DEVICE: u64 = 0x30;
    /// The field before it, `queue_notify_data`, is there with VIRTIO_F_NOTIF_CONFIG_DATA alone,
    /// which is not offered.
    pub(in super::super) const QUEUE_RESET: u64 = 0x3a;
    pub(in super::super) const LENGTH: u64 = 0x3c;
}

/// `struct virtio_pci_cap`: types of structures (4.1.4).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}

/// Whom an access to BAR 0 is for, if it stays within one structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Structure {
    /// The common configuration, from an offset on.
    Common(u64),
    /// The ISR status.
    Isr,
    /// The device's configuration, from an offset on.
    Device(u64),
    /// The start of a queue's page for notifications.
    Notify(u16),
}

impl Structure {
    pub(super) fn at(offset: u64, length: usize, queues: u16) -> Option<Self> {
        let end = offset.checked_add(length as u64)?;
        if end <= common::LENGTH {
            Some(Self::Common(offset))
        } else if offset == ISR && length == 1 {
            Some(Self::Isr)
        } else if offset >= DEVICE && end <= DEVICE + DEVICE_LENGTH {
            Some(Self::Device(offset - DEVICE))
        } else {
            let offset = offset.checked_sub(NOTIFY)?;
            let queue = u16::try_from(offset / NOTIFY_STRIDE).ok()?;
            let starts = offset.is_multiple_of(NOTIFY_STRIDE);
            (starts && queue < queues).then_some(Self::Notify(queue))
        }
    }
}

/// Where in BAR 0 a queue is notified.
pub(super) fn doorbell(queue: u16) -> u64 {
    NOTIFY + u64::from(queue) * NOTIFY_STRIDE
}

/// The vectors of a function: one for each queue, and one for the configuration.
pub(super) fn vectors(queues: u16) -> u16 {
    queues + 1
}

/// A function with so many queues, at most [`MAX_QUEUES`].
pub(super) fn function(device_type: DeviceType, queues: u16) -> FunctionSpec {
    let vectors = MsixVectors::new(vectors(queues)).expect("few queues, and one vector more");
    let half = vectors.table_length().next_power_of_two().max(MSIX_HALF_MIN) as u64;
    let vendor = capabilities(queues);
    let structures = doorbell(queues).next_power_of_two();
    let bar = |index, kind, size| BarSpec { index, kind, size };
    FunctionSpec {
        bars: vec![
            bar(STRUCTURES, BarKind::Memory64 { prefetchable: false }, structures),
            bar(MSIX, BarKind::Memory32 { prefetchable: false }, 2 * half),
        ],
        interrupt_pin: Some(InterruptPin::A),
        msix: Some(MsixSpec {
            vectors,
            table: BarOffset { bar: MSIX, offset: 0 },
            pending: BarOffset { bar: MSIX, offset: half },
        }),
        power: Some(PowerSpec { no_soft_reset: true }),
        express: Some(ExpressSpec { function_level_reset: true, aer: true }),
        bar_window: Some(vendor.len() - 1),
        vendor,
        ..FunctionSpec::new(Ids {
            vendor: 0x1af4,
            device: 0x1040 + device_type.0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            revision: 1,
            class: class(device_type),
        })
    }
}

/// The last one is the window to the BARs.
fn capabilities(queues: u16) -> Vec<VendorSpec> {
    let stride = u32::try_from(NOTIFY_STRIDE).expect("a page");
    let notify = u64::from(queues) * NOTIFY_STRIDE;
    vec![
        capability(cfg_type::COMMON, COMMON, common::LENGTH, None),
        // "notify_off_multiplier"
        capability(cfg_type::NOTIFY, NOTIFY, notify, Some(stride)),
        capability(cfg_type::ISR, ISR, 1, None),
        capability(cfg_type::DEVICE, DEVICE, DEVICE_LENGTH, None),
        VendorSpec::bar_window(cfg_type::PCI),
    ]
}

/// What follows the length in `struct virtio_pci_cap`: type, BAR, id, padding, offset and length,
/// and what some types have behind them.
fn capability(cfg_type: u8, offset: u64, length: u64, more: Option<u32>) -> VendorSpec {
    let word = |value: u64| u32::try_from(value).expect("BAR 0 is small").to_le_bytes();
    let mut bytes = vec![cfg_type, STRUCTURES.get(), 0, 0, 0];
    bytes.extend(word(offset));
    bytes.extend(word(length));
    bytes.extend(more.iter().flat_map(|more| more.to_le_bytes()));
    VendorSpec::read_only(&bytes)
}

/// The class that says most about a device to whoever has no driver for it (PCI appendix D).
fn class(device_type: DeviceType) -> ClassCode {
    let (base, sub) = match device_type {
        DeviceType::BLOCK | DeviceType::SCSI => (0x01, 0x00),
        DeviceType::FS => (0x01, 0x80),
        DeviceType::NET => (0x02, 0x00),
        DeviceType::GPU => (0x03, 0x80),
        DeviceType::SOUND => (0x04, 0x01),
        DeviceType::CONSOLE | DeviceType::VSOCK => (0x07, 0x80),
        DeviceType::INPUT => (0x09, 0x80),
        _ => (0xff, 0x00),
    };
    ClassCode { base, sub, interface: 0 }
}
