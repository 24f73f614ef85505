//! Guest memory, as a VMM would share it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

/// A memfd of `size` bytes that its owner may still shrink.
#[must_use]
pub fn shrinkable(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("guest", flags).expect("a memfd");
    ftruncate(&memory, size).expect("room for a memfd");
    File::from(memory)
}

/// A memfd of `size` bytes whose every page exists for ever.
#[must_use]
pub fn sealed(size: u64) -> File {
    let memory = shrinkable(size);
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::SEAL).expect("a memfd can be sealed");
    memory
}

/// `length` bytes of `file` at `offset`.
#[must_use]
pub fn bytes_at(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).expect("the file is as long as the test made it");
    bytes
}
