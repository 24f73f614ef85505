//! The entropy device.

use barkeep_tests::virtio::{DATA, Part, feature};

use crate::front_end::Driver;
use crate::sidecar::Sidecar;

/// Random bytes from the device.
pub(crate) fn random(driver: &mut Driver) -> Vec<u8> {
    let head = driver.send(0, &[Part::Write(DATA, 64)]);
    let used = driver.next_used(0);
    assert_eq!((used.head, used.len), (head, 64));
    driver.memory.data.bytes(DATA, 64)
}

#[test]
fn reads_differ() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    for features in [0, feature::EVENT_IDX, feature::EVENT_IDX | feature::INDIRECT_DESC] {
        let features = features | feature::VERSION_1;
        let mut driver = Driver::start_with(&sidecar.socket(0), 1, 8, features);
        let reads: Vec<_> = (0..20).map(|_| random(&mut driver)).collect();
        for (index, read) in reads.iter().enumerate() {
            assert!(!reads[..index].contains(read) && *read != [0; 64]);
        }
    }
}
