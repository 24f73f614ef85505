//! The guest's own vfio-pci, through the container interface of `linux/vfio.h`: the way to take a
//! function's interrupts on eventfds and to put its DMA behind the guest's IOMMU.

mod uapi;

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::memory::{DmaPage, PAGE_SIZE};
use crate::mmio::Mapping;
use crate::pci::{COMMAND, Function};
use crate::{Result, ensure};
use uapi::{Access, IrqAction};

pub(crate) use uapi::Interrupt;

/// A function that vfio-pci owns, and the IOMMU domain it does DMA in.
#[derive(Debug)]
pub(crate) struct Device {
    device: File,
    container: OwnedFd,
    /// Closing the group takes the device out of the container.
    _group: OwnedFd,
}

/// An interrupt whose vectors signal an eventfd each, until this is dropped.
#[derive(Debug)]
pub(crate) struct Enabled<'a> {
    device: &'a Device,
    interrupt: Interrupt,
    events: Vec<File>,
}

impl Device {
    /// Binds vfio-pci to the function and opens it.
    ///
    /// # Errors
    /// No vfio-pci, no IOMMU, or the kernel refuses.
    pub(crate) fn open(function: &Function) -> Result<Self> {
        let address = function.address()?;
        function.bind("vfio-pci")?;

        let container = open_node("/dev/vfio/vfio")?;
        let group = open_node(&format!("/dev/vfio/{}", function.link_target("iommu_group")?))?;
        uapi::set_container(&group, &container)?;
        uapi::set_type1_iommu(&container)?;
        let device = uapi::device_fd(&group, address)?;
        Ok(Self { device: File::from(device), container, _group: group })
    }

    /// Maps a BAR.
    pub(crate) fn map_bar(&self, index: u32) -> Result<Mapping> {
        let region = uapi::region(&self.device, index)?;
        Mapping::of_file(&self.device, region.offset, usize::try_from(region.len)?)
    }

    /// Sets or clears bits of the Command register. vfio-pci keeps the memory and I/O enables to
    /// itself and passes Bus Master Enable on.
    pub(crate) fn set_command(&self, bits: u16, on: bool) -> Result<()> {
        let at = uapi::region(&self.device, uapi::CONFIG_REGION)?.offset + COMMAND;
        let mut command = [0; 2];
        self.device.read_exact_at(&mut command, at)?;
        let before = u16::from_le_bytes(command);
        let after = if on { before | bits } else { before & !bits };
        self.device.write_all_at(&after.to_le_bytes(), at)?;
        self.device.read_exact_at(&mut command, at)?;
        let seen = u16::from_le_bytes(command);
        ensure!(seen & bits == after & bits, "Command reads {seen:#06x} after {after:#06x}");
        Ok(())
    }

    /// One load of 4 bytes from a BAR that may be too small to be mapped.
    pub(crate) fn read_bar(&self, index: u32, offset: u64) -> Result<u32> {
        let mut value = [0; 4];
        self.device
            .read_exact_at(&mut value, uapi::region(&self.device, index)?.offset + offset)?;
        Ok(u32::from_le_bytes(value))
    }

    /// One store of 4 bytes to a BAR that may be too small to be mapped.
    pub(crate) fn write_bar(&self, index: u32, offset: u64, value: u32) -> Result<()> {
        let at = uapi::region(&self.device, index)?.offset + offset;
        Ok(self.device.write_all_at(&value.to_le_bytes(), at)?)
    }

