use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{
    FallocateFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
};
use thiserror::Error;

use super::memory::Memory;

/// The memory file of a function's state. It was made by somebody else, with
/// `MFD_ALLOW_SEALING`, who keeps it.
#[derive(Debug)]
pub struct StateFile {
    file: OwnedFd,
}

/// No state is longer, in bytes. Its file may be, if a broken process has made it so, which must not
/// cost the next one more memory than there is.
const MAX_LENGTH: usize = 256 << 20;

/// Why a state can't be gone on from: the function is then as at power-on, and its session over.
#[derive(Debug, Error)]
pub enum StateError {
    /// The kernel refuses.
    #[error("memory for the state: {0}")]
    Io(#[from] io::Error),
    /// There is none: the file is empty, or its first user did not come far enough.
    #[error("there is no state")]
    NoState,
    /// Of another function, or of the same one with other options.
    #[error("the state is that of \"{0}\"")]
    Foreign(String),
    /// Of a later version of this program, which this one does not understand.
    #[error("the state has layout {version}, which needs a reader of layout {oldest_reader}")]
    Newer {
        /// Its layout.
        version: u64,
        /// The first one whose reader understands it.
        oldest_reader: u64,
    },
    /// There is an area that this version does not know and may not leave alone.
    #[error("the state has an area {0:#x} that is not known")]
    UnknownArea(u64),
    /// An area is shorter than this version needs.
    #[error("the state has too little room")]
    TooSmall,
    /// It contradicts itself.
    #[error("the state is damaged: {0}")]
    Damaged(&'static str),
}

impl StateFile {
    /// A file that has just been made, of length 0.
    ///
    /// # Errors
    /// [`StateError::Io`] if it has a length.
    pub fn create(memfd: OwnedFd) -> Result<Self, StateError> {
        let file = Self { file: memfd };
        if file.length()? > 0 {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists).into());
        }
        Ok(file)
    }

    /// A file that has had a user, who may have come any far with it.
    ///
    /// # Errors
    /// [`StateError::NoState`] if it is empty.
    pub fn open(memfd: OwnedFd) -> Result<Self, StateError> {
        let file = Self { file: memfd };
        if file.length()? == 0 { Err(StateError::NoState) } else { Ok(file) }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(fstat(&self.file)?.st_size.cast_unsigned())
    }

    /// Maps it with a length and nothing but zeros in it.
    pub(super) fn map_empty(&self, length: usize) -> Result<Memory, StateError> {
        if self.length()? < length as u64 {
            ftruncate(&self.file, length as u64).map_err(io::Error::from)?;
        }
        self.seal()?;
        let memory = Memory::map(&self.file, length)?;
        // Nobody takes what half of it is for a state.
        super::layout::Layout::erase(&memory);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, hole, 0, memory.len() as u64).map_err(io::Error::from)?;
        Ok(memory)
    }

    /// Maps it as it is.
    pub(super) fn map(&self) -> Result<Memory, StateError> {
        self.seal()?;
        let length = self.length()?;
        if length < super::memory::WORD as u64 {
            return Err(StateError::NoState);
        }
        let length = usize::try_from(length).map_or(MAX_LENGTH, |length| length.min(MAX_LENGTH));
        Ok(Memory::map(&self.file, length)?)
    }

    /// It never gets shorter than somebody has mapped it. It may get longer: a later version may need
    /// more.
    fn seal(&self) -> io::Result<()> {
        if !fcntl_get_seals(&self.file)?.contains(SealFlags::SHRINK) {
            fcntl_add_seals(&self.file, SealFlags::SHRINK)?;
        }
        Ok(())
    }
}
