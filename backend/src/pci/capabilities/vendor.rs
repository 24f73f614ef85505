//! The vendor-specific capability (PCI appendix H).

use crate::pci::config_space::Register;
use crate::pci::spec::{vendor as registers, vendor_window as window};

/// A vendor-specific capability: bytes that mean something to the vendor's driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VendorSpec {
    /// The bytes behind the capability's length.
    pub bytes: Vec<VendorByte>,
}

/// One byte of a vendor-specific capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VendorByte {
    /// Value at power-on and after a reset.
    pub reset: u8,
    /// Bits that software sets and clears.
    pub read_write: u8,
}

/// What a window has behind its length.
const WINDOW_BYTES: usize = window::END - registers::DATA;

impl VendorSpec {
    /// A capability that software only reads.
    pub fn read_only(bytes: &[u8]) -> Self {
        let bytes = bytes.iter().map(|&reset| VendorByte { reset, read_write: 0 }).collect();
        Self { bytes }
    }

    /// A window to the function's BARs: virtio's PCI configuration access capability (virtio 1.2,
    /// 4.1.4.9), whose type has the number `cfg_type`. It works if
    /// [`FunctionSpec::bar_window`](crate::pci::FunctionSpec::bar_window) points to it.
    pub fn bar_window(cfg_type: u8) -> Self {
        let mut bytes = vec![VendorByte { reset: 0, read_write: 0xff }; WINDOW_BYTES];
        let padding = window::BAR + 1 - registers::DATA..window::OFFSET - registers::DATA;
        bytes[padding].fill(VendorByte::default());
        bytes[0] = VendorByte { reset: cfg_type, read_write: 0 };
        Self { bytes }
    }

    /// Whether it is long enough to be a window.
    pub(super) fn has_window(&self) -> bool {
        self.bytes.len() >= WINDOW_BYTES
    }

    /// Length of the capability in bytes.
    pub(super) fn length(&self) -> usize {
        registers::DATA + self.bytes.len()
    }

    /// The registers behind ID and link of the capability at `at`: its length, the byte that
    /// completes the first doubleword, then doublewords.
    pub(super) fn registers(&self, at: usize) -> Vec<Register> {
        const NAME: &str = "Vendor-Specific Information";
        // Capabilities that do not fit below 0x100 were refused.
        let length = u8::try_from(self.length()).expect("capabilities end by 0x100");
        let mut list =
            vec![Register::byte("Vendor-Specific Length", at + registers::LENGTH).reset(length)];
        let (first, rest) = self.bytes.split_at(self.bytes.len().min(1));
        let mut offset = at + registers::DATA;
        for byte in first {
            list.push(Register::byte(NAME, offset).reset(byte.reset).read_write(byte.read_write));
            offset += 1;
        }
        let mut dwords = rest.chunks_exact(4);
        for dword in &mut dwords {
            let value = |byte: fn(&VendorByte) -> u8| {
                dword.iter().rev().fold(0, |value, b| value << 8 | u32::from(byte(b)))
            };
            list.push(
                Register::dword(NAME, offset)
                    .reset(value(|byte| byte.reset))
                    .read_write(value(|byte| byte.read_write)),
            );
            offset += 4;
        }
        for byte in dwords.remainder() {
            list.push(Register::byte(NAME, offset).reset(byte.reset).read_write(byte.read_write));
            offset += 1;
        }
        list
    }
}
