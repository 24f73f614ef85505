//! Which request is which method of a function.

use std::os::fd::OwnedFd;

use barkeep_protocol::wire::{MigData, RegionWrites, Request};

use super::peer::Peer;
use super::request_error::RequestError;
use super::served::{Reply, Served};

/// Serves one request of a client that has negotiated.
pub(super) fn serve_request(
    function: &mut dyn Served,
    peer: Peer,
    request: Request<'_>,
    fds: Vec<OwnedFd>,
    reply: &mut Reply<'_>,
) -> Result<(), RequestError> {
    match request {
        Request::Version(_) => Err(RequestError::OutOfOrder),
        Request::GetInfo => {
            function.device_info(reply);
            Ok(())
        }
        Request::GetRegionInfo(query) => function.region_info(query, peer.extensions, reply),
        Request::GetRegionIoFds(query) => function.region_io_fds(&query, peer.message_fds, reply),
        Request::GetIrqInfo(query) => function.irq_info(query, reply),
        Request::SetIrqs(set) => function.set_irqs(&set, fds),
        Request::RegionRead(access) => {
            access.write_reply(reply.body, |data| function.region_read(&access, data))
        }
        Request::RegionWrite(write) => {
            function.region_write(&write.access, write.data)?;
            write.access.write_to(reply.body);
            Ok(())
        }
        Request::RegionWriteMulti(writes) => write_multi(function, &writes, reply),
        Request::Reset => function.device_reset(),
        Request::DmaMap(map) => function.dma_map(&map, fds.into_iter().next()),
        Request::DmaUnmap(unmap) => function.dma_unmap(&unmap, reply),
        Request::DeviceFeature(feature) => function.device_feature(&feature, reply),
        Request::MigDataRead(read) => {
            let mut data = Vec::new();
            function.migration_read(read.size as usize, &mut data)?;
            MigData { data: &data }.write_to(reply.body);
            Ok(())
        }
        Request::MigDataWrite(written) => function.migration_write(written.data),
        Request::MemoryFault(report) if peer.extensions.memory_fault => {
            function.memory_fault(&report, reply)
        }
        Request::RegionState(query) if peer.extensions.region_state => {
            function.region_state(query, reply)
        }
        Request::MemoryFault(_) | Request::RegionState(_) => Err(RequestError::NotNegotiated),
        // The session's own, as its page is.
        Request::DecodePage(_) => Err(RequestError::OutOfOrder),
    }
}

/// The writes are done in order. The first that fails ends them; the reply tells how many were done.
fn write_multi(
    function: &mut dyn Served,
    request: &RegionWrites<'_>,
    reply: &mut Reply<'_>,
) -> Result<(), RequestError> {
    let mut completed = 0;
    for write in request.writes {
        match function.region_write(&write.access(), write.data()) {
            Ok(()) => completed += 1,
            Err(error) if completed == 0 => return Err(error),
            Err(_) => break,
        }
    }
    RegionWrites::write_reply(reply.body, completed);
    Ok(())
}
