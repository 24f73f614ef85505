//! Some hundred files of known content, to be copied.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::super::virtio::disk::run;
use crate::pattern::{Pattern, hash};
use crate::{Result, ensure};

const FILES: u64 = 320;
const LONGEST: u64 = 128 << 10;

/// The files, which anybody with the same seed knows.
#[derive(Debug)]
pub(crate) struct Tree {
    seed: u64,
}

impl Tree {
    /// Makes the files below `root`, which is not there yet.
    ///
    /// # Errors
    /// They can't be written.
    pub(crate) fn make(root: &Path, nonce: &str) -> Result<Self> {
        let tree = Self { seed: hash(nonce.as_bytes()) };
        for number in 0..FILES {
            let path = root.join(tree.path(number));
            fs::create_dir_all(path.parent().ok_or("a file without a folder")?)?;
            fs::write(path, tree.content(number)?)?;
        }
        Ok(tree)
    }

    /// Compares every byte of a copy, and its number of files.
    ///
    /// # Errors
    /// It is not the same.
    pub(crate) fn compare(&self, root: &Path) -> Result<String> {
        let mut bytes = 0;
        for number in 0..FILES {
            let path = root.join(self.path(number));
            let name = path.display();
            let mut is = Vec::new();
            fs::File::open(&path)
                .and_then(|mut file| file.read_to_end(&mut is))
                .map_err(|error| format!("{name}: {error}"))?;
            let expected = self.content(number)?;
            ensure!(
                is.len() == expected.len(),
                "{name} has {} bytes instead of {}",
                is.len(),
                expected.len()
            );
            let at = is.iter().zip(&expected).position(|(is, expected)| is != expected);
            ensure!(at.is_none(), "{name} differs from byte {} on", at.unwrap_or_default());
            bytes += is.len();
        }
        let found = run(&["find", root.to_str().ok_or("a path is not text")?, "-type", "f"])?;
        let found = found.lines().count();
        ensure!(found == usize::try_from(FILES)?, "{found} files instead of {FILES}");
        Ok(format!("{FILES} files, {bytes} bytes"))
    }

    fn path(&self, number: u64) -> PathBuf {
        PathBuf::from(format!("{}/{}/file {number}", number % 5, number % 7))
    }

    /// Of any length, and some of none.
    fn content(&self, number: u64) -> Result<Vec<u8>> {
        let mut pattern = Pattern::new(self.seed ^ number);
        let len = if number.is_multiple_of(16) { 0 } else { pattern.below(LONGEST) };
        let mut content = vec![0; usize::try_from(len)?];
        pattern.fill(&mut content);
        Ok(content)
    }
}
