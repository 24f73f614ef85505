//! Advanced Error Reporting (PCIe 6.2 and 7.8.4).

use super::express::Severity;
use crate::pci::config_space::{ConfigSpace, Register};
use crate::pci::spec::aer as registers;

const UNSUPPORTED_REQUEST: u32 = 1 << registers::UNSUPPORTED_REQUEST_BIT;

/// The capability at its place in configuration space.
#[derive(Clone, Copy, Debug)]
pub(in crate::pci) struct AerCapability {
    at: usize,
}

impl AerCapability {
    pub(super) const fn new(at: usize) -> Self {
        Self { at }
    }

    pub(super) const fn at(&self) -> usize {
        self.at
    }

    pub(super) fn registers(&self) -> [Register; 10] {
        let log = |name, dword: usize, volatile: u32| {
            let offset = self.at + registers::HEADER_LOG + 4 * dword;
            Register::dword(name, offset).volatile(volatile).sticky(volatile)
        };
        [
            Register::dword("Uncorrectable Error Status", self.uncorrectable_status())
                .write_one_to_clear(registers::UNCORRECTABLE_ERRORS)
                .volatile(UNSUPPORTED_REQUEST)
                .sticky(registers::UNCORRECTABLE_ERRORS),
            Register::dword("Uncorrectable Error Mask", self.uncorrectable_mask())
                .read_write(registers::UNCORRECTABLE_ERRORS)
                .sticky(registers::UNCORRECTABLE_ERRORS),
            Register::dword("Uncorrectable Error Severity", self.uncorrectable_severity())
                .reset(registers::UNCORRECTABLE_SEVERITY_RESET)
                .read_write(registers::UNCORRECTABLE_ERRORS)
                .sticky(registers::UNCORRECTABLE_ERRORS),
            Register::dword("Correctable Error Status", self.correctable_status())
                .write_one_to_clear(registers::CORRECTABLE_ERRORS)
                .volatile(registers::ADVISORY_NON_FATAL)
                .sticky(registers::CORRECTABLE_ERRORS),
            Register::dword("Correctable Error Mask", self.correctable_mask())
                .reset(registers::ADVISORY_NON_FATAL)
                .read_write(registers::CORRECTABLE_ERRORS)
                .sticky(registers::CORRECTABLE_ERRORS),
            // The ECRC and multiple header fields read 0: the function has neither.
            Register::dword("Advanced Error Capabilities and Control", self.control())
                .volatile(UNSUPPORTED_REQUEST_POINTER)
                .sticky(registers::FIRST_ERROR_POINTER),
            // Only bits that the header of a memory or I/O request can have set.
            log("Header Log 0", 0, 0x6200_03ff),
            log("Header Log 1", 1, 0x0000_00ff),
            log("Header Log 2", 2, u32::MAX),
            log("Header Log 3", 3, !0b11),
        ]
    }

    /// Whether software wants an Unsupported Request to be a fatal error.
    pub(in crate::pci) fn unsupported_request_is_fatal(&self, space: &ConfigSpace) -> bool {
        space.u32_at(self.uncorrectable_severity()) & UNSUPPORTED_REQUEST != 0
    }

    /// Logs an Unsupported Request with the header of its packet (PCIe 6.2.4 and figure 6-2).
    /// Returns whether the masks let the function report it.
    pub(in crate::pci) fn log(
        &self,
        space: &mut ConfigSpace,
        severity: Severity,
        header: [u32; 4],
    ) -> bool {
        if severity == Severity::Advisory {
            set(space, self.correctable_status(), registers::ADVISORY_NON_FATAL);
            // Masked, an advisory error leaves no trace in the uncorrectable registers
            // (PCIe 6.2.4.3).
            if space.u32_at(self.correctable_mask()) & registers::ADVISORY_NON_FATAL != 0 {
                return false;
            }
        }
        let log_is_free = !self.first_error_is_logged(space);
        set(space, self.uncorrectable_status(), UNSUPPORTED_REQUEST);
        let masked = space.u32_at(self.uncorrectable_mask()) & UNSUPPORTED_REQUEST != 0;
        match (log_is_free, masked) {
            // The log holds the first error until software clears its status bit (PCIe 6.2.4.2).
            (false, _) => {}
            (true, false) => {
                self.point_to(space, UNSUPPORTED_REQUEST_POINTER);
                for (dword, value) in header.into_iter().enumerate() {
                    space.set_u32(self.at + registers::HEADER_LOG + 4 * dword, value);
                }
            }
            // The status bit is set but the log has no header for it. A pointer left from an error
            // long cleared would make an old header look like this error's.
            (true, true) => self.point_to(space, 0),
        }
        // A masked uncorrectable error is not reported. An advisory one is reported as the
        // correctable error that it counts as, whose mask was looked at.
        severity == Severity::Advisory || !masked
    }

    /// Whether the First Error Pointer holds a value that it can take.
    pub(in crate::pci) fn is_possible(&self, space: &ConfigSpace) -> bool {
        let pointer = space.u32_at(self.control()) & registers::FIRST_ERROR_POINTER;
        pointer == 0 || pointer == UNSUPPORTED_REQUEST_POINTER
    }

    /// Whether the First Error Pointer is valid: its status bit is set (PCIe 6.2.4.2).
    fn first_error_is_logged(&self, space: &ConfigSpace) -> bool {
        let pointer = space.u32_at(self.control()) & registers::FIRST_ERROR_POINTER;
        space.u32_at(self.uncorrectable_status()) & 1 << pointer != 0
    }

    fn point_to(&self, space: &mut ConfigSpace, pointer: u32) {
        let control = space.u32_at(self.control()) & !registers::FIRST_ERROR_POINTER;
        space.set_u32(self.control(), control | pointer);
    }

    const fn uncorrectable_status(&self) -> usize {
        self.at + registers::UNCORRECTABLE_STATUS
    }

    const fn uncorrectable_mask(&self) -> usize {
        self.at + registers::UNCORRECTABLE_MASK
    }

    const fn uncorrectable_severity(&self) -> usize {
        self.at + registers::UNCORRECTABLE_SEVERITY
    }

    const fn correctable_status(&self) -> usize {
        self.at + registers::CORRECTABLE_STATUS
    }

    const fn correctable_mask(&self) -> usize {
        self.at + registers::CORRECTABLE_MASK
    }

    pub(in crate::pci) const fn control(&self) -> usize {
        self.at + registers::CAPABILITIES_AND_CONTROL
    }
}

/// What the First Error Pointer says of an Unsupported Request.
const UNSUPPORTED_REQUEST_POINTER: u32 = registers::UNSUPPORTED_REQUEST_BIT;

fn set(space: &mut ConfigSpace, offset: usize, bits: u32) {
    space.set_u32(offset, space.u32_at(offset) | bits);
}
