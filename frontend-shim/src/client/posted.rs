//! Writes that nobody waits for.

use barkeep_protocol::wire::{Command, Offer, RegionData, RegionWrites, SmallWrite};

use super::{Client, ClientError};

impl Client {
    /// Writes to a region without an answer: it returns when the write is on its way.
    ///
    /// The writes and reads that the same thread asks for later arrive after it, so that on one socket a
    /// read still pushes the writes before it, as on a PCI bus. Everything else is different from
    /// [`region_write`](Self::region_write), which is why nothing in this crate uses it on its own: an
    /// error is told to nobody, a write to one function does not wait for one to another that has a
    /// socket of its own, and a guest's change of PCI_COMMAND on another vCPU may overtake a write that
    /// its vCPU takes for done. A VMM may use it for registers that are known not to mind.
    ///
    /// # Errors
    /// [`ClientError::TooLarge`], and what ends the session.
    pub fn region_write_posted(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        if data.is_empty() {
            return Ok(());
        }
        let access = self.access(region, offset, data.len())?;
        let write = RegionData { access, data };
        self.connection.post(Command::RegionWrite, |out| write.write_to(out))
    }

    /// Makes several small writes with one message, in their order; how many of them, from the first
    /// on, were made.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] when the server lacks `write_multiple`, [`ClientError::TooLarge`] for
    /// more writes than one message takes, and as for every request.
    pub fn region_write_multi(&self, writes: &[SmallWrite]) -> Result<usize, ClientError> {
        if !self.offer.contains(Offer::WRITE_MULTIPLE) {
            return Err(ClientError::NotOffered("write_multiple"));
        }
        let size = size_of_val(writes);
        if writes.len() > RegionWrites::MAX_WRITES || size > self.transfer_size as usize {
            return Err(ClientError::TooLarge(size));
        }
        let writes = RegionWrites { writes };
        let body = |out: &mut Vec<u8>| writes.write_to(out);
        self.call(Command::RegionWriteMulti, body, |body| writes.parse_reply(body))
    }
}
