//! What a request costs whoever asks: a vCPU that waits for a register.

use std::time::Duration;

use barkeep_protocol::wire::PciRegion;
use barkeep_shim::client::Client;
use barkeep_tests::backend::Backend;

use crate::allocations;

const DEADLINE: Duration = Duration::from_secs(20);
/// Of an edu function: a register that keeps the complement of what is written.
const LIVENESS: u64 = 0x04;

fn connect(backend: &Backend) -> Client {
    let client = Client::connect(backend.socket(), DEADLINE).unwrap();
    // It decodes.
    client.region_write(PciRegion::Config.index(), 4, &[2, 0]).unwrap();
    client
}

fn round_trip(client: &Client, value: u32) {
    client.region_write(0, LIVENESS, &value.to_le_bytes()).unwrap();
    let mut data = [0; 4];
    client.region_read(0, LIVENESS, &mut data).unwrap();
    assert_eq!(u32::from_le_bytes(data), !value);
}

#[test]
fn a_register_that_is_written_and_read_allocates_nothing_where_nobody_else_asks() {
    let backend = Backend::serve(&["edu"]);
    let client = connect(&backend);
    // The buffers get their size.
    round_trip(&client, 0);
    let allocated = allocations(|| (0..1000).for_each(|value| round_trip(&client, value)));
    assert_eq!(allocated, 0, "allocations in 1000 writes and 1000 reads");
}

#[test]
fn a_register_that_is_posted_and_read_allocates_nothing() {
    let backend = Backend::serve(&["edu"]);
    let client = connect(&backend);
    let post = |value: u32| {
        client.region_write_posted(0, LIVENESS, &value.to_le_bytes()).unwrap();
        let mut data = [0; 4];
        client.region_read(0, LIVENESS, &mut data).unwrap();
        assert_eq!(u32::from_le_bytes(data), !value);
    };
    post(0);
    assert_eq!(allocations(|| (0..1000).for_each(post)), 0);
}
