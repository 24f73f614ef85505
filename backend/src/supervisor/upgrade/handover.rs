//! What a supervisor leaves to the program that takes its place.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::{Errno, pread, pwrite};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Tells a handover from any other file.
const MAGIC: &[u8; 8] = b"barkhand";
/// The largest that is read, in bytes.
const MAX_SIZE: u64 = 16 << 20;

/// The descriptors that a supervisor leaves open, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// How often the program was replaced, this time included.
    pub upgrades: u32,
    /// What a descriptor is, as a [`FdName`](crate::supervisor::systemd::FdName) or the function whose
    /// listener a service manager has opened, and its number.
    pub descriptors: Vec<(String, RawFd)>,
}

/// Why a handover can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HandoverError {
    /// It is something else, or damaged.
    #[error("not a handover")]
    Foreign,
    /// It is of a program that is too new or too old for this one.
    #[error("a handover in no form that this program knows")]
    Unknown,
    /// The kernel refused.
    #[error("{0}")]
    System(#[from] Errno),
}

/// A handover as it is written. A later version is another variant.
///
/// The file holds it in every form that the writer knows, the newest first, each after its length; the
/// reader takes the first that it knows. So a release can hand over to the one after it, and back, if
/// it still writes the form before its own.
#[derive(Debug, Serialize, Deserialize)]
enum Written {
    V1 { upgrades: u32, descriptors: Vec<(String, RawFd)> },
}

impl Handover {
    /// Writes it to a file of memory.
    ///
    /// # Errors
    /// When the kernel has no more memory or descriptors.
    pub fn to_file(&self) -> io::Result<OwnedFd> {
        let file = memfd_create("barkeep-handover", MemfdFlags::CLOEXEC)?;
        let bytes = self.to_bytes();
        let mut written = 0;
        while written < bytes.len() {
            written += pwrite(&file, &bytes[written..], written as u64)?;
        }
        Ok(file)
    }

    /// Reads it from a file, wherever that stands.
    ///
    /// # Errors
    /// [`HandoverError`]
    pub fn from_file(file: &OwnedFd) -> Result<Self, HandoverError> {
        let size = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
        if size > MAX_SIZE {
            return Err(HandoverError::Foreign);
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| HandoverError::Foreign)?];
        let mut read = 0;
        while read < bytes.len() {
            match pread(file, &mut bytes[read..], read as u64)? {
                0 => return Err(HandoverError::Foreign),
                count => read += count,
            }
        }
        Self::parse(&bytes)
    }

    fn to_bytes(&self) -> Vec<u8> {
        let Self { upgrades, descriptors } = self.clone();
        let mut bytes = MAGIC.to_vec();
        push(&mut bytes, &Written::V1 { upgrades, descriptors });
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Self, HandoverError> {
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(HandoverError::Foreign)?;
        while !rest.is_empty() {
            let (length, tail) = rest.split_first_chunk::<4>().ok_or(HandoverError::Foreign)?;
            let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
            let (form, tail) = tail.split_at_checked(length).ok_or(HandoverError::Foreign)?;
            if let Ok((Written::V1 { upgrades, descriptors }, [])) = postcard::take_from_bytes(form)
            {
                return Ok(Self { upgrades, descriptors });
            }
            rest = tail;
        }
        Err(HandoverError::Unknown)
    }
}

fn push(bytes: &mut Vec<u8>, form: &impl Serialize) {
    let form = postcard::to_allocvec(form).expect("plain data has a form");
    let length = u32::try_from(form.len()).expect("a process has fewer descriptors than that");
    bytes.extend(length.to_le_bytes());
    bytes.extend(form);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The release after this one.
    #[derive(Serialize)]
    enum Later {
        #[expect(dead_code, reason = "takes the place of the form that both know")]
        V1,
        V2 {
            upgrades: u32,
            descriptors: Vec<(String, RawFd, u64)>,
            more: String,
        },
    }

    fn later() -> Later {
        let descriptors = vec![("disk/state".into(), 9, 1)];
        Later::V2 { upgrades: 4, descriptors, more: "news".into() }
    }

    fn example() -> Handover {
        let descriptors = [("disk/state", 5), ("disk/client", 7), ("edu0", 3)];
        let descriptors = descriptors.map(|(name, number)| (name.to_owned(), number)).to_vec();
        Handover { upgrades: 3, descriptors }
    }

    #[test]
    fn what_is_written_is_read() {
        let file = example().to_file().unwrap();
        assert_eq!(Handover::from_file(&file), Ok(example()));
        assert_eq!(Handover::from_file(&file), Ok(example()), "as often as one likes");
    }

    #[test]
    fn the_form_of_this_release_stays_readable() {
        let bytes = b"barkhand\x0f\0\0\0\0\x03\x01\x0adisk/state\x0a";
        let descriptors = vec![("disk/state".to_owned(), 5)];
        assert_eq!(
            Handover::parse(bytes),
            Ok(Handover { upgrades: 3, descriptors: descriptors.clone() })
        );
        assert_eq!(Handover { upgrades: 3, descriptors }.to_bytes(), bytes);
    }

    #[test]
    fn a_later_release_that_writes_our_form_as_well_is_read() {
        let mut bytes = MAGIC.to_vec();
        push(&mut bytes, &later());
        let ours = example().to_bytes();
        bytes.extend(&ours[MAGIC.len()..]);
        assert_eq!(Handover::parse(&bytes), Ok(example()));
    }

    #[test]
    fn a_release_that_writes_none_of_our_forms_is_told_from_damage() {
        let mut bytes = MAGIC.to_vec();
        push(&mut bytes, &later());
        assert_eq!(Handover::parse(&bytes), Err(HandoverError::Unknown));
        assert_eq!(Handover::parse(MAGIC), Err(HandoverError::Unknown));
        for bytes in [&b""[..], b"barkhane", b"barkhand\x01", b"barkhand\xff\xff\xff\xff\0"] {
            assert_eq!(Handover::parse(bytes), Err(HandoverError::Foreign), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_another_handover(at: prop::sample::Index, byte: u8, length: prop::sample::Index) {
            let mut bytes = example().to_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(length.index(bytes.len() + 1));
            let _ = Handover::parse(&bytes);
        }
    }
}
