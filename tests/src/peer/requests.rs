//! The requests that most tests need on their way to what they test.

use std::os::fd::BorrowedFd;

use super::Peer;
use super::message::{Payload, Reply, command};

/// Region index of configuration space.
pub const CONFIG: u32 = 7;

/// Offsets in configuration space and their bits, by the names of the PCI specification.
pub mod pci {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const COMMAND: u64 = 0x04;
    pub const STATUS: u64 = 0x06;
    pub const BAR0: u64 = 0x10;
    pub const CAPABILITIES_POINTER: u64 = 0x34;
    pub const MEMORY_SPACE: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
    pub const INTERRUPT_STATUS: u16 = 1 << 3;
    pub const POWER_MANAGEMENT: u8 = 0x01;
    pub const MSI: u8 = 0x05;
    pub const EXPRESS: u8 = 0x10;
}

/// Flags of SET_IRQS.
pub mod irq {
    #![expect(missing_docs, reason = "the names of linux/vfio.h")]
    pub const DATA_NONE: u32 = 1 << 0;
    pub const DATA_BOOL: u32 = 1 << 1;
    pub const DATA_EVENTFD: u32 = 1 << 2;
    pub const ACTION_MASK: u32 = 1 << 3;
    pub const ACTION_UNMASK: u32 = 1 << 4;
    pub const ACTION_TRIGGER: u32 = 1 << 5;
    pub const INTX: u32 = 0;
    pub const MSI: u32 = 1;
}

/// Flags and indices of DEVICE_FEATURE.
pub mod feature {
    #![expect(missing_docs, reason = "the names of linux/vfio.h")]
    pub const GET: u32 = 1 << 16;
    pub const SET: u32 = 1 << 17;
    pub const PROBE: u32 = 1 << 18;
    pub const MIGRATION: u32 = 1;
    pub const STATE: u32 = 2;
    pub const LOGGING_START: u32 = 6;
    pub const LOGGING_STOP: u32 = 7;
    pub const LOGGING_REPORT: u32 = 8;
}

/// States of `enum vfio_device_mig_state`.
pub mod migration {
    #![expect(missing_docs, reason = "the names of linux/vfio.h")]
    pub const ERROR: u32 = 0;
    pub const STOP: u32 = 1;
    pub const RUNNING: u32 = 2;
    pub const STOP_COPY: u32 = 3;
    pub const RESUMING: u32 = 4;
    pub const RUNNING_P2P: u32 = 5;
    pub const PRE_COPY: u32 = 6;
}

/// The payload of a DMA_MAP.
#[must_use]
pub fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    Payload::new().u32(32).u32(flags).u64(offset).u64(address).u64(size).done()
}

/// The payload of a DMA_UNMAP.
#[must_use]
pub fn dma_unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    Payload::new().u32(24).u32(flags).u64(address).u64(size).done()
}

/// The payload of a GET_REGION_INFO.
#[must_use]
pub fn region_info(argsz: u32, index: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(0).u32(index).u32(0).u64(0).u64(0).done()
}

/// The payload of a GET_INFO (without an index) or GET_IRQ_INFO.
#[must_use]
pub fn info(argsz: u32, index: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(0).u32(index).u32(0).done()
}

/// The payload of a SET_IRQS; `data` is what follows the fixed part.
#[must_use]
pub fn set_irqs(flags: u32, index: u32, start: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let argsz = u32::try_from(20 + data.len()).expect("a byte a vector");
    Payload::new().u32(argsz).u32(flags).u32(index).u32(start).u32(count).bytes(data).done()
}

/// The payload of a REGION_READ, and the fixed part of everything about regions.
#[must_use]
pub fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    Payload::new().u64(offset).u32(region).u32(count).done()
}

/// The payload of a REGION_WRITE.
#[must_use]
pub fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let count = u32::try_from(data.len()).expect("a test's write is small");
    Payload::new().u64(offset).u32(region).u32(count).bytes(data).done()
}

/// The payload of a memory fault report.
#[must_use]
pub fn memory_fault(access: u32, region: u32, offset: u64, size: u64) -> Vec<u8> {
    Payload::new().u32(32).u32(access).u32(region).u32(0).u64(offset).u64(size).done()
}

/// The payload of a query for the state of a region.
#[must_use]
pub fn region_state(argsz: u32, flags: u32, region: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(flags).u32(region).u32(0).done()
}

/// The payload of a request for the decode page.
#[must_use]
pub fn decode_page(argsz: u32, flags: u32) -> Vec<u8> {
    Payload::new().u32(argsz).u32(flags).done()
}

impl Peer {
    /// Reads `count` bytes of a region.
    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let mut body = self.call(command::REGION_READ, &access(region, offset, count)).success();
        assert_eq!(body.len(), 16 + count as usize);
        body.split_off(16)
    }

    /// Writes bytes to a region.
    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let _ = self.call(command::REGION_WRITE, &write(region, offset, data)).success();
    }

    /// Reads a little-endian register of 4 bytes.
    pub fn read_u32(&mut self, region: u32, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(region, offset, 4).try_into().expect("4 bytes"))
    }

    /// Writes a little-endian register of 4 bytes.
    pub fn write_u32(&mut self, region: u32, offset: u64, value: u32) {
        self.write(region, offset, &value.to_le_bytes());
    }

    /// Reads a little-endian register of 2 bytes in configuration space.
    pub fn config_u16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(CONFIG, offset, 2).try_into().expect("2 bytes"))
    }

    /// Writes a little-endian register of 2 bytes in configuration space.
    pub fn set_config_u16(&mut self, offset: u64, value: u16) {
        self.write(CONFIG, offset, &value.to_le_bytes());
    }

    /// Where the capability with this ID is.
    pub fn capability(&mut self, id: u8) -> u64 {
        let mut at = self.read(CONFIG, pci::CAPABILITIES_POINTER, 1)[0];
        while at != 0 {
            let [this, next] = self.config_u16(at.into()).to_le_bytes();
            if this == id {
                return at.into();
            }
            at = next;
        }
        unreachable!("the function has no capability {id:#x}")
    }

    /// Enables MSI, or disables it.
    pub fn enable_msi(&mut self, enabled: bool) {
        let control = self.capability(pci::MSI) + 2;
        let value = self.config_u16(control);
        self.set_config_u16(control, value & !1 | u16::from(enabled));
    }

    /// Announces a window of guest memory.
    pub fn map(&mut self, flags: u32, address: u64, size: u64, file: BorrowedFd<'_>) {
        let body = dma_map(flags, 0, address, size);
        let reply = self.call_with_fds(command::DMA_MAP, &body, &[file]).success();
        assert!(reply.is_empty(), "\"there is no payload in the reply message\"");
    }

    /// Gives one vector its eventfd.
    pub fn set_eventfd(&mut self, index: u32, vector: u32, fd: BorrowedFd<'_>) {
        let body = set_irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, index, vector, 1, &[]);
        let reply = self.call_with_fds(command::SET_IRQS, &body, &[fd]).success();
        assert!(reply.is_empty(), "\"there is no payload in the reply\"");
    }

    /// Sends a SET_IRQS without file descriptors.
    pub fn set_irqs(&mut self, flags: u32, index: u32, start: u32, count: u32) -> Reply {
        self.call(command::SET_IRQS, &set_irqs(flags, index, start, count, &[]))
    }
}
