//! "VFIO_USER_DEVICE_FEATURE" and "VFIO_USER_MIG_DATA_*": a function moves to another process.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, sealed};
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{Payload, REPLY, command, message, u32_at, u64_at};
use barkeep_tests::peer::requests::feature::{GET, MIGRATION, PROBE, SET, STATE};
use barkeep_tests::peer::requests::migration::*;
use barkeep_tests::peer::requests::{CONFIG, access, dma_map, pci};
use rustix::io::Errno;

fn set_state(state: u32) -> Vec<u8> {
    Payload::new().u32(16).u32(SET | STATE).u32(state).u32(0).done()
}

fn go_to(peer: &mut Peer, state: u32) {
    let request = set_state(state);
    let reply = peer.call(command::DEVICE_FEATURE, &request).success();
    assert_eq!(reply, request, "the reply repeats the request");
}

fn state(peer: &mut Peer) -> u32 {
    let get = Payload::new().u32(16).u32(GET | STATE).done();
    u32_at(&peer.call(command::DEVICE_FEATURE, &get).success(), 8)
}

/// Reads a whole state, `size` bytes at a time.
fn save(peer: &mut Peer, size: u32) -> Vec<u8> {
    let mut saved = Vec::new();
    loop {
        let request = Payload::new().u32(8 + size).u32(size).done();
        let reply = peer.call(command::MIG_DATA_READ, &request).success();
        let count = u32_at(&reply, 4);
        assert_eq!(reply.len(), 8 + count as usize);
        saved.extend_from_slice(&reply[8..]);
        if count < size {
            return saved;
        }
    }
}

fn write_state(data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap();
    Payload::new().u32(8 + size).u32(size).bytes(data).done()
}

fn load(peer: &mut Peer, saved: &[u8], size: usize) {
    for part in saved.chunks(size) {
        let _ = peer.call(command::MIG_DATA_WRITE, &write_state(part)).success();
    }
}

/// All of configuration space, and what edu's registers read.
fn observe(peer: &mut Peer) -> (Vec<u8>, Vec<u32>) {
    let registers = [at::LIVENESS, at::FACTORIAL, 0x20, at::INTERRUPT_STATUS, at::DMA_COUNT];
    let config = peer.read(CONFIG, 0, 4096);
    (config, registers.map(|register| peer.read_u32(0, register)).to_vec())
}

#[test]
fn a_function_goes_on_in_another_process_where_it_was() {
    let (source, target) = (Backend::serve(&["edu"]), Backend::serve(&["edu"]));
    let (mut old, mut new) = (source.client(), target.client());
    let memory = sealed(0x10000);
    edu::enable(&mut old);
    old.write_u32(CONFIG, pci::BAR0, 0xfe00_0000);
    old.map(3, 0, 0x10000, memory.as_fd());
    edu::load(&mut old, 0x100, 64);
    old.write_u32(0, at::LIVENESS, 0x1234_5678);
    old.write_u32(0, at::FACTORIAL, 5);
    edu::raise(&mut old);
    let before = observe(&mut old);

    go_to(&mut old, STOP_COPY);
    let saved = save(&mut old, 100);
    go_to(&mut new, RESUMING);
    load(&mut new, &saved, 77);
    let line = EventCounter::new();
    new.set_eventfd(0, 0, line.as_fd());
    assert_eq!(line.take(), 0, "a stopped function is silent");
    go_to(&mut new, RUNNING);
    assert_eq!(line.take(), 1, "the level is still asserted");
    assert_eq!(observe(&mut new), before);
    edu::acknowledge(&mut new);
    assert_eq!(new.read_u32(0, at::INTERRUPT_STATUS), 0);
}

#[test]
fn work_under_way_moves_along_and_is_finished_in_the_new_place() {
    let (source, target) = (Backend::serve(&["edu"]), Backend::serve(&["edu"]));
    let (mut old, mut new) = (source.client(), target.client());
    // Memory that the old client moves by messages, and never does.
    let _ = old.call(command::DMA_MAP, &dma_map(3, 0, 0, 0x1000)).success();
    edu::enable(&mut old);
    edu::load(&mut old, 0x10, 6);
    let abandoned = old.receive();
    assert_eq!(abandoned.command, command::DMA_READ);
    go_to(&mut old, STOP_COPY);
    let saved = save(&mut old, 4096);

    let memory = sealed(0x1000);
    std::os::unix::fs::FileExt::write_all_at(&memory, b"moving", 0x10).unwrap();
    new.map(3, 0, 0x1000, memory.as_fd());
    go_to(&mut new, RESUMING);
    load(&mut new, &saved, 4096);
    go_to(&mut new, RUNNING);
    assert_eq!(new.read_u32(0, at::DMA_COMMAND) & 1, 0, "done");
    edu::store(&mut new, 0x800, 6);
    assert_eq!(bytes_at(&memory, 0x800, 6), b"moving");
    // The answer that comes too late finds nobody.
    let body = Payload::new().bytes(&abandoned.body).bytes(b"latest").done();
    old.send(&message(abandoned.id, abandoned.command, REPLY, &body));
    assert_eq!(state(&mut old), STOP_COPY);
}

