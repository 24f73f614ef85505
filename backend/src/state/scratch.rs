use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::memory::Memory;

/// A part of the state that its owner keeps in order by itself, for what changes too often to be
/// saved as a whole: words of 64 bits, zeros at first. Each store is on its own.
#[derive(Clone, Debug)]
pub struct Scratch {
    memory: Arc<Memory>,
    first: usize,
    words: usize,
}

impl Scratch {
    /// Memory that nobody else has, of so many words.
    ///
    /// # Errors
    /// When the kernel has no more memory or descriptors.
    pub fn private(words: usize) -> io::Result<Self> {
        let file = memfd_create("barkeep-scratch", MemfdFlags::CLOEXEC)?;
        let size = words.max(1) * size_of::<u64>();
        ftruncate(&file, size as u64)?;
        Ok(Self { memory: Arc::new(Memory::map(file, size)?), first: 0, words })
    }

    pub(super) fn of(memory: Arc<Memory>, first: usize, words: usize) -> Self {
        Self { memory, first, words }
    }

    /// How many words there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Reads a word.
    ///
    /// # Panics
    /// If there is no such word.
    #[must_use]
    pub fn get(&self, word: usize) -> u64 {
        assert!(word < self.words, "word {word} of {}", self.words);
        self.memory.get(self.first + word)
    }

    /// Stores a word. When it is there, so is everything that was stored before.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn set(&self, word: usize, value: u64) {
        assert!(word < self.words, "word {word} of {}", self.words);
        self.memory.set(self.first + word, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_what_is_stored() {
        let scratch = Scratch::private(600).unwrap();
        assert_eq!((scratch.len(), scratch.get(599)), (600, 0));
        scratch.set(599, u64::MAX);
        assert_eq!((scratch.clone().get(599), scratch.get(598)), (u64::MAX, 0));
    }
}
