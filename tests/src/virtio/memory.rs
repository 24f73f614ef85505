//! Memory that a function is given.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use barkeep_protocol::wire::{DmaAccess, DmaMap, DmaUnmap};
use barkeep_shim::client::Client;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::memory::sealed;

/// Where rings, tables and [headers](HEADERS) are.
pub const RINGS: u64 = 0x1_0000_0000;
/// Where small parts of requests are: headers and status bytes.
pub const HEADERS: u64 = RINGS + (16 << 20);
/// Where data is.
pub const DATA: u64 = 0x2_0000_0000;
const RINGS_SIZE: u64 = 32 << 20;

/// Guest memory in two windows, of which the one with the data can go away alone.
#[derive(Debug)]
pub struct Memory {
    /// At [`RINGS`].
    pub rings: Window,
    /// At [`DATA`].
    pub data: Window,
}

impl Memory {
    /// Memory with so many bytes of data.
    #[must_use]
    pub fn new(data: u64) -> Self {
        Self { rings: Window::new(RINGS, RINGS_SIZE), data: Window::new(DATA, data) }
    }

    /// Gives all of it to a function.
    pub fn map(&self, client: &Client) {
        self.rings.map(client);
        self.data.map(client);
    }

    /// The window that has an address.
    #[must_use]
    pub fn window(&self, address: u64) -> &Window {
        if address >= self.data.address { &self.data } else { &self.rings }
    }
}

/// A window of guest memory: a memfd that is mapped here too.
#[derive(Debug)]
pub struct Window {
    /// Its first address (IOVA).
    pub address: u64,
    /// Its length in bytes.
    pub size: u64,
    file: File,
    memory: GuestMemoryMmap,
}

impl Window {
    /// A new one, all zeros.
    #[must_use]
    pub fn new(address: u64, size: u64) -> Self {
        let file = sealed(size);
        let offset = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
        let length = usize::try_from(size).expect("a test's memory fits");
        let range = (GuestAddress(address), length, Some(offset));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("a mapping");
        Self { address, size, file, memory }
    }

    /// Gives it to a function.
    pub fn map(&self, client: &Client) {
        let map = DmaMap {
            access: DmaAccess::READ | DmaAccess::WRITE,
            file_offset: 0,
            address: self.address,
            size: self.size,
        };
        let file = OwnedFd::from(self.file.try_clone().expect("a descriptor"));
        client.dma_map(&map, Some(file)).expect("a window that does not overlap");
    }

    /// What it is a mapping of, from the beginning.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes it back: when this returns, the function must not touch it.
    pub fn unmap(&self, client: &Client) {
        client.dma_unmap(&DmaUnmap::range(self.address, self.size)).expect("it was mapped");
    }

    /// Reads bytes.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.memory.read_slice(data, GuestAddress(address)).expect("an address in the window");
    }

    /// Reads so many bytes.
    #[must_use]
    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(address, &mut bytes);
        bytes
    }

    /// Writes bytes.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).expect("an address in the window");
    }

    /// Fills all of it with a byte.
    pub fn fill(&self, byte: u8) {
        let length = usize::try_from(self.size).expect("a test's memory fits");
        self.write(self.address, &vec![byte; length]);
    }

    /// The first page that does not hold `byte` everywhere: its address.
    #[must_use]
    pub fn first_other_than(&self, byte: u8) -> Option<u64> {
        const PAGE: usize = 4096;
        let expected = [byte; PAGE];
        let mut pages = (self.address..self.address + self.size).step_by(PAGE);
        pages.find(|page| self.bytes(*page, PAGE) != expected)
    }

    /// Reads 2 bytes at once, before whatever is read later.
    #[must_use]
    pub fn load(&self, address: u64) -> u16 {
        let value = self.memory.load(GuestAddress(address), Ordering::Acquire);
        u16::from_le(value.expect("an address in the window"))
    }

    /// Writes 2 bytes at once, after whatever was written before.
    pub fn store(&self, address: u64, value: u16) {
        let stored = self.memory.store(value.to_le(), GuestAddress(address), Ordering::Release);
        stored.expect("an address in the window");
    }
}
