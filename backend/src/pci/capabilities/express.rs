//! The PCI Express capability of an endpoint (PCIe 7.5.3).

use bitflags::bitflags;

use crate::pci::config_space::{ConfigSpace, Register};
use crate::pci::spec::express as registers;

/// The PCI Express capability of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpressSpec {
    /// Software can reset the function on its own.
    pub function_level_reset: bool,
    /// The function has the Advanced Error Reporting extended capability.
    pub aer: bool,
}

bitflags! {
    /// Device Control (PCIe 7.5.3.4). Max_Payload_Size is hardwired to 128 bytes, the size that
    /// every function supports.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceControl: u16 {
        /// Correctable Error Reporting Enable.
        const CORRECTABLE_ERROR_REPORTING = 1 << 0;
        /// Non-Fatal Error Reporting Enable.
        const NON_FATAL_ERROR_REPORTING = 1 << 1;
        /// Fatal Error Reporting Enable.
        const FATAL_ERROR_REPORTING = 1 << 2;
        /// Unsupported Request Reporting Enable.
        const UNSUPPORTED_REQUEST_REPORTING = 1 << 3;
        /// Enable Relaxed Ordering.
        const RELAXED_ORDERING = 1 << 4;
        /// Enable No Snoop.
        const NO_SNOOP = 1 << 11;
        /// Max_Read_Request_Size, all of the field.
        const MAX_READ_REQUEST_SIZE = 0b111 << 12;
        /// Initiate Function Level Reset. Reads 0.
        const INITIATE_FLR = 1 << 15;
    }
}

impl DeviceControl {
    const WRITABLE: Self = Self::CORRECTABLE_ERROR_REPORTING
        .union(Self::NON_FATAL_ERROR_REPORTING)
        .union(Self::FATAL_ERROR_REPORTING)
        .union(Self::UNSUPPORTED_REQUEST_REPORTING)
        .union(Self::RELAXED_ORDERING)
        .union(Self::NO_SNOOP)
        .union(Self::MAX_READ_REQUEST_SIZE);

    /// Relaxed ordering and no snoop allowed, reads of up to 512 bytes.
    const RESET: Self =
        Self::RELAXED_ORDERING.union(Self::NO_SNOOP).union(Self::from_bits_retain(0b010 << 12));
}

bitflags! {
    /// Device Status (PCIe 7.5.3.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceStatus: u16 {
        /// Correctable Error Detected.
        const CORRECTABLE_ERROR_DETECTED = 1 << 0;
        /// Non-Fatal Error Detected.
        const NON_FATAL_ERROR_DETECTED = 1 << 1;
        /// Fatal Error Detected.
        const FATAL_ERROR_DETECTED = 1 << 2;
        /// Unsupported Request Detected.
        const UNSUPPORTED_REQUEST_DETECTED = 1 << 3;
    }
}

/// What an Unsupported Request counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pci) enum Severity {
    /// An advisory non-fatal error: the requester learns of it from the completion, so for the
    /// function it is a correctable one (PCIe 6.2.3.2.4.1).
    Advisory,
    /// A non-fatal error: nobody else learns of a lost posted request.
    NonFatal,
    /// A fatal error, because software said so. Then it makes no difference who else learns of it.
    Fatal,
}

impl Severity {
    const fn detected(self) -> DeviceStatus {
        match self {
            Self::Advisory => DeviceStatus::CORRECTABLE_ERROR_DETECTED,
            Self::NonFatal => DeviceStatus::NON_FATAL_ERROR_DETECTED,
            Self::Fatal => DeviceStatus::FATAL_ERROR_DETECTED,
        }
    }
}

/// The capability at its place in configuration space.
#[derive(Clone, Copy, Debug)]
pub(in crate::pci) struct ExpressCapability {
    at: u8,
    spec: ExpressSpec,
}

impl ExpressCapability {
    pub(super) const fn new(at: u8, spec: ExpressSpec) -> Self {
        Self { at, spec }
    }

    pub(super) const fn at(&self) -> u8 {
        self.at
    }

