//! Rings and chains that are none: the device says that it needs a reset, and works after it.

use barkeep_tests::virtio::requests::{blk as request, header_at};
use barkeep_tests::virtio::{
    DATA, Driver, Event, Part, RINGS, Setup, feature, raw_descriptor, status,
};

use crate::blk::{self, sidecar};
use crate::sidecar::{Sidecar, drive};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Where nothing is mapped.
const NOWHERE: u64 = 0x7_0000_0000;

/// What is wrong, the features that the driver does without, and how it does it.
type Row = (&'static str, u64, fn(&mut Driver));

/// What no device can go on with, whatever it is. The first queue's first descriptors are free.
const RINGS_AND_CHAINS: [Row; 13] = [
    ("more is available than the queue holds", 0, |driver| driver.queue(0).overstate(300)),
    ("the index goes backwards", 0, |driver| driver.queue(0).overstate(0xffff)),
    ("a head outside of the table", 0, |driver| driver.queue(0).make_available(0x7fff)),
    ("a head just outside of the table", 0, |driver| driver.queue(0).make_available(256)),
    ("a descriptor that follows itself", 0, |driver| {
        chain(driver, &[raw_descriptor(DATA, 16, NEXT | WRITE, 0)]);
    }),
    ("a loop of two", 0, |driver| {
        let loops = [(DATA, 1), (DATA + 64, 0)];
        chain(driver, &loops.map(|(at, next)| raw_descriptor(at, 16, NEXT | WRITE, next)));
    }),
    ("a next descriptor outside of the table", 0, |driver| {
        chain(driver, &[raw_descriptor(DATA, 16, NEXT | WRITE, 256)]);
    }),
    ("a buffer to read behind one to write", 0, |driver| {
        let first = raw_descriptor(DATA, 16, NEXT | WRITE, 1);
        chain(driver, &[first, raw_descriptor(DATA + 64, 16, 0, 0)]);
    }),
    ("an indirect table that was not negotiated", feature::INDIRECT_DESC, |driver| {
        driver.memory.data.write(DATA, &raw_descriptor(DATA + 64, 16, WRITE, 0));
        chain(driver, &[raw_descriptor(DATA, 16, INDIRECT, 0)]);
    }),
    ("an indirect table of odd length", 0, |driver| {
        driver.memory.data.write(DATA, &raw_descriptor(DATA + 64, 16, WRITE, 0));
        chain(driver, &[raw_descriptor(DATA, 17, INDIRECT, 0)]);
    }),
    ("an indirect table in another", 0, |driver| {
        driver.memory.data.write(DATA, &raw_descriptor(DATA, 16, INDIRECT, 0));
        chain(driver, &[raw_descriptor(DATA, 16, INDIRECT, 0)]);
    }),
    ("an indirect table where no memory is", 0, |driver| {
        chain(driver, &[raw_descriptor(NOWHERE, 32, INDIRECT, 0)]);
    }),
    ("an indirect table at the end of the address space", 0, |driver| {
        chain(driver, &[raw_descriptor(u64::MAX - 15, 64, INDIRECT, 0)]);
    }),
];

/// Block requests that can't even be answered.
const BLOCK_REQUESTS: [Row; 3] = [
    ("no room for a status", 0, |driver| _ = driver.send(0, &[Part::Read(header_at(0), 16)])),
    ("a status where no memory is", 0, |driver| {
        driver.memory.rings.write(header_at(0), &[0; 16]);
        let parts = [Part::Read(header_at(0), 16), Part::Write(DATA, 512), Part::Write(NOWHERE, 1)];
        driver.send(0, &parts);
    }),
    ("an empty request", 0, |driver| chain(driver, &[raw_descriptor(DATA, 0, 0, 0)])),
];

/// Makes a chain of raw descriptors available, from the first one of the table on.
fn chain(driver: &mut Driver, descriptors: &[[u8; 16]]) {
    for (index, descriptor) in (0..).zip(descriptors) {
        driver.queue(0).describe(index, *descriptor);
    }
    driver.queue(0).make_available(0);
}

/// Does what a row says to a device that is set up anew, and sees that the device asks for a reset.
fn assert_needs_reset(mut driver: Driver, setup: Setup, row: &Row) -> Driver {
    let (name, without, act) = row;
    let (function, memory) = (driver.function.clone(), driver.memory.clone());
    drop(driver);
    driver =
        Driver::start(&function, &memory, Setup { features: setup.features & !without, ..setup });
    act(&mut driver);
    driver.kick(0);
    assert_eq!(driver.wait(), Event::Config, "{name}");
    let found = function.status();
    assert_eq!(found & status::NEEDS_RESET, status::NEEDS_RESET, "{name}: status {found:#x}");
    // Until then it does nothing at all.
    let before = memory.rings.bytes(RINGS, 4 << 20);
    driver.kick(0);
    for _ in 0..3 {
        let _ = function.status();
    }
    assert!(memory.rings.bytes(RINGS, 4 << 20) == before, "{name}: it still works on the rings");
    Driver::start(&function, &memory, setup)
}

#[test]
fn a_block_device_with_a_malformed_ring_needs_a_reset_and_works_after_it() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, blk::setup());
    for row in RINGS_AND_CHAINS.iter().chain(&BLOCK_REQUESTS) {
        driver = assert_needs_reset(driver, blk::setup(), row);
        assert_eq!(driver.blk_read(0, 512), [0; 512], "{} is over", row.0);
    }
}

