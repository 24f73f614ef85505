//! Constants of the network device (virtio 1.2, 5.1), with their sections.

/// Feature bits (5.1.3).
pub(super) mod feature {
    /// The device takes frames with partial checksums.
    pub(in super::super) const CSUM: u64 = 1 << 0;
    /// The driver takes frames with partial checksums.
    pub(in super::super) const GUEST_CSUM: u64 = 1 << 1;
    /// The configuration has the maximum MTU.
    pub(in super::super) const MTU: u64 = 1 << 3;
    /// The configuration has the MAC address.
    pub(in super::super) const MAC: u64 = 1 << 5;
    /// The driver takes frames to be segmented: TCP over IPv4.
    pub(in super::super) const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub(in super::super) const GUEST_TSO6: u64 = 1 << 8;
    /// The same with explicit congestion notification.
    pub(in super::super) const GUEST_ECN: u64 = 1 << 9;
    /// The driver takes frames to be fragmented: UDP.
    pub(in super::super) const GUEST_UFO: u64 = 1 << 10;
    /// The device takes frames to be segmented: TCP over IPv4.
    pub(in super::super) const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub(in super::super) const HOST_TSO6: u64 = 1 << 12;
    /// The same with explicit congestion notification.
    pub(in super::super) const HOST_ECN: u64 = 1 << 13;
    /// The device takes frames to be fragmented: UDP.
    pub(in super::super) const HOST_UFO: u64 = 1 << 14;
    /// A received frame may lie in several chains.
    pub(in super::super) const MRG_RXBUF: u64 = 1 << 15;
    /// The configuration has the status of the link.
    pub(in super::super) const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub(in super::super) const CTRL_VQ: u64 = 1 << 17;
    /// It takes receive modes and MAC tables.
    pub(in super::super) const CTRL_RX: u64 = 1 << 18;
    /// There may be several pairs of queues.
    pub(in super::super) const MQ: u64 = 1 << 22;
    /// The control queue sets the MAC address.
    pub(in super::super) const CTRL_MAC_ADDR: u64 = 1 << 23;
}

/// Fields of the configuration (5.1.4).
pub(super) mod config {
    /// Bit of the status field: the link is up.
    pub(in super::super) const LINK_UP: u16 = 1;
    /// "The device MUST set mtu to between 68 and 65535 inclusive" (5.1.4.1).
    pub(in super::super) const MIN_MTU: u16 = 68;
}

/// The header of a frame (5.1.6).
pub(super) mod header {
    /// Its length in bytes: `num_buffers` is always there in a device that is not a legacy one.
    pub(in super::super) const SIZE: usize = 12;
    /// Offset of the flags.
    pub(in super::super) const FLAGS: usize = 0;
    /// Offset of the kind of segmentation.
    pub(in super::super) const GSO_TYPE: usize = 1;
    /// Offset of the number of chains that a received frame lies in.
    pub(in super::super) const NUM_BUFFERS: usize = 10;

    /// Flag: the checksum is partial.
    pub(in super::super) const NEEDS_CSUM: u8 = 1;
    /// Flag: the checksum was checked.
    pub(in super::super) const DATA_VALID: u8 = 2;

    /// No segmentation.
    pub(in super::super) const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub(in super::super) const GSO_TCPV4: u8 = 1;
    /// UDP fragments.
    pub(in super::super) const GSO_UDP: u8 = 3;
    /// TCP over IPv6.
    pub(in super::super) const GSO_TCPV6: u8 = 4;
    /// With explicit congestion notification: added to one of TCP.
    pub(in super::super) const GSO_ECN: u8 = 0x80;
}

/// The control queue (5.1.6.5): classes and commands.
pub(super) mod control {
    /// The answer: done.
    pub(in super::super) const OK: u8 = 0;
    /// The answer: refused.
    pub(in super::super) const ERR: u8 = 1;

    /// Class of receive modes (5.1.6.5.1).
    pub(in super::super) const RX: u8 = 0;
    /// Promiscuous mode.
    pub(in super::super) const RX_PROMISC: u8 = 0;
    /// All multicast frames.
    pub(in super::super) const RX_ALLMULTI: u8 = 1;

    /// Class of MAC addresses (5.1.6.5.2).
    pub(in super::super) const MAC: u8 = 1;
    /// Two tables of addresses to receive, unicast and multicast.
    pub(in super::super) const MAC_TABLE_SET: u8 = 0;
    /// The device's own address.
    pub(in super::super) const MAC_ADDR_SET: u8 = 1;

    /// Class of queue pairs (5.1.6.5.5).
    pub(in super::super) const MQ: u8 = 4;
    /// How many pairs are used.
    pub(in super::super) const MQ_VQ_PAIRS_SET: u8 = 0;
}
