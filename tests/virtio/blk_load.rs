//! virtio-blk under load.

use barkeep_tests::virtio::{Kicks, Load, Setup, feature};

use crate::blk::{self, sidecar};
use crate::sidecar::drive;

const SIZE: u64 = 8 << 20;
const REQUESTS: u64 = 6000;

fn run(options: &str, block: u64, setup: Setup) {
    let (sidecar, image) = sidecar(SIZE, options);
    let mut driver = drive(&sidecar, setup);
    assert_eq!(driver.queues(), setup.queues);
    let mut load = Load::new(SIZE, block, 48);
    load.run(&mut driver, REQUESTS);
    load.finish(&mut driver);
    assert_eq!((load.failed, load.under_way()), (0, 0));
    load.verify(&image);
}

#[test]
fn random_writes_on_one_queue_are_all_in_the_image() {
    run("", 512, blk::setup());
}

#[test]
fn random_writes_on_four_queues_are_all_in_the_image() {
    run(",queues=4", 512, Setup { queues: 4, ..blk::setup() });
}

#[test]
fn random_writes_of_4096_bytes_are_all_in_the_image() {
    run(",logical-block-size=4096,queues=2", 4096, Setup { queues: 2, ..blk::setup() });
}

#[test]
fn the_queues_work_without_event_idx_and_without_indirect_tables() {
    let setup = blk::setup();
    let with = |without: u64| Setup { features: setup.features & !without, ..setup };
    run("", 512, with(feature::EVENT_IDX | feature::INDIRECT_DESC));
    run("", 512, Setup { kicks: Kicks::Write, ..with(feature::EVENT_IDX) });
    run(",aio=sync", 512, Setup { kicks: Kicks::Write, ..with(feature::INDIRECT_DESC) });
}

/// A small queue fills up and wraps around all the time.
#[test]
fn a_small_queue_wraps_around_without_a_loss() {
    let (sidecar, image) = sidecar(SIZE, "");
    let mut driver = drive(&sidecar, Setup { size: 16, ..blk::setup() });
    let mut load = Load::new(SIZE, 512, 16);
    load.run(&mut driver, 70_000);
    load.finish(&mut driver);
    assert_eq!(load.failed, 0);
    load.verify(&image);
}

#[test]
fn rate_limits_delay_and_lose_nothing() {
    let (sidecar, image) = sidecar(SIZE, ",iops=2000,bps=8M");
    let mut driver = drive(&sidecar, blk::setup());
    let mut load = Load::new(SIZE, 512, 48);
    load.run(&mut driver, 1500);
    load.finish(&mut driver);
    assert_eq!(load.failed, 0);
    load.verify(&image);
}
