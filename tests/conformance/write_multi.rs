//! "VFIO_USER_REGION_WRITE_MULTI"

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, Payload, command, message};
use barkeep_tests::peer::requests::{CONFIG, pci};
use rustix::io::Errno;

/// Writes of at most 8 bytes: region, offset, data.
fn multi(writes: &[(u32, u64, &[u8])]) -> Vec<u8> {
    let one = |body: Payload, (region, offset, data): &(u32, u64, &[u8])| {
        let count = u32::try_from(data.len()).expect("at most 8 bytes");
        let rest = vec![0xee; 8 - data.len()];
        body.u64(*offset).u32(*region).u32(count).bytes(data).bytes(&rest)
    };
    writes.iter().fold(Payload::new().u64(writes.len() as u64), one).done()
}

#[test]
fn writes_are_done_in_order_and_counted() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let enable = (pci::MEMORY_SPACE | pci::BUS_MASTER).to_le_bytes();
    let writes: [(u32, u64, &[u8]); 4] = [
        // Before this one, the BAR would not take the others.
        (CONFIG, pci::COMMAND, &enable),
        (0, at::LIVENESS, &1u32.to_le_bytes()),
        (0, at::DMA_SOURCE, &0x1234_5678_9abc_u64.to_le_bytes()),
        (0, at::LIVENESS, &2u32.to_le_bytes()),
    ];
    let reply = peer.call(command::REGION_WRITE_MULTI, &multi(&writes)).success();
    assert_eq!(reply, 4u64.to_ne_bytes());
    assert_eq!(peer.read_u32(0, at::LIVENESS), !2);
    assert_eq!(peer.read(0, at::DMA_SOURCE, 8), 0x1234_5678_9abc_u64.to_le_bytes());
    let reply = peer.call(command::REGION_WRITE_MULTI, &multi(&[])).success();
    assert_eq!(reply, 0u64.to_ne_bytes());
}

#[test]
fn the_first_write_that_fails_ends_them() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let liveness = |value: u32| value.to_le_bytes();
    let (one, two, three) = (liveness(1), liveness(2), liveness(3));
    let nowhere: (u32, u64, &[u8]) = (5, 0, &[0; 4]);
    let writes =
        multi(&[(0, at::LIVENESS, &one), (0, at::LIVENESS, &two), nowhere, (0, 4, &three)]);
    let reply = peer.call(command::REGION_WRITE_MULTI, &writes).success();
    assert_eq!(reply, 2u64.to_ne_bytes());
    assert_eq!(peer.read_u32(0, at::LIVENESS), !2);
    // If that is the first of all, its error is the answer.
    let writes = multi(&[nowhere, (0, at::LIVENESS, &three)]);
    peer.expect_errno(command::REGION_WRITE_MULTI, &writes, Errno::INVAL);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !2);
}

/// As QEMU sends them.
#[test]
fn several_posted_writes_are_done_and_not_answered() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let writes: Vec<_> = (0..200u32).map(u32::to_le_bytes).collect();
    let writes: Vec<_> = writes.iter().map(|data| (0, at::LIVENESS, &data[..])).collect();
    let body = multi(&writes);
    peer.send(&message(0x7777, command::REGION_WRITE_MULTI, COMMAND | NO_REPLY, &body));
    assert_eq!(peer.read_u32(0, at::LIVENESS), !199, "the next reply is that of the next request");
}
