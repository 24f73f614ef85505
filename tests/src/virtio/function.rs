//! A virtio function on the PCI bus (4.1).

use std::path::Path;
use std::time::Duration;

use barkeep_protocol::wire::{IrqAction, IrqData, PciIrq, SetIrqs};
use barkeep_shim::client::Client;

use crate::peer::requests::{CONFIG, pci};

/// A virtio function, with its structures found.
#[derive(Debug)]
pub struct Function {
    /// How it is reached; for any number of threads.
    pub client: Client,
    /// Its common configuration structure.
    pub common: Area,
    /// Its notification structure.
    pub notify: Area,
    /// Bytes between the notification addresses of queues.
    pub notify_multiplier: u32,
    /// Its ISR status.
    pub isr: Area,
    /// Its device-specific configuration.
    pub device: Area,
    /// Where the PCI configuration access capability is.
    pub access: u64,
    msix: u64,
}

/// A part of a BAR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Area {
    /// Index of the BAR.
    pub bar: u32,
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Device Status Field (2.1).
pub mod status {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// Offsets in the common configuration structure (4.1.4.3).
pub mod common {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_RESET: u64 = 0x3a;
}

const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const INTX_DISABLE: u16 = 1 << 10;
/// Where the function's first BAR is placed; the others follow at distances of 4 GiB or less.
const PLACE: u32 = 0xe000_0000;
/// Far above what a busy machine needs.
const ANSWER: Duration = Duration::from_secs(30);

impl Function {
    /// Connects to the function's socket and sets it up for a driver: BARs placed, memory decoded,
    /// bus mastering and MSI-X on.
    ///
    /// # Panics
    /// If it is no virtio function as the specification has them.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let client = Client::connect(path, ANSWER).expect("a server");
        let mut function = Self {
            client,
            common: Area::default(),
            notify: Area::default(),
            notify_multiplier: 0,
            isr: Area::default(),
            device: Area::default(),
            access: 0,
            msix: 0,
        };
        assert_eq!(function.config::<2>(0), [0xf4, 0x1a], "a virtio function");
        function.find_capabilities();
        function.enable();
        function
    }

    /// Brings the function from power-on to where software can drive it.
    pub fn enable(&self) {
        for (bar, place) in [(0, PLACE), (2, PLACE + (64 << 20))] {
            self.set_config(pci::BAR0 + 4 * bar, &place.to_le_bytes());
        }
        self.set_command(pci::MEMORY_SPACE | pci::BUS_MASTER | INTX_DISABLE);
        self.set_config(self.msix + 2, &MSIX_ENABLE.to_le_bytes());
    }

    /// Has the function interrupt by its pin rather than by MSI-X.
    pub fn use_pin(&self) {
        self.set_config(self.msix + 2, &[0, 0]);
        self.set_command(pci::MEMORY_SPACE | pci::BUS_MASTER);
    }

    /// Lets the pin speak again after a signal, which masks it.
    pub fn unmask_pin(&self) {
        let set = SetIrqs {
            action: IrqAction::Unmask,
            data: IrqData::None,
            index: PciIrq::Intx.index(),
            start: 0,
            count: 1,
        };
        self.client.set_irqs(&set, Vec::new()).expect("a function with a pin");
    }

    /// Writes the Command register.
    pub fn set_command(&self, command: u16) {
        self.set_config(pci::COMMAND, &command.to_le_bytes());
    }

    fn find_capabilities(&mut self) {
        let mut at = u64::from(self.config::<1>(pci::CAPABILITIES_POINTER)[0]);
        while at != 0 {
            let [id, next] = self.config::<2>(at);
            match id {
                MSIX => self.msix = at,
                VENDOR_SPECIFIC => self.take_vendor(at),
                _ => {}
            }
            at = next.into();
        }
        assert!(self.common.length >= 0x38 && self.notify.length > 0, "{self:?}");
        assert!(self.isr.length >= 1 && self.access != 0 && self.msix != 0, "{self:?}");
    }

