//! virtio-rng (5.4).

use barkeep_tests::virtio::{DATA, Part, Setup};

use crate::sidecar::{Sidecar, drive};

#[test]
fn reads_differ_and_fill_what_they_say() {
    let sidecar = Sidecar::start("virtio-rng");
    let mut driver = drive(&sidecar, Setup::default());
    driver.memory.data.fill(0);
    let mut seen = Vec::new();
    for _ in 0..100 {
        driver.send(0, &[Part::Write(DATA, 20), Part::Write(DATA + 4096, 44)]);
        let len = driver.next_used(0).len as usize;
        assert!((1..=64).contains(&len));
        let first = driver.memory.data.bytes(DATA, 20);
        let second = driver.memory.data.bytes(DATA + 4096, 44);
        let bytes = [first, second].concat();
        assert!(!seen.contains(&bytes));
        // Eight zeros in a row, with odds of one in 2^64.
        assert!(len < 8 || bytes[..len].chunks_exact(8).all(|word| word != [0; 8]));
        seen.push(bytes);
    }
    // Not a byte beside the buffers.
    assert_eq!(driver.memory.data.bytes(DATA + 20, 4076), [0; 4076]);
    assert_eq!(driver.memory.data.bytes(DATA + 4096 + 44, 4096), [0; 4096]);
}

#[test]
fn a_limited_device_hands_out_what_it_may_and_goes_on_later() {
    let sidecar = Sidecar::start("virtio-rng,max-bytes=64,period=10");
    let mut driver = drive(&sidecar, Setup::default());
    for _ in 0..4 {
        driver.send(0, &[Part::Write(DATA, 64)]);
    }
    for _ in 0..4 {
        assert!(driver.next_used(0).len > 0);
    }
}