/// The ring is well, so the device goes on.
#[test]
fn a_block_request_that_is_none_fails_alone() {
    let (sidecar, image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, blk::setup());
    let status = Part::Write(header_at(0) + 16, 1);
    let rows: [(&str, &[Part]); 6] = [
        ("a header that is too short", &[Part::Read(header_at(0), 15), status]),
        ("no header", &[status]),
        ("a header where no memory is", &[Part::Read(NOWHERE, 16), status]),
        ("a header at the end of the address space", &[Part::Read(u64::MAX - 7, 16), status]),
        (
            "data to write where no memory is",
            &[Part::Read(header_at(1), 16), Part::Read(NOWHERE, 512), status],
        ),
        (
            "room for data where no memory is",
            &[Part::Read(header_at(0), 16), Part::Write(NOWHERE, 512), status],
        ),
    ];
    for (name, parts) in rows {
        driver.memory.rings.write(header_at(0), &[[0; 16], [request::S_NONE; 16]].concat());
        driver.memory.rings.write(header_at(1), &[[1, 0, 0, 0], [0; 4], [0; 4], [0; 4]].concat());
        driver.send(0, parts);
        driver.next_used(0);
        assert_eq!(driver.blk_status(0), request::S_IOERR, "{name}");
        assert_eq!(driver.blk_read(0, 512), [0; 512], "{name} is over");
    }
    assert_eq!(image.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn an_entropy_device_with_a_malformed_ring_needs_a_reset_and_works_after_it() {
    let sidecar = Sidecar::start("virtio-rng");
    let mut driver = drive(&sidecar, Setup::default());
    for row in &RINGS_AND_CHAINS {
        driver = assert_needs_reset(driver, Setup::default(), row);
        driver.send(0, &[Part::Write(DATA, 64)]);
        assert!(driver.next_used(0).len > 0, "{} is over", row.0);
    }
}

#[test]
fn other_devices_with_a_malformed_ring_need_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let net = format!("virtio-net,socket={}", directory.path().join("net").display());
    let console = format!("virtio-console,socket={}", directory.path().join("con").display());
    for device in [net, console] {
        let sidecar = Sidecar::start(&device);
        // The second queue transmits: what is there is looked at.
        let setup = Setup { queues: 2, ..Setup::default() };
        for (name, without, act) in &RINGS_AND_CHAINS {
            let features = setup.features & !without;
            let mut driver = drive(&sidecar, Setup { features, ..setup });
            driver.swap_queues();
            act(&mut driver);
            driver.kick(0);
            assert_eq!(driver.wait(), Event::Config, "{device}: {name}");
            let found = driver.function.status();
            assert_ne!(found & status::NEEDS_RESET, 0, "{device}: {name}: status {found:#x}");
        }
    }
}

#[test]
fn rings_where_no_memory_is_need_a_reset() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, blk::setup());
    let (function, memory) = (driver.function.clone(), driver.memory.clone());
    memory.rings.unmap(&function.client);
    driver.kick(0);
    assert_eq!(driver.wait(), Event::Config);
    assert_ne!(function.status() & status::NEEDS_RESET, 0);
    memory.rings.map(&function.client);
    let mut driver = Driver::start(&function, &memory, blk::setup());
    assert_eq!(driver.blk(request::T_FLUSH, 0, barkeep_tests::virtio::requests::BlkData::None), 0);
}
