//! The guest's own vfio-pci, through the container interface of `linux/vfio.h`: the way to take a
//! function's interrupts on eventfds and to put its DMA behind the guest's IOMMU.

mod uapi;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::memory::{DmaPage, PAGE_SIZE};
use crate::mmio::Mapping;
use crate::pci::{COMMAND, Function};
use crate::{Result, ensure};
use uapi::IrqAction;

pub(crate) use uapi::Interrupt;

/// A function that vfio-pci owns, and the IOMMU domain it does DMA in.
#[derive(Debug)]
pub(crate) struct Device {
    device: File,
    container: OwnedFd,
    /// Closing the group takes the device out of the container.
    _group: OwnedFd,
}

/// An interrupt that signals an eventfd, until this is dropped.
#[derive(Debug)]
pub(crate) struct Enabled<'a> {
    device: &'a Device,
    interrupt: Interrupt,
    event: File,
}

impl Device {
    /// Binds vfio-pci to the function and opens it.
    ///
    /// # Errors
    /// No vfio-pci, no IOMMU, or the kernel refuses.
    pub(crate) fn open(function: &Function) -> Result<Self> {
        let address = function.address()?;
        function.set_attribute("driver_override", "vfio-pci")?;
        fs::write("/sys/bus/pci/drivers_probe", address)?;
        let driver = function.link_target("driver")?;
        ensure!(driver == "vfio-pci", "{address} is driven by {driver}");

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

    /// Routes an interrupt to a new eventfd.
    pub(crate) fn enable(&self, interrupt: Interrupt) -> Result<Enabled<'_>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        uapi::set_eventfd(&self.device, interrupt, event.as_fd())?;
        Ok(Enabled { device: self, interrupt, event: File::from(event) })
    }

    /// Lets the function read and write `page` at bus address `iova`.
    pub(crate) fn map_dma(&self, page: &DmaPage, iova: u64) -> Result<()> {
        uapi::map_dma(&self.container, page.address(), iova, PAGE_SIZE)
    }

    /// Takes the page at `iova` away from the function.
    pub(crate) fn unmap_dma(&self, iova: u64) -> Result<()> {
        uapi::unmap_dma(&self.container, iova, PAGE_SIZE)
    }
}

impl Enabled<'_> {
    /// Waits for the interrupt and says how often it arrived since the last call.
    ///
    /// # Errors
    /// It does not arrive.
    pub(crate) fn wait(&self) -> Result<u64> {
        const BOUND: Duration = Duration::from_secs(10);
        ensure!(self.within(BOUND)?, "no interrupt in {BOUND:?}");
        let mut count = [0; 8];
        (&self.event).read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }

    /// Fails if the interrupt arrives although it must not. Whoever relies on absence proves it by
    /// the count of a later [`Self::wait`]; looking for a while first keeps a wrong arrival from
    /// merging with the right one.
    pub(crate) fn expect_none(&self) -> Result<()> {
        ensure!(!self.within(Duration::from_millis(200))?, "an interrupt arrived");
        Ok(())
    }

    /// Lets INTx through again; vfio masks it whenever it arrives.
    pub(crate) fn unmask(&self) -> Result<()> {
        uapi::act(&self.device.device, self.interrupt, IrqAction::Unmask)
    }

    fn within(&self, bound: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::try_from(bound)?))? != 0)
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
