//! GET_REGION_IO_FDS.

use barkeep_protocol::wire::{IoFd, IoFdKind, IoFds, IoFdsQuery, PciRegion};

use std::os::fd::AsFd;

use super::{HostedFunction, Target};
use crate::devices::Doorbell;
use crate::pci::BarKind;
use crate::server::request_error::RequestError;
use crate::server::served::{Reply, duplicate};

/// Doorbells beyond what the client takes with one message stay what they are without: writes to forward.
pub(super) fn info(
    hosted: &HostedFunction,
    query: &IoFdsQuery,
    most: usize,
    reply: &mut Reply<'_>,
) -> Result<(), RequestError> {
    let region = PciRegion::from_index(query.region);
    let region = region.ok_or(RequestError::NoRegion(query.region))?;
    let (mut doorbells, mut pio) = (Vec::new(), false);
    if let Some((Target::Bar(bar), _)) = hosted.target(region) {
        doorbells = hosted.device.doorbells(bar);
        doorbells.truncate(most);
        pio = hosted.function.bar(bar).is_some_and(|bar| bar.kind == BarKind::Io);
    }
    let entry = |(index, doorbell): (usize, &Doorbell)| IoFd {
        offset: doorbell.offset,
        size: doorbell.width.into(),
        fd_index: u32::try_from(index).ok(),
        kind: IoFdKind::Eventfd { datamatch: doorbell.value, pio },
    };
    let entries = doorbells.iter().enumerate().map(entry).collect();
    if (IoFds { region: query.region, entries }).write_to(query, reply.body) {
        for doorbell in &doorbells {
            reply.fd(duplicate(doorbell.eventfd.as_fd())?);
        }
    }
    Ok(())
}
