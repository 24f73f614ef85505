//! Moving a function to another process: VFIO's migration protocol, version 2
//! (`enum vfio_device_mig_state` in `<linux/vfio.h>`).

use std::fs::File;
use std::os::unix::fs::FileExt;

use barkeep_protocol::wire::MigrationState;
use serde::{Deserialize, Serialize};

use super::function::Rest;
use super::request_error::RequestError;
use crate::pci::FunctionState;

/// Where a function is on its way, and what it carries.
#[derive(Debug, Default)]
pub(super) enum Migration {
    /// It works.
    #[default]
    Running,
    /// It does nothing by itself and changes nothing.
    Stopped,
    /// It is stopped, and the client reads its state.
    Saving(Outgoing),
    /// It is stopped, and the client writes a state for it.
    Resuming(Incoming),
    /// A state could not be taken over. Only a reset helps.
    Failed,
    /// The function is what its predecessor in another process was, but for what the client has set
    /// up around it.
    Recovering(Rest),
}

/// What moves with a function: the first version.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum SavedFunction {
    V1 {
        function: FunctionState,
        device: Vec<u8>,
        /// Bytes of memory that follow.
        memory: u64,
    },
}

/// Tells our stream from anything else.
const MAGIC: [u8; 8] = *b"barkeep1";
/// The longest description of a function that is taken, without its memory.
const MAX_HEADER: usize = 1 << 20;
/// What precedes the description: [`MAGIC`] and its length.
const PREFIX: usize = MAGIC.len() + 4;

impl Migration {
    /// The state in the protocol's words.
    pub(super) fn state(&self) -> MigrationState {
        match self {
            Self::Running => MigrationState::Running,
            Self::Stopped => MigrationState::Stop,
            Self::Saving(_) => MigrationState::StopCopy,
            Self::Resuming(_) => MigrationState::Resuming,
            // Nobody asks before it is over.
            Self::Failed | Self::Recovering(_) => MigrationState::Error,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running)
    }
}

/// A state on its way out.
#[derive(Debug)]
pub(super) struct Outgoing {
    header: Vec<u8>,
    memory: u64,
    position: u64,
}

impl Outgoing {
    pub(super) fn new(saved: &SavedFunction) -> Self {
        let SavedFunction::V1 { memory, .. } = saved;
        let description = postcard::to_allocvec(saved).expect("plain data serialises");
        let length = u32::try_from(description.len()).expect("a description is small");
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&length.to_le_bytes());
        header.extend_from_slice(&description);
        Self { header, memory: *memory, position: 0 }
    }

    /// The same, of which so much has been read.
    pub(super) fn from(saved: &SavedFunction, position: u64) -> Self {
        Self { position, ..Self::new(saved) }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Appends the next `limit` bytes, or fewer at the end. `memory` is the device's.
    pub(super) fn read(
        &mut self,
        limit: usize,
        memory: Option<&File>,
        out: &mut Vec<u8>,
    ) -> Result<(), RequestError> {
        let start = usize::try_from(self.position).unwrap_or(usize::MAX);
        let rest = self.header.get(start..).unwrap_or_default();
        let part = &rest[..rest.len().min(limit)];
        out.extend_from_slice(part);

        let limit = (limit - part.len()) as u64;
        let position = self.position + part.len() as u64;
        let offset = position.saturating_sub(self.header.len() as u64);
        let count = if part.len() == rest.len() { limit.min(self.memory - offset) } else { 0 };
        if let Some(memory) = memory.filter(|_| count > 0) {
            let first = out.len();
            out.resize(first + usize::try_from(count).expect("at most the limit"), 0);
            memory
                .read_exact_at(&mut out[first..], offset)
                .map_err(|error| RequestError::memory(&error))?;
        }
        self.position = position + count;
        Ok(())
    }
}

/// A state on its way in.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// Prefix and description, as far as they have come.
    header: Vec<u8>,
    saved: Option<SavedFunction>,
    /// Bytes of memory that have come.
    memory: u64,
}

impl Incoming {
    /// Takes the next bytes. `memory` is the device's, with its length.
    pub(super) fn write(
        &mut self,
        mut data: &[u8],
        memory: Option<(&File, u64)>,
    ) -> Result<(), RequestError> {
        while self.saved.is_none() && !data.is_empty() {
            let wanted = self.wanted()?;
            let (now, later) = data.split_at(data.len().min(wanted));
            self.header.extend_from_slice(now);
            data = later;
            if self.wanted()? == 0 {
                let (saved, rest) = postcard::take_from_bytes(&self.header[PREFIX..])
                    .map_err(|_| RequestError::ForeignState)?;
                let SavedFunction::V1 { memory: announced, .. } = &saved;
                if !rest.is_empty() || *announced != memory.map_or(0, |(_, length)| length) {
                    return Err(RequestError::ForeignState);
                }
                self.saved = Some(saved);
            }
        }
        if data.is_empty() {
            return Ok(());
        }
        let (file, length) = memory.ok_or(RequestError::ForeignState)?;
        let end = self.memory + data.len() as u64;
        if end > length {
            return Err(RequestError::ForeignState);
        }
        file.write_all_at(data, self.memory).map_err(|error| RequestError::memory(&error))?;
        self.memory = end;
        Ok(())
    }

