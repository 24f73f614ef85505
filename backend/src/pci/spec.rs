//! Register offsets and field encodings, by the specification that defines them.
//!
//! - PCI: *PCI Local Bus Specification*, revision 3.0
//! - PM: *PCI Bus Power Management Interface Specification*, revision 1.2
//! - PCIe: *PCI Express Base Specification*, revision 4.0
//!
//! Offsets are in bytes. In [`header`] they count from the start of configuration space, in the
//! capability modules from the capability's first byte.

/// Size of the configuration space of a conventional function (PCI 6.1).
pub const CONFIG_SIZE: usize = 256;

/// Size of the configuration space of a PCI Express function (PCIe 7.2).
pub const EXTENDED_CONFIG_SIZE: usize = 4096;

/// The Vendor ID that a read returns where there is no function (PCI 6.2.1).
pub const VENDOR_ABSENT: u16 = 0xffff;

/// Type 0 configuration header (PCI 6.1, PCIe 7.5.1).
pub mod header {
    /// Vendor ID, 16 bits (PCI 6.2.1).
    pub const VENDOR_ID: usize = 0x00;
    /// Device ID, 16 bits (PCI 6.2.1).
    pub const DEVICE_ID: usize = 0x02;
    /// Command, 16 bits (PCI 6.2.2, PCIe 7.5.1.1.3).
    pub const COMMAND: usize = 0x04;
    /// Status, 16 bits (PCI 6.2.3, PCIe 7.5.1.1.4).
    pub const STATUS: usize = 0x06;
    /// Revision ID, 8 bits (PCI 6.2.1).
    pub const REVISION_ID: usize = 0x08;
    /// Class Code, 24 bits: interface, sub-class, base class (PCI 6.2.1).
    pub const CLASS_CODE: usize = 0x09;
    /// Cache Line Size, 8 bits (PCI 6.2.4).
    pub const CACHE_LINE_SIZE: usize = 0x0c;
    /// Latency Timer, 8 bits (PCI 6.2.4, PCIe 7.5.1.1.8).
    pub const LATENCY_TIMER: usize = 0x0d;
    /// Header Type, 8 bits (PCI 6.2.1).
    pub const HEADER_TYPE: usize = 0x0e;
    /// BIST, 8 bits (PCI 6.2.4).
    pub const BIST: usize = 0x0f;
    /// First of the six Base Address registers, 32 bits each (PCI 6.2.5.1).
    pub const BAR0: usize = 0x10;
    /// CardBus CIS Pointer, 32 bits (PCI 6.2.4).
    pub const CARDBUS_CIS: usize = 0x28;
    /// Subsystem Vendor ID, 16 bits (PCI 6.2.4).
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
    /// Subsystem ID, 16 bits (PCI 6.2.4).
    pub const SUBSYSTEM_ID: usize = 0x2e;
    /// Expansion ROM Base Address, 32 bits (PCI 6.2.5.2).
    pub const EXPANSION_ROM: usize = 0x30;
    /// Capabilities Pointer, 8 bits (PCI 6.7).
    pub const CAPABILITIES_POINTER: usize = 0x34;
    /// Interrupt Line, 8 bits (PCI 6.2.4).
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// Interrupt Pin, 8 bits (PCI 6.2.4).
    pub const INTERRUPT_PIN: usize = 0x3d;
    /// Min_Gnt, 8 bits (PCI 6.2.4).
    pub const MIN_GNT: usize = 0x3e;
    /// Max_Lat, 8 bits (PCI 6.2.4).
    pub const MAX_LAT: usize = 0x3f;
    /// Length of the header; capabilities follow it.
    pub const LENGTH: u8 = 0x40;
}

/// Base Address register encodings (PCI 6.2.5.1).
pub mod bar {
    /// Number of Base Address registers in a type 0 header.
    pub const COUNT: usize = 6;
    /// Bit 0: the BAR maps into I/O space.
    pub const IO_SPACE: u32 = 1 << 0;
    /// Bits 2:1 = 10b: a memory BAR that can be placed anywhere in the 64-bit address space.
    pub const MEMORY_64: u32 = 0b10 << 1;
    /// Bit 3: reads have no side effects and writes may be merged.
    pub const PREFETCHABLE: u32 = 1 << 3;
    /// Smallest memory BAR: bits 3:0 hold the type.
    pub const MEMORY_SIZE_MIN: u64 = 16;
    /// Largest 32-bit memory BAR: 2 GiB, one writable address bit.
    pub const MEMORY32_SIZE_MAX: u64 = 1 << 31;
    /// Largest 64-bit memory BAR: one writable address bit.
    pub const MEMORY64_SIZE_MAX: u64 = 1 << 63;
    /// Smallest I/O BAR: bits 1:0 hold the type.
    pub const IO_SIZE_MIN: u64 = 4;
    /// Largest I/O BAR: a function must not ask for more than 256 bytes.
    pub const IO_SIZE_MAX: u64 = 256;
}