#[test]
fn memory_of_the_device_moves_with_it() {
    let spec = ["ivshmem,size=64K,vectors=2"];
    let (source, target) = (Backend::serve(&spec), Backend::serve(&spec));
    let (mut old, mut new) = (source.client(), target.client());
    for peer in [&mut old, &mut new] {
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    }
    old.write(2, 0xfff0, b"the last bytes..");
    old.write_u32(0, 0, 0xcafe);
    new.write(2, 0, b"to be overwritten");
    go_to(&mut old, STOP_COPY);
    let saved = save(&mut old, 1 << 20);
    assert!(saved.len() > 0x10000);
    go_to(&mut new, RESUMING);
    load(&mut new, &saved, 5000);
    go_to(&mut new, RUNNING);
    assert_eq!(new.read(2, 0xfff0, 16), b"the last bytes..");
    assert_eq!(new.read(2, 0, 17), [0; 17]);
    assert_eq!(new.read_u32(0, 0), 0xcafe);
}

#[test]
fn a_stopped_function_claims_nothing_and_goes_on_when_it_runs() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    peer.write_u32(0, at::LIVENESS, 1);
    go_to(&mut peer, STOP);
    peer.write_u32(0, at::LIVENESS, 2);
    assert_eq!(peer.read_u32(0, at::LIVENESS), 0xffff_ffff);
    assert_eq!(peer.read(CONFIG, 0, 2), [0x34, 0x12]);
    go_to(&mut peer, RUNNING);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !1);
}

#[test]
fn the_level_from_before_a_restored_state_is_forgotten() {
    let (source, target) = (Backend::serve(&["edu"]), Backend::serve(&["edu"]));
    let (mut old, mut new) = (source.client(), target.client());
    go_to(&mut old, STOP_COPY);
    let quiet = save(&mut old, 4096);
    edu::enable(&mut new);
    edu::raise(&mut new);
    go_to(&mut new, RESUMING);
    load(&mut new, &quiet, 4096);
    go_to(&mut new, STOP);
    // Another one is to drive the line, or the next client; here it is the same.
    let _ = new.call(command::RESET, &[]).success();
    let line = EventCounter::new();
    new.set_eventfd(0, 0, line.as_fd());
    assert_eq!(line.take(), 0);
}

#[test]
fn states_are_reached_as_the_protocol_says() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let flags = Payload::new().u32(16).u32(GET | MIGRATION).done();
    let reply = peer.call(command::DEVICE_FEATURE, &flags).success();
    assert_eq!(u64_at(&reply, 8), 1, "STOP_COPY and no more");
    assert_eq!(state(&mut peer), RUNNING);
    for target in [STOP_COPY, STOP, STOP_COPY, RUNNING, STOP, STOP, RUNNING, RUNNING] {
        go_to(&mut peer, target);
        assert_eq!(state(&mut peer), target);
    }
    for refused in [ERROR, RUNNING_P2P, PRE_COPY, 7, 8, u32::MAX] {
        peer.expect_errno(command::DEVICE_FEATURE, &set_state(refused), Errno::INVAL);
        assert_eq!(state(&mut peer), RUNNING, "{refused}");
    }
    let read = Payload::new().u32(108).u32(100).done();
    for elsewhere in [RUNNING, STOP, RESUMING] {
        if elsewhere != RESUMING {
            go_to(&mut peer, elsewhere);
            peer.expect_errno(command::MIG_DATA_WRITE, &write_state(b"x"), Errno::INVAL);
        } else {
            go_to(&mut peer, elsewhere);
        }
        peer.expect_errno(command::MIG_DATA_READ, &read, Errno::INVAL);
    }
    for (index, known) in [(MIGRATION, true), (STATE, true), (6, true), (3, false), (99, false)] {
        let probe = Payload::new().u32(8).u32(PROBE | index).done();
        let reply = peer.call(command::DEVICE_FEATURE, &probe);
        if known { drop(reply.success()) } else { reply.failure(Errno::NOTTY) }
    }
}

#[test]
fn a_state_that_is_foreign_cut_or_tampered_with_ends_in_error_and_a_reset_helps() {
    let backend = Backend::serve(&["edu", "ivshmem,size=4K"]);
    let mut source = backend.client();
    go_to(&mut source, STOP_COPY);
    let good = save(&mut source, 4096);
    drop(source);
    let mut other = Peer::greeted(backend.socket_of(1));
    go_to(&mut other, STOP_COPY);
    let foreign = save(&mut other, 4096);

    let mut longer = good.clone();
    longer.push(0);
    let mut peer = backend.client();
    let rows =
        [&good[..good.len() - 1], &good[..20], &[], &longer, &foreign, b"barkeep1\xff\xff\xff\xff"];
    for (row, bytes) in rows.into_iter().enumerate() {
        go_to(&mut peer, RESUMING);
        let written = peer.call(command::MIG_DATA_WRITE, &write_state(bytes));
        if written.flags == REPLY {
            peer.expect_errno(command::DEVICE_FEATURE, &set_state(STOP), Errno::INVAL);
        }
        assert_eq!(state(&mut peer), ERROR, "row {row}");
        peer.expect_errno(command::DEVICE_FEATURE, &set_state(RUNNING), Errno::INVAL);
        let _ = peer.call(command::REGION_READ, &access(0, 0, 4)).success();
        let _ = peer.call(command::RESET, &[]).success();
        assert_eq!(state(&mut peer), RUNNING);
    }
    go_to(&mut peer, RESUMING);
    load(&mut peer, &good, good.len());
    go_to(&mut peer, RUNNING);
    drop(peer);
    edu::assert_served(backend.socket());
}
