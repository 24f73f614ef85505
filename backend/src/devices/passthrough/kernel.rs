//! The kernel's VFIO: a device in a group, a group in a container, a container with an IOMMU.

use std::ffi::CString;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, pread, pwrite};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    VFIO_TYPE1v2_IOMMU, vfio_device_info, vfio_group_status, vfio_irq_info, vfio_region_info,
};

use super::address::PciAddress;
use super::device::{
    Description, IrqCommand, IrqDescription, RegionDescription, VfioDevice, VfioIrq, VfioRegion,
};
use super::ioctl;
use super::open_error::OpenError;
use crate::dma::{DmaAccess, HostMemory, Iommu, Iova};

/// A device file of the kernel's.
#[derive(Debug)]
pub(super) struct KernelDevice {
    file: OwnedFd,
    /// Where each region starts in the file.
    offsets: [u64; 8],
}

/// A container, which is an IOMMU domain. It lives as long as it is open, as its group must.
#[derive(Debug)]
pub(super) struct KernelIommu {
    container: OwnedFd,
    _group: OwnedFd,
}

/// Opens a device that is known to be in `group`, with an IOMMU domain of its own.
pub(super) fn open(
    address: PciAddress,
    group: &str,
) -> Result<(KernelDevice, Description, KernelIommu), OpenError> {
    let container = open_file("/dev/vfio/vfio")?;
    let step = |what| move |errno| OpenError::Step { what, errno };
    let version = ioctl::with_number(container.as_fd(), &ioctl::GET_API_VERSION, 0);
    let type1 = ioctl::with_number(container.as_fd(), &ioctl::CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU);
    if version != Ok(VFIO_API_VERSION) || type1 != Ok(1) {
        return Err(OpenError::NoType1);
    }
    let group_file = open_group(group)?;
    let mut status = vfio_group_status { argsz: ioctl::argsz::<vfio_group_status>(), flags: 0 };
    ioctl::with(group_file.as_fd(), &ioctl::GROUP_GET_STATUS, &mut status)
        .map_err(step("asking for the group's state"))?;
    if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(OpenError::NotViable { group: group.to_owned() });
    }
    let mut number = container.as_raw_fd();
    ioctl::with(group_file.as_fd(), &ioctl::GROUP_SET_CONTAINER, &mut number)
        .map_err(step("putting the group into a container"))?;
    ioctl::with_number(container.as_fd(), &ioctl::SET_IOMMU, VFIO_TYPE1v2_IOMMU)
        .map_err(step("enabling the IOMMU"))?;
    let name = CString::new(address.to_string()).expect("an address has no NUL");
    let file = ioctl::device_of_group(group_file.as_fd(), &name)
        .map_err(step("opening the device of the group"))?;
    let description = describe(file.as_fd()).map_err(step("asking what the device is"))?;
    let offsets = std::array::from_fn(|index| description.regions[index].file_offset);
    let device = KernelDevice { file, offsets };
    Ok((device, description, KernelIommu { container, _group: group_file }))
}

fn open_group(group: &str) -> Result<OwnedFd, OpenError> {
    open_file(&format!("/dev/vfio/{group}")).map_err(|error| match error {
        OpenError::File { errno: Errno::BUSY, .. } => OpenError::InUse { group: group.to_owned() },
        error => error,
    })
}

fn open_file(path: &str) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    openat(CWD, Path::new(path), flags, Mode::empty())
        .map_err(|errno| OpenError::File { path: path.to_owned(), errno })
}