/// Expansion ROM Base Address register (PCI 6.2.5.2).
pub mod rom {
    /// Bit 0: the function claims the ROM, if it also claims memory.
    pub const ENABLE: u32 = 1 << 0;
    /// Smallest ROM: bits 10:1 are reserved.
    pub const SIZE_MIN: u32 = 1 << 11;
    /// Largest ROM: a function must not ask for more than 16 MiB.
    pub const SIZE_MAX: u32 = 1 << 24;
}

/// The two bytes that every capability starts with (PCI 6.7).
pub mod capability {
    /// Capability ID, 8 bits.
    pub const ID: usize = 0x00;
    /// Pointer to the next capability, 8 bits; 0 ends the list.
    pub const NEXT: usize = 0x01;
}

/// Power management capability (PM 3.2).
pub mod power {
    /// Capability ID (PM 3.2.1).
    pub const CAPABILITY_ID: u8 = 0x01;
    /// Length of the capability.
    pub const LENGTH: u8 = 0x08;
    /// Power Management Capabilities, 16 bits (PM 3.2.3).
    pub const PMC: usize = 0x02;
    /// Power Management Control/Status, 16 bits (PM 3.2.4).
    pub const PMCSR: usize = 0x04;
    /// PMC bits 2:0: version 3 is revision 1.2 of the specification.
    pub const PMC_VERSION: u16 = 3;
    /// PMCSR bits 1:0: the power state.
    pub const PMCSR_POWER_STATE: u16 = 0b11;
    /// PMCSR bit 3: D3hot to D0 keeps the function's context.
    pub const PMCSR_NO_SOFT_RESET: u16 = 1 << 3;
}

/// MSI capability with a 64-bit message address (PCI 6.8.1).
pub mod msi {
    /// Capability ID (PCI 6.8.1.1).
    pub const CAPABILITY_ID: u8 = 0x05;
    /// Length without per-vector masking.
    pub const LENGTH: u8 = 0x0e;
    /// Length with per-vector masking.
    pub const LENGTH_MASKING: u8 = 0x18;
    /// Message Control, 16 bits (PCI 6.8.1.3).
    pub const MESSAGE_CONTROL: usize = 0x02;
    /// Message Address, 32 bits (PCI 6.8.1.4).
    pub const MESSAGE_ADDRESS: usize = 0x04;
    /// Message Upper Address, 32 bits (PCI 6.8.1.5).
    pub const MESSAGE_UPPER_ADDRESS: usize = 0x08;
    /// Message Data, 16 bits (PCI 6.8.1.6).
    pub const MESSAGE_DATA: usize = 0x0c;
    /// Mask Bits, 32 bits (PCI 6.8.1.7).
    pub const MASK: usize = 0x10;
    /// Pending Bits, 32 bits (PCI 6.8.1.8).
    pub const PENDING: usize = 0x14;
    /// Message Control bit 0: the function may send messages and must not use its INTx pin.
    pub const CONTROL_ENABLE: u16 = 1 << 0;
    /// Message Control bits 3:1: log2 of the vectors the function asks for.
    pub const CONTROL_MULTIPLE_CAPABLE_SHIFT: u32 = 1;
    /// Message Control bits 6:4: log2 of the vectors that software granted.
    pub const CONTROL_MULTIPLE_ENABLE: u16 = 0b111 << CONTROL_MULTIPLE_ENABLE_SHIFT;
    /// Position of [`CONTROL_MULTIPLE_ENABLE`].
    pub const CONTROL_MULTIPLE_ENABLE_SHIFT: u32 = 4;
    /// Message Control bit 7: there is an upper message address.
    pub const CONTROL_64_BIT: u16 = 1 << 7;
    /// Message Control bit 8: there are mask and pending bits.
    pub const CONTROL_PER_VECTOR_MASKING: u16 = 1 << 8;
    /// Message Address bits 1:0 are always 0: a message is an aligned doubleword write.
    pub const ADDRESS_MASK: u32 = !0b11;
}

