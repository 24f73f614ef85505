//! virtio-blk (5.2), request by request.

use std::fs::File;
use std::os::unix::fs::FileExt;

use barkeep_tests::virtio::requests::{BlkData, blk};
use barkeep_tests::virtio::{DATA, Event, Setup};

use crate::sidecar::{Sidecar, drive};

/// A process with an image of so many bytes, all zeros.
pub(crate) fn sidecar(size: u64, options: &str) -> (Sidecar, File) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = File::create_new(&path).unwrap();
    image.set_len(size).unwrap();
    let image = File::options().read(true).write(true).open(&path).unwrap();
    let device = format!("virtio-blk,path={}{options}", path.display());
    (Sidecar::start_in(directory, &device), image)
}

pub(crate) fn setup() -> Setup {
    let plain = Setup::default();
    Setup { features: plain.features | blk::ALL, ..plain }
}

fn bytes_of(image: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    image.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    for options in ["", ",cache=writethrough", ",aio=sync"] {
        let (sidecar, image) = sidecar(1 << 20, options);
        let mut driver = drive(&sidecar, setup());
        assert_eq!(driver.blk_capacity(), 2048);
        driver.blk_write(7, &[0xa5; 1024]);
        assert_eq!(driver.blk(blk::T_FLUSH, 0, BlkData::None), blk::S_OK);
        assert_eq!(bytes_of(&image, 7 * 512, 1024), [0xa5; 1024], "{options}");
        assert_eq!(bytes_of(&image, 9 * 512, 512), [0; 512]);
        image.write_all_at(b"from outside", 2047 * 512).unwrap();
        assert_eq!(driver.blk_read(2047, 512)[..12], *b"from outside");
        assert_eq!(driver.blk_read(6, 1024), [[0; 512], [0xa5; 512]].concat());
    }
}

