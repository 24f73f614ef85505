//! The common configuration structure (4.1.4.3).

use virtio_queue::QueueT;

use super::driver::{DriverState, Slot};
use super::layout::{self, common as at};
use crate::devices::virtio::spec::{feature, status};

/// What a write asks the function to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Nothing that anybody else must know.
    Nothing,
    /// Reset the device.
    Reset,
    /// DRIVER_OK was set.
    Start,
    /// A queue or a vector is another now.
    Change,
    /// Stop a queue and forget what it holds.
    StopQueue(u16),
    /// The device can't go on, for this reason.
    Fail(String),
}

/// A field, or a part of one that can be accessed by itself (4.1.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    QueueCount,
    Status,
    Generation,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    /// An address of a queue, by its place in [`Slot::rings`]: from bit `shift` on, as far as `mask`.
    Ring {
        ring: usize,
        shift: u32,
        mask: u64,
    },
    QueueReset,
}

/// VIRTIO_MSI_NO_VECTOR
const NO_VECTOR: u16 = 0xffff;

impl Field {
    /// The field that an access of this place and width is for.
    fn at(offset: u64, width: usize) -> Option<Self> {
        let field = match (offset, width) {
            (at::DEVICE_FEATURE_SELECT, 4) => Self::DeviceFeatureSelect,
            (at::DEVICE_FEATURE, 4) => Self::DeviceFeature,
            (at::DRIVER_FEATURE_SELECT, 4) => Self::DriverFeatureSelect,
            (at::DRIVER_FEATURE, 4) => Self::DriverFeature,
            (at::CONFIG_MSIX_VECTOR, 2) => Self::ConfigVector,
            (at::NUM_QUEUES, 2) => Self::QueueCount,
            (at::DEVICE_STATUS, 1) => Self::Status,
            (at::CONFIG_GENERATION, 1) => Self::Generation,
            (at::QUEUE_SELECT, 2) => Self::QueueSelect,
            (at::QUEUE_SIZE, 2) => Self::QueueSize,
            (at::QUEUE_MSIX_VECTOR, 2) => Self::QueueVector,
            (at::QUEUE_ENABLE, 2) => Self::QueueEnable,
            (at::QUEUE_NOTIFY_OFF, 2) => Self::QueueNotifyOffset,
            (at::QUEUE_RESET, 2) => Self::QueueReset,
            _ => return Self::ring(offset, width),
        };
        Some(field)
    }

    /// 64 bits at once or in halves.
    fn ring(offset: u64, width: usize) -> Option<Self> {
        let start = [at::QUEUE_DESC, at::QUEUE_DRIVER, at::QUEUE_DEVICE];
        let ring = start.iter().rposition(|start| *start <= offset)?;
        let (shift, mask) = match (offset - start[ring], width) {
            (0, 8) => (0, u64::MAX),
            (0, 4) => (0, u64::from(u32::MAX)),
            (4, 4) => (32, u64::from(u32::MAX)),
            _ => return None,
        };
        Some(Self::Ring { ring, shift, mask })
    }
}

/// Fills `data`, which holds all ones, if it is a field.
pub(super) fn read(driver: &DriverState, offset: u64, data: &mut [u8]) {
    if let Some(field) = Field::at(offset, data.len()) {
        let value = driver.read(field).to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
    }
}

/// Does what a write of a field means. Anything else is ignored, and so are values that a field
/// can't have: it reads what it was.
pub(super) fn write(driver: &mut DriverState, offset: u64, data: &[u8]) -> Request {
    let Some(field) = Field::at(offset, data.len()) else { return Request::Nothing };
    driver.revision += 1;
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    driver.write(field, u64::from_le_bytes(bytes))
}

impl DriverState {
    fn read(&self, field: Field) -> u64 {
        let slot = self.slot(self.queue_select);
        // "If it is not available, queue_size reads 0" (4.1.4.3.1); the rest is as good.
        let of_slot = |value: fn(&Slot) -> u64| slot.map_or(0, value);
        match field {
            Field::DeviceFeatureSelect => self.feature_select[0].into(),
            Field::DeviceFeature => dword(self.offered.into(), self.feature_select[0]),
            Field::DriverFeatureSelect => self.feature_select[1].into(),
            Field::DriverFeature => dword(self.accepted, self.feature_select[1]),
            Field::ConfigVector => self.config_vector.unwrap_or(NO_VECTOR).into(),
            Field::QueueCount => self.queue_count().into(),
            Field::Status => self.status.into(),
            Field::Generation => self.generation.into(),
            Field::QueueSelect => self.queue_select.into(),
            Field::QueueSize => of_slot(|slot| slot.queue.size().into()),
            Field::QueueVector => slot.and_then(|slot| slot.vector).unwrap_or(NO_VECTOR).into(),
            Field::QueueEnable => of_slot(|slot| slot.queue.ready().into()),
            Field::QueueNotifyOffset => slot.map_or(0, |_| self.queue_select.into()),
            Field::Ring { ring, shift, mask } => {
                slot.map_or(0, |slot| slot.rings[ring] >> shift & mask)
            }
            // A reset is over when the write that asked for it is.
            Field::QueueReset => 0,
        }
    }