    /// The whole state.
    pub(super) fn finish(self) -> Result<SavedFunction, RequestError> {
        match self.saved {
            Some(SavedFunction::V1 { memory, .. }) if memory != self.memory => {
                Err(RequestError::ForeignState)
            }
            Some(saved) => Ok(saved),
            None => Err(RequestError::ForeignState),
        }
    }

    /// How many bytes of the header are missing, as far as that is known.
    fn wanted(&self) -> Result<usize, RequestError> {
        let Some(prefix) = self.header.first_chunk::<PREFIX>() else {
            return Ok(PREFIX - self.header.len());
        };
        let (magic, length) = prefix.split_at(MAGIC.len());
        let length = u32::from_le_bytes(length.try_into().expect("4 bytes")) as usize;
        if magic != MAGIC || length > MAX_HEADER || length == 0 {
            return Err(RequestError::ForeignState);
        }
        Ok(PREFIX + length - self.header.len())
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::config::Parameters;
    use crate::devices::{Device, Edu};
    use crate::pci::Function;

    fn file(length: u64) -> File {
        let file = memfd_create("memory", MemfdFlags::empty()).unwrap();
        ftruncate(&file, length).unwrap();
        File::from(file)
    }

    fn saved(memory: u64) -> SavedFunction {
        let device = Box::new(Edu::from_parameters(&mut Parameters::default()).unwrap());
        let function = Function::new(device.spec()).unwrap().save();
        SavedFunction::V1 { function, device: b"registers".to_vec(), memory }
    }

    fn stream(memory: Option<&File>, length: u64) -> Vec<u8> {
        let mut outgoing = Outgoing::new(&saved(length));
        let mut bytes = Vec::new();
        // What brings nothing is behind the end.
        loop {
            let before = bytes.len();
            outgoing.read(7, memory, &mut bytes).unwrap();
            match bytes.len() - before {
                0 => break,
                count => assert!(count == 7 || bytes.len() % 7 != 0, "short at the end alone"),
            }
        }
        bytes
    }

    #[test]
    fn what_goes_out_in_parts_comes_in_in_others() {
        let (from, to) = (file(100), file(100));
        from.write_all_at(b"contents", 50).unwrap();
        let bytes = stream(Some(&from), 100);
        for size in [1, 5, 13, bytes.len()] {
            let mut incoming = Incoming::default();
            for part in bytes.chunks(size) {
                incoming.write(part, Some((&to, 100))).unwrap();
            }
            let SavedFunction::V1 { device, .. } = incoming.finish().unwrap();
            assert_eq!(device, b"registers");
            let mut contents = [0; 8];
            to.read_exact_at(&mut contents, 50).unwrap();
            assert_eq!(&contents, b"contents");
        }
    }

    #[test]
    fn a_stream_that_is_cut_too_long_foreign_or_for_other_memory_is_refused() {
        let memory = file(16);
        let good = stream(Some(&memory), 16);
        let take = |bytes: &[u8], memory: Option<(&File, u64)>| {
            let mut incoming = Incoming::default();
            incoming.write(bytes, memory).and_then(|()| incoming.finish()).err()
        };
        let at_home = Some((&memory, 16));
        assert_eq!(take(&good, at_home), None);
        for length in 0..good.len() {
            assert_eq!(
                take(&good[..length], at_home),
                Some(RequestError::ForeignState),
                "{length}"
            );
        }
        let longer = [&good[..], &[0]].concat();
        assert_eq!(take(&longer, at_home), Some(RequestError::ForeignState));
        assert_eq!(take(&good, None), Some(RequestError::ForeignState));
        assert_eq!(take(&good, Some((&memory, 8))), Some(RequestError::ForeignState));
        let mut foreign = good.clone();
        foreign[0] ^= 1;
        assert_eq!(take(&foreign, at_home), Some(RequestError::ForeignState));
        let mut endless = good;
        endless[MAGIC.len()..PREFIX].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(take(&endless, at_home), Some(RequestError::ForeignState));
    }
}