/// MSI-X capability, and the structures in memory that it points to (PCI 6.8.2).
pub mod msix {
    /// Capability ID (PCI 6.8.2.1).
    pub const CAPABILITY_ID: u8 = 0x11;
    /// Length of the capability.
    pub const LENGTH: u8 = 0x0c;
    /// Message Control, 16 bits (PCI 6.8.2.3).
    pub const MESSAGE_CONTROL: usize = 0x02;
    /// Table Offset/Table BIR, 32 bits (PCI 6.8.2.4).
    pub const TABLE: usize = 0x04;
    /// PBA Offset/PBA BIR, 32 bits (PCI 6.8.2.5).
    pub const PENDING: usize = 0x08;
    /// Message Control bit 14: all vectors are masked, whatever their own mask bits say.
    pub const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
    /// Message Control bit 15: the function may send messages and must not use its INTx pin.
    pub const CONTROL_ENABLE: u16 = 1 << 15;
    /// The most vectors a function can have: Message Control bits 10:0 hold their number less one.
    pub const VECTORS_MAX: u16 = 2048;
    /// Length of a table entry: message address, upper address, data, vector control.
    pub const ENTRY_LENGTH: usize = 16;
    /// Vector Control in a table entry, 32 bits (PCI 6.8.2.9).
    pub const ENTRY_VECTOR_CONTROL: usize = 12;
    /// Vector Control bit 0: the vector is masked. Set at reset; the other bits are reserved.
    pub const VECTOR_CONTROL_MASK: u8 = 1 << 0;
    /// Table and Pending Bit Array are aligned to this many bytes: the BIR takes bits 2:0.
    pub const ALIGNMENT: u64 = 8;
}

/// Vendor-specific capability (PCI appendix H).
pub mod vendor {
    /// Capability ID.
    pub const CAPABILITY_ID: u8 = 0x09;
    /// Length of the capability, 8 bits, with the three bytes up to and including this one.
    pub const LENGTH: usize = 0x02;
    /// First byte that is the vendor's.
    pub const DATA: usize = 0x03;
}

/// A vendor-specific capability that is a window to BARs: `struct virtio_pci_cfg_cap` (virtio 1.2,
/// 4.1.4.9).
pub mod vendor_window {
    /// Number of the BAR, 8 bits.
    pub const BAR: usize = 0x04;
    /// Offset in the BAR, 32 bits.
    pub const OFFSET: usize = 0x08;
    /// Length of the access, 32 bits: 1, 2 or 4.
    pub const ACCESS_LENGTH: usize = 0x0c;
    /// What is read or written, 32 bits.
    pub const DATA: usize = 0x10;
    /// Where the capability ends.
    pub const END: usize = 0x14;
}

/// PCI Express capability, version 2 (PCIe 7.5.3).
pub mod express {
    /// Capability ID (PCIe 7.5.3.1).
    pub const CAPABILITY_ID: u8 = 0x10;
    /// Length of the version 2 capability.
    pub const LENGTH: u8 = 0x3c;
    /// PCI Express Capabilities, 16 bits (PCIe 7.5.3.2).
    pub const CAPABILITIES: usize = 0x02;
    /// Device Capabilities, 32 bits (PCIe 7.5.3.3).
    pub const DEVICE_CAPABILITIES: usize = 0x04;
    /// Device Control, 16 bits (PCIe 7.5.3.4).
    pub const DEVICE_CONTROL: usize = 0x08;
    /// Device Status, 16 bits (PCIe 7.5.3.5).
    pub const DEVICE_STATUS: usize = 0x0a;
    /// Link Capabilities, 32 bits (PCIe 7.5.3.6).
    pub const LINK_CAPABILITIES: usize = 0x0c;
    /// Link Control, 16 bits (PCIe 7.5.3.7).
    pub const LINK_CONTROL: usize = 0x10;
    /// Link Status, 16 bits (PCIe 7.5.3.8).
    pub const LINK_STATUS: usize = 0x12;
    /// Device Capabilities 2, 32 bits (PCIe 7.5.3.15).
    pub const DEVICE_CAPABILITIES_2: usize = 0x24;
    /// Device Control 2, 16 bits (PCIe 7.5.3.16).
    pub const DEVICE_CONTROL_2: usize = 0x28;
    /// Device Status 2, 16 bits (PCIe 7.5.3.17).
    pub const DEVICE_STATUS_2: usize = 0x2a;
    /// Link Capabilities 2, 32 bits (PCIe 7.5.3.18).
    pub const LINK_CAPABILITIES_2: usize = 0x2c;
    /// Link Control 2, 16 bits (PCIe 7.5.3.19).
    pub const LINK_CONTROL_2: usize = 0x30;
    /// Link Status 2, 16 bits (PCIe 7.5.3.20).
    pub const LINK_STATUS_2: usize = 0x32;
    /// PCI Express Capabilities bits 3:0: the version of this structure.
    pub const CAPABILITIES_VERSION: u16 = 2;
    /// PCI Express Capabilities bits 7:4: PCI Express Endpoint.
    pub const CAPABILITIES_ENDPOINT: u16 = 0 << 4;
    /// Device Capabilities bit 15: errors are reported by role (PCIe 6.2.3.2.4).
    pub const DEVICE_CAPABILITIES_ROLE_BASED_ERRORS: u32 = 1 << 15;
    /// Device Capabilities bit 28: the function can be reset on its own (PCIe 6.6.2).
    pub const DEVICE_CAPABILITIES_FLR: u32 = 1 << 28;
    /// Link Capabilities and Link Status bits 3:0: 2.5 GT/s.
    pub const LINK_SPEED_2_5: u16 = 1;
    /// Link Capabilities and Link Status bits 9:4: one lane.
    pub const LINK_WIDTH_X1: u16 = 1 << 4;
    /// Link Capabilities bit 22: "no ASPM support" means what it says.
    pub const LINK_CAPABILITIES_ASPM_OPTIONALITY: u32 = 1 << 22;
    /// Link Control bits an endpoint implements: ASPM Control (1:0), Common Clock Configuration
    /// (6), Extended Synch (7).
    pub const LINK_CONTROL_WRITABLE: u16 = 1 << 7 | 1 << 6 | 0b11;
    /// Link Capabilities 2 bits 7:1: the link runs at 2.5 GT/s only.
    pub const LINK_CAPABILITIES_2_SPEED_2_5: u32 = 1 << 1;
}

