//! Workers that stand still, and a supervisor that dies itself.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use barkeep_tests::edu::{self, at};
use barkeep_tests::memory::{bytes_at, sealed};
use barkeep_tests::peer::Peer;
use barkeep_tests::supervised::{Launch, Supervised};
use barkeep_tests::virtio::Load;
use rustix::process::Signal;

use crate::blk;

fn client(run: &Supervised) -> Peer {
    let mut peer = Peer::greeted(run.socket(0));
    peer.wait_for(Duration::from_secs(60));
    edu::enable(&mut peer);
    peer
}

#[test]
fn a_worker_that_stands_still_is_replaced_and_its_requests_are_served() {
    let arguments = vec!["--watchdog".into(), "1".into()];
    let launch = Launch { arguments, ..Launch::default() };
    let run = Supervised::start_in(tempfile::tempdir().unwrap(), &["edu", "edu"], &launch);
    let mut peer = client(&run);
    let (worker, other) = (run.worker(0), run.worker(1));
    peer.write_u32(0, at::LIVENESS, 1);
    worker.signal(Signal::STOP);
    peer.write_u32(0, at::LIVENESS, 2);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !2);
    assert!(worker.ends(), "it is not left behind");
    assert_ne!(run.worker(0).pid, worker.pid);
    assert!(!other.has_ended(), "the other one worked");
}

#[test]
fn a_disk_whose_worker_stands_still_loses_nothing() {
    let arguments = vec!["--watchdog".into(), "1".into()];
    let (run, image) = blk::disk(blk::SIZE, "", &Launch { arguments, ..Launch::default() });
    let mut driver = blk::drive(&run, 0, blk::setup());
    let mut load = Load::new(blk::SIZE, 512, blk::DEPTH);
    for _ in 0..2 {
        load.run(&mut driver, 100);
        load.fill(&mut driver);
        run.worker(0).signal(Signal::STOP);
        load.run(&mut driver, 100);
    }
    load.finish(&mut driver);
    blk::assert_settled(&mut driver, &load);
    load.verify(&image);
}

#[test]
fn a_worker_that_dies_without_a_client_is_there_for_the_next_one() {
    let run = Supervised::start(&["edu"]);
    for _ in 0..5 {
        run.worker(0).kill();
        edu::assert_served(run.socket(0));
    }
}

#[test]
fn a_client_that_waits_for_its_turn_has_it_whatever_dies() {
    let run = Supervised::start(&["edu"]);
    let mut first = client(&run);
    first.write_u32(0, at::LIVENESS, 7);
    let mut second = Peer::connect(run.socket(0));
    run.worker(0).kill();
    assert_eq!(first.read_u32(0, at::LIVENESS), !7);
    drop(first);
    run.worker(0).kill();
    second.greet();
    edu::enable(&mut second);
    assert_eq!(second.read_u32(0, at::LIVENESS), 0, "a leftover of another client");
}

#[test]
fn memory_given_between_deaths_is_all_there_for_the_last_worker() {
    let run = Supervised::start(&["edu"]);
    let mut peer = client(&run);
    let windows: Vec<_> = (0..24).map(|_| sealed(0x1000)).collect();
    for (index, window) in (1..).zip(&windows) {
        peer.map(3, index * 0x1_0000, 0x1000, window.as_fd());
        if index % 3 == 0 {
            run.worker(0).kill();
        }
    }
    peer.write_u32(0, at::LIVENESS, 5);
    edu::copy(&mut peer, 0x1_0000, 0x2_0800, 16);
    for (index, window) in (1..).zip(&windows) {
        let byte = u8::try_from(index).unwrap();
        std::os::unix::fs::FileExt::write_all_at(window, &[byte; 8], 0).unwrap();
        let next = index % 24 + 1;
        edu::copy(&mut peer, index * 0x1_0000, next * 0x1_0000 + 0x100, 8);
        let next = usize::try_from(next - 1).unwrap();
        assert_eq!(bytes_at(&windows[next], 0x100, 8), [byte; 8], "window {index}");
    }
}

