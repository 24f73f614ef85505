use std::ops::Range;

use super::daemon::Daemon;
use super::exchange::DaemonError;
use super::kinds::{Field, Kind, net};
use crate::devices::virtio::spec::DeviceType;

/// What of a configuration the operator decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// The daemon knows everything.
    Nothing,
    /// The tag of a file system, padded with zeros (5.11.4).
    Tag([u8; 36]),
    /// The guest's address among sockets (5.10.4).
    Cid(u64),
    /// A network: daemons serve its queues and know nothing else of it (5.1.4).
    Net {
        /// Its address; a driver without one chooses it.
        mac: Option<[u8; 6]>,
    },
}

/// A device's configuration as the driver sees it: what the daemon said last, and what is made here.
/// It is there while the daemon is not.
#[derive(Debug)]
pub(super) struct Config {
    kind: &'static Kind,
    made: Made,
    requests: u16,
    bytes: Vec<u8>,
}

/// VIRTIO_NET_S_LINK_UP
const LINK_UP: u16 = 1;

impl Config {
    /// Asks a daemon for the part that is its own.
    ///
    /// # Errors
    /// [`DaemonError`]; [`DaemonError::Unfit`] when it has none and somebody must.
    pub(super) fn new(
        kind: &'static Kind,
        made: Made,
        requests: u16,
        daemon: &mut Daemon,
    ) -> Result<Self, DaemonError> {
        let mut config = Self { kind, made, requests, bytes: Vec::new() };
        config.refresh(daemon)?;
        Ok(config)
    }

    /// Asks a daemon, perhaps another one, again. Returns whether the driver sees a difference.
    ///
    /// # Errors
    /// [`DaemonError`], as in [`new`](Self::new).
    pub(super) fn refresh(&mut self, daemon: &mut Daemon) -> Result<bool, DaemonError> {
        let mut bytes = vec![0; self.kind.config];
        if self.daemon_knows() {
            if daemon.has_config() {
                daemon.read_config(&mut bytes)?;
            } else {
                self.without_daemon(&mut bytes)?;
            }
        }
        self.overlay(&mut bytes);
        let changed = self.bytes != bytes;
        self.bytes = bytes;
        Ok(changed)
    }

    /// Feature bits that are offered for what is made here.
    pub(super) fn features(&self) -> u64 {
        match self.made {
            Made::Net { mac: Some(_) } => net::MAC,
            _ => 0,
        }
    }

    /// See [`Backing::config_read`](crate::devices::virtio::pci::Backing::config_read).
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let present = self.bytes.get(start..).unwrap_or_default();
        for (byte, value) in data.iter_mut().zip(present) {
            *byte = *value;
        }
    }

    /// The place that a driver's write is about, if it may write there and the daemon is to know.
    pub(super) fn writable(&self, offset: u64, length: usize) -> Option<Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let range = start..start.checked_add(length)?;
        let fields = &self.kind.writable;
        let within = fields.start <= range.start && range.end <= fields.end;
        (length > 0 && within).then_some(range)
    }

    fn daemon_knows(&self) -> bool {
        self.kind.config > 0 && self.made == Made::Nothing
    }

    /// What a type's configuration is when the daemon does not have any.
    fn without_daemon(&self, bytes: &mut [u8]) -> Result<(), DaemonError> {
        match self.kind.device_type {
            // Without any feature, no field means anything.
            DeviceType::CONSOLE => Ok(()),
            DeviceType::SCSI => {
                scsi(bytes);
                Ok(())
            }
            DeviceType::FS => Err(DaemonError::Unfit("does not know its tag: tag= must say it")),
            DeviceType::VSOCK => {
                Err(DaemonError::Unfit("does not know the guest's address: guest-cid= must say it"))
            }
            _ => Err(DaemonError::Unfit("has no configuration to give")),
        }
    }

    fn overlay(&self, bytes: &mut [u8]) {
        match self.made {
            Made::Nothing => {}
            Made::Tag(tag) => bytes[..tag.len()].copy_from_slice(&tag),
            Made::Cid(cid) => bytes.copy_from_slice(&cid.to_le_bytes()),
            Made::Net { mac } => {
                bytes[..6].copy_from_slice(&mac.unwrap_or_default());
                bytes[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
                bytes[8..10].copy_from_slice(&1_u16.to_le_bytes());
            }
        }
        match self.kind.queues_at {
            Some(Field::U16(at)) => {
                bytes[at..at + 2].copy_from_slice(&self.requests.to_le_bytes());
            }
            Some(Field::U32(at)) => {
                bytes[at..at + 4].copy_from_slice(&u32::from(self.requests).to_le_bytes());
            }
            None => {}
        }
    }
}

/// 5.6.4, for hosts whose daemon leaves it to the VMM. `num_queues` comes from elsewhere.
fn scsi(bytes: &mut [u8]) {
    let words = [
        0,      // num_queues
        126,    // seg_max
        0xffff, // max_sectors
        128,    // cmd_per_lun
        16,     // event_info_size
        96,     // sense_size
        32,     // cdb_size
    ];
    for (field, word) in bytes.chunks_exact_mut(4).zip(words) {
        field.copy_from_slice(&u32::to_le_bytes(word));
    }
    bytes[28..30].copy_from_slice(&0_u16.to_le_bytes()); // max_channel
    bytes[30..32].copy_from_slice(&255_u16.to_le_bytes()); // max_target
    bytes[32..36].copy_from_slice(&16383_u32.to_le_bytes()); // max_lun
}
