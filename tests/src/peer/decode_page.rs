//! A client's decode page, read word by word as docs/protocol.md lays it out.

use std::os::fd::OwnedFd;

use barkeep_shim::hypervisor::HostMapping;

use super::Peer;
use super::message::{Payload, command};
use super::requests::decode_page;

/// Bytes of a page.
pub const LENGTH: u64 = 4096;

/// A page, and the file that it is in.
#[derive(Debug)]
pub struct DecodePage {
    /// The file, as the server has sent it.
    pub file: OwnedFd,
    memory: HostMapping,
}

/// What a page shows of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its epoch.
    pub epoch: u64,
    /// Its BARs.
    pub bars: [Option<Bar>; 6],
}

/// What a page shows of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Whether it decodes.
    pub decodes: bool,
    /// Whether it is in I/O space.
    pub io: bool,
    /// Its address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where it decoded last, or 0.
    pub decoded_at: u64,
}

impl DecodePage {
    /// Maps one.
    ///
    /// # Panics
    /// If the file can't be mapped, or does not hold a page.
    #[must_use]
    pub fn map(file: OwnedFd) -> Self {
        let memory = HostMapping::from_fd(&file, 0, LENGTH, false).expect("it can be read");
        let page = Self { file, memory };
        assert_eq!(page.word(0).to_ne_bytes(), *b"bkdecode");
        assert_eq!(page.word(1), LENGTH << 32 | 1, "length and version");
        page
    }

    /// One word of it.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn word(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(8 * index, &mut bytes).expect("a word of the page");
        u64::from_ne_bytes(bytes)
    }

    /// What it shows; `None` if a write is not complete.
    #[must_use]
    pub fn shown(&self) -> Option<Shown> {
        let before = self.word(2);
        let shown =
            Shown { epoch: self.word(3), bars: [0, 1, 2, 3, 4, 5].map(|bar| self.load(bar)) };
        (before.is_multiple_of(2) && self.word(2) == before).then_some(shown)
    }

    /// A BAR that is there, of a function that is at rest.
    ///
    /// # Panics
    /// Otherwise.
    #[must_use]
    pub fn bar(&self, index: usize) -> Bar {
        self.shown().expect("a whole page").bars[index].expect("the function has it")
    }

    /// Reads that were Unsupported Requests, writes that were, and memory faults.
    #[must_use]
    pub fn counters(&self) -> [u64; 3] {
        [4, 5, 6].map(|word| self.word(word))
    }

    fn load(&self, bar: u64) -> Option<Bar> {
        let [flags, address, size, decoded_at] =
            [0, 1, 2, 3].map(|part| self.word(8 + 4 * bar + part));
        let (decodes, io) = (flags & 1 != 0, flags & 2 != 0);
        (size != 0).then_some(Bar { decodes, io, address, size, decoded_at })
    }
}

impl Peer {
    /// Asks for the decode page.
    ///
    /// # Panics
    /// If it can't be had.
    pub fn decode_page(&mut self) -> DecodePage {
        let mut reply = self.call(command::DECODE_PAGE, &decode_page(16, 0));
        let file = reply.fds.pop();
        assert!(reply.fds.is_empty());
        assert_eq!(reply.success(), Payload::new().u32(16).u32(0).u64(LENGTH).done());
        DecodePage::map(file.expect("the page's file"))
    }
}
