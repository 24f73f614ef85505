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
        let mut argsz = room(DOORBELLS);
        // The first answer may tell that a complete one is larger; the second one is complete.
        for _ in 0..2 {
            match self.doorbells_within(IoFdsQuery { region, argsz })? {
                Answer::Complete(doorbells) => return Ok(doorbells),
                Answer::TooSmall(needed) => argsz = needed.min(room(MAX_DOORBELLS)),
            }
        }
        // Nobody has as many: the writes are forwarded.
        Ok(Vec::new())
    }

    fn doorbells_within(&self, query: IoFdsQuery) -> Result<Answer, ClientError> {
        let body = |out: &mut Vec<u8>| query.write_to(out);
        self.call_with_fds(Command::GetRegionIoFds, body, Vec::new(), |reply| {
            let Reply { body, fds } = reply;
            Ok(match IoFds::parse_reply(&query, body, fds.len())? {
                IoFdsReply::Complete(found) => Answer::Complete(of(found, fds)),
                IoFdsReply::TooSmall { argsz } => Answer::TooSmall(argsz),
            })
        })
    }
}

enum Answer {
    Complete(Vec<Doorbell>),
    /// The `argsz` that it needs.
    TooSmall(u32),
}

/// Several doorbells may share a descriptor; not many do.
const DOORBELLS: u32 = 64;
/// More than any device has, in libvfio-user's longer entries.
const MAX_DOORBELLS: u32 = 4096;

/// `argsz` for so many.
const fn room(doorbells: u32) -> u32 {
    IoFdsQuery::FIXED_SIZE + doorbells * IoFdLayout::Spec.entry_size()
}

fn of(found: IoFds, fds: Vec<OwnedFd>) -> Vec<Doorbell> {
    let fds: Vec<_> = fds.into_iter().map(Arc::new).collect();
    let doorbell = |entry: barkeep_protocol::wire::IoFd| {
        let IoFdKind::Eventfd { datamatch: value, pio: false } = entry.kind else { return None };
        let eventfd = fds.get(entry.fd_index? as usize)?.clone();
        Some(Doorbell { offset: entry.offset, size: entry.size, value, eventfd })
    };
    found.entries.into_iter().filter_map(doorbell).collect()
}
