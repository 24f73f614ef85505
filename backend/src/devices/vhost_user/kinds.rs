//! What is known of each device type: how its queues are laid out, and what of its configuration and
//! features a daemon has nothing to do with.

use std::ops::Range;

use crate::devices::virtio::spec::{DeviceType, feature};

/// A device type that a daemon can serve.
#[derive(Debug)]
pub(super) struct Kind {
    /// What `type=` calls it.
    pub(super) name: &'static str,
    pub(super) device_type: DeviceType,
    pub(super) layout: Layout,
    /// The length of its configuration, in bytes: as much as daemons have of it.
    pub(super) config: usize,
    /// The fields that a driver may write; they are adjacent.
    pub(super) writable: Range<usize>,
    /// The field that tells the number of request queues.
    pub(super) queues_at: Option<Field>,
    /// Feature bits of the type that are not for the daemon alone to offer.
    pub(super) withheld: u64,
    /// Whether a daemon that lost track of what it was doing may begin at the first buffer that it
    /// did not give back: it serves buffers in order, and may serve one twice.
    pub(super) repeats: bool,
    /// Whether a daemon gives back soon what it took. Others keep buffers for what may happen, in
    /// any state.
    pub(super) finishes: bool,
    /// Whether any daemon may begin anew what another one left, so that it pays to keep track.
    pub(super) resumes: bool,
}

/// The queues of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// So many, all of which the daemon serves.
    Fixed(u16),
    /// So many, of which the daemon serves the first ones: nobody serves the others.
    Partly { all: u16, served: u16 },
    /// Queues for requests, and so many others.
    Requests { others: u16 },
}

/// Where a number is in a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    U16(usize),
    U32(usize),
}

impl Layout {
    /// How many queues the function has.
    pub(super) fn all(self, requests: u16) -> u16 {
        match self {
            Self::Fixed(count) | Self::Partly { all: count, .. } => count,
            Self::Requests { others } => others + requests,
        }
    }

    /// How many of them the daemon serves.
    pub(super) fn served(self, requests: u16) -> u16 {
        match self {
            Self::Partly { served, .. } => served,
            Self::Fixed(_) | Self::Requests { .. } => self.all(requests),
        }
    }
}

const PLAIN: Kind = Kind {
    name: "",
    device_type: DeviceType(0),
    layout: Layout::Fixed(1),
    config: 0,
    writable: 0..0,
    queues_at: None,
    withheld: 0,
    repeats: false,
    finishes: false,
    resumes: false,
};

