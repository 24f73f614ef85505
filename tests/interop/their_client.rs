//! Their client, our server: what Cloud Hypervisor does.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, shrinkable};
use vfio_user::Client;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

const CONFIG: u32 = 7;
const COMMAND: u64 = 4;

fn connect(backend: &Backend) -> Client {
    Client::new(backend.socket()).expect("a session")
}

fn write(client: &mut Client, region: u32, offset: u64, value: u64) {
    client.region_write(region, offset, &value.to_le_bytes()).expect("a write");
}

fn read_u32(client: &mut Client, region: u32, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    client.region_read(region, offset, &mut bytes).expect("a read");
    u32::from_le_bytes(bytes)
}

fn write_u32(client: &mut Client, region: u32, offset: u64, value: u32) {
    client.region_write(region, offset, &value.to_le_bytes()).expect("a write");
}

/// Memory Space Enable and Bus Master Enable.
fn enable(client: &mut Client) {
    client.region_write(CONFIG, COMMAND, &[0b110, 0]).expect("a write");
}

#[test]
fn it_learns_the_regions_and_interrupts() {
    let backend = Backend::serve(&["edu"]);
    let mut client = connect(&backend);
    let sizes: Vec<u64> =
        (0..9).map(|index| client.region(index).expect("a region").size).collect();
    assert_eq!(sizes, [1 << 20, 0, 0, 0, 0, 0, 0, 4096, 0]);
    assert!(client.region(0).is_some_and(|bar| bar.file_offset.is_none()));
    let counts: Vec<u32> =
        (0..5).map(|index| client.get_irq_info(index).expect("an index").count).collect();
    assert_eq!(counts, [1, 1, 0, 1, 1]);
    // Its test of the flag is the wrong way round: a device that can be reset is reported as one
    // that can't, and the other way round.
    assert!(!client.resettable());
}

#[test]
fn it_reads_and_writes_regions() {
    let backend = Backend::serve(&["edu"]);
    let mut client = connect(&backend);
    assert_eq!(read_u32(&mut client, CONFIG, 0), 0x11e8_1234);
    assert_eq!(read_u32(&mut client, 0, 0), u32::MAX, "not decoding");
    enable(&mut client);
    assert_eq!(read_u32(&mut client, 0, edu::at::IDENTIFICATION), edu::IDENTIFICATION);
    write_u32(&mut client, 0, edu::at::LIVENESS, 0x55);
    assert_eq!(read_u32(&mut client, 0, edu::at::LIVENESS), !0x55);
    let mut whole = [0; 4096];
    client.region_read(CONFIG, 0, &mut whole).expect("a read");
    assert_eq!(whole[..2], [0x34, 0x12]);
}

#[test]
fn its_memory_is_reached_by_dma() {
    let backend = Backend::serve(&["edu"]);
    let mut client = connect(&backend);
    enable(&mut client);
    let memory = shrinkable(0x2000);
    memory.write_all_at(b"guest memory", 0).expect("room");
    client.dma_map(0, 0x10_0000, 0x2000, memory.as_raw_fd()).expect("a window");
    // It does not look at the error of a reply: a window that is refused with EEXIST looks mapped.
    client.dma_map(0, 0x10_0000, 0x2000, memory.as_raw_fd()).expect("no error is reported");

    for (source, destination, command) in [(0x10_0000, 0x40000, 1), (0x40000, 0x10_1000, 3)] {
        write(&mut client, 0, edu::at::DMA_SOURCE, source);
        write(&mut client, 0, edu::at::DMA_DESTINATION, destination);
        write(&mut client, 0, edu::at::DMA_COUNT, 12);
        write(&mut client, 0, edu::at::DMA_COMMAND, command);
    }
    assert_eq!(bytes_at(&memory, 0x1000, 12), b"guest memory");

    client.dma_unmap(0x10_0000, 0x2000).expect("the window");
    memory.write_all_at(&[0; 12], 0x1000).expect("room");
    write(&mut client, 0, edu::at::DMA_COMMAND, 3);
    assert_eq!(bytes_at(&memory, 0x1000, 12), [0; 12]);
}

#[test]
fn it_receives_interrupts() {
    const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
    const NONE_UNMASK: u32 = 1 << 0 | 1 << 4;
    const NONE_TRIGGER: u32 = 1 << 0 | 1 << 5;
    let backend = Backend::serve(&["edu"]);
    let mut client = connect(&backend);
    enable(&mut client);
    let pin = EventCounter::new();
    let fds = [pin.as_fd().as_raw_fd()];
    client.set_irqs(0, EVENTFD_TRIGGER, 0, 1, &fds).expect("INTx");
    write_u32(&mut client, 0, edu::at::INTERRUPT_RAISE, 1);
    assert_eq!(pin.take(), 1);
    client.set_irqs(0, NONE_UNMASK, 0, 1, &[]).expect("INTx");
    assert_eq!(pin.take(), 1, "still asserted");
    client.set_irqs(0, NONE_TRIGGER, 0, 0, &[]).expect("INTx");
    client.set_irqs(0, NONE_UNMASK, 0, 1, &[]).expect("INTx");
    assert_eq!(pin.take(), 0, "disabled");
}

#[test]
fn it_maps_the_memory_of_a_bar() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut client = connect(&backend);
    client.region_write(CONFIG, COMMAND, &[0b010, 0]).expect("a write");
    let bar = client.region(2).expect("BAR2");
    assert_eq!((bar.size, bar.flags), (65536, 0b111));
    let file = bar.file_offset.clone().expect("a file to map");
    let mapping: MmapRegion = MmapRegion::from_file(file, 65536).expect("a mapping");
    let memory = mapping.as_volatile_slice();

    memory.write_slice(b"mapped", 0x8000).expect("room");
    let mut bytes = [0; 6];
    client.region_read(2, 0x8000, &mut bytes).expect("a read");
    assert_eq!(&bytes, b"mapped");
    client.region_write(2, 0x9000, b"forwarded").expect("a write");
    let mut bytes = [0; 9];
    memory.read_slice(&mut bytes, 0x9000).expect("room");
    assert_eq!(&bytes, b"forwarded");
}

#[test]
fn it_resets_the_function_and_leaves() {
    let backend = Backend::serve(&["edu"]);
    let mut client = connect(&backend);
    enable(&mut client);
    client.reset().expect("a reset");
    assert_eq!(read_u32(&mut client, CONFIG, COMMAND) & 0xffff, 0);
    client.shutdown().expect("a connected socket");
    drop(client);
    edu::assert_served(backend.socket());
}
