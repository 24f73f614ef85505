//! "VFIO_USER_REGION_READ" and "VFIO_USER_REGION_WRITE": what is a valid access, and the replies.

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::peer::message::{Payload, command};
use barkeep_tests::peer::requests::{CONFIG, access, pci, write};
use rustix::io::Errno;

const MAX_TRANSFER: u32 = 1 << 20;

#[test]
fn replies_repeat_the_access() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let reply = peer.call(command::REGION_WRITE, &write(0, at::LIVENESS, &[1, 2, 3, 4])).success();
    assert_eq!(reply, Payload::new().u64(4).u32(0).u32(4).done(), "without the data");
    let reply = peer.call(command::REGION_READ, &access(0, at::LIVENESS, 4)).success();
    let expected = Payload::new().u64(4).u32(0).u32(4).bytes(&[!1, !2, !3, !4]).done();
    assert_eq!(reply, expected);
}

#[test]
fn configuration_space_is_read_and_written_in_every_width() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let whole = peer.read(CONFIG, 0, 4096);
    assert_eq!(whole[..4], [0x34, 0x12, 0xe8, 0x11]);
    for (offset, count) in
        [(0, 1), (1, 1), (3, 1), (0, 2), (1, 2), (2, 4), (0, 8), (3, 8), (0x2a, 64), (4095, 1)]
    {
        let end = offset + count as usize;
        assert_eq!(peer.read(CONFIG, offset as u64, count), whole[offset..end], "{offset}+{count}");
    }
    for (offset, data) in [(0x3c, &[0x5a][..]), (0x0c, &[0x11]), (0x0b, &[0xff, 0x22])] {
        peer.write(CONFIG, offset, data);
    }
    let [cache_line, line] = [0x0c, 0x3c].map(|at| peer.read(CONFIG, at, 1)[0]);
    assert_eq!((cache_line, line), (0x22, 0x5a));
    // Across Command, Status and what follows, as firmware that saves and restores does.
    let mut header = peer.read(CONFIG, 4, 12);
    header[0] = 0b110;
    peer.write(CONFIG, 4, &header);
    assert_eq!(peer.config_u16(pci::COMMAND), 0b110);
}

#[test]
fn memory_behind_a_bar_is_read_and_written_in_every_width() {
    let backend = Backend::serve(&["ivshmem,size=1M"]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let data: Vec<u8> = (0..=u8::MAX).cycle().take(MAX_TRANSFER as usize).collect();
    peer.write(2, 0, &data);
    assert_eq!(peer.read(2, 0, MAX_TRANSFER), data, "the largest transfer");
    for (offset, count) in [(0, 1), (3, 2), (5, 4), (7, 8), (0xfff, 2), (0x1f1, 3), (77, 4099)] {
        let end = offset + count as usize;
        assert_eq!(peer.read(2, offset as u64, count), data[offset..end], "{offset}+{count}");
        let fresh = vec![0xa5; count as usize];
        peer.write(2, offset as u64, &fresh);
        assert_eq!(peer.read(2, offset as u64, count), fresh);
        peer.write(2, offset as u64, &data[offset..end]);
    }
    assert_eq!(peer.read(2, 0, MAX_TRANSFER), data, "nothing else was touched");
}

#[test]
fn a_register_takes_the_widths_that_its_device_defines() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    peer.write(0, at::DMA_SOURCE, &0x1122_3344_5566_7788_u64.to_le_bytes());
    assert_eq!(peer.read(0, at::DMA_SOURCE, 8), 0x1122_3344_5566_7788_u64.to_le_bytes());
    assert_eq!(peer.read_u32(0, at::IDENTIFICATION), edu::IDENTIFICATION);
    for (offset, count) in [(0, 1), (0, 2), (0, 8), (1, 4), (0, 64), (0x80, 2), (0xffff0, 16)] {
        assert_eq!(peer.read(0, offset, count), vec![0xff; count as usize], "{offset:#x}");
    }
    peer.write(0, at::LIVENESS, &[1, 2]);
    assert_eq!(peer.read_u32(0, at::LIVENESS), 0, "half a register is ignored");
}

#[test]
fn an_access_must_lie_in_its_region() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    for (region, end) in [(0, 1 << 20), (CONFIG, 4096)] {
        for (offset, count) in [(end - 4, 4), (end - 1, 1), (end, 0), (0, 0), (end - 1, 0)] {
            assert_eq!(peer.read(region, offset, count).len(), count as usize);
            peer.write(region, offset, &vec![0; count as usize]);
        }
        for (offset, count) in [
            (end - 3, 4),
            (end - 1, 2),
            (end, 1),
            (end + 1, 0),
            (1 << 32, 4),
            (u64::MAX, 1),
            (u64::MAX - 3, 4),
            (u64::MAX, 0),
        ] {
            println!("region {region}: {count} bytes at {offset:#x}");
            let read = access(region, offset, count);
            peer.expect_errno(command::REGION_READ, &read, Errno::INVAL);
            let write = write(region, offset, &vec![0; count as usize]);
            peer.expect_errno(command::REGION_WRITE, &write, Errno::INVAL);
        }
    }
}

#[test]
fn a_region_that_does_not_exist_cant_be_accessed() {
    let backend = Backend::serve(&["ivshmem,size=4K"]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    // BAR3 is the upper half of BAR2; 6 is the ROM, 8 is VGA.
    for region in [1, 3, 4, 5, 6, 8, 9, 1 << 31, u32::MAX] {
        for count in [0, 4] {
            let read = access(region, 0, count);
            peer.expect_errno(command::REGION_READ, &read, Errno::INVAL);
            let write = write(region, 0, &vec![0; count as usize]);
            peer.expect_errno(command::REGION_WRITE, &write, Errno::INVAL);
        }
    }
}

#[test]
fn a_count_must_fit_its_message_and_the_limit() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let too_much = vec![0; MAX_TRANSFER as usize + 1];
    for (name, command, body) in [
        ("short read", command::REGION_READ, access(0, 0, 4)[..15].to_vec()),
        ("read with data", command::REGION_READ, write(0, 0, &[0; 4])),
        ("read above the limit", command::REGION_READ, access(0, 0, MAX_TRANSFER + 1)),
        ("read of 2^32 - 1", command::REGION_READ, access(0, 0, u32::MAX)),
        ("short write", command::REGION_WRITE, access(0, 0, 0)[..15].to_vec()),
        ("write without data", command::REGION_WRITE, access(0, 4, 4)),
        ("write of less", command::REGION_WRITE, [access(0, 4, 4), vec![1; 3]].concat()),
        ("write of more", command::REGION_WRITE, [access(0, 4, 4), vec![1; 5]].concat()),
        ("write above the limit", command::REGION_WRITE, write(0, 0, &too_much)),
        ("write of 2^32 - 1", command::REGION_WRITE, access(0, 0, u32::MAX)),
    ] {
        println!("{name}");
        peer.expect_errno(command, &body, Errno::INVAL);
    }
    assert_eq!(peer.read_u32(0, at::LIVENESS), 0, "nothing was written");
}
