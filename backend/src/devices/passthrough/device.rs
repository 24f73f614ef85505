//! A device as the kernel offers it: what it says about it, and what can be asked of it.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

/// A device that the kernel gave to this process (`<linux/vfio.h>`, device file).
pub trait VfioDevice: Send + fmt::Debug {
    /// Reads from a region. The kernel cuts the access into naturally aligned ones.
    ///
    /// # Errors
    /// What the kernel says: EIO for memory that the function does not decode.
    fn read(&self, region: VfioRegion, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes to a region.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn write(&self, region: VfioRegion, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Resets the function.
    ///
    /// # Errors
    /// What the kernel says: ENOTTY or EINVAL if it knows no way.
    fn reset(&self) -> Result<(), Errno>;

    /// Configures interrupts. Returns 0, or if there are fewer vectors than asked for, how many.
    ///
    /// # Errors
    /// What the kernel says.
    fn set_irqs(&self, irq: VfioIrq, command: IrqCommand<'_>) -> Result<u32, Errno>;

    /// The device file: what a VMM maps BARs from. Whoever holds it holds the whole device.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// A region of a PCI function that can be passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfioRegion {
    /// BAR0 to BAR5.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// Configuration space.
    Config,
}

impl VfioRegion {
    /// Every region, in the kernel's order.
    pub const ALL: [Self; 8] = [
        Self::Bar(0),
        Self::Bar(1),
        Self::Bar(2),
        Self::Bar(3),
        Self::Bar(4),
        Self::Bar(5),
        Self::Rom,
        Self::Config,
    ];

    /// Its number (`VFIO_PCI_*_REGION_INDEX`).
    #[must_use]
    pub fn index(self) -> u32 {
        match self {
            Self::Bar(bar) => bar.into(),
            Self::Rom => 6,
            Self::Config => 7,
        }
    }
}

/// An interrupt type (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfioIrq {
    /// The INTx pin.
    Intx,
    /// MSI vectors.
    Msi,
    /// MSI-X vectors.
    Msix,
    /// Uncorrected errors.
    Error,
    /// The host asks for the device.
    Request,
}

impl VfioIrq {
    /// Every type, in the kernel's order.
    pub const ALL: [Self; 5] = [Self::Intx, Self::Msi, Self::Msix, Self::Error, Self::Request];

    /// Its number.
    #[must_use]
    pub fn index(self) -> u32 {
        self as u32
    }
}

/// What the kernel is told about interrupts.
#[derive(Clone, Copy, Debug)]
pub enum IrqCommand<'a> {
    /// No interrupt of the type any more.
    Disable,
    /// Eventfds for vectors from `start` on; `None` leaves a vector without.
    Connect {
        /// First vector.
        start: u32,
        /// One a vector.
        eventfds: &'a [Option<BorrowedFd<'a>>],
    },
    /// As if the device had sent these vectors.
    Trigger {
        /// First vector.
        start: u32,
        /// One a vector: whether it is meant.
        which: &'a [bool],
    },
    /// Keep INTx silent.
    Mask,
    /// Let INTx speak again.
    Unmask,
    /// An eventfd that unmasks INTx, or none any more.
    UnmaskBy(Option<BorrowedFd<'a>>),
}

/// What a device is, asked once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// By [`VfioRegion::index`]; of size 0 where the function has none.
    pub regions: [RegionDescription; 8],
    /// By [`VfioIrq::index`].
    pub irqs: [IrqDescription; 5],
    /// Whether the kernel knows a way to reset the function alone.
    pub resettable: bool,
}

/// What a region is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionDescription {
    /// Length in bytes.
    pub size: u64,
    /// Where it starts in the device file.
    pub file_offset: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// The parts that can be mapped, in bytes from its start, ascending.
    pub mappable: Vec<Range<u64>>,
}

/// What an interrupt type is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqDescription {
    /// Number of vectors.
    pub count: u32,
    /// Whether it signals eventfds.
    pub eventfd: bool,
    /// Whether it can be masked.
    pub maskable: bool,
    /// Whether it masks itself when it fires.
    pub automasked: bool,
    /// Whether vectors can be added while others are in use.
    pub resizable: bool,
}

impl RegionDescription {
    /// Takes the pages that a range touches out of what can be mapped.
    pub fn unmappable(&mut self, range: &Range<u64>) {
        const PAGE: u64 = 4096;
        let start = range.start / PAGE * PAGE;
        let end = range.end.saturating_add(PAGE - 1) / PAGE * PAGE;
        self.mappable = std::mem::take(&mut self.mappable)
            .into_iter()
            .flat_map(|part| [part.start..part.end.min(start), part.start.max(end)..part.end])
            .filter(|part| !part.is_empty())
            .collect();
    }

    /// Whether the whole region can be mapped.
    #[must_use]
    pub fn wholly_mappable(&self) -> bool {
        self.mappable.first() == Some(&(0..self.size))
    }
}
