//! A disk as a driver sees it: over real files with both engines, and over one that does what a
//! test wants.

mod cache;
mod configuration;
mod engines;
mod lifecycle;
mod limits;
mod loss;
mod memory;
mod model;
mod opening;
mod refusals;
mod requests;
mod scripted;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use self::scripted::Script;
use super::*;
use crate::config::DeviceSpec;
use crate::devices::virtio::spec::descriptor;
use crate::devices::virtio::testing::{Driver, Memory, Part, Sent};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Both ways to access a real image.
const ENGINES: [&str; 2] = ["io_uring", "sync"];

const MIB: u64 = 1 << 20;

/// A disk with its driver.
struct Fixture {
    driver: Driver,
    block: Block<Memory>,
    image: NamedTempFile,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Outcome {
    status: u8,
    written: u32,
}

fn image(size: u64) -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(size).unwrap();
    image
}

fn create(text: &str) -> Result<Block<Memory>, ConfigError> {
    let mut spec: DeviceSpec = text.parse()?;
    let block = Block::from_parameters(&mut spec.parameters)?;
    spec.parameters.finish()?;
    Ok(block)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let low = |number: usize| number.to_le_bytes()[0];
    let byte = |index: usize| low(index / 512) ^ low(index * 7) ^ seed;
    (0..len).map(byte).collect()
}

impl Fixture {
    /// A disk over an empty image, with all features.
    fn new(size: u64, options: &str) -> Self {
        Self::over(image(size), options)
    }

    fn over(image: NamedTempFile, options: &str) -> Self {
        let block = create(&format!("virtio-blk,path={}{options}", image.path().display()));
        Self::started(block.unwrap(), image)
    }

    /// A disk whose engine does what the script says.
    fn scripted(size: u64, options: &str) -> (Self, Script) {
        let image = image(size);
        let text = format!("virtio-blk,aio=sync,path={}{options}", image.path().display());
        let mut spec: DeviceSpec = text.parse().unwrap();
        let options = Options::from_parameters(&mut spec.parameters).unwrap();
        let script = Script::default();
        let wake = Arc::new(EventFd::create().unwrap());
        let block = Block::new(options, Box::new(script.clone()), wake).unwrap();
        (Self::started(block, image), script)
    }

    fn started(mut block: Block<Memory>, image: NamedTempFile) -> Self {
        let driver = Driver::new(u16::try_from(block.queue_sizes().len()).unwrap());
        block.start(driver.features | block.features());
        Self { driver, block, image }
    }

    fn file(&self) -> &File {
        self.image.as_file()
    }

    /// Bytes of the image as another process sees them.
    fn stored(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Makes a request available: header, what is read, what is written, status. Its last part is
    /// the status.
    fn send(&mut self, queue: u16, kind: u32, sector: u64, data: &[Part<'_>]) -> Sent {
        let header = header(kind, sector);
        let mut parts = vec![Part::Readable(&header)];
        parts.extend(data);
        parts.push(Part::Writable(1));
        let sent = self.driver.send(queue, &parts);
        self.poison(&sent);
        sent
    }

    /// A status that no device writes.
    fn poison(&self, sent: &Sent) {
        let status = GuestAddress(*sent.addresses.last().unwrap());
        self.driver.memory.write_obj(0xffu8, status).unwrap();
    }

    /// The same in a table of its own, so that it takes one descriptor of the queue.
    fn send_indirect(&mut self, queue: u16, parts: &[(u64, u32, u16)]) -> Sent {
        let len = parts.len() as u64 * descriptor::SIZE;
        let table = self.driver.room(len);
        for (index, (address, len, flags)) in parts.iter().enumerate() {
            let more = index + 1 < parts.len();
            let flags = flags | if more { descriptor::NEXT } else { 0 };
            let next = u16::try_from(index + 1).unwrap();
            let bytes = [
                &address.to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ];
            let at = GuestAddress(table + index as u64 * descriptor::SIZE);
            self.driver.memory.write_slice(&bytes.concat(), at).unwrap();
        }
        let table = Part::Raw(table, u32::try_from(len).unwrap(), descriptor::INDIRECT);
        self.driver.send(queue, &[table])
    }

    fn kick(&mut self, queue: u16) {
        self.block.kicked(queue, &mut self.driver).unwrap();
    }

    /// Waits until a wake is readable, and wakes the device.
    fn wake(&mut self) {
        let wakes = self.block.wakes();
        let mut polled: Vec<_> = wakes.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let patience = Timespec::try_from(Duration::from_secs(60)).unwrap();
        let count = poll(&mut polled, Some(&patience)).unwrap();
        assert!(count > 0, "the device is not done and nothing will wake it");
        let ready = polled.iter().map(|fd| fd.revents().contains(PollFlags::IN));
        let ready: Vec<bool> = ready.collect();
        for (index, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            self.block.woken(index, &mut self.driver).unwrap();
        }
    }

    /// Whether the first wake is readable now.
    fn is_woken(&self) -> bool {
        let wakes = self.block.wakes();
        let mut polled = [PollFd::new(&wakes[0], PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).unwrap() > 0
    }

    /// The next request that the device gives back.
    fn used(&mut self, queue: u16) -> (u16, u32) {
        loop {
            if let Some(used) = self.driver.used(queue) {
                return used;
            }
            self.wake();
        }
    }

    fn status(&self, sent: &Sent) -> u8 {
        self.driver.bytes(*sent.addresses.last().unwrap(), 1)[0]
    }

    /// Kicks, and waits for the end of the only request.
    fn finish(&mut self, queue: u16, sent: &Sent) -> Outcome {
        self.kick(queue);
        self.outcome(queue, sent)
    }

    /// Waits for the end of the only request.
    fn outcome(&mut self, queue: u16, sent: &Sent) -> Outcome {
        let (head, written) = self.used(queue);
        assert_eq!(head, sent.head);
        Outcome { status: self.status(sent), written }
    }

    /// One request in queue 0, from its beginning to its end.
    fn request(&mut self, kind: u32, sector: u64, data: &[Part<'_>]) -> Outcome {
        let sent = self.send(0, kind, sector, data);
        self.finish(0, &sent)
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let sent = self.send(0, IN, sector, &[Part::Writable(len)]);
        let outcome = self.finish(0, &sent);
        assert_eq!(outcome, Outcome { status: OK, written: len + 1 });
        self.driver.bytes(sent.addresses[1], len as usize)
    }

    fn write(&mut self, sector: u64, data: &[u8]) {
        let outcome = self.request(OUT, sector, &[Part::Readable(data)]);
        assert_eq!(outcome, DONE);
    }
}

/// A request that succeeded and has no data for the driver.
const DONE: Outcome = Outcome { status: OK, written: 1 };
/// A request that failed, and had no data for the driver.
const FAILED: Outcome = Outcome { status: IOERR, written: 1 };
