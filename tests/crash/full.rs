//! Disks without room, and processes without descriptors.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use barkeep_tests::edu::{self, at};
use barkeep_tests::figure;
use barkeep_tests::memory::sealed;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::{dma_map, dma_unmap};
use barkeep_tests::skip;
use barkeep_tests::supervised::{Launch, Supervised};
use barkeep_tests::virtio::Load;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit, prlimit};

use crate::blk;

const SIZE: u64 = 16 << 20;
const EMFILE: u32 = 24;
const ROUNDS_UNTIL_FULL: u64 = 200;

/// Gives this thread, and whatever it starts, a disk of its own with so many bytes.
fn small_disk(at: &Path, size: &str) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing: Option<&str> = None;
    // What is mounted here shows nowhere else.
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(size))
}

fn grow(at: &Path, size: &str) {
    let nothing: Option<&str> = None;
    mount(nothing, at, nothing, MsFlags::MS_REMOUNT, Some(size)).unwrap();
}

/// An image that has less room than its length, under a load while its worker is killed.
fn fill_up(options: &str) {
    let directory = tempfile::tempdir().unwrap();
    let mounted = directory.path().join("disk");
    std::fs::create_dir(&mounted).unwrap();
    if let Err(errno) = small_disk(&mounted, "size=4m") {
        return skip(&format!("a mount of its own: {errno}"));
    }
    let path = mounted.join("image");
    File::create_new(&path).unwrap().set_len(SIZE).unwrap();
    let image = File::options().read(true).write(true).open(&path).unwrap();
    let device = format!("virtio-blk,path={}{options}", path.display());
    let run = Supervised::start_in(directory, &[&device], &Launch::default());
    let mut driver = blk::drive(&run, 0, blk::setup());
    let mut load = Load::new(SIZE, 4096, blk::DEPTH);
    // All of the image is written to long before.
    for _ in 0..ROUNDS_UNTIL_FULL {
        load.run(&mut driver, 100);
        if load.failed > 0 {
            break;
        }
    }
    assert!(load.failed > 0, "{} requests did not fill the disk", load.done);
    for _ in 0..5 {
        load.run(&mut driver, 200);
        load.fill(&mut driver);
        run.worker(0).kill();
        load.run(&mut driver, 100);
    }
    load.finish(&mut driver);
    // What was acknowledged is there; what failed is there or not, but never a mixture.
    load.verify(&image);
    grow(&mounted, "size=64m");
    let failed = load.failed;
    load.run(&mut driver, 1000);
    load.finish(&mut driver);
    assert_eq!(load.failed, failed, "there is room");
    load.verify(&image);
}

#[test]
fn a_full_disk_is_an_error_for_the_guest_and_loses_nothing() {
    fill_up("");
}

#[test]
fn a_full_disk_is_an_error_for_the_guest_of_a_worker_that_waits_for_it() {
    fill_up(",aio=sync");
}

/// What one function's client may not have is nobody else's loss, and outlives a death as it is.
#[test]
fn a_client_has_a_share_of_descriptors_and_what_it_has_is_kept() {
    let launch = Launch { descriptors: Some(128), ..Launch::default() };
    let directory = tempfile::tempdir().unwrap();
    let run = Supervised::start_in(directory, &["edu", "edu"], &launch);
    let mut peer = Peer::greeted(run.socket(0));
    edu::enable(&mut peer);
    let map = |peer: &mut Peer, index: u64| {
        // A file that several windows have would be held once.
        let memory = sealed(0x1000);
        let body = dma_map(3, 0, index * 0x1_0000, 0x1000);
        peer.call_with_fds(command::DMA_MAP, &body, &[memory.as_fd()])
    };
    let given = (1..100).take_while(|index| map(&mut peer, *index).error == 0).count() as u64;
    figure(&format_args!("{given} windows with a limit of 128 descriptors"));
    assert!((2..99).contains(&given), "{given} windows");
    assert_eq!(map(&mut peer, given + 1).error, EMFILE);
    edu::assert_served(run.socket(1));
    for _ in 0..2 {
        peer.write_u32(0, at::LIVENESS, 9);
        run.worker(0).kill();
        assert_eq!(peer.read_u32(0, at::LIVENESS), !9);
        edu::copy(&mut peer, 0x1_0000, given * 0x1_0000 + 0x800, 16);
    }
    let reply = peer.call(command::DMA_UNMAP, &dma_unmap(0, 0x1_0000, 0x1000));
    assert_eq!(reply.error, 0);
    assert_eq!(map(&mut peer, 1).error, 0, "there is room for one again");
    assert_eq!(map(&mut peer, given + 1).error, EMFILE);
}

#[test]
fn a_worker_that_may_open_nothing_more_refuses_memory_and_goes_on() {
    let run = Supervised::start(&["edu"]);
    let mut peer = Peer::greeted(run.socket(0));
    edu::enable(&mut peer);
    let allow = |limit| {
        let limit = Rlimit { current: Some(limit), maximum: Some(4096) };
        prlimit(Some(run.worker(0).pid), Resource::Nofile, limit).unwrap();
    };
    let memory = sealed(0x1000);
    let map = |peer: &mut Peer| {
        let body = dma_map(3, 0, 0x1_0000, 0x1000);
        peer.call_with_fds(command::DMA_MAP, &body, &[memory.as_fd()]).error
    };
    allow(0);
    assert_ne!(map(&mut peer), 0);
    peer.write_u32(0, at::LIVENESS, 9);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !9);
    allow(4096);
    assert_eq!(map(&mut peer), 0);
    run.worker(0).kill();
    edu::copy(&mut peer, 0x1_0000, 0x1_0800, 16);
}
