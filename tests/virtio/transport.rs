//! The PCI transport (4.1), as far as it takes a device at work to see it.

use barkeep_tests::virtio::requests::{BlkData, blk as request, header_at};
use barkeep_tests::virtio::{Area, DATA, Driver, Function, Part, Setup, common, feature, status};

use crate::blk::{self, sidecar};
use crate::sidecar::{Sidecar, drive};

/// Registers of `struct virtio_pci_cfg_cap` (4.1.4.9), from its capability on.
const CFG_BAR: u64 = 4;
const CFG_OFFSET: u64 = 8;
const CFG_LENGTH: u64 = 12;
const CFG_DATA: u64 = 16;

fn point(function: &Function, area: Area, offset: u64, length: u32) {
    let at = function.access;
    function.set_config(at + CFG_BAR, &[u8::try_from(area.bar).unwrap()]);
    let offset = u32::try_from(area.offset + offset).unwrap();
    function.set_config(at + CFG_OFFSET, &offset.to_le_bytes());
    function.set_config(at + CFG_LENGTH, &length.to_le_bytes());
}

#[test]
fn registers_are_reached_through_configuration_space_too() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, blk::setup());
    let function = driver.function.clone();
    let data = function.access + CFG_DATA;
    point(&function, function.common, common::DEVICE_STATUS, 1);
    assert_eq!(function.config::<1>(data)[0], function.status());
    point(&function, function.device, 0, 4);
    assert_eq!(function.config::<4>(data), 2048_u32.to_le_bytes(), "the capacity");
    point(&function, function.common, common::QUEUE_SELECT, 2);
    function.set_config(data, &7_u16.to_le_bytes());
    assert_eq!(function.read::<2>(function.common, common::QUEUE_SELECT), [7, 0]);

    // A notification.
    let header = header_at(0);
    let offset = driver.notify_offset(0);
    driver.memory.rings.write(header, &[[0; 16], [request::S_NONE; 16]].concat());
    let parts = [Part::Read(header, 16), Part::Write(DATA, 512), Part::Write(header + 16, 1)];
    driver.queue(0).add(&parts).unwrap();
    point(&function, function.notify, offset, 2);
    function.set_config(data, &[0, 0]);
    driver.next_used(0);
    assert_eq!(driver.blk_status(0), request::S_OK);

    // What is no register, no BAR, no width: nothing, and the function goes on.
    let nowhere = Area { bar: 5, ..function.common };
    for (area, offset, length) in [
        (nowhere, 0, 4),
        (function.common, u64::from(u32::MAX), 4),
        (function.common, 0, 3),
        (function.common, 0, 0),
        (function.common, 0, u32::MAX),
        (Area { bar: 255, ..function.common }, 0, 4),
    ] {
        point(&function, area, offset, length);
        let _ = function.config::<4>(data);
        function.set_config(data, &[0xff; 4]);
    }
    assert_eq!(driver.blk_read(0, 512), [0; 512]);
}

#[test]
fn features_that_were_not_offered_are_not_agreed_to() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let function = sidecar.connect();
    let offered = function.features();
    assert_ne!(offered & feature::VERSION_1, 0);
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    for (features, agrees) in [
        (offered, true),
        (offered | 1 << 63, false),
        (offered | 1 << 34, false),
        (feature::VERSION_1 | offered & feature::ACCESS_PLATFORM, true),
        (offered & !feature::VERSION_1, false),
    ] {
        function.reset();
        function.set_status(status::ACKNOWLEDGE | status::DRIVER);
        function.accept(features);
        function.set_status(ready);
        let found = function.status() & status::FEATURES_OK != 0;
        assert_eq!(found, agrees, "{features:#x} of {offered:#x}");
    }
}

#[test]
fn a_queue_can_be_kicked_in_every_way_and_more_often_than_needed() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, blk::setup());
    let function = driver.function.clone();
    let offset = driver.notify_offset(0);
    for width in [2, 4] {
        driver.queue(0).needs_kick();
        for _ in 0..3 {
            function.write(function.notify, offset, &[0; 4][..width]);
            driver.kick(0);
        }
        assert_eq!(driver.blk_read(0, 512), [0; 512]);
    }
    // Other queues' pages, and what is on the page behind the first bytes.
    for at in [offset + 2, offset + 0xffe, offset + 0x1000] {
        let end = function.notify.length;
        if at + 2 <= end {
            function.write(function.notify, at, &[0xff; 2]);
        }
    }
    assert_eq!(driver.blk_read(0, 512), [0; 512]);
}

/// "If VIRTIO_F_VERSION_1 ... the driver MUST NOT" is not for the device to rely on.
#[test]
fn a_device_that_is_not_set_up_ignores_kicks() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let driver = drive(&sidecar, blk::setup());
    let (function, memory) = (driver.function.clone(), driver.memory.clone());
    driver.kick(0);
    function.reset();
    for _ in 0..100 {
        driver.kick(0);
        function.write(function.notify, 0, &[0; 2]);
    }
    assert_eq!(function.status(), 0);
    let mut driver = Driver::start(&function, &memory, blk::setup());
    assert_eq!(driver.blk(request::T_FLUSH, 0, BlkData::None), request::S_OK);
}

#[test]
fn every_device_is_of_its_type() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    for (device, id, queues) in [
        (format!("virtio-blk,path={}", image.display()), 0x1042_u16, 1),
        (format!("virtio-blk,queues=3,path={}", image.display()), 0x1042, 3),
        // Two a pair, and the one for commands.
        (format!("virtio-net,socket={}", at("net")), 0x1041, 3),
        (format!("virtio-net,queues=2,socket={}", at("net2")), 0x1041, 5),
        ("virtio-rng".to_owned(), 0x1044, 1),
        (format!("virtio-console,socket={}", at("console")), 0x1043, 2),
    ] {
        let sidecar = Sidecar::start(&device);
        let driver = drive(&sidecar, Setup { queues: 16, ..Setup::default() });
        assert_eq!(driver.function.config::<2>(2), id.to_le_bytes(), "{device}");
        assert_eq!(driver.queues(), queues, "{device}");
    }
}