/// The doubleword that every extended capability starts with (PCIe 7.6.3).
pub mod extended_capability {
    /// Where the first extended capability is.
    pub const FIRST: usize = 0x100;
    /// Position of the version, bits 19:16. The capability ID is in bits 15:0.
    pub const VERSION_SHIFT: u32 = 16;
    /// Position of the offset of the next extended capability, bits 31:20; 0 ends the list.
    pub const NEXT_SHIFT: u32 = 20;
}

/// Advanced Error Reporting extended capability (PCIe 7.8.4), as an endpoint has it.
pub mod aer {
    /// Extended capability ID (PCIe 7.8.4.1).
    pub const CAPABILITY_ID: u16 = 0x0001;
    /// Version of the structure.
    pub const VERSION: u32 = 2;
    /// Length of the structure, with the registers of root ports and of TLP prefixes, which read 0.
    pub const LENGTH: usize = 0x48;
    /// Uncorrectable Error Status, 32 bits (PCIe 7.8.4.2).
    pub const UNCORRECTABLE_STATUS: usize = 0x04;
    /// Uncorrectable Error Mask, 32 bits (PCIe 7.8.4.3).
    pub const UNCORRECTABLE_MASK: usize = 0x08;
    /// Uncorrectable Error Severity, 32 bits (PCIe 7.8.4.4).
    pub const UNCORRECTABLE_SEVERITY: usize = 0x0c;
    /// Correctable Error Status, 32 bits (PCIe 7.8.4.5).
    pub const CORRECTABLE_STATUS: usize = 0x10;
    /// Correctable Error Mask, 32 bits (PCIe 7.8.4.6).
    pub const CORRECTABLE_MASK: usize = 0x14;
    /// Advanced Error Capabilities and Control, 32 bits (PCIe 7.8.4.7).
    pub const CAPABILITIES_AND_CONTROL: usize = 0x18;
    /// Header Log, four doublewords (PCIe 7.8.4.8).
    pub const HEADER_LOG: usize = 0x1c;
    /// Capabilities and Control bits 4:0: First Error Pointer.
    pub const FIRST_ERROR_POINTER: u32 = 0b1_1111;
    /// Position of Unsupported Request Error in the uncorrectable registers.
    pub const UNSUPPORTED_REQUEST_BIT: u32 = 20;
    /// The uncorrectable errors an endpoint implements: Data Link Protocol (4), Poisoned TLP (12),
    /// Completion Timeout (14), Unexpected Completion (16), Malformed TLP (18), Unsupported
    /// Request (20). The optional ones are left out.
    pub const UNCORRECTABLE_ERRORS: u32 =
        1 << 4 | 1 << 12 | 1 << 14 | 1 << 16 | 1 << 18 | 1 << UNSUPPORTED_REQUEST_BIT;
    /// Those that are fatal at reset: Data Link Protocol and Malformed TLP.
    pub const UNCORRECTABLE_SEVERITY_RESET: u32 = 1 << 4 | 1 << 18;
    /// Advisory Non-Fatal Error in the correctable registers. Masked at reset.
    pub const ADVISORY_NON_FATAL: u32 = 1 << 13;
    /// The correctable errors an endpoint implements: Bad TLP (6), Bad DLLP (7), REPLAY_NUM
    /// Rollover (8), Replay Timer Timeout (12), Advisory Non-Fatal (13). The optional ones are left
    /// out.
    pub const CORRECTABLE_ERRORS: u32 = 1 << 6 | 1 << 7 | 1 << 8 | 1 << 12 | ADVISORY_NON_FATAL;
}
