//! A peer that maps a lot of memory: what it uses up must not be missing elsewhere.
//!
//! A process of its own: it lowers the process's limit of descriptors.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::dma_map;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit that services and shells start with.
const DESCRIPTORS: u64 = 1024;
/// Far below the `max_dma_maps` that a backend announces; a guest behind a vIOMMU gets there.
const WINDOWS: u64 = 4096;

#[test]
fn windows_are_limited_by_max_dma_maps_and_not_by_descriptors() {
    let hard = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: Some(DESCRIPTORS), maximum: hard };
    setrlimit(Resource::Nofile, limit).expect("a lower limit");

    let backend = Backend::serve(&["edu", "edu"]);
    let mut peer = backend.client();
    let memory = shrinkable(8192);
    for window in 0..WINDOWS {
        // Neighbours in memory, but not in the file: mappings of their own.
        let body = dma_map(0b11, window % 2 * 4096, window * 4096, 4096);
        let reply = peer.call_with_fds(command::DMA_MAP, &body, &[memory.as_fd()]);
        assert_eq!(reply.error, 0, "window {window}");
    }
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    neighbour.map(0b11, 0, 4096, memory.as_fd());
    drop(neighbour);
    edu::assert_served(backend.socket_of(1));
    drop(peer);
    edu::assert_served(backend.socket());
}
