//! The block device, driven by the crate `virtio-driver`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use barkeep_tests::memory::{bytes_at, shrinkable};
use barkeep_tests::virtio::requests::{blk, header_at};
use barkeep_tests::virtio::{DATA, Part, feature};
use rustix::process::Signal;
use virtio_driver::{
    EventFd, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use crate::front_end::{Driver, wait};
use crate::sidecar::Sidecar;

const IMAGE: u64 = 16 << 20;
/// Room for the data of requests.
const ROOM: usize = 4 << 20;

/// A sidecar with an image.
struct Served {
    sidecar: Sidecar,
    image: File,
    path: PathBuf,
}

impl Served {
    fn start(options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let image = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        image.write_all_at(&pattern(7, usize::try_from(IMAGE).unwrap()), 0).unwrap();
        let device = format!("virtio-blk,path={}{options}", path.display());
        Self { sidecar: Sidecar::start_in(directory, &[&device]), image, path }
    }

    fn disk(&self, queues: usize) -> Disk {
        Disk::connect(&self.sidecar, queues)
    }

    /// The image as it is on the host.
    fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        bytes_at(&self.image, offset, length)
    }
}

/// The driver's side: its queues, and data that the device reaches.
struct Disk {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    done: Vec<Arc<EventFd>>,
    /// Where the driver believes the data is; what it holds is in `data`.
    room: Vec<u8>,
    data: File,
    transport: Box<VirtioBlkTransport>,
}

impl Disk {
    fn connect(sidecar: &Sidecar, queues: usize) -> Self {
        let features = VirtioFeatureFlags::VERSION_1
            | VirtioFeatureFlags::RING_EVENT_IDX
            | VirtioFeatureFlags::RING_INDIRECT_DESC;
        let features = features.bits() | VirtioBlkFeatureFlags::all().bits();
        let path = sidecar.socket(0);
        let transport = VhostUser::new(path.to_str().unwrap(), features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let room = vec![0; ROOM];
        let data = shrinkable(ROOM as u64);
        let address = room.as_ptr().addr();
        transport.map_mem_region(address, ROOM, data.as_raw_fd(), 0).unwrap();
        let count = queues;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, count, 128).unwrap();
        queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
        let done = (0..count).map(|index| transport.get_completion_fd(index)).collect();
        Self { queues, done, room, data, transport }
    }

    /// Hands over what a queue was given, and waits until so many requests are done. Their results,
    /// by the numbers that they were given.
    fn finish(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut results = Vec::new();
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().unwrap();
        }
        while results.len() < count {
            let done = self.queues[queue].completions();
            results.extend(done.map(|done| (done.context, done.ret)));
            if results.len() < count {
                wait(&self.done[queue]);
            }
        }
        results.sort_unstable();
        results
    }

    fn write(&mut self, queue: usize, offset: u64, bytes: &[u8]) {
        self.data.write_all_at(bytes, 0).unwrap();
        self.queues[queue].write(offset, &self.room[..bytes.len()], 0).unwrap();
        assert_eq!(self.finish(queue, 1), [(0, 0)]);
    }

    fn read(&mut self, queue: usize, offset: u64, length: usize) -> Vec<u8> {
        self.data.write_all_at(&vec![0xee; length], 0).unwrap();
        self.queues[queue].read(offset, &mut self.room[..length], 0).unwrap();
        assert_eq!(self.finish(queue, 1), [(0, 0)]);
        bytes_at(&self.data, 0, length)
    }
}

/// Bytes that differ from those of another seed, and from those at another place.
fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0_u64..).flat_map(|index| (index << 8 | u64::from(seed)).to_le_bytes()).take(length).collect()
}

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    for options in ["", ",aio=sync", ",cache=writethrough"] {
        let served = Served::start(options);
        let mut disk = served.disk(1);
        assert_eq!(u64::from(disk.transport.get_config().unwrap().capacity) * 512, IMAGE);
        for (seed, offset, length) in [(1, 0, 512), (2, 4096, 65536), (3, IMAGE - 4096, 4096)] {
            let before = disk.read(0, offset, length);
            assert_eq!(before, served.bytes(offset, length));
            disk.write(0, offset, &pattern(seed, length));
            assert_eq!(served.bytes(offset, length), pattern(seed, length));
            assert_eq!(disk.read(0, offset, length), pattern(seed, length));
        }
        disk.queues[0].flush(0).unwrap();
        assert_eq!(disk.finish(0, 1), [(0, 0)]);
        // What is between them is as it was.
        assert_eq!(served.bytes(512, 3584), pattern(7, 4096)[512..]);
    }
}

#[test]
fn discarded_and_zeroed_ranges_are_zeros_and_no_others_are() {
    let served = Served::start("");
    let mut disk = served.disk(1);
    let before = served.bytes(0, 4 << 20);
    disk.queues[0].discard(1 << 20, 1 << 20, 1).unwrap();
    disk.queues[0].write_zeroes(2 << 20, 65536, false, 2).unwrap();
    disk.queues[0].write_zeroes(3 << 20, 65536, true, 3).unwrap();
    assert_eq!(disk.finish(0, 3), [(1, 0), (2, 0), (3, 0)]);
    let mut expected = before;
    for (start, length) in [(1 << 20, 1 << 20), (2 << 20, 65536), (3 << 20, 65536)] {
        expected[start..start + length].fill(0);
    }
    assert!(served.bytes(0, 4 << 20) == expected);
    assert!(disk.read(0, 0, 4 << 20) == expected);
}