impl VfioDevice for KernelDevice {
    fn read(&self, region: VfioRegion, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let start = self.start(region).checked_add(offset).ok_or(Errno::OVERFLOW)?;
        let mut done = 0;
        while done < data.len() {
            match pread(&self.file, &mut data[done..], start + done as u64) {
                Ok(0) => return Err(Errno::IO),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn write(&self, region: VfioRegion, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let start = self.start(region).checked_add(offset).ok_or(Errno::OVERFLOW)?;
        let mut done = 0;
        while done < data.len() {
            match pwrite(&self.file, &data[done..], start + done as u64) {
                Ok(0) => return Err(Errno::IO),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        ioctl::with_number(self.file.as_fd(), &ioctl::DEVICE_RESET, 0).map(|_| ())
    }

    fn set_irqs(&self, irq: VfioIrq, command: IrqCommand<'_>) -> Result<u32, Errno> {
        ioctl::with_tail(self.file.as_fd(), &ioctl::DEVICE_SET_IRQS, &mut irq_set(irq, command))
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl KernelDevice {
    fn start(&self, region: VfioRegion) -> u64 {
        self.offsets[region.index() as usize]
    }
}

impl Iommu for KernelIommu {
    fn map(&self, iova: Iova, memory: HostMemory, access: DmaAccess) -> Result<(), Errno> {
        ioctl::map_dma(self.container.as_fd(), iova, memory, access)
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), Errno> {
        let argsz = ioctl::argsz::<ioctl::DmaUnmap>();
        let mut unmap = ioctl::DmaUnmap { argsz, flags: 0, iova: iova.0, size };
        ioctl::with(self.container.as_fd(), &ioctl::IOMMU_UNMAP_DMA, &mut unmap)?;
        // The kernel tells how much it has unmapped.
        if unmap.size == size { Ok(()) } else { Err(Errno::IO) }
    }
}

/// `struct vfio_irq_set`, all of it in words. Its first word is filled in later.
pub(super) fn irq_set(irq: VfioIrq, command: IrqCommand<'_>) -> Vec<u32> {
    let whole = |flags, count| (flags, 0, count, Vec::new());
    let (flags, start, count, tail) = match command {
        IrqCommand::Disable => whole(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, 0),
        IrqCommand::Mask => whole(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK, 1),
        IrqCommand::Unmask => whole(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, 1),
        IrqCommand::Connect { start, eventfds } => {
            let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
            (flags, start, eventfds.len(), eventfds.iter().map(|fd| number(*fd)).collect())
        }
        IrqCommand::UnmaskBy(eventfd) => {
            let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
            (flags, 0, 1, vec![number(eventfd)])
        }
        IrqCommand::Trigger { start, which } => {
            let flags = VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_ACTION_TRIGGER;
            let word = |bools: &[bool]| {
                u32::from_ne_bytes(std::array::from_fn(|at| u8::from(bools.get(at) == Some(&true))))
            };
            (flags, start, which.len(), which.chunks(4).map(word).collect())
        }
    };
    let count = u32::try_from(count).expect("a function has at most 2048 vectors");
    [0, flags, irq.index(), start, count].into_iter().chain(tail).collect()
}

/// A descriptor as the kernel takes it: -1 is none.
fn number(eventfd: Option<BorrowedFd<'_>>) -> u32 {
    eventfd.map_or(-1, |fd| fd.as_raw_fd()).cast_unsigned()
}

fn describe(device: BorrowedFd<'_>) -> Result<Description, Errno> {
    let mut info = vfio_device_info {
        argsz: ioctl::argsz::<vfio_device_info>(),
        flags: 0,
        num_regions: 0,
        num_irqs: 0,
        cap_offset: 0,
        pad: 0,
    };
    ioctl::with(device, &ioctl::DEVICE_GET_INFO, &mut info)?;
    if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
        return Err(Errno::NODEV);
    }
    let mut description = Description {
        resettable: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
        ..Description::default()
    };
    for region in VfioRegion::ALL {
        if region.index() < info.num_regions {
            description.regions[region.index() as usize] = describe_region(device, region)?;
        }
    }
    for irq in VfioIrq::ALL {
        if irq.index() < info.num_irqs {
            // The kernel has no error interrupt for a function without PCI Express.
            let described = describe_irq(device, irq).unwrap_or_default();
            description.irqs[irq.index() as usize] = described;
        }
    }
    Ok(description)
}

fn describe_region(device: BorrowedFd<'_>, region: VfioRegion) -> Result<RegionDescription, Errno> {
    let argsz = ioctl::argsz::<vfio_region_info>();
    let index = region.index();
    let mut info = vfio_region_info { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
    ioctl::with(device, &ioctl::DEVICE_GET_REGION_INFO, &mut info)?;
    let has = |flag| info.flags & flag != 0;
    let mut mappable = Vec::new();
    if has(VFIO_REGION_INFO_FLAG_MMAP) {
        let whole = 0..info.size;
        mappable = vec![whole];
        if has(VFIO_REGION_INFO_FLAG_CAPS) && info.argsz > argsz {
            let mut words = vec![0; (info.argsz as usize).div_ceil(4)];
            words[2] = index;
            ioctl::with_tail(device, &ioctl::DEVICE_GET_REGION_CAPS, &mut words)?;
            mappable = sparse_areas(&words, info.size).unwrap_or(mappable);
        }
    }
    Ok(RegionDescription {
        size: info.size,
        file_offset: info.offset,
        readable: has(VFIO_REGION_INFO_FLAG_READ),
        writable: has(VFIO_REGION_INFO_FLAG_WRITE),
        mappable,
    })
}

/// The areas of `struct vfio_region_info_cap_sparse_mmap`, if that is among the capabilities behind
/// a `struct vfio_region_info`. The kernel aligns all of it to words.
pub(super) fn sparse_areas(words: &[u32], size: u64) -> Option<Vec<Range<u64>>> {
    let wide = |at: usize| {
        let low = words.get(at).copied().map(u64::from)?;
        words.get(at + 1).copied().map(|high| u64::from(high) << 32 | low)
    };
    let mut at = *words.get(3)? as usize / 4;
    while at != 0 {
        let header = *words.get(at)?;
        if header & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = *words.get(at + 2)? as usize;
            let area = |number: usize| {
                let start = wide(at + 4 + number * 4)?;
                let end = start.checked_add(wide(at + 6 + number * 4)?)?;
                Some(start..end.min(size))
            };
            let mut areas = (0..count).map(area).collect::<Option<Vec<_>>>()?;
            areas.retain(|area| !area.is_empty());
            areas.sort_by_key(|area| area.start);
            return Some(areas);
        }
        let next = *words.get(at + 1)? as usize / 4;
        at = if next > at { next } else { 0 };
    }
    None
}

fn describe_irq(device: BorrowedFd<'_>, irq: VfioIrq) -> Result<IrqDescription, Errno> {
    let argsz = ioctl::argsz::<vfio_irq_info>();
    let mut info = vfio_irq_info { argsz, flags: 0, index: irq.index(), count: 0 };
    ioctl::with(device, &ioctl::DEVICE_GET_IRQ_INFO, &mut info)?;
    let has = |flag| info.flags & flag != 0;
    Ok(IrqDescription {
        count: info.count.min(2048),
        eventfd: has(VFIO_IRQ_INFO_EVENTFD),
        maskable: has(VFIO_IRQ_INFO_MASKABLE),
        automasked: has(VFIO_IRQ_INFO_AUTOMASKED),
        resizable: !has(VFIO_IRQ_INFO_NORESIZE),
    })
}
