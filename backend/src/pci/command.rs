//! The Command and Status registers (PCI 6.2.2 and 6.2.3, PCIe 7.5.1.1.3 and 7.5.1.1.4).

use bitflags::bitflags;

use super::bar::BarKind;
use super::function_spec::FunctionSpec;

bitflags! {
    /// Command register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Command: u16 {
        /// I/O Space Enable: the function claims its I/O BARs.
        const IO_SPACE = 1 << 0;
        /// Memory Space Enable: the function claims its memory BARs.
        const MEMORY_SPACE = 1 << 1;
        /// Bus Master Enable: the function may read and write memory, and send MSI messages.
        const BUS_MASTER = 1 << 2;
        /// Parity Error Response: poisoned data is recorded in the Status register.
        const PARITY_ERROR_RESPONSE = 1 << 6;
        /// SERR# Enable: non-fatal and fatal errors are reported.
        const SERR_ENABLE = 1 << 8;
        /// Interrupt Disable: the function must not assert its INTx pin.
        const INTERRUPT_DISABLE = 1 << 10;
    }
}

impl Command {
    /// The bits that software can change in a function of this kind; the rest reads 0.
    pub(super) fn writable(spec: &FunctionSpec) -> Self {
        let mut writable = Self::BUS_MASTER | Self::PARITY_ERROR_RESPONSE | Self::SERR_ENABLE;
        // Without a BAR in a space there is nothing to claim, and the bit is hardwired to 0
        // (PCI 6.2.2).
        writable.set(Self::IO_SPACE, spec.bars.iter().any(|bar| bar.kind == BarKind::Io));
        let memory = spec.rom.is_some() || spec.bars.iter().any(|bar| bar.kind != BarKind::Io);
        writable.set(Self::MEMORY_SPACE, memory);
        // Optional for a function that does not generate INTx, and 0 if absent (PCIe 7.5.1.1.3).
        writable.set(Self::INTERRUPT_DISABLE, spec.interrupt_pin.is_some());
        writable
    }
}

bitflags! {
    /// Status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u16 {
        /// Interrupt Status: an INTx interrupt is pending inside the function, whether or not it
        /// may assert the pin.
        const INTERRUPT_STATUS = 1 << 3;
        /// Capabilities List: the Capabilities Pointer is valid.
        const CAPABILITIES_LIST = 1 << 4;
        /// Master Data Parity Error.
        const MASTER_DATA_PARITY_ERROR = 1 << 8;
        /// Signaled Target Abort.
        const SIGNALED_TARGET_ABORT = 1 << 11;
        /// Received Target Abort.
        const RECEIVED_TARGET_ABORT = 1 << 12;
        /// Received Master Abort.
        const RECEIVED_MASTER_ABORT = 1 << 13;
        /// Signaled System Error: the function sent a non-fatal or fatal error message.
        const SIGNALED_SYSTEM_ERROR = 1 << 14;
        /// Detected Parity Error.
        const DETECTED_PARITY_ERROR = 1 << 15;
    }
}

impl Status {
    /// The bits that software clears by writing 1 to them.
    pub(super) const WRITE_ONE_TO_CLEAR: Self = Self::MASTER_DATA_PARITY_ERROR
        .union(Self::SIGNALED_TARGET_ABORT)
        .union(Self::RECEIVED_TARGET_ABORT)
        .union(Self::RECEIVED_MASTER_ABORT)
        .union(Self::SIGNALED_SYSTEM_ERROR)
        .union(Self::DETECTED_PARITY_ERROR);

    /// The bits that a function of this kind changes by itself.
    pub(super) fn volatile(spec: &FunctionSpec) -> Self {
        let mut volatile = Self::empty();
        volatile.set(Self::INTERRUPT_STATUS, spec.interrupt_pin.is_some());
        volatile.set(Self::SIGNALED_SYSTEM_ERROR, spec.express.is_some());
        volatile
    }
}