/// Every type by name, sorted.
pub(super) const KINDS: [Kind; 13] = [
    Kind {
        name: "blk",
        device_type: DeviceType::BLOCK,
        layout: Layout::Requests { others: 0 },
        // Up to `write_zeroes_may_unmap` and its padding (5.2.4): some daemons have no more.
        config: 60,
        // `writeback`
        writable: 32..33,
        queues_at: Some(Field::U16(34)),
        // VIRTIO_BLK_F_SECURE_ERASE and ZONED, whose fields lie behind.
        withheld: 1 << 16 | 1 << 17,
        finishes: true,
        resumes: true,
        ..PLAIN
    },
    Kind {
        name: "console",
        device_type: DeviceType::CONSOLE,
        layout: Layout::Fixed(2),
        config: 12,
        // `emerg_wr`
        writable: 8..12,
        // VIRTIO_CONSOLE_F_MULTIPORT, which has more queues.
        withheld: 1 << 1,
        repeats: true,
        ..PLAIN
    },
    Kind {
        name: "crypto",
        device_type: DeviceType::CRYPTO,
        layout: Layout::Requests { others: 1 },
        config: 56,
        queues_at: Some(Field::U32(4)),
        finishes: true,
        ..PLAIN
    },
    Kind {
        name: "fs",
        device_type: DeviceType::FS,
        layout: Layout::Requests { others: 1 },
        config: 40,
        queues_at: Some(Field::U32(36)),
        // VIRTIO_FS_F_NOTIFICATION, which has one more queue.
        withheld: 1 << 0,
        finishes: true,
        ..PLAIN
    },
    Kind {
        name: "gpio",
        device_type: DeviceType::GPIO,
        layout: Layout::Fixed(2),
        config: 8,
        ..PLAIN
    },
    Kind {
        name: "gpu",
        device_type: DeviceType::GPU,
        layout: Layout::Fixed(2),
        config: 16,
        // `events_clear`
        writable: 4..8,
        ..PLAIN
    },
    Kind { name: "i2c", device_type: DeviceType::I2C, ..PLAIN },
    Kind {
        name: "input",
        device_type: DeviceType::INPUT,
        layout: Layout::Fixed(2),
        config: 136,
        // `select` and `subsel`
        writable: 0..2,
        repeats: true,
        ..PLAIN
    },
    Kind {
        name: "net",
        device_type: DeviceType::NET,
        layout: Layout::Fixed(2),
        config: 12,
        withheld: net::WITHHELD,
        repeats: true,
        ..PLAIN
    },
    Kind { name: "rng", device_type: DeviceType::ENTROPY, repeats: true, ..PLAIN },
    Kind {
        name: "scsi",
        device_type: DeviceType::SCSI,
        layout: Layout::Requests { others: 2 },
        config: 36,
        // `sense_size` and `cdb_size`
        writable: 20..28,
        queues_at: Some(Field::U32(0)),
        finishes: true,
        resumes: true,
        ..PLAIN
    },
    Kind {
        name: "sound",
        device_type: DeviceType::SOUND,
        layout: Layout::Fixed(4),
        config: 12,
        // VIRTIO_SND_F_CTLS, whose field lies behind what daemons have.
        withheld: 1 << 0,
        ..PLAIN
    },
    Kind {
        name: "vsock",
        device_type: DeviceType::VSOCK,
        // The event queue tells of migrations, which nobody does.
        layout: Layout::Partly { all: 3, served: 2 },
        config: 8,
        repeats: true,
        ..PLAIN
    },
];

/// Feature bits of network devices (5.1.3).
pub(super) mod net {
    /// The device has an address of its own.
    pub(in super::super) const MAC: u64 = 1 << 5;
    /// MTU and speed are in the configuration, which the daemon does not make.
    const IN_CONFIG: u64 = 1 << 3 | 1 << 63;
    /// A control queue and what is asked for there: daemons announce it and leave it to the VMM.
    const CONTROL: u64 = 1 << 2
        | 1 << 17
        | 1 << 18
        | 1 << 19
        | 1 << 21
        | 1 << 22
        | 1 << 23
        | 1 << 52
        | 1 << 53
        | 1 << 57
        | 1 << 60;
    /// VIRTIO_NET_F_STANDBY
    const STANDBY: u64 = 1 << 62;
    pub(super) const WITHHELD: u64 = MAC | IN_CONFIG | CONTROL | STANDBY;
}

/// What a daemon's offer is good for: the transport makes the rest by itself or can't pass it on.
///
/// Addresses are those of the client's windows, whatever an IOMMU of its makes of them, and the
/// daemon gets the windows under these addresses. So the driver is offered ACCESS_PLATFORM, and the
/// daemon, to which it would mean an IOMMU of its own, hears nothing of it.
const FROM_DAEMON: u64 = feature::OFFERABLE & !feature::ACCESS_PLATFORM;

impl Kind {
    /// The type that an operator calls so.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        static ALL: [Kind; KINDS.len()] = KINDS;
        ALL.iter().find(|kind| kind.name == name)
    }

    /// What a driver is offered when the daemon offers `features`.
    pub(super) fn offered(&self, features: u64) -> u64 {
        self.passed_on(features) | feature::ACCESS_PLATFORM
    }

    /// What the daemon is told of the features that the driver accepted.
    pub(super) fn passed_on(&self, negotiated: u64) -> u64 {
        negotiated & FROM_DAEMON & !self.withheld
    }
}
