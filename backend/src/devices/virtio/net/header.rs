use super::spec::{feature, header};

/// The header in front of a frame, `struct virtio_net_hdr` (5.1.6): the same for the driver and for
/// a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header(pub(super) [u8; header::SIZE]);

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the driver.
    Transmit,
    /// To the driver.
    Receive,
}

/// The feature bits that allow each kind of unfinished work in one direction.
struct Offloads {
    checksum: u64,
    tso4: u64,
    tso6: u64,
    ecn: u64,
    ufo: u64,
}

const TRANSMIT: Offloads = Offloads {
    checksum: feature::CSUM,
    tso4: feature::HOST_TSO4,
    tso6: feature::HOST_TSO6,
    ecn: feature::HOST_ECN,
    ufo: feature::HOST_UFO,
};

const RECEIVE: Offloads = Offloads {
    checksum: feature::GUEST_CSUM,
    tso4: feature::GUEST_TSO4,
    tso6: feature::GUEST_TSO6,
    ecn: feature::GUEST_ECN,
    ufo: feature::GUEST_UFO,
};

impl Header {
    /// What is left of it with the features that were negotiated; nothing if it asks for work that
    /// was not agreed upon. Its number of buffers is then one.
    pub(super) fn agreed(mut self, features: u64, direction: Direction) -> Option<Self> {
        let (offloads, mut flags) = match direction {
            Direction::Transmit => (TRANSMIT, header::NEEDS_CSUM),
            Direction::Receive => (RECEIVE, header::NEEDS_CSUM | header::DATA_VALID),
        };
        if features & offloads.checksum == 0 {
            // "the driver MUST ignore it" or must have set it to zero (5.1.6.2.1, 5.1.6.4.1).
            flags &= !header::DATA_VALID;
        }
        self.0[header::FLAGS] &= flags;
        let mut needed = offloads.segmentation(self.0[header::GSO_TYPE])?;
        if self.0[header::FLAGS] & header::NEEDS_CSUM != 0 {
            needed |= offloads.checksum;
        }
        self.set_num_buffers(1);
        (features & needed == needed).then_some(self)
    }

    /// In how many chains a received frame lies.
    pub(super) fn set_num_buffers(&mut self, buffers: u16) {
        self.0[header::NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    }
}

impl Offloads {
    /// The features that a kind of segmentation needs, if there is such a kind.
    fn segmentation(&self, kind: u8) -> Option<u64> {
        let congested = kind & header::GSO_ECN != 0;
        let features = match kind & !header::GSO_ECN {
            header::GSO_NONE if !congested => 0,
            header::GSO_TCPV4 => self.tso4,
            header::GSO_TCPV6 => self.tso6,
            header::GSO_UDP if !congested => self.ufo,
            _ => return None,
        };
        Some(if congested { features | self.ecn } else { features })
    }
}
