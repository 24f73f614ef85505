//! Constants of the virtio specification 1.2, with their sections.

/// Device Status Field (2.1).
pub mod status {
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// The driver has accepted features.
    pub const FEATURES_OK: u8 = 8;
    /// The device can't go on before a reset.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// Reserved Feature Bits (6), which belong to the transport and the queues.
pub mod feature {
    /// Chains may lie in a table of their own.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device is not a legacy one.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device's accesses are limited and translated as the platform says.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// A queue can be reset by itself.
    pub const RING_RESET: u64 = 1 << 40;
    /// All of them that this program knows how to offer with queues of its own.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM | RING_RESET;
    /// Buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// Memory accesses are ordered as the platform's are.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// Reserved bits, of queues and transport.
    const RESERVED: u64 = (1 << 50) - (1 << 24);
    /// What a device over PCI can offer, whoever serves its queues: they are split, and a
    /// notification carries nothing but the queue's index.
    pub const OFFERABLE: u64 = !RESERVED | TRANSPORT | IN_ORDER | ORDER_PLATFORM;
}

/// Descriptor flags (2.7.5).
pub mod descriptor {
    /// The chain goes on.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer; otherwise it reads it.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Length of a descriptor in bytes.
    pub const SIZE: u64 = 16;
}

/// The available ring (2.7.6).
pub mod avail {
    /// Its flag that asks for no interrupts.
    pub const NO_INTERRUPT: u16 = 1;
    /// Where the ring starts, in bytes.
    pub const RING: u64 = 4;
}

/// The used ring (2.7.8).
pub mod used {
    /// Where its index is, in bytes.
    pub const INDEX: u64 = 2;
    /// Where the ring starts, in bytes.
    pub const RING: u64 = 4;
    /// Length of an entry in bytes.
    pub const SIZE: u64 = 8;
}

/// Device types (5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u16);

impl DeviceType {
    /// Network device (5.1).
    pub const NET: Self = Self(1);
    /// Block device (5.2).
    pub const BLOCK: Self = Self(2);
    /// Console device (5.3).
    pub const CONSOLE: Self = Self(3);
    /// Entropy device (5.4).
    pub const ENTROPY: Self = Self(4);
    /// SCSI host (5.6).
    pub const SCSI: Self = Self(8);
    /// GPU device (5.7).
    pub const GPU: Self = Self(16);
    /// Input device (5.8).
    pub const INPUT: Self = Self(18);
    /// Socket device (5.10).
    pub const VSOCK: Self = Self(19);
    /// Crypto device (5.9).
    pub const CRYPTO: Self = Self(20);
    /// File system device (5.11).
    pub const FS: Self = Self(26);
    /// RPMB device (5.12).
    pub const RPMB: Self = Self(28);
    /// Sound device (5.14).
    pub const SOUND: Self = Self(25);
    /// I2C adapter (5.15).
    pub const I2C: Self = Self(34);
    /// GPIO device (5.18).
    pub const GPIO: Self = Self(41);
}
