//! Windows of the client's memory, of which many have the same file.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use barkeep_protocol::transport::{Flush, Frame, Sender};
use barkeep_protocol::wire::{DmaUnmapFlags, Errno, MessageId};
use rustix::event::epoll::{CreateFlags, create};
use rustix::fs::{Mode, OFlags, open};

use super::fragile;
use super::talk::Talk;
use super::*;
use crate::server::recorded::files::FileId;

fn unmap(address: u64) -> Step {
    Step::new(Command::DmaUnmap, DmaUnmap::range(address, SIZE).to_bytes())
}

fn map_for(access: DmaAccess, address: u64, file: &OwnedFd) -> Step {
    let map = DmaMap { access, file_offset: 0, address, size: SIZE };
    Step::new(Command::DmaMap, map.to_bytes()).with(Some(file))
}

/// The same file, opened once more.
fn reopened(file: &OwnedFd, flags: OFlags) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    open(Path::new(&path), flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// How many descriptors are held for the session.
fn held(talk: &Talk) -> usize {
    talk.lab.held().len() - talk.lab.kept().len()
}

#[test]
fn a_file_is_held_once_for_each_way_to_access_it() {
    let (file, other, irq, unmask) = (memory(), memory(), counter(), counter());
    let mut talk = Talk::begin(fragile::savable);
    for window in 0..3 {
        let _ = talk.expect(map(MEMORY + window * SIZE, Some(&file)));
    }
    assert_eq!(held(&talk), 1);
    let _ = talk.expect(map(MEMORY + 3 * SIZE, Some(&reopened(&file, OFlags::RDWR))));
    assert_eq!(held(&talk), 1);
    let read_only = reopened(&file, OFlags::RDONLY);
    let _ = talk.expect(map_for(DmaAccess::READ, MEMORY + 4 * SIZE, &read_only));
    assert_eq!(held(&talk), 2);
    let _ = talk.expect(map(MEMORY + 5 * SIZE, Some(&other)));
    let _ = talk.expect(set_irq(IrqAction::Trigger, IrqData::Eventfd, 0, Some(&irq)));
    let _ = talk.expect(set_irq(IrqAction::Unmask, IrqData::Eventfd, 0, Some(&unmask)));
    assert_eq!(held(&talk), 5);

    talk.restart();
    assert_eq!(held(&talk), 5);
    for window in 0..6 {
        let again = talk.ask(map(MEMORY + window * SIZE, None)).0;
        assert_eq!(again, Err(Errno::EXIST), "{window}");
    }
    let _ = talk.expect(map(MEMORY + 6 * SIZE, Some(&file)));
    assert_eq!(held(&talk), 5);
    for (window, left) in [(0, 5), (6, 5), (4, 4), (1, 4), (3, 4), (2, 3), (5, 2)] {
        let _ = talk.expect(unmap(MEMORY + window * SIZE));
        assert_eq!(held(&talk), left, "{window}");
    }
    let _ = talk.expect(map(MEMORY, Some(&file)));
    assert_eq!(held(&talk), 3);
    let all = DmaUnmap { flags: DmaUnmapFlags::ALL, address: 0, size: 0, bitmap: None };
    let _ = talk.expect(Step::new(Command::DmaUnmap, all.to_bytes()));
    assert_eq!(held(&talk), 2);
}

#[test]
fn a_file_that_is_refused_is_not_held_and_takes_nothing_from_others() {
    let file = memory();
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, Some(&file)));
    for _ in 0..2 {
        assert_eq!(talk.ask(map(MEMORY, Some(&file))).0, Err(Errno::EXIST));
        assert_eq!(talk.ask(map(MEMORY, Some(&memory()))).0, Err(Errno::EXIST));
        assert_eq!(held(&talk), 1);
    }
    talk.restart();
    assert_eq!(talk.ask(map(MEMORY, None)).0, Err(Errno::EXIST));
}

/// The descriptor of the second request is found when the first one is looked at, and the window that
/// has the same file goes before its own comes.
#[test]
fn a_file_may_come_back_before_it_is_gone() {
    let file = memory();
    let mut talk = Talk::begin(fragile::savable);
    let _ = talk.expect(map(MEMORY, Some(&file)));
    let mut sender = Sender::default();
    let client = talk.client.socket();
    let map = DmaMap {
        access: DmaAccess::READ | DmaAccess::WRITE,
        file_offset: 0,
        address: MEMORY + SIZE,
        size: SIZE,
    };
    let unmap = DmaUnmap::range(MEMORY, SIZE).to_bytes();
    sender.queue(Frame::command(MessageId(70), Command::DmaUnmap, unmap));
    assert_eq!(sender.flush(client.as_fd()).unwrap(), Flush::Done);
    let map = Frame::command(MessageId(71), Command::DmaMap, map.to_bytes());
    sender.queue(map.with_fds(vec![file.try_clone().unwrap()]));
    assert_eq!(sender.flush(client.as_fd()).unwrap(), Flush::Done);
    for _ in 0..4 {
        talk.lab.round();
    }
    assert!((&client).read(&mut [0; 1000]).unwrap() > 32, "two replies");
    assert_eq!(held(&talk), 1);
    talk.restart();
    let again = talk.ask(super::map(MEMORY + SIZE, None)).0;
    assert_eq!(again, Err(Errno::EXIST));
}

#[test]
fn only_files_are_told_from_each_other() {
    let (file, other) = (memory(), memory());
    let epoll = create(CreateFlags::CLOEXEC).unwrap();
    let id = |fd: &OwnedFd| FileId::of(fd.as_fd());
    assert!(id(&file).is_some());
    assert_eq!(id(&file), id(&reopened(&file, OFlags::RDWR)));
    assert_ne!(id(&file), id(&reopened(&file, OFlags::RDONLY)));
    assert_ne!(id(&file), id(&other));
    assert_eq!(id(&reopened(&file, OFlags::PATH)), None);
    assert_eq!([id(&counter()), id(&epoll)], [None, None]);
}

#[test]
fn windows_of_one_file_survive_a_kill_anywhere() {
    let steps = |memory: &OwnedFd, _: &OwnedFd, _: &OwnedFd| {
        let mut steps = vec![enable()];
        steps.extend((0..3).map(|window| map(MEMORY + window * SIZE, Some(memory))));
        steps.extend([unmap(MEMORY), unmap(MEMORY + SIZE), map(MEMORY, Some(memory))]);
        steps.push(unmap(MEMORY + 2 * SIZE));
        steps.extend([unmap(MEMORY), map(MEMORY, Some(memory))]);
        steps.extend(dma(true, MEMORY + 0x100, 16));
        steps.push(Step::until_clear(read(BAR0, 0x98, 8)));
        steps
    };
    Scene { function: edu, offer: Offer::empty(), steps }.survives_a_kill_anywhere();
}

/// `cargo test --release -p barkeep-backend --lib -- --ignored --nocapture costs`
#[test]
#[ignore = "prints times"]
fn what_windows_cost() {
    let file = memory();
    let mut talk = Talk::begin(fragile::savable);
    let mut count = 0;
    for _ in 0..4 {
        let start = Instant::now();
        for _ in 0..5000 {
            let _ = talk.expect(map(MEMORY + count * SIZE, Some(&file)));
            count += 1;
        }
        println!("up to {count}: {:?} each", start.elapsed() / 5000);
    }
    let start = Instant::now();
    talk.restart();
    println!("recovery: {:?}", start.elapsed());
    assert_eq!(held(&talk), 1);
}