    fn write(&mut self, field: Field, value: u64) -> Request {
        let [low, high, ..] = value.to_le_bytes();
        let word = u16::from_le_bytes([low, high]);
        // No field but a whole address is longer.
        let long = u32::try_from(value).unwrap_or(u32::MAX);
        match field {
            Field::DeviceFeatureSelect => self.feature_select[0] = long,
            Field::DriverFeatureSelect => self.feature_select[1] = long,
            Field::DriverFeature => self.accept(long),
            Field::ConfigVector => {
                self.config_vector = self.checked_vector(word);
                return Request::Change;
            }
            Field::Status => return self.set_status(low),
            Field::QueueSelect => self.queue_select = word,
            Field::QueueVector => {
                let vector = self.checked_vector(word);
                if let Some(slot) = self.slot_mut(self.queue_select) {
                    slot.vector = vector;
                    return Request::Change;
                }
            }
            Field::QueueEnable if word == 1 => return self.enable_queue(),
            Field::QueueReset if word == 1 => return self.reset_queue(),
            Field::QueueSize => {
                if let Some(slot) = self.stopped_slot() {
                    // A size that the queue can't have is not taken.
                    let _ = slot.queue.try_set_size(word);
                }
            }
            Field::Ring { ring, shift, mask } => {
                if let Some(slot) = self.stopped_slot() {
                    slot.rings[ring] =
                        slot.rings[ring] & !(mask << shift) | (value & mask) << shift;
                }
            }
            Field::DeviceFeature
            | Field::QueueCount
            | Field::Generation
            | Field::QueueNotifyOffset
            | Field::QueueEnable
            | Field::QueueReset => {}
        }
        Request::Nothing
    }

    /// "The driver MUST NOT accept new feature bits after this step" (3.1.1).
    fn accept(&mut self, bits: u32) {
        if self.status & status::FEATURES_OK == 0
            && let Some(shift) = shift(self.feature_select[1])
        {
            let others = self.accepted & !(u128::from(u32::MAX) << shift);
            self.accepted = others | u128::from(bits) << shift;
        }
    }

    /// A vector that the function does not have can't be used, which the driver sees when it reads
    /// what it wrote (4.1.5.1.2).
    fn checked_vector(&self, vector: u16) -> Option<u16> {
        Some(vector).filter(|vector| *vector < layout::vectors(self.queue_count()))
    }

    /// "The driver MUST NOT clear a device status bit" (2.1.1), but for a reset by 0.
    fn set_status(&mut self, value: u8) -> Request {
        if value == 0 {
            return Request::Reset;
        }
        let driver_bits = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        self.status |= value & driver_bits;
        if value & status::FEATURES_OK != 0 && self.features_agree() {
            self.status |= status::FEATURES_OK;
        }
        let ready = self.status & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        if value & status::DRIVER_OK != 0 && ready {
            self.status |= status::DRIVER_OK;
            // A queue may have been enabled before features were agreed on.
            let event_idx = self.event_idx();
            self.slots_mut().for_each(|slot| slot.queue.set_event_idx(event_idx));
            return Request::Start;
        }
        Request::Nothing
    }

    /// Whether the device can work with what the driver accepted (2.2.2): nothing that was not
    /// offered, and not as a legacy device (6.2).
    pub(super) fn features_agree(&self) -> bool {
        self.accepted & !u128::from(self.offered) == 0
            && self.accepted & u128::from(feature::VERSION_1) != 0
    }

    pub(super) fn event_idx(&self) -> bool {
        self.negotiated() & feature::EVENT_IDX != 0
    }

    /// The selected queue, as long as the driver may set it up.
    fn stopped_slot(&mut self) -> Option<&mut Slot> {
        self.slot_mut(self.queue_select).filter(|slot| !slot.queue.ready())
    }

    fn enable_queue(&mut self) -> Request {
        let event_idx = self.event_idx();
        let index = self.queue_select;
        if self.stopped_slot().is_none() {
            return Request::Nothing;
        }
        let start = self.next_start();
        let Some(slot) = self.stopped_slot() else { return Request::Nothing };
        slot.start = start;
        match slot.enable(event_idx) {
            Ok(()) => Request::Change,
            Err(error) => Request::Fail(format!("queue {index}: {error}")),
        }
    }

    /// 2.6.1.1: the queue is as after a reset of the device.
    fn reset_queue(&mut self) -> Request {
        let negotiated = self.negotiated() & feature::RING_RESET != 0;
        let index = self.queue_select;
        match self.slot_mut(index) {
            Some(slot) if negotiated && slot.queue.ready() => Request::StopQueue(index),
            _ => Request::Nothing,
        }
    }
}

/// Where the word that is selected starts. No feature is behind bit 127.
fn shift(select: u32) -> Option<u32> {
    (select < 4).then(|| 32 * select)
}

fn dword(bits: u128, select: u32) -> u64 {
    let word = shift(select).map_or(0, |shift| bits >> shift & u128::from(u32::MAX));
    u64::try_from(word).unwrap_or(0)
}