#[test]
fn many_requests_of_many_queues_are_done_at_once() {
    let served = Served::start(",queues=4");
    let mut disk = served.disk(4);
    assert_eq!(disk.transport.max_queues(), Some(4));
    let count = 40;
    let size = 4096;
    disk.data.write_all_at(&pattern(9, 4 * count * size), 0).unwrap();
    for queue in 0..4 {
        for number in 0..count {
            let at = (queue * count + number) * size;
            let data = &disk.room[at..at + size];
            disk.queues[queue].write(at as u64, data, number).unwrap();
        }
    }
    for queue in (0..4).rev() {
        let results: Vec<_> = (0..count).map(|number| (number, 0)).collect();
        assert_eq!(disk.finish(queue, count), results);
    }
    assert!(served.bytes(0, 4 * count * size) == pattern(9, 4 * count * size));
    for queue in 0..4 {
        let at = (queue * count * size) as u64;
        assert!(disk.read(queue, at, size) == served.bytes(at, size));
    }
}

#[test]
fn a_driver_that_vanishes_in_the_midst_of_its_requests_makes_room_for_the_next() {
    let served = Served::start(",queues=2");
    for round in 0..5 {
        let mut disk = served.disk(2);
        for number in 0..60 {
            let data = &disk.room[number * 65536..(number + 1) * 65536];
            disk.queues[number % 2].write(8 << 20, data, number).unwrap();
        }
        for queue in 0..2 {
            disk.transport.get_submission_notifier(queue).notify().unwrap();
        }
        drop(disk);
        let mut next = served.disk(1);
        next.write(0, 0, &pattern(round, 4096));
        assert_eq!(served.bytes(0, 4096), pattern(round, 4096));
    }
}

#[test]
fn an_image_that_is_read_only_stays_as_it_is() {
    let served = Served::start(",readonly=on");
    let mut disk = served.disk(1);
    assert_ne!(disk.transport.get_features() & VirtioBlkFeatureFlags::RO.bits(), 0);
    disk.queues[0].write(0, &disk.room[..512], 0).unwrap();
    let [(_, result)] = disk.finish(0, 1)[..] else { panic!("one result") };
    assert!(result < 0);
    assert_eq!(disk.read(0, 0, 512), pattern(7, 512));
}

#[test]
fn an_image_that_grows_is_seen_after_a_reload() {
    let mut served = Served::start("");
    let mut disk = served.disk(1);
    served.image.set_len(2 * IMAGE).unwrap();
    served.sidecar.signal(Signal::HUP);
    served.sidecar.expect_log("the configuration changed");
    assert_eq!(u64::from(disk.transport.get_config().unwrap().capacity) * 512, 2 * IMAGE);
    disk.write(0, 2 * IMAGE - 512, &pattern(1, 512));
    assert_eq!(served.bytes(2 * IMAGE - 512, 512), pattern(1, 512));
}

#[test]
fn a_disk_of_another_process_is_refused() {
    let served = Served::start("");
    let directory = tempfile::tempdir().unwrap();
    let device = format!("virtio-blk,path={}", served.path.display());
    let error = Sidecar::refused(&directory.path().join("0.sock"), &device);
    assert!(error.contains("in use"), "{error}");
}

/// Writes so many blocks of 4 KiB, each at its place, and does not wait for it.
fn send_writes(driver: &mut Driver, seed: u8, count: usize) {
    for slot in 0..count {
        let at = header_at(slot);
        let sector = 8 * slot as u64;
        let header = [blk::T_OUT.to_le_bytes(), [0; 4]].concat();
        driver.memory.rings.write(at, &[header, sector.to_le_bytes().to_vec()].concat());
        driver.memory.rings.write(at + 16, &[blk::S_NONE]);
        let data = DATA + slot as u64 * 4096;
        driver.memory.data.write(data, &pattern(seed, 4096));
        let parts = [Part::Read(at, 16), Part::Read(data, 4096), Part::Write(at + 16, 1)];
        driver.send(0, &parts);
    }
}

fn assert_written(served: &Served, driver: &Driver, seed: u8, count: usize) {
    for slot in 0..count {
        assert_eq!(driver.memory.rings.bytes(header_at(slot) + 16, 1), [blk::S_OK]);
        assert!(served.bytes(slot as u64 * 4096, 4096) == pattern(seed, 4096));
    }
}

#[test]
fn a_ring_stops_with_all_its_requests_done_or_not_begun() {
    let features = feature::VERSION_1 | feature::INDIRECT_DESC;
    // With a limit, few of them begin.
    for (options, count, rounds) in [("", 100, 10), (",iops=40", 60, 2)] {
        let served = Served::start(options);
        let mut driver = Driver::start_with(&served.sidecar.socket(0), 1, 256, features);
        let mut done = 0;
        for round in 0..rounds {
            send_writes(&mut driver, round, count);
            let next = driver.stop_ring(0);
            let mut left = count;
            while driver.rings[0].queue.used().is_some() {
                left -= 1;
                done += 1;
            }
            assert_eq!(next, done, "what was taken is given back");
            // The others are done when it starts again.
            driver.start_ring(0, 256, next);
            for _ in 0..left {
                driver.next_used(0);
                done += 1;
            }
            assert_written(&served, &driver, round, count);
        }
    }
}
