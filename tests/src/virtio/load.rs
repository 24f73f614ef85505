//! Random writes and reads of a block device, as many at a time as there are slots. Each block that
//! is written carries its own place and a number of its own, so that a lost write, one that was done
//! twice or late, and one in the wrong place show.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::driver::{Driver, Event};
use super::function::status;
use super::memory::DATA;
use super::requests::{BlkData, blk};

/// What blocks hold, and what is under way.
#[derive(Debug)]
pub struct Load {
    block: u64,
    random: u64,
    /// The last number given to a write.
    number: u64,
    /// What each block may hold: one number, or several when a write was interrupted.
    blocks: Vec<BTreeSet<u64>>,
    busy: BTreeSet<u64>,
    /// Requests by queue and head.
    under_way: BTreeMap<(u16, u16), Request>,
    free: Vec<usize>,
    data_is_gone: bool,
    /// Requests that ended well.
    pub done: u64,
    /// Requests that ended with an error.
    pub failed: u64,
}

#[derive(Debug)]
struct Request {
    slot: usize,
    kind: Kind,
    first: u64,
    count: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The number of its first block.
    Write(u64),
    Read,
    Flush,
}

/// What a request may move at most, in bytes.
const SLOT: u64 = 16 << 10;

impl Load {
    /// For an image that is all zeros, with so many requests at a time.
    #[must_use]
    pub fn new(capacity: u64, block: u64, depth: usize) -> Self {
        Self::with_slots(capacity, block, 0..depth)
    }

    /// With the memory of these slots.
    #[must_use]
    pub fn with_slots(capacity: u64, block: u64, slots: Range<usize>) -> Self {
        let blocks = usize::try_from(capacity / block).expect("a small image");
        Self {
            block,
            random: 0x9e37_79b9_7f4a_7c15,
            number: 0,
            blocks: vec![BTreeSet::from([0]); blocks],
            busy: BTreeSet::new(),
            under_way: BTreeMap::new(),
            free: slots.collect(),
            data_is_gone: false,
            done: 0,
            failed: 0,
        }
    }

    /// Another sequence of requests than the usual one.
    #[must_use]
    pub fn seeded(mut self, seed: u64) -> Self {
        self.random = scramble(seed);
        self
    }

    /// Runs until so many more requests ended, with all slots in use until then.
    pub fn run(&mut self, driver: &mut Driver, requests: u64) {
        let end = self.done + self.failed + requests;
        while self.done + self.failed < end {
            self.fill(driver);
            self.one(driver);
        }
    }

    /// Waits for everything that is under way.
    pub fn finish(&mut self, driver: &mut Driver) {
        while !self.under_way.is_empty() {
            self.one(driver);
        }
    }

    /// Runs until so many more requests ended, waits for the others, and looks at the whole image.
    pub fn run_to_end(&mut self, driver: &mut Driver, requests: u64, image: &File) {
        self.run(driver, requests);
        self.finish(driver);
        self.verify(image);
    }

    /// Makes requests available until no slot is free.
    pub fn fill(&mut self, driver: &mut Driver) {
        let queues = u64::from(driver.queues());
        while let Some(slot) = self.free.pop() {
            let queue = u16::try_from(self.next_random() % queues).expect("a few");
            let request = self.choose(slot);
            let (length, at) = (request.count * self.block, address_of(slot));
            let bytes = u32::try_from(length).expect("a small request");
            let (kind, data) = match request.kind {
                Kind::Write(number) => {
                    for index in 0..request.count {
                        let block = self.content(request.first + index, number + index);
                        driver.memory.data.write(at + index * self.block, &block);
                    }
                    (blk::T_OUT, BlkData::Out(at, bytes))
                }
                Kind::Read => (blk::T_IN, BlkData::In(at, bytes)),
                Kind::Flush => (blk::T_FLUSH, BlkData::None),
            };
            let sector = request.first * self.block / blk::SECTOR;
            let head = driver.send_blk(queue, slot, kind, sector, data);
            self.under_way.insert((queue, head), request);
        }
    }

    /// Waits for one request.
    fn one(&mut self, driver: &mut Driver) {
        match driver.wait() {
            Event::Used(queue, used) => self.ended(driver, queue, used.head),
            // Told of nothing, a driver looks and goes on.
            Event::Config => {
                let status = driver.function.status();
                assert_eq!(status & status::NEEDS_RESET, 0, "status {status:#x}");
            }
        }
    }

    /// Takes note of the end of a request.
    pub fn ended(&mut self, driver: &Driver, queue: u16, head: u16) {
        let request = self.under_way.remove(&(queue, head)).expect("it is under way");
        match driver.blk_status(request.slot) {
            blk::S_OK => self.succeeded(driver, &request),
            blk::S_IOERR => {
                self.failed += 1;
                self.in_doubt(&request);
            }
            status => unreachable!("status {status}"),
        }
        self.settle(&request);
    }