    /// `struct virtio_pci_cap` (4.1.4). The first of a kind is the one to use.
    fn take_vendor(&mut self, at: u64) {
        let [kind, bar] = self.config::<2>(at + 3);
        let [offset, length] =
            [8, 12].map(|field| u64::from(u32::from_le_bytes(self.config::<4>(at + field))));
        let area = Area { bar: bar.into(), offset, length };
        let slot = match kind {
            1 => &mut self.common,
            2 => &mut self.notify,
            3 => &mut self.isr,
            4 => &mut self.device,
            5 => {
                self.access = at;
                return;
            }
            _ => return,
        };
        if *slot == Area::default() {
            *slot = area;
            if kind == 2 {
                self.notify_multiplier = u32::from_le_bytes(self.config(at + 16));
            }
        }
    }

    /// Reads configuration space.
    #[must_use]
    pub fn config<const LENGTH: usize>(&self, offset: u64) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        self.client.region_read(CONFIG, offset, &mut bytes).expect("a served function");
        bytes
    }

    /// Writes configuration space.
    pub fn set_config(&self, offset: u64, bytes: &[u8]) {
        self.client.region_write(CONFIG, offset, bytes).expect("a served function");
    }

    /// Where the first capability with this id is.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn capability(&self, id: u8) -> u64 {
        let mut at = u64::from(self.config::<1>(pci::CAPABILITIES_POINTER)[0]);
        while at != 0 {
            let [found, next] = self.config::<2>(at);
            if found == id {
                return at;
            }
            at = next.into();
        }
        unreachable!("the function has no capability {id:#x}")
    }

    /// Reads a structure.
    #[must_use]
    pub fn read<const LENGTH: usize>(&self, area: Area, offset: u64) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let at = area.offset + offset;
        self.client.region_read(area.bar, at, &mut bytes).expect("a served function");
        bytes
    }

    /// Writes to a structure.
    pub fn write(&self, area: Area, offset: u64, bytes: &[u8]) {
        let at = area.offset + offset;
        self.client.region_write(area.bar, at, bytes).expect("a served function");
    }

    /// Reads the device status.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.read::<1>(self.common, common::DEVICE_STATUS)[0]
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u8) {
        self.write(self.common, common::DEVICE_STATUS, &[status]);
    }

    /// Resets the device and sees that it was (3.1.1).
    ///
    /// # Panics
    /// If the reset does not come to an end.
    pub fn reset(&self) {
        self.set_status(0);
        assert!((0..1000).any(|_| self.status() == 0), "the device does not reset");
    }

    /// The feature bits that the device offers.
    #[must_use]
    pub fn features(&self) -> u64 {
        let half = |select: u32| {
            self.write(self.common, common::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(self.common, common::DEVICE_FEATURE)))
        };
        half(0) | half(1) << 32
    }

    /// Accepts feature bits.
    pub fn accept(&self, features: u64) {
        let bytes = features.to_le_bytes();
        for (select, half) in [(0_u32, &bytes[..4]), (1, &bytes[4..])] {
            self.write(self.common, common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            self.write(self.common, common::DRIVER_FEATURE, half);
        }
    }

    /// Selects a queue.
    pub fn select(&self, queue: u16) {
        self.write(self.common, common::QUEUE_SELECT, &queue.to_le_bytes());
    }

    /// How many queues there are.
    #[must_use]
    pub fn queues(&self) -> u16 {
        u16::from_le_bytes(self.read(self.common, common::NUM_QUEUES))
    }

    /// Starts a Function Level Reset. The function is at power-on afterwards.
    pub fn function_level_reset(&self) {
        const EXPRESS: u8 = 0x10;
        const INITIATE: u8 = 1 << 7;
        let control = self.capability(EXPRESS) + 9;
        let [old] = self.config::<1>(control);
        self.set_config(control, &[old | INITIATE]);
    }
}