    /// Slot and root registers are left out: an endpoint has neither (PCIe 7.5.3).
    pub(super) fn registers(&self) -> [Register; 13] {
        let at = usize::from(self.at);
        let link = registers::LINK_SPEED_2_5 | registers::LINK_WIDTH_X1;
        let flr =
            if self.spec.function_level_reset { registers::DEVICE_CAPABILITIES_FLR } else { 0 };
        [
            Register::word("PCI Express Capabilities", at + registers::CAPABILITIES)
                .reset(registers::CAPABILITIES_VERSION | registers::CAPABILITIES_ENDPOINT),
            Register::dword("Device Capabilities", at + registers::DEVICE_CAPABILITIES)
                .reset(registers::DEVICE_CAPABILITIES_ROLE_BASED_ERRORS | flr),
            Register::word("Device Control", at + registers::DEVICE_CONTROL)
                .reset(DeviceControl::RESET.bits())
                .read_write(DeviceControl::WRITABLE.bits()),
            Register::word("Device Status", self.device_status())
                .write_one_to_clear(DeviceStatus::all().bits())
                .volatile(self.volatile_status().bits()),
            Register::dword("Link Capabilities", at + registers::LINK_CAPABILITIES)
                .reset(registers::LINK_CAPABILITIES_ASPM_OPTIONALITY | u32::from(link)),
            // The link is not the function's: resetting the function leaves it as it was
            // (PCIe 6.6.2).
            Register::word("Link Control", at + registers::LINK_CONTROL)
                .read_write(registers::LINK_CONTROL_WRITABLE)
                .reset_retains(registers::LINK_CONTROL_WRITABLE),
            Register::word("Link Status", at + registers::LINK_STATUS).reset(link),
            Register::dword("Device Capabilities 2", at + registers::DEVICE_CAPABILITIES_2),
            Register::word("Device Control 2", at + registers::DEVICE_CONTROL_2),
            Register::word("Device Status 2", at + registers::DEVICE_STATUS_2),
            Register::dword("Link Capabilities 2", at + registers::LINK_CAPABILITIES_2)
                .reset(registers::LINK_CAPABILITIES_2_SPEED_2_5),
            Register::word("Link Control 2", at + registers::LINK_CONTROL_2),
            Register::word("Link Status 2", at + registers::LINK_STATUS_2),
        ]
    }

    /// Whether a write of `data` at `offset` of configuration space sets Initiate FLR.
    pub(in crate::pci) fn initiates_flr(&self, offset: usize, data: &[u8]) -> bool {
        let [_, bit] = DeviceControl::INITIATE_FLR.bits().to_le_bytes();
        let upper_byte = usize::from(self.at) + registers::DEVICE_CONTROL + 1;
        self.spec.function_level_reset
            && upper_byte
                .checked_sub(offset)
                .and_then(|position| data.get(position))
                .is_some_and(|byte| byte & bit != 0)
    }

    /// Notes an Unsupported Request in Device Status: whether or not it is reported, and whatever
    /// the masks of Advanced Error Reporting say (PCIe 7.5.3.5).
    pub(in crate::pci) fn record_unsupported_request(
        &self,
        space: &mut ConfigSpace,
        severity: Severity,
    ) {
        let detected = severity.detected() | DeviceStatus::UNSUPPORTED_REQUEST_DETECTED;
        let status = self.device_status();
        space.set_u16(status, space.u16_at(status) | detected.bits());
    }

    pub(in crate::pci) fn control(&self, space: &ConfigSpace) -> DeviceControl {
        let at = usize::from(self.at) + registers::DEVICE_CONTROL;
        DeviceControl::from_bits_retain(space.u16_at(at))
    }

    /// Without Advanced Error Reporting, no error can be made fatal.
    fn volatile_status(&self) -> DeviceStatus {
        let mut volatile = DeviceStatus::all();
        volatile.set(DeviceStatus::FATAL_ERROR_DETECTED, self.spec.aer);
        volatile
    }

    fn device_status(&self) -> usize {
        usize::from(self.at) + registers::DEVICE_STATUS
    }
}
