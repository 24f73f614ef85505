//! What a device is, asked right after the handshake.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use barkeep_protocol::page::decode::LENGTH;
use barkeep_protocol::wire::{
    BarkeepExtensions, Command, DecodePageInfo, DecodePageQuery, InfoQuery, RegionInfo,
};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};

use super::connection::{Connection, Writer};

/// BARs of a function.
pub(super) const BARS: usize = 6;

/// What is known of a device.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Lengths of the BARs in bytes, 0 for none.
    pub(super) sizes: [u64; BARS],
    pub(super) files: Vec<BarFile>,
    /// A file that can't shrink and has at least a page.
    pub(super) page: Option<OwnedFd>,
}

/// A part of a file that is a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BarFile {
    /// Device and inode number.
    pub(super) identity: (u64, u64),
    pub(super) bar: u8,
    /// Where in the file the BAR begins, and its length. In bytes.
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Room for an answer with sparse areas: some servers send no descriptor with one that is cut.
const ROOM: u32 = 1024;

/// File system of a plain memfd (`TMPFS_MAGIC`).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// Asks the server. `None` if it does not answer.
pub(super) fn introduce(
    connection: &Connection,
    writer: &mut Writer,
    extensions: Option<BarkeepExtensions>,
    deadline: Instant,
) -> Option<Facts> {
    let mut facts = Facts::default();
    for (bar, size) in (0..).zip(&mut facts.sizes) {
        let query = InfoQuery { index: u32::from(bar), argsz: ROOM }.to_region_bytes();
        let reply = connection.ask_between(writer, Command::GetRegionInfo, &query, deadline)?;
        let info = reply.body().and_then(|body| RegionInfo::parse(body).ok());
        let Some((info, _)) = info.filter(|(info, _)| info.index == u32::from(bar)) else {
            continue;
        };
        *size = info.size;
        if let Some(Ok(stat)) = reply.fd.as_ref().map(fstat) {
            let identity = (stat.st_dev, stat.st_ino);
            facts.files.push(BarFile { identity, bar, start: info.file_offset, len: info.size });
        }
    }
    if extensions.is_some_and(|extensions| extensions.decode_page) {
        let query = DecodePageQuery.to_bytes();
        let reply = connection.ask_between(writer, Command::DecodePage, &query, deadline)?;
        let info = reply.body().and_then(|body| DecodePageInfo::parse(body).ok());
        let long = info.is_some_and(|info| info.length >= LENGTH as u64);
        facts.page = reply.fd.filter(|file| long && is_page(file));
    }
    Some(facts)
}

/// Whether nobody can take the memory of the file away, which would be a `SIGBUS` wherever it is looked at. A
/// hole gets zeros where the file is one of `tmpfs`; in huge pages there may be none left for it.
fn is_page(file: impl AsFd) -> bool {
    let sealed = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    let plain = fstatfs(&file).is_ok_and(|system| system.f_type == TMPFS);
    let long = |size: i64| u64::try_from(size).is_ok_and(|size| size >= LENGTH as u64);
    sealed && plain && fstat(&file).is_ok_and(|stat| long(stat.st_size))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    fn sealed(flags: MemfdFlags) -> OwnedFd {
        let file = memfd_create("page", flags | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 2 << 20).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        file
    }

    #[test]
    fn a_page_is_a_file_of_plain_memory() {
        assert!(is_page(sealed(MemfdFlags::CLOEXEC)));
        assert!(!is_page(sealed(MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)));
    }
}