    /// Routes an interrupt to a new eventfd.
    pub(crate) fn enable(&self, interrupt: Interrupt) -> Result<Enabled<'_>> {
        self.enable_vectors(interrupt, 1)
    }

    /// Routes the first vectors of an interrupt to a new eventfd each.
    pub(crate) fn enable_vectors(&self, interrupt: Interrupt, count: usize) -> Result<Enabled<'_>> {
        let events = (0..count)
            .map(|_| Ok(File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
            .collect::<Result<Vec<_>>>()?;
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        uapi::set_eventfds(&self.device, interrupt, &fds)?;
        Ok(Enabled { device: self, interrupt, events })
    }

    /// Lets the function read and write `page` at bus address `iova`.
    pub(crate) fn map_dma(&self, page: &DmaPage, iova: u64) -> Result<()> {
        uapi::map_dma(&self.container, page.address(), iova, PAGE_SIZE, Access::ReadWrite)
    }

    /// Lets the function read `page` at bus address `iova`, but not write it.
    pub(crate) fn map_dma_for_reads(&self, page: &DmaPage, iova: u64) -> Result<()> {
        uapi::map_dma(&self.container, page.address(), iova, PAGE_SIZE, Access::Read)
    }

    /// Takes the page at `iova` away from the function.
    pub(crate) fn unmap_dma(&self, iova: u64) -> Result<()> {
        self.unmap_dma_range(iova, PAGE_SIZE)
    }

    /// Takes every page mapped in a range away from the function.
    pub(crate) fn unmap_dma_range(&self, iova: u64, len: usize) -> Result<()> {
        uapi::unmap_dma(&self.container, iova, len)
    }
}

impl Enabled<'_> {
    /// Waits for the interrupt, if it has one vector, and says how often it arrived since the last
    /// call.
    ///
    /// # Errors
    /// It does not arrive.
    pub(crate) fn wait(&self) -> Result<u64> {
        self.wait_on(0)
    }

    /// As [`Self::wait`], for one vector.
    ///
    /// # Errors
    /// It does not arrive.
    pub(crate) fn wait_on(&self, vector: usize) -> Result<u64> {
        const BOUND: Duration = Duration::from_secs(10);
        ensure!(self.arrived_within(BOUND, vector)?, "no interrupt in {BOUND:?}");
        let mut event = self.event(vector)?;
        let mut count = [0; 8];
        event.read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }

    /// Fails if any vector arrives although it must not. Whoever relies on absence proves it by
    /// the count of a later [`Self::wait`]; looking for a while first keeps a wrong arrival from
    /// merging with the right one.
    pub(crate) fn expect_none(&self) -> Result<()> {
        const BOUND: Duration = Duration::from_millis(200);
        let mut fds: Vec<_> =
            self.events.iter().map(|event| PollFd::new(event, PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec::try_from(BOUND)?))?;
        let arrived = fds.iter().position(|fd| !fd.revents().is_empty());
        ensure!(arrived.is_none(), "interrupt vector {} arrived", arrived.unwrap_or_default());
        Ok(())
    }

    /// Takes what arrives by itself, such as what was pending when a vector was masked.
    pub(crate) fn settle(&self) -> Result<()> {
        while self.expect_none().is_err() {
            for vector in 0..self.events.len() {
                if self.has_arrived(vector)? {
                    self.wait_on(vector)?;
                }
            }
        }
        Ok(())
    }

    /// Says whether a vector has arrived and was not waited for, without looking for long.
    pub(crate) fn has_arrived(&self, vector: usize) -> Result<bool> {
        self.arrived_within(Duration::ZERO, vector)
    }

    /// Lets INTx through again; vfio masks it whenever it arrives.
    pub(crate) fn unmask(&self) -> Result<()> {
        uapi::act(&self.device.device, self.interrupt, IrqAction::Unmask)
    }

    fn arrived_within(&self, bound: Duration, vector: usize) -> Result<bool> {
        let mut fds = [PollFd::new(self.event(vector)?, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::try_from(bound)?))? != 0)
    }

    fn event(&self, vector: usize) -> Result<&File> {
        Ok(self.events.get(vector).ok_or_else(|| format!("vector {vector} is not enabled"))?)
    }
}

impl Drop for Enabled<'_> {
    fn drop(&mut self) {
        let disabled = uapi::act(&self.device.device, self.interrupt, IrqAction::Disable);
        disabled.expect("what was enabled can be disabled");
    }
}

fn open_node(path: &str) -> Result<OwnedFd> {
    let node = OpenOptions::new().read(true).write(true).open(path);
    Ok(node.map_err(|error| format!("{path}: {error}"))?.into())
}
