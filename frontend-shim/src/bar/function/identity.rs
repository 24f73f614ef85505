//! Whether the function that answers in another session is the one that was attached.

use barkeep_protocol::wire::{DeviceInfo, IrqInfo, PciRegion, RegionInfo};

use crate::bar::Backend;
use crate::client::ClientError;

/// What must not change from one session to the next: a guest has seen it, and its driver goes by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: DeviceInfo,
    regions: Vec<RegionInfo>,
    irqs: Vec<IrqInfo>,
    ids: Vec<u8>,
}

/// Registers that say what a function is (PCI 3.0, 6.2.1): first byte and length.
const IDS: [(u64, usize); 4] = [
    // Vendor and device.
    (0x00, 4),
    // Revision and class.
    (0x08, 4),
    // Header type.
    (0x0e, 1),
    // Subsystem vendor and subsystem.
    (0x2c, 4),
];

/// INTx, MSI, MSI-X, errors and requests.
const MAX_IRQS: u32 = 5;

impl Identity {
    pub(super) fn read(backend: &impl Backend) -> Result<Self, ClientError> {
        let device = backend.device_info()?;
        let regions = (0..device.num_regions.min(PciRegion::COUNT)).map(|index| {
            let (info, _) = backend.region_info(index)?;
            // Where a region lies in its file is the server's own affair.
            Ok(RegionInfo { file_offset: 0, ..info })
        });
        let regions = regions.collect::<Result<_, ClientError>>()?;
        let irqs = (0..device.num_irqs.min(MAX_IRQS)).map(|index| backend.irq_info(index));
        let irqs = irqs.collect::<Result<_, _>>()?;
        let mut ids = Vec::new();
        for (offset, len) in IDS {
            let mut bytes = vec![0; len];
            backend.region_read(PciRegion::Config.index(), offset, &mut bytes)?;
            ids.extend(bytes);
        }
        Ok(Self { device, regions, irqs, ids })
    }

    /// What another function than this one is different in.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        let rows = [
            (self.ids == other.ids, "PCI ids"),
            (self.device == other.device, "device info"),
            (self.regions == other.regions, "regions"),
            (self.irqs == other.irqs, "interrupts"),
        ];
        rows.into_iter().find(|(same, _)| !same).map(|(_, what)| what)
    }
}
