//! Eventfds that a server would like to be signalled for writes ("VFIO_USER_DEVICE_GET_REGION_IO_FDS").

use std::os::fd::OwnedFd;
use std::sync::Arc;

use barkeep_protocol::wire::{Command, IoFdKind, IoFdLayout, IoFds, IoFdsQuery, IoFdsReply};

use super::{Client, ClientError, Reply};

/// A place in a region where a write need not be forwarded: to signal an eventfd is enough.
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// Where in the region, in bytes.
    pub offset: u64,
    /// Length of the write in bytes: 1, 2, 4 or 8, or 0 for any.
    pub size: u64,
    /// The value that is written, if only that one counts.
    pub value: Option<u64>,
    /// What is to be signalled.
    pub eventfd: Arc<OwnedFd>,
}

impl Client {
    /// The doorbells of a region. What else the server offers, as ioregionfds, is left out: those
    /// writes are forwarded.
    ///
    /// # Errors
    /// [`ClientError`], as for every request. Servers without doorbells may refuse.
    pub fn doorbells(&self, region: u32) -> Result<Vec<Doorbell>, ClientError> {
        let query = IoFdsQuery { region, argsz: ROOM };
        let body = |out: &mut Vec<u8>| query.write_to(out);
        self.call_with_fds(Command::GetRegionIoFds, body, Vec::new(), |reply| {
            let Reply { body, fds } = reply;
            match IoFds::parse_reply(&query, body, fds.len())? {
                IoFdsReply::Complete(found) => Ok(of(found, fds)),
                // There was room for more than a message has descriptors, and than KVM likes.
                IoFdsReply::TooSmall { .. } => Err(ClientError::Protocol("too many doorbells")),
            }
        })
    }
}

/// Several doorbells may share a descriptor; not many do.
const MAX_DOORBELLS: u32 = 64;
const ROOM: u32 = IoFdsQuery::FIXED_SIZE + MAX_DOORBELLS * IoFdLayout::Spec.entry_size();

fn of(found: IoFds, fds: Vec<OwnedFd>) -> Vec<Doorbell> {
    let fds: Vec<_> = fds.into_iter().map(Arc::new).collect();
    let doorbell = |entry: barkeep_protocol::wire::IoFd| {
        let IoFdKind::Eventfd { datamatch: value, pio: false } = entry.kind else { return None };
        let eventfd = fds.get(entry.fd_index? as usize)?.clone();
        Some(Doorbell { offset: entry.offset, size: entry.size, value, eventfd })
    };
    found.entries.into_iter().filter_map(doorbell).collect()
}
