//! The ioctls of VFIO, each with the argument that the kernel expects for it (`<linux/vfio.h>`).
#![expect(unsafe_code, reason = "ioctls have no safe interface")]

use std::ffi::CStr;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE, vfio_device_info,
    vfio_group_status, vfio_iommu_type1_dma_map, vfio_irq_info, vfio_region_info,
};

use crate::dma::{DmaAccess, HostMemory, Iova};

/// A request whose argument is an `A`. Only this module makes one, so number and type agree.
pub(super) struct Ioctl<A> {
    number: u32,
    argument: PhantomData<fn(A)>,
}

/// The argument is a number, or unused.
pub(super) struct Number;
/// The argument is a structure with a tail: its first word is its size in bytes.
pub(super) struct Sized32;

pub(super) const GET_API_VERSION: Ioctl<Number> = Ioctl::new(0);
pub(super) const CHECK_EXTENSION: Ioctl<Number> = Ioctl::new(1);
pub(super) const SET_IOMMU: Ioctl<Number> = Ioctl::new(2);
pub(super) const GROUP_GET_STATUS: Ioctl<vfio_group_status> = Ioctl::new(3);
/// The container's descriptor.
pub(super) const GROUP_SET_CONTAINER: Ioctl<i32> = Ioctl::new(4);
const GROUP_GET_DEVICE_FD: u32 = 6;
pub(super) const DEVICE_GET_INFO: Ioctl<vfio_device_info> = Ioctl::new(7);
pub(super) const DEVICE_GET_REGION_INFO: Ioctl<vfio_region_info> = Ioctl::new(8);
pub(super) const DEVICE_GET_REGION_CAPS: Ioctl<Sized32> = Ioctl::new(8);
pub(super) const DEVICE_GET_IRQ_INFO: Ioctl<vfio_irq_info> = Ioctl::new(9);
pub(super) const DEVICE_SET_IRQS: Ioctl<Sized32> = Ioctl::new(10);
pub(super) const DEVICE_RESET: Ioctl<Number> = Ioctl::new(11);
const IOMMU_MAP_DMA: Ioctl<vfio_iommu_type1_dma_map> = Ioctl::new(13);
pub(super) const IOMMU_UNMAP_DMA: Ioctl<DmaUnmap> = Ioctl::new(14);

/// `struct vfio_iommu_type1_dma_unmap` without the bitmap at its end, which is optional.
#[repr(C)]
#[derive(Debug)]
pub(super) struct DmaUnmap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) iova: u64,
    pub(super) size: u64,
}

impl<A> Ioctl<A> {
    /// VFIO's requests are numbered from a base, and their numbers tell no size.
    const fn new(offset: u32) -> Self {
        Self { number: (VFIO_TYPE as u32) << 8 | (VFIO_BASE + offset), argument: PhantomData }
    }
}

/// Does a request with a number.
pub(super) fn with_number(
    fd: BorrowedFd<'_>,
    ioctl: &Ioctl<Number>,
    number: u32,
) -> Result<u32, Errno> {
    // SAFETY: for this request the kernel takes the argument for a number.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), ioctl.number.into(), libc::c_ulong::from(number)) })
}

/// Does a request with a structure that the kernel reads and fills in.
pub(super) fn with<A>(
    fd: BorrowedFd<'_>,
    ioctl: &Ioctl<A>,
    argument: &mut A,
) -> Result<u32, Errno> {
    // SAFETY: the kernel reads and writes exactly such a structure for this request, or less when
    // its `argsz` says so; of addresses in it only that of the private IOMMU_MAP_DMA counts.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), ioctl.number.into(), &raw mut *argument) })
}

/// Does a request with a structure with a tail. Its size is put into its first word.
pub(super) fn with_tail(
    fd: BorrowedFd<'_>,
    ioctl: &Ioctl<Sized32>,
    words: &mut [u32],
) -> Result<u32, Errno> {
    let size = u32::try_from(size_of_val(words)).map_err(|_| Errno::TOOBIG)?;
    *words.first_mut().ok_or(Errno::INVAL)? = size;
    // SAFETY: the kernel believes the size in the first word, which is that of the words.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), ioctl.number.into(), words.as_mut_ptr()) })
}

/// Opens the device of a group by its PCI address.
pub(super) fn device_of_group(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let request = Ioctl::<Number>::new(GROUP_GET_DEVICE_FD).number.into();
    // SAFETY: the kernel reads a terminated string.
    let fd = result(unsafe { libc::ioctl(group.as_raw_fd(), request, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) })
}

/// Lets the devices of a container reach memory, with the window's permissions.
pub(super) fn map_dma(
    container: BorrowedFd<'_>,
    iova: Iova,
    memory: HostMemory,
    access: DmaAccess,
) -> Result<(), Errno> {
    let mut flags = 0;
    if access.contains(DmaAccess::READ) {
        flags |= VFIO_DMA_MAP_FLAG_READ;
    }
    if access.contains(DmaAccess::WRITE) {
        flags |= VFIO_DMA_MAP_FLAG_WRITE;
    }
    // What a device does to this memory is what other processes may do to it anyway: it is a shared
    // mapping without references into it, and its pages stay pinned beyond its end.
    let mut map = vfio_iommu_type1_dma_map {
        argsz: argsz::<vfio_iommu_type1_dma_map>(),
        flags,
        vaddr: memory.address(),
        iova: iova.0,
        size: memory.size(),
    };
    with(container, &IOMMU_MAP_DMA, &mut map).map(|_| ())
}

/// The size of a structure as its `argsz` field holds it.
#[expect(clippy::cast_possible_truncation, reason = "the kernel's structures have tens of bytes")]
pub(super) const fn argsz<A>() -> u32 {
    size_of::<A>() as u32
}

fn result(result: libc::c_int) -> Result<u32, Errno> {
    u32::try_from(result)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
