//! DMA_UNMAP.

use barkeep_protocol::wire::{DmaUnmap, DmaUnmapFlags};

use super::HostedFunction;
use crate::dma::Iova;
use crate::server::request_error::RequestError;
use crate::server::served::Reply;

/// When the reply is sent, nothing of the windows is mapped any more and nothing is in flight there.
pub(super) fn unmap(
    hosted: &mut HostedFunction,
    unmap: &DmaUnmap,
    reply: &mut Reply<'_>,
) -> Result<(), RequestError> {
    hosted.device.quiesce();
    let dma = &mut hosted.dma;
    let iova = Iova(unmap.address);
    let mut result = Ok(());
    match unmap.bitmap {
        _ if unmap.flags.contains(DmaUnmapFlags::ALL) => {
            dma.unmap_all()?;
            reply.bytes(&unmap.to_bytes());
        }
        None => {
            dma.unmap(iova, unmap.size)?;
            reply.bytes(&unmap.to_bytes());
        }
        Some(bitmap) => unmap.write_reply(reply.body, |mut dirty| {
            result = dma.unmap_reporting(iova, unmap.size, bitmap.page_size, dirty.bytes());
        }),
    }
    Ok(result?)
}
