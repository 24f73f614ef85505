//! The disk's image, and where requests go in it.

use std::fs::File;
use std::path::PathBuf;

use tempfile::TempDir;

/// Length of a request's data in bytes.
pub(crate) const BLOCK: usize = 4096;
/// Length of the image in blocks.
const BLOCKS: u64 = 16384;

/// An image in the page cache.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) directory: TempDir,
    pub(crate) path: PathBuf,
}

impl Image {
    pub(crate) fn create() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![7; usize::try_from(BLOCKS).unwrap() * BLOCK]).unwrap();
        Self { directory, path }
    }

    pub(crate) fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }
}

/// Places of blocks in the image, in bytes: the same ones for everybody.
#[derive(Debug)]
pub(crate) struct Places(u64);

impl Places {
    pub(crate) fn new() -> Self {
        Self(1)
    }

    /// A linear congruential generator of 2^14 places, by Knuth's multiplier.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 50) % BLOCKS * BLOCK as u64
    }
}