#[test]
fn requests_behind_the_end_and_of_odd_length_fail_and_change_nothing() {
    let (sidecar, image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, setup());
    driver.memory.data.fill(0x77);
    let rows = [
        (2048, 512),
        (2047, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
    ];
    for (sector, length) in rows {
        for (kind, data) in
            [(blk::T_OUT, BlkData::Out(DATA, length)), (blk::T_IN, BlkData::In(DATA, length))]
        {
            let status = driver.blk(kind, sector, data);
            assert_eq!(status, blk::S_IOERR, "{kind} of {length} at {sector}");
        }
    }
    assert_eq!(image.metadata().unwrap().len(), 1 << 20);
    assert_eq!(bytes_of(&image, 0, 1 << 20), vec![0; 1 << 20]);
    assert_eq!(driver.blk_read(0, 512), [0; 512], "it goes on");
}

#[test]
fn an_unknown_request_is_unsupported() {
    let (sidecar, _image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, setup());
    for kind in [2, 3, 5, 99, u32::MAX] {
        let status = driver.blk(kind, 0, BlkData::In(DATA, 512));
        assert_eq!(status, blk::S_UNSUPP, "{kind}");
    }
    assert_eq!(driver.blk_read(0, 512), [0; 512], "it goes on");
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeros() {
    let (sidecar, image) = sidecar(1 << 20, ",discard=on");
    let mut driver = drive(&sidecar, setup());
    let wanted = blk::DISCARD | blk::WRITE_ZEROES;
    assert_eq!(driver.features & wanted, wanted);
    driver.blk_write(0, &vec![0xff; 256 << 10]);
    assert_eq!(driver.blk_range(blk::T_WRITE_ZEROES, 3, 5, 0), blk::S_OK);
    assert_eq!(driver.blk_range(blk::T_WRITE_ZEROES, 64, 64, 1), blk::S_OK, "with unmap");
    assert_eq!(driver.blk_range(blk::T_DISCARD, 128, 128, 0), blk::S_OK);
    let mut expected = vec![0xff; 256 << 10];
    for (from, count) in [(3, 5), (64, 64), (128, 128)] {
        expected[from * 512..(from + count) * 512].fill(0);
    }
    assert!(driver.blk_read(0, 256 << 10) == expected);
    assert!(bytes_of(&image, 0, 256 << 10) == expected);
    assert_eq!(image.metadata().unwrap().len(), 1 << 20);
    // Behind the end; a flag that nobody knows; unmap, which a discard has not.
    for (kind, sector, sectors, flags, status) in [
        (blk::T_DISCARD, 2047, 2, 0, blk::S_IOERR),
        (blk::T_WRITE_ZEROES, 2048, 1, 0, blk::S_IOERR),
        (blk::T_DISCARD, u64::MAX, u32::MAX, 0, blk::S_IOERR),
        (blk::T_WRITE_ZEROES, 0, 1, 2, blk::S_UNSUPP),
        (blk::T_DISCARD, 0, 1, 1, blk::S_UNSUPP),
    ] {
        let found = driver.blk_range(kind, sector, sectors, flags);
        assert_eq!(found, status, "{kind} at {sector}, {sectors} sectors, flags {flags}");
    }
    assert!(bytes_of(&image, 0, 256 << 10) == expected);
}

#[test]
fn discard_is_only_done_where_it_was_offered() {
    let (sidecar, image) = sidecar(1 << 20, ",discard=off");
    let mut driver = drive(&sidecar, setup());
    assert_eq!(driver.features & blk::DISCARD, 0);
    driver.blk_write(0, &[0xff; 4096]);
    assert_eq!(driver.blk_range(blk::T_DISCARD, 0, 8, 0), blk::S_UNSUPP);
    assert_eq!(bytes_of(&image, 0, 4096), [0xff; 4096]);
}

#[test]
fn a_read_only_device_is_not_written() {
    let (sidecar, image) = sidecar(1 << 20, ",readonly=on");
    image.write_all_at(&[0x11; 512], 0).unwrap();
    let mut driver = drive(&sidecar, setup());
    assert_ne!(driver.features & blk::RO, 0);
    assert_eq!(driver.blk(blk::T_OUT, 0, BlkData::Out(DATA, 512)), blk::S_IOERR);
    // What is not offered may also be called unsupported.
    assert_ne!(driver.blk_range(blk::T_WRITE_ZEROES, 0, 1, 0), blk::S_OK);
    assert_ne!(driver.blk_range(blk::T_DISCARD, 0, 1, 0), blk::S_OK);
    assert_eq!(bytes_of(&image, 0, 512), [0x11; 512]);
    assert_eq!(driver.blk_read(0, 512), [0x11; 512]);
}

#[test]
fn the_serial_number_is_the_operators() {
    for serial in ["disk-7", "twenty-bytes-exactly"] {
        let (sidecar, _image) = sidecar(1 << 20, &format!(",serial={serial}"));
        let mut driver = drive(&sidecar, setup());
        driver.memory.data.fill(0x77);
        assert_eq!(driver.blk(blk::T_GET_ID, 0, BlkData::In(DATA, 20)), blk::S_OK);
        let mut expected = serial.as_bytes().to_vec();
        expected.resize(20, 0);
        assert_eq!(driver.memory.data.bytes(DATA, 21), [&expected[..], &[0x77]].concat());
    }
}

#[test]
fn a_device_of_4096_bytes_a_block_says_so_and_takes_nothing_smaller() {
    let (sidecar, image) = sidecar(1 << 20, ",logical-block-size=4096");
    let mut driver = drive(&sidecar, setup());
    assert_ne!(driver.features & blk::BLK_SIZE, 0);
    let area = driver.function.device;
    assert_eq!(driver.function.read::<4>(area, 20), 4096_u32.to_le_bytes(), "blk_size");
    // The unit stays 512 bytes (5.2.4).
    assert_eq!(driver.blk_capacity(), 2048);
    driver.blk_write(8, &[0x42; 4096]);
    assert_eq!(bytes_of(&image, 4096, 4096), [0x42; 4096]);
    assert_eq!(driver.blk_read(2040, 4096), [0; 4096]);
    assert_eq!(driver.blk(blk::T_OUT, 0, BlkData::Out(DATA, 512)), blk::S_IOERR);
    assert_eq!(driver.blk(blk::T_OUT, 1, BlkData::Out(DATA, 4096)), blk::S_IOERR);
    assert_eq!(bytes_of(&image, 0, 4096), [0; 4096]);
}

#[test]
fn an_image_that_grows_or_shrinks_is_told_after_a_signal() {
    let (sidecar, image) = sidecar(1 << 20, "");
    let mut driver = drive(&sidecar, setup());
    assert_eq!(driver.blk_capacity(), 2048);
    for size in [3 << 20, 1 << 19] {
        image.set_len(size).unwrap();
        sidecar.hang_up();
        assert_eq!(driver.wait(), Event::Config);
        assert_eq!(driver.blk_capacity(), size / 512);
        driver.blk_write(size / 512 - 1, &[0x33; 512]);
        assert_eq!(bytes_of(&image, size - 512, 512), [0x33; 512]);
        let status = driver.blk(blk::T_OUT, size / 512, BlkData::Out(DATA, 512));
        assert_eq!(status, blk::S_IOERR);
        assert_eq!(image.metadata().unwrap().len(), size);
    }
    // A size that is none: told in the log, and the device stays as it is.
    image.set_len((1 << 19) + 100).unwrap();
    sidecar.hang_up();
    image.set_len(1 << 20).unwrap();
    sidecar.hang_up();
    assert_eq!(driver.wait(), Event::Config);
    assert_eq!(driver.blk_capacity(), 2048);
}
