use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::WireError;
use super::device::prefix;
use super::request::with_argsz;

/// What a "VFIO_USER_DEVICE_SET_IRQS" does with its vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask them.
    Mask,
    /// Unmask them.
    Unmask,
    /// Trigger them, or set the eventfd that the server triggers.
    Trigger,
}

/// Which vectors a "VFIO_USER_DEVICE_SET_IRQS" means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// All of the range.
    None,
    /// Those of the range whose byte is not zero; one byte a vector.
    Bool(&'a [u8]),
    /// The range, each with the eventfd that travels with the message; without any, the range's
    /// eventfds are taken away.
    Eventfd,
}

/// Configures interrupts ("VFIO_USER_DEVICE_SET_IRQS").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// What is to be done.
    pub action: IrqAction,
    /// With which of the vectors.
    pub data: IrqData<'a>,
    /// Interrupt index (see [`super::PciIrq`]).
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Number of vectors. 0 with `start` 0, `None` and `Trigger` disables the whole index.
    pub count: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawSetIrqs {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

const DATA_NONE: u32 = 1 << 0;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const DATA_MASK: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

impl<'a> SetIrqs<'a> {
    /// The payload is its fixed part and, with `BOOL`, exactly `count` bytes. `argsz` should be its
    /// length, but it holds no more than the length itself says, and VFIO's counts an array of file
    /// descriptors that vfio-user has not: it is only too small if it can't hold the fixed part.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, WireError> {
        let raw: RawSetIrqs = prefix(body)?;
        let rest = &body[size_of::<RawSetIrqs>()..];
        with_argsz::<RawSetIrqs>(raw.argsz)?;
        let action = match raw.flags & !DATA_MASK {
            ACTION_MASK => IrqAction::Mask,
            ACTION_UNMASK => IrqAction::Unmask,
            ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(WireError::Flags(raw.flags)),
        };
        let data = match raw.flags & DATA_MASK {
            DATA_NONE => IrqData::None,
            DATA_BOOL => IrqData::Bool(rest),
            DATA_EVENTFD => IrqData::Eventfd,
            _ => return Err(WireError::Flags(raw.flags)),
        };
        let expected = if matches!(data, IrqData::Bool(_)) { raw.count as usize } else { 0 };
        if rest.len() != expected {
            return Err(WireError::Length { expected, actual: rest.len() });
        }
        let set = Self { action, data, index: raw.index, start: raw.start, count: raw.count };
        let (address, size) = (u64::from(set.start), u64::from(set.count));
        if set.start.checked_add(set.count).is_none() {
            return Err(WireError::Range { address, size });
        }
        if set.count == 0 && !set.disables_index() {
            return Err(WireError::Count(0));
        }
        Ok(set)
    }

    /// Whether it takes away everything of the index: "a count (and start) of 0, with data flags of
    /// NONE". It is the only form with count 0.
    #[must_use]
    pub fn disables_index(&self) -> bool {
        (self.action, self.data, self.start, self.count)
            == (IrqAction::Trigger, IrqData::None, 0, 0)
    }

    /// The payload's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let (data, tail): (u32, &[u8]) = match self.data {
            IrqData::None => (DATA_NONE, &[]),
            IrqData::Bool(bools) => (DATA_BOOL, bools),
            IrqData::Eventfd => (DATA_EVENTFD, &[]),
        };
        let action = match self.action {
            IrqAction::Mask => ACTION_MASK,
            IrqAction::Unmask => ACTION_UNMASK,
            IrqAction::Trigger => ACTION_TRIGGER,
        };
        let argsz = u32::try_from(size_of::<RawSetIrqs>() + tail.len())
            .expect("an interrupt index has at most 2048 vectors");
        let raw = RawSetIrqs {
            argsz,
            flags: data | action,
            index: self.index,
            start: self.start,
            count: self.count,
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(tail);
        bytes
    }
}
