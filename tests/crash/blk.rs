//! A disk that is written, read and flushed at full depth while its worker is killed.

use std::fs::File;
use std::sync::Arc;

use barkeep_tests::figure;
use barkeep_tests::supervised::{Launch, Supervised};
use barkeep_tests::virtio::requests::blk;
use barkeep_tests::virtio::{Driver, Function, Interrupts, Kicks, Load, Memory, Setup, feature};

use crate::kills::{Lives, number_of_kills, while_killed};
use crate::random::Random;

pub(crate) const SIZE: u64 = 8 << 20;
pub(crate) const DEPTH: usize = 32;

/// A disk of so many bytes, all zeros, and its image.
pub(crate) fn disk(size: u64, options: &str, launch: &Launch) -> (Supervised, File) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    image.set_len(size).unwrap();
    let device = format!("virtio-blk,path={}{options}", path.display());
    (Supervised::start_in(directory, &[&device], launch), image)
}

/// Everything that a disk and its queues have.
pub(crate) fn setup() -> Setup {
    let plain = Setup::default();
    Setup { features: plain.features | blk::ALL, ..plain }
}

/// A function with its driver, and memory of 4 MiB for data.
pub(crate) fn drive(run: &Supervised, function: usize, setup: Setup) -> Driver {
    let function = Arc::new(Function::connect(run.socket(function)));
    let memory = Arc::new(Memory::new(4 << 20));
    memory.map(&function.client);
    Driver::start(&function, &memory, setup)
}

/// Checks that the device has given back each request once, all of them well.
pub(crate) fn assert_settled(driver: &mut Driver, load: &Load) {
    assert_eq!((load.failed, load.under_way()), (0, 0));
    assert_eq!(driver.look(), None, "something came back that nobody asked for");
    for index in 0..driver.queues() {
        let queue = driver.queue(index);
        let (available, seen) = queue.counts();
        assert_eq!((seen, queue.given_back()), (available, available), "queue {index}");
    }
}

/// How many requests each queue has given back, for another thread.
pub(crate) fn progress(driver: &mut Driver) -> impl Fn() -> Vec<u16> + Sync + use<> {
    let memory = Arc::clone(&driver.memory);
    let indices: Vec<_> = (0..driver.queues()).map(|index| driver.queue(index).used_at()).collect();
    move || indices.iter().map(|address| memory.rings.load(*address)).collect()
}

fn survive(options: &str, setup: Setup, kills: u64) {
    survive_after(Lives::Short, options, setup, kills);
}

fn survive_after(lives: Lives, options: &str, setup: Setup, kills: u64) {
    let mut random = Random::new();
    let (run, image) = disk(SIZE, options, &Launch::default());
    let mut driver = drive(&run, 0, setup);
    assert_eq!(driver.queues(), setup.queues);
    let depth = DEPTH.min(setup.size.into());
    let mut load = Load::new(SIZE, 512, depth).seeded(random.next());
    let progress = progress(&mut driver);
    let recovery =
        while_killed(&run, 0, (kills, lives), &mut random, progress, || load.run(&mut driver, 20));
    load.finish(&mut driver);
    assert_settled(&mut driver, &load);
    load.verify(&image);
    figure(&format_args!("{} requests, {recovery}", load.done));
    assert_eq!(recovery.kills(), kills);
    // A worker that has nothing to do is no different.
    run.worker(0).kill();
    load.run(&mut driver, 200);
    load.finish(&mut driver);
    assert_settled(&mut driver, &load);
    load.verify(&image);
}

#[test]
fn every_acknowledged_write_survives_kills_at_random_instants() {
    survive_after(Lives::Settled, "", setup(), number_of_kills());
}

#[test]
fn every_acknowledged_write_survives_kills_one_after_the_other() {
    survive("", setup(), number_of_kills() / 2);
}

#[test]
fn every_acknowledged_write_on_four_queues_survives_kills() {
    survive(",queues=4", Setup { queues: 4, ..setup() }, number_of_kills() / 4);
}

#[test]
fn every_acknowledged_write_survives_kills_without_event_idx_and_indirect_tables() {
    let features = setup().features & !(feature::EVENT_IDX | feature::INDIRECT_DESC);
    survive("", Setup { features, ..setup() }, number_of_kills() / 4);
}

#[test]
fn every_acknowledged_write_survives_kills_with_kicks_that_are_requests() {
    let features = setup().features & !feature::INDIRECT_DESC;
    survive("", Setup { features, kicks: Kicks::Write, ..setup() }, number_of_kills() / 4);
}

#[test]
fn every_acknowledged_write_survives_kills_with_the_interrupt_pin() {
    let pin = Setup { interrupts: Interrupts::Intx, ..setup() };
    survive(",queues=2", Setup { queues: 2, ..pin }, number_of_kills() / 4);
    let features = setup().features & !feature::EVENT_IDX;
    survive("", Setup { features, kicks: Kicks::Write, ..pin }, number_of_kills() / 4);
}

#[test]
fn every_acknowledged_write_survives_kills_of_a_worker_that_waits_for_the_disk() {
    survive(",aio=sync", setup(), number_of_kills() / 4);
}

#[test]
fn every_acknowledged_write_survives_kills_with_limits_and_writethrough() {
    survive(",iops=4000,cache=writethrough", setup(), number_of_kills() / 8);
}

/// The ring wraps all the time.
#[test]
fn every_acknowledged_write_survives_kills_on_a_small_queue() {
    survive("", Setup { size: 16, ..setup() }, number_of_kills() / 4);
}