    fn succeeded(&mut self, driver: &Driver, request: &Request) {
        self.done += 1;
        for index in 0..request.count {
            let block = request.first + index;
            match request.kind {
                Kind::Write(number) => {
                    *self.at(block) = BTreeSet::from([number + index]);
                }
                Kind::Read if self.data_is_gone => {}
                Kind::Read => {
                    let length = usize::try_from(self.block).expect("a small block");
                    let at = address_of(request.slot) + index * self.block;
                    let found = driver.memory.data.bytes(at, length);
                    self.check(block, &found);
                }
                Kind::Flush => {}
            }
        }
    }

    /// Goes on with the memory of other slots. Nothing is under way.
    pub fn use_slots(&mut self, slots: Range<usize>) {
        assert!(self.under_way.is_empty());
        self.free = slots.collect();
    }

    /// Waits for everything that is under way, without a look at what was read: its memory is gone.
    /// Whether the device goes on.
    pub fn finish_without_data(&mut self, driver: &mut Driver) -> bool {
        self.data_is_gone = true;
        while !self.under_way.is_empty() {
            match driver.wait() {
                Event::Used(queue, used) => self.ended(driver, queue, used.head),
                Event::Config => break,
            }
        }
        self.data_is_gone = false;
        self.under_way.is_empty()
    }

    /// What was under way is with nobody any more: the device was reset, or is gone.
    pub fn abandon(&mut self) {
        for (_, request) in std::mem::take(&mut self.under_way) {
            self.in_doubt(&request);
            self.settle(&request);
        }
    }

    /// What was under way on one queue is with nobody any more.
    pub fn abandon_queue(&mut self, queue: u16) {
        let (gone, left) = std::mem::take(&mut self.under_way)
            .into_iter()
            .partition::<BTreeMap<_, _>, _>(|((of, _), _)| *of == queue);
        self.under_way = gone;
        self.abandon();
        self.under_way = left;
    }

    /// How many requests the device has.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Looks at the whole image. What it holds is certain afterwards.
    pub fn verify(&mut self, image: &File) {
        let mut found = vec![0; usize::try_from(self.block).expect("a small block")];
        for block in 0..self.blocks.len() as u64 {
            image.read_exact_at(&mut found, block * self.block).expect("a block of the image");
            self.check(block, &found);
        }
        assert_eq!(image.metadata().expect("a file").len(), self.blocks.len() as u64 * self.block);
    }

    fn check(&mut self, block: u64, found: &[u8]) {
        let number = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
        let expected = self.at(block);
        assert!(expected.contains(&number), "block {block} has {number}, not of {expected:?}");
        *expected = BTreeSet::from([number]);
        assert!(self.content(block, number) == found, "block {block} of write {number} is torn");
    }

    fn in_doubt(&mut self, request: &Request) {
        if let Kind::Write(number) = request.kind {
            for index in 0..request.count {
                self.at(request.first + index).insert(number + index);
            }
        }
    }

    fn settle(&mut self, request: &Request) {
        for block in request.first..request.first + request.count {
            self.busy.remove(&block);
        }
        self.free.push(request.slot);
    }

    /// What comes next: three writes in five, and now and then a flush. Requests at a time do not
    /// touch the same blocks.
    fn choose(&mut self, slot: usize) -> Request {
        let kind = self.next_random() % 40;
        if kind == 0 {
            return Request { slot, kind: Kind::Flush, first: 0, count: 0 };
        }
        let (mut first, mut count);
        loop {
            count = 1 + self.next_random() % (SLOT / self.block).min(8);
            first = self.next_random() % (self.blocks.len() as u64 - count);
            if self.busy.range(first..first + count).next().is_none() {
                break;
            }
        }
        self.busy.extend(first..first + count);
        if kind < 25 {
            let number = self.number + 1;
            self.number += count;
            Request { slot, kind: Kind::Write(number), first, count }
        } else {
            Request { slot, kind: Kind::Read, first, count }
        }
    }

    /// What a write with this number leaves in a block; number 0 is the image's beginning.
    fn content(&self, block: u64, number: u64) -> Vec<u8> {
        let length = usize::try_from(self.block).expect("a small block");
        if number == 0 {
            return vec![0; length];
        }
        let words = (0..self.block / 8).map(|index| match index {
            0 => block,
            1 => number,
            index => scramble(number ^ index << 48),
        });
        words.flat_map(u64::to_le_bytes).collect()
    }

    fn at(&mut self, block: u64) -> &mut BTreeSet<u64> {
        &mut self.blocks[usize::try_from(block).expect("a small image")]
    }

    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        scramble(self.random)
    }
}

/// Where the data of a slot's request is.
fn address_of(slot: usize) -> u64 {
    DATA + slot as u64 * SLOT
}

/// The finaliser of splitmix64.
fn scramble(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