#[test]
fn a_worker_that_is_told_to_end_has_a_successor() {
    let (run, image) = blk::disk(blk::SIZE, "", &Launch::default());
    let mut driver = blk::drive(&run, 0, blk::setup());
    let mut load = Load::new(blk::SIZE, 512, blk::DEPTH);
    for _ in 0..5 {
        load.run(&mut driver, 100);
        load.fill(&mut driver);
        let worker = run.worker(0);
        worker.signal(Signal::TERM);
        load.run(&mut driver, 100);
        assert!(worker.ends(), "it was told to");
    }
    load.finish(&mut driver);
    blk::assert_settled(&mut driver, &load);
    load.verify(&image);
}

#[test]
fn functions_that_share_a_worker_survive_its_death_together() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let disk = format!("virtio-blk,path={},group=a", image.display());
    let devices = ["edu,group=a", &disk, "edu"];
    let run = Supervised::start_in(directory, &devices, &Launch::default());
    assert_eq!(run.worker(0).pid, run.worker(1).pid);
    let other = run.worker(2);
    assert_ne!(run.worker(0).pid, other.pid);
    let mut peer = client(&run);
    let mut driver = blk::drive(&run, 1, blk::setup());
    let mut load = Load::new(1 << 20, 512, blk::DEPTH);
    for value in 1..10 {
        peer.write_u32(0, at::LIVENESS, value);
        load.run(&mut driver, 50);
        load.fill(&mut driver);
        run.worker(value as usize % 2).kill();
        assert_eq!(peer.read_u32(0, at::LIVENESS), !value);
    }
    load.run_to_end(&mut driver, 100, &std::fs::File::open(&image).unwrap());
    blk::assert_settled(&mut driver, &load);
    assert!(!other.has_ended());
}

/// What docs/crash-safety.md promises.
#[test]
fn without_its_supervisor_a_worker_serves_its_client_to_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let disk = format!("virtio-blk,path={}", image.display());
    let devices = ["edu", &disk, "edu"];
    let mut run = Supervised::start_in(directory, &devices, &Launch::default());
    let mut peer = client(&run);
    peer.write_u32(0, at::LIVENESS, 1);
    let mut driver = blk::drive(&run, 1, blk::setup());
    let mut load = Load::new(1 << 20, 512, blk::DEPTH);
    load.run(&mut driver, 100);
    load.fill(&mut driver);
    let [edu, blk, idle] = [0, 1, 2].map(|function| run.worker(function));
    run.kill();
    assert!(idle.ends(), "nobody needs it");

    assert_eq!(peer.read_u32(0, at::LIVENESS), !1);
    let memory = sealed(0x1000);
    peer.map(3, 0x1_0000, 0x1000, memory.as_fd());
    edu::copy(&mut peer, 0x1_0000, 0x1_0800, 16);
    load.run(&mut driver, 300);
    load.finish(&mut driver);
    blk::assert_settled(&mut driver, &load);
    load.verify(&std::fs::File::open(&image).unwrap());
    assert!(!edu.has_ended() && !blk.has_ended());

    // One that dies now has no successor: its client is told at once.
    edu.kill();
    peer.expect_closed();
    drop(driver);
    assert!(blk.ends(), "its client has gone");

    // The same command again serves the same functions: nothing of the old ones is in the way.
    run.start_again(&devices, &Launch::default());
    edu::assert_served(run.socket(0));
    let mut driver = blk::drive(&run, 1, blk::setup());
    load.run_to_end(&mut driver, 100, &std::fs::File::open(&image).unwrap());
}

#[test]
fn an_orderly_end_closes_connections_and_leaves_no_socket_behind() {
    let mut run = Supervised::start(&["edu"]);
    let mut peer = client(&run);
    let socket = run.socket(0).to_owned();
    assert_eq!(run.stop(), Some(0));
    peer.expect_closed();
    assert!(!Path::new(&socket).exists());
}
