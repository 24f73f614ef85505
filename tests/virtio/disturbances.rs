//! What a guest and its VMM do to a block device at full queue depth: nothing is lost, and nothing
//! is written to memory that is no longer the device's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use barkeep_tests::peer::requests::pci;
use barkeep_tests::virtio::{Driver, Function, Load, Memory, Setup};

use crate::blk::{self, sidecar};
use crate::sidecar::drive;

const SIZE: u64 = 2 << 20;
const DEPTH: usize = 48;
const PATTERN: u8 = 0x5a;
const INTX_DISABLE: u16 = 1 << 10;
const ON: u16 = pci::MEMORY_SPACE | pci::BUS_MASTER | INTX_DISABLE;

fn setup() -> Setup {
    Setup { queues: 2, ..blk::setup() }
}

/// The driver runs while another thread does `disturb` again and again, and leaves the function as
/// it should be.
fn while_disturbed(
    driver: &mut Driver,
    times: u64,
    disturb: impl Fn(&Function) + Sync,
    mut drive: impl FnMut(&mut Driver),
) {
    let (enough, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let function = Arc::clone(&driver.function);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !enough.load(Ordering::Relaxed) {
                disturb(&function);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        // A failure here must end the other thread, too.
        let stop = Stop(&enough);
        while count.load(Ordering::Relaxed) < times {
            drive(driver);
        }
        drop(stop);
    });
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn toggled_memory_space_and_bus_mastering_delay_requests_and_lose_none() {
    let (sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    let toggle = |function: &Function| {
        for off in [pci::MEMORY_SPACE, pci::BUS_MASTER, pci::MEMORY_SPACE | pci::BUS_MASTER] {
            function.set_command(ON & !off);
            function.set_command(ON);
        }
        function.set_command(ON & !pci::BUS_MASTER);
        function.set_command(ON & !(pci::BUS_MASTER | pci::MEMORY_SPACE));
        function.set_command(ON & !pci::MEMORY_SPACE);
        function.set_command(ON);
    };
    while_disturbed(&mut driver, 2000, toggle, |driver| load.run(driver, 100));
    load.finish(&mut driver);
    assert_eq!(load.failed, 0, "they wait, as on bare metal");
    load.verify(&image);
    // The driver is bound anew.
    let mut driver = Driver::start(&driver.function, &driver.memory, setup());
    load.run_to_end(&mut driver, 1000, &image);
}

#[test]
fn without_bus_mastering_nothing_happens_to_memory_and_then_everything() {
    let (sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    for _ in 0..200 {
        load.run(&mut driver, 10);
        load.fill(&mut driver);
        driver.function.set_command(ON & !pci::BUS_MASTER);
        let before = driver.memory.rings.bytes(driver.memory.rings.address, 4 << 20);
        for queue in 0..2 {
            driver.kick(queue);
        }
        // The kicks have been seen when a request after them is answered.
        for _ in 0..3 {
            let _ = driver.function.status();
        }
        let after = driver.memory.rings.bytes(driver.memory.rings.address, 4 << 20);
        assert!(before == after, "the device wrote to its rings");
        driver.function.set_command(ON);
    }
    load.finish(&mut driver);
    assert_eq!(load.failed, 0);
    load.verify(&image);
}

#[test]
fn memory_that_was_taken_back_is_neither_read_nor_written() {
    let (sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    for round in 0..40 {
        load.run(&mut driver, 200);
        load.fill(&mut driver);
        let (function, memory) = (Arc::clone(&driver.function), Arc::clone(&driver.memory));
        memory.data.unmap(&function.client);
        memory.data.fill(PATTERN);
        if round % 2 == 0 {
            load.fill(&mut driver);
            memory.data.fill(PATTERN);
        }
        let goes_on = load.finish_without_data(&mut driver);
        assert_eq!(memory.data.first_other_than(PATTERN), None, "round {round}");
        memory.data.map(&function.client);
        if !goes_on {
            driver = Driver::start(&function, &memory, setup());
            assert_eq!(memory.data.first_other_than(PATTERN), None, "round {round}");
            load.abandon();
        }
    }
    load.run_to_end(&mut driver, 1000, &image);
}

#[test]
fn a_function_level_reset_in_the_middle_ends_everything_and_the_driver_comes_back() {
    reset_in_the_middle(|driver| {
        driver.function.function_level_reset();
        driver.function.enable();
    });
}

#[test]
fn a_reset_of_the_device_in_the_middle_ends_everything_and_the_driver_comes_back() {
    reset_in_the_middle(|driver| driver.function.reset());
}

#[test]
fn a_reset_by_the_vmm_in_the_middle_ends_everything_and_the_driver_comes_back() {
    reset_in_the_middle(|driver| {
        driver.function.client.reset().unwrap();
        driver.function.enable();
    });
}

fn reset_in_the_middle(reset: impl Fn(&Driver)) {
    let (sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    for round in 0..40 {
        // The slots of two rounds have nothing in common.
        let first = round % 2 * DEPTH;
        load.use_slots(first..first + DEPTH);
        load.run(&mut driver, 200);
        load.fill(&mut driver);
        reset(&driver);
        load.abandon();
        let memory = Arc::clone(&driver.memory);
        memory.data.fill(PATTERN);
        driver = Driver::start(&driver.function, &memory, setup());
        load.verify(&image);
        assert_eq!(memory.data.first_other_than(PATTERN), None, "round {round}");
    }
    load.run_to_end(&mut driver, 1000, &image);
}

#[test]
fn a_queue_that_is_reset_in_the_middle_forgets_its_requests_alone() {
    let (sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut driver = drive(&sidecar, setup());
    let mut load = Load::new(SIZE, 512, DEPTH);
    for round in 0..40 {
        load.run(&mut driver, 200);
        load.fill(&mut driver);
        let queue = round % 2;
        driver.reset_queue(queue);
        load.abandon_queue(queue);
    }
    load.run(&mut driver, 1000);
    load.finish(&mut driver);
    assert_eq!(load.failed, 0);
    load.verify(&image);
}

#[test]
fn a_client_that_leaves_under_load_leaves_a_working_device_and_all_it_was_told_of() {
    let (sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut load = Load::new(SIZE, 512, DEPTH);
    let mut left: Option<Arc<Memory>> = None;
    for round in 0..20 {
        let mut driver = drive(&sidecar, setup());
        if let Some(memory) = left.take() {
            assert_eq!(memory.data.first_other_than(PATTERN), None, "round {round}");
            load.verify(&image);
        }
        load.run(&mut driver, 200);
        load.fill(&mut driver);
        load.abandon();
        let memory = Arc::clone(&driver.memory);
        drop(driver);
        // Its server may be at work until it has noticed, and has when it serves the next one.
        let next = sidecar.connect();
        memory.data.fill(PATTERN);
        drop(next);
        left = Some(memory);
    }
}

/// The next one starts at once: the image is nobody's when its server is gone.
#[test]
fn a_killed_server_has_written_all_that_it_acknowledged() {
    let (mut sidecar, image) = sidecar(SIZE, ",queues=2");
    let mut load = Load::new(SIZE, 512, DEPTH);
    for _ in 0..10 {
        let mut driver = drive(&sidecar, setup());
        load.verify(&image);
        load.run(&mut driver, 300);
        load.fill(&mut driver);
        drop(driver);
        sidecar = sidecar.killed_and_started_anew();
        load.abandon();
    }
    let mut driver = drive(&sidecar, setup());
    load.run_to_end(&mut driver, 300, &image);
}
