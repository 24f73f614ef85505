//! The few ioctls of `linux/vfio.h` that the lab needs.
#![expect(unsafe_code, reason = "ioctls hand raw structs to the kernel")]

use std::ffi::{CString, c_void};
use std::io;

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::Result;

/// The region index of configuration space.
pub(crate) const CONFIG_REGION: u32 = 7;

/// Interrupt indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupt {
    Intx = 0,
    Msi = 1,
    Msix = 2,
}

/// More vectors than any function of the lab has.
pub(crate) const MOST_VECTORS: usize = 8;

/// What [`act`] does with an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IrqAction {
    Unmask,
    Disable,
}

/// Where a region lies in the device's file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Region {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Puts a group into a container.
pub(crate) fn set_container(group: impl AsFd, container: impl AsFd) -> Result<()> {
    let mut container = container.as_fd().as_raw_fd();
    call(group, 4, Argument::Pointer(&mut container))?;
    Ok(())
}

/// Gives the container a type 1 IOMMU, second interface version.
pub(crate) fn set_type1_iommu(container: impl AsFd) -> Result<()> {
    const TYPE1_V2: usize = 3;
    call::<()>(container, 2, Argument::Integer(TYPE1_V2))?;
    Ok(())
}

/// The file of a device in a group, by its PCI address.
pub(crate) fn device_fd(group: impl AsFd, address: &str) -> Result<OwnedFd> {
    let mut name = [0_u8; 32];
    let address = CString::new(address)?;
    let address = address.as_bytes_with_nul();
    name.get_mut(..address.len()).ok_or("a PCI address is short")?.copy_from_slice(address);
    let device = call(group, 6, Argument::Pointer(&mut name))?;
    // SAFETY: a successful VFIO_GROUP_GET_DEVICE_FD returns a new descriptor nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(device) })
}

/// Asks where a region lies.
pub(crate) fn region(device: impl AsFd, index: u32) -> Result<Region> {
    let mut info = RegionInfo { argsz: size_of_u32::<RegionInfo>()?, index, ..Default::default() };
    call(device, 8, Argument::Pointer(&mut info))?;
    Ok(Region { offset: info.offset, len: info.size })
}

/// Makes the vectors of an interrupt, from the first one on, signal `events`.
///
/// # Panics
/// There are more than [`MOST_VECTORS`]: a mistake in a check.
pub(crate) fn set_eventfds(
    device: impl AsFd,
    interrupt: Interrupt,
    events: &[BorrowedFd<'_>],
) -> Result<()> {
    assert!(events.len() <= MOST_VECTORS, "no function of the lab has so many vectors");
    let mut eventfds = [-1; MOST_VECTORS];
    for (slot, event) in eventfds.iter_mut().zip(events) {
        *slot = event.as_raw_fd();
    }
    let mut set = IrqSet {
        argsz: size_of_u32::<IrqSet>()?,
        flags: IrqSet::DATA_EVENTFD | IrqSet::ACTION_TRIGGER,
        index: interrupt as u32,
        start: 0,
        count: u32::try_from(events.len())?,
        eventfds,
    };
    call(device, 10, Argument::Pointer(&mut set))?;
    Ok(())
}

/// Unmasks or disables an interrupt.
pub(crate) fn act(device: impl AsFd, interrupt: Interrupt, action: IrqAction) -> Result<()> {
    let (action, count) = match action {
        IrqAction::Unmask => (IrqSet::ACTION_UNMASK, 1),
        // A trigger for no vector at all is how the interface spells "disable".
        IrqAction::Disable => (IrqSet::ACTION_TRIGGER, 0),
    };
    let mut set = IrqSet {
        argsz: size_of_u32::<IrqSet>()?,
        flags: IrqSet::DATA_NONE | action,
        index: interrupt as u32,
        start: 0,
        count,
        eventfds: [-1; MOST_VECTORS],
    };
    call(device, 10, Argument::Pointer(&mut set))?;
    Ok(())
}

/// What a device may do with mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read = 1,
    ReadWrite = 3,
}

/// Maps memory of this process at a bus address.
pub(crate) fn map_dma(
    container: impl AsFd,
    address: usize,
    iova: u64,
    len: usize,
    access: Access,
) -> Result<()> {
    let mut map = DmaMap {
        argsz: size_of_u32::<DmaMap>()?,
        flags: access as u32,
        vaddr: u64::try_from(address)?,
        iova,
        size: u64::try_from(len)?,
    };
    call(container, 13, Argument::Pointer(&mut map))?;
    Ok(())
}

/// Undoes [`map_dma`].
pub(crate) fn unmap_dma(container: impl AsFd, iova: u64, len: usize) -> Result<()> {
    let mut unmap =
        DmaUnmap { argsz: size_of_u32::<DmaUnmap>()?, flags: 0, iova, size: u64::try_from(len)? };
    call(container, 14, Argument::Pointer(&mut unmap))?;
    Ok(())
}

/// `struct vfio_region_info`
#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

/// `struct vfio_irq_set` with room for eventfds.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfds: [i32; MOST_VECTORS],
}

impl IrqSet {
    const DATA_NONE: u32 = 1 << 0;
    const DATA_EVENTFD: u32 = 1 << 2;
    const ACTION_UNMASK: u32 = 1 << 4;
    const ACTION_TRIGGER: u32 = 1 << 5;
}

/// `struct vfio_iommu_type1_dma_map`
#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`
#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

fn size_of_u32<T>() -> Result<u32> {
    Ok(u32::try_from(size_of::<T>())?)
}

enum Argument<'a, T> {
    Pointer(&'a mut T),
    Integer(usize),
}

/// One vfio ioctl; the output is the system call's return value.
struct Call<'a, T> {
    number: u8,
    argument: Argument<'a, T>,
}

// SAFETY: `as_ptr` gives a pointer that is valid for reads and writes of a `T` while `self` lives,
// or an integer that the kernel does not follow; the output is the return value alone.
unsafe impl<T> Ioctl for Call<'_, T> {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        const VFIO_TYPE: u8 = b';';
        const VFIO_BASE: u8 = 100;
        opcode::none(VFIO_TYPE, VFIO_BASE + self.number)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        match &mut self.argument {
            Argument::Pointer(to) => (&raw mut **to).cast(),
            Argument::Integer(value) => std::ptr::without_provenance_mut(*value),
        }
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut c_void,
    ) -> rustix::io::Result<Self::Output> {
        Ok(output)
    }
}

fn call<T>(fd: impl AsFd, number: u8, argument: Argument<'_, T>) -> Result<i32> {
    // SAFETY: every caller above passes the struct that `linux/vfio.h` names for the number, with
    // `argsz` set to its size, so the kernel stays inside it.
    let output = unsafe { ioctl(fd, Call { number, argument }) };
    output.map_err(|errno| format!("vfio ioctl {number}: {}", io::Error::from(errno)).into())
}
