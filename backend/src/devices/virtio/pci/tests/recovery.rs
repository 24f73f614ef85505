//! Going on where a process was killed.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::OwnedFd;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::layout::common as at;
use super::bench::{ALL_SET, Bench, DEVICE, ring};
use super::core::{QUEUE_SIZE, Told};
use crate::devices::Device;
use crate::devices::virtio::InFlight;
use crate::devices::virtio::spec::{feature, status};
use crate::pci::BarIndex;
use crate::state::Scratch;

const QUEUES: u16 = 2;
const FEATURES: u64 = feature::RING_RESET;

#[derive(Clone, Debug)]
enum Step {
    Send(u16),
    Kick(u16),
    /// Requests that come from now on wait, or not.
    Hold(bool),
    /// Those that wait are done.
    Wake,
    ResetQueue(u16),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let queue = 0..QUEUES;
    let step = prop_oneof![
        5 => queue.clone().prop_map(Step::Send),
        5 => queue.clone().prop_map(Step::Kick),
        2 => any::<bool>().prop_map(Step::Hold),
        2 => Just(Step::Wake),
        1 => queue.prop_map(Step::ResetQueue),
        1 => Just(Step::Reset),
    ];
    vec(step, 1..20)
}

/// A driver that knows what it waits for, by queue and head.
struct Driver {
    bench: Bench,
    waits: BTreeMap<(u16, u16), [u8; 4]>,
    sent: u32,
}

impl Driver {
    fn step(&mut self, step: &Step) {
        let bench = &mut self.bench;
        match step {
            Step::Send(queue) => {
                let data = self.sent.to_le_bytes();
                let head = bench.next_head(*queue);
                if let Entry::Vacant(entry) = self.waits.entry((*queue, head)) {
                    assert_eq!(bench.send(*queue, &data), head);
                    entry.insert(data);
                    self.sent += 1;
                }
            }
            Step::Kick(queue) => bench.kick(*queue),
            Step::Hold(holds) => bench.core.state().holds = *holds,
            Step::Wake => bench.wake(bench.core_wake()),
            Step::ResetQueue(queue) => {
                bench.set(at::QUEUE_SELECT, 2, u64::from(*queue));
                bench.set(at::QUEUE_RESET, 2, 1);
                self.waits.retain(|(of, _), _| of != queue);
                bench.set_up_queue(*queue);
            }
            Step::Reset => {
                bench.set(at::DEVICE_STATUS, 1, 0);
                self.waits.clear();
                bench.drive(FEATURES);
            }
        }
        self.look();
    }

    /// Every request comes back once, with its own data.
    fn look(&mut self) {
        for queue in 0..QUEUES {
            for (head, data) in self.bench.used(queue) {
                let waits = self.waits.remove(&(queue, head));
                assert_eq!(waits.expect("the driver waits for it"), data[..]);
            }
        }
    }
}

/// Goes through the steps in processes of which each is killed at its point. Returns how many were.
fn run(steps: &[Step], kills: &[u64]) -> usize {
    let mut bench = Bench::new(QUEUES.into());
    bench.enable_msix(true);
    bench.is_mortal(kills);
    bench.drive(FEATURES);
    let mut driver = Driver { bench, waits: BTreeMap::new(), sent: 0 };
    steps.iter().for_each(|step| driver.step(step));
    let last = [Step::Hold(false), Step::Wake, Step::Kick(0), Step::Kick(1), Step::Wake];
    last.iter().for_each(|step| driver.step(step));
    assert!(driver.waits.is_empty(), "lost: {:?}", driver.waits);
    assert_eq!(driver.bench.status(), ALL_SET);
    driver.bench.is_spared()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_once_wherever_the_process_is_killed(
        steps in steps(),
        second in vec(0..200_u64, 8),
    ) {
        let mut first = 0;
        while run(&steps, &[first]) == 1 {
            for second in &second {
                run(&steps, &[first, *second]);
            }
            first += 1;
        }
    }

    #[test]
    fn whatever_lies_in_the_words_harms_nobody(
        garbage in vec((any::<prop::sample::Index>(), any::<u64>(), any::<bool>()), 1..40),
    ) {
        let mut bench = mortal(FEATURES);
        bench.core.state().holds = true;
        for queue in [0, 1, 0] {
            bench.send(queue, b"data");
            bench.kick(queue);
        }
        let scratch = bench.scratch();
        for (index, value, near) in garbage {
            let word = index.index(scratch.len());
            // Something that could be, too.
            let value = if near { scratch.get(word) ^ 1 << (value % 64) } else { value };
            scratch.set(word, value);
        }
        bench.is_killed();
        for queue in 0..QUEUES {
            bench.kick(queue);
        }
        bench.wake(bench.core_wake());
        bench.set(at::DEVICE_STATUS, 1, 0);
        bench.drive(FEATURES);
        bench.core.state().holds = false;
        let head = bench.send(0, b"anew");
        bench.kick(0);
        // It may be that nobody believes the words any more.
        if bench.status() == ALL_SET {
            prop_assert_eq!(bench.used(0), [(head, b"anew".to_vec())]);
        }
    }
}

/// A function that outlives its process, with its driver set up.
fn mortal(features: u64) -> Bench {
    let mut bench = Bench::new(QUEUES.into());
    bench.enable_msix(true);
    bench.is_mortal(&[]);
    bench.drive(features);
    bench
}

#[test]
fn what_was_in_flight_is_done_in_the_order_in_which_it_was_taken() {
    let mut bench = mortal(0);
    bench.core.state().holds = true;
    let mut expected = Vec::new();
    for queue in [1, 0, 1, 1, 0] {
        let head = bench.send(queue, b"data");
        bench.kick(queue);
        expected.push(Told::Resubmitted(InFlight { queue, head }));
    }
    bench.is_killed();
    let told = bench.core.take_told();
    let resubmitted: Vec<_> =
        told.into_iter().filter(|told| matches!(told, Told::Resubmitted(_))).collect();
    assert_eq!(resubmitted, expected);
}

#[test]
fn the_driver_is_interrupted_once_for_each_queue_that_was_served() {
    let mut bench = mortal(feature::EVENT_IDX);
    bench.send(0, b"data");
    bench.kick(0);
    // It asks for no more interrupts.
    bench.set_used_event(0, 100);
    bench.messages();
    bench.is_killed();
    assert_eq!(bench.messages(), [1, 1, 0]);
}

/// A driver that reads the configuration while nothing decodes would believe what it finds.
#[test]
fn the_driver_is_told_of_the_configuration_if_it_is_another_one() {
    let mut bench = mortal(0);
    bench.write(BarIndex::BAR0, DEVICE, &[3]);
    bench.messages();
    let generation = bench.field(at::CONFIG_GENERATION, 1);
    bench.is_killed();
    assert_eq!((bench.messages()[2], bench.field(at::CONFIG_GENERATION, 1)), (0, generation));
    bench.is_killed_and(|bench| bench.core.state().capacity = 5);
    assert_eq!((bench.messages()[2], bench.field(at::CONFIG_GENERATION, 1)), (1, generation + 1));
    bench.is_killed_and(|bench| bench.core.state().capacity = 5);
    assert_eq!((bench.messages()[2], bench.field(at::CONFIG_GENERATION, 1)), (0, generation + 1));
}

#[test]
fn a_driver_that_begins_anew_is_told_of_no_change() {
    for reset in [false, true] {
        let mut from = mortal(0);
        let mut to = from.successor();
        to.enable_msix(true);
        to.is_mortal(&[]);
        to.core.state().capacity = 5;
        let mut to = from.moved_to(to);
        if reset {
            to.set(at::DEVICE_STATUS, 1, 0);
            to.drive(0);
        }
        to.messages();
        to.resume();
        assert_eq!(to.messages()[2], u64::from(!reset), "{reset}");
    }
}

#[test]
fn requests_change_nothing_that_is_saved() {
    let mut bench = mortal(FEATURES);
    let revision = |bench: &mut Bench| bench.device.saved().unwrap().revision().unwrap();
    let before = revision(&mut bench);
    bench.core.state().holds = true;
    for _ in 0..2 {
        bench.send(0, b"data");
        bench.kick(0);
        bench.wake(bench.core_wake());
        bench.core.state().holds = false;
    }
    bench.field(at::QUEUE_SIZE, 2);
    assert_eq!(revision(&mut bench), before);

    type Change = fn(&mut Bench);
    let changes: [Change; 5] = [
        |bench| bench.set(at::QUEUE_SELECT, 2, 0),
        |bench| bench.set(at::CONFIG_MSIX_VECTOR, 2, 0),
        |bench| bench.write(BarIndex::BAR0, DEVICE, &[7]),
        |bench| {
            bench.make_available(0, 0x77);
            bench.kick(0);
        },
        |bench| bench.set(at::DEVICE_STATUS, 1, 0),
    ];
    for (index, change) in changes.iter().enumerate() {
        let before = (revision(&mut bench), bench.device.saved().unwrap().save());
        change(&mut bench);
        let after = (revision(&mut bench), bench.device.saved().unwrap().save());
        assert!(before.1 != after.1, "{index}: something changed");
        assert!(before.0 != after.0, "{index}: and it is told");
    }

    let mut fleeting = Bench::driven(1, 0);
    assert_eq!(fleeting.device.saved().unwrap().revision(), None);
}

#[test]
fn a_used_ring_that_the_driver_wrote_to_breaks_its_own_device() {
    let mut bench = mortal(FEATURES);
    bench.core.state().holds = true;
    bench.send(0, b"data");
    bench.kick(0);
    bench.put(ring(0) + 0x2000 + 2, &7_u16.to_le_bytes());
    bench.is_killed();
    assert_eq!(bench.status(), ALL_SET | status::DEVICE_NEEDS_RESET);
}

#[test]
fn a_request_that_is_available_twice_breaks_its_own_device() {
    let mut bench = mortal(FEATURES);
    bench.core.state().holds = true;
    let head = bench.send(0, b"data");
    bench.make_available(0, head);
    bench.kick(0);
    assert_eq!(bench.status(), ALL_SET | status::DEVICE_NEEDS_RESET);
    bench.is_killed();
    bench.wake(bench.core_wake());
    bench.kick(0);
    assert_ne!(bench.status() & status::DEVICE_NEEDS_RESET, 0);
}

#[test]
fn a_queue_whose_rings_are_away_waits_for_them() {
    let mut bench = mortal(FEATURES);
    bench.core.state().holds = true;
    let held = bench.send(0, b"held");
    bench.kick(0);
    bench.unmap_memory();
    bench.is_killed_and(Bench::unmap_memory);
    bench.kick(0);
    assert_eq!(bench.status(), ALL_SET);
    assert!(bench.used(0).is_empty());
    // And if it moves on now, nobody could know what was in flight.
    let mut elsewhere = bench.moved();
    assert_eq!(elsewhere.status(), ALL_SET | status::DEVICE_NEEDS_RESET);

    bench.map_memory();
    assert_eq!(bench.used(0), [(held, b"held".to_vec())]);
}

#[test]
fn a_function_that_moved_begins_where_its_state_says_and_can_be_killed_then() {
    let mut from = mortal(FEATURES);
    from.send(0, b"done");
    from.kick(0);
    assert_eq!(from.used(0).len(), 1);
    from.core.state().holds = true;
    let held = from.send(0, b"held");
    from.kick(0);

    // Another process, whose words have another history.
    let rings = from.get(ring(0), 0x2_0000);
    let mut to = from.successor();
    to.enable_msix(true);
    to.is_mortal(&[]);
    for _ in 0..3 {
        to.drive(FEATURES);
        to.set(at::DEVICE_STATUS, 1, 0);
    }
    from.put(ring(0), &rings);
    let mut to = from.moved_to(to);
    to.core.state().holds = true;
    to.turn(|device, context| device.saved().unwrap().resume(context));
    assert_eq!(
        to.core.take_told().pop(),
        Some(Told::Resubmitted(InFlight { queue: 0, head: held }))
    );
    assert_eq!(to.used(0), [(held, b"held".to_vec())]);
    let next = to.send(0, b"next");
    to.kick(0);
    to.is_killed();
    assert_eq!(to.used(0), [(next, b"next".to_vec())]);
}

#[test]
fn a_state_from_elsewhere_is_not_taken_for_the_one_that_belongs_to_the_words() {
    let mut here = mortal(FEATURES);
    for _ in 0..3 {
        here.set(at::DEVICE_STATUS, 1, 0);
        here.drive(FEATURES);
    }
    let mut from = mortal(FEATURES);
    from.core.state().holds = true;
    let held = from.send(0, b"held");
    from.kick(0);
    // Its process was killed before it had saved anything.
    let mut to = from.successor();
    to.device.saved().unwrap().set_scratch(here.scratch());
    let mut to = from.moved_to(to);
    to.resume();
    assert_eq!(to.used(0), [(held, b"held".to_vec())]);
}

#[test]
fn a_state_that_comes_back_to_its_own_process_says_where_it_is() {
    let mut bench = mortal(FEATURES);
    bench.core.state().holds = true;
    let held = bench.send(0, b"held");
    bench.kick(0);
    bench.device.quiesce();
    let (before, rings) = (bench.device.saved().unwrap().save(), bench.get(ring(0), 0x3000));
    bench.resume();
    bench.wake(bench.core_wake());
    bench.device.quiesce();
    // And guest memory with it.
    bench.put(ring(0), &rings);
    bench.device.saved().unwrap().restore(&before).unwrap();
    bench.core.state().holds = false;
    bench.turn(|device, context| device.saved().unwrap().resume(context));
    assert_eq!(bench.used(0), [(held, b"held".to_vec())]);
    bench.is_killed();
    assert_eq!(bench.status(), ALL_SET);
    let next = bench.send(0, b"next");
    bench.kick(0);
    assert_eq!(bench.used(0), [(next, b"next".to_vec())]);
}

#[test]
fn a_queue_that_was_set_up_anew_by_an_access_that_was_not_finished_is_left_alone() {
    let mut bench = mortal(FEATURES);
    bench.core.state().holds = true;
    bench.send(0, b"data");
    bench.kick(0);
    let before = bench.life();
    bench.set(at::DEVICE_STATUS, 1, 0);
    bench.drive(FEATURES);
    bench.kick(0);
    // As if all of that had been one message of many writes.
    bench.is_killed_and_has(before);
    assert_eq!(bench.core.take_told().len(), 3, "reset, quiesced, started");
    assert_eq!(bench.status(), ALL_SET | status::DEVICE_NEEDS_RESET);
    bench.set(at::DEVICE_STATUS, 1, 0);
    bench.drive(FEATURES);
    let head = bench.send(0, b"data");
    bench.core.state().holds = false;
    bench.kick(0);
    assert_eq!(bench.used(0), [(head, b"data".to_vec())]);
}

#[test]
fn a_successor_is_notified_through_the_eventfds_that_clients_have() {
    let (first, mut second) = (Bench::new(2), Bench::new(2));
    let kept = |bench: &Bench| -> Vec<OwnedFd> {
        bench.device.kept().iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect()
    };
    second.device.adopt(kept(&first)).unwrap();
    for (ours, theirs) in kept(&first).iter().zip(second.device.doorbells(BarIndex::BAR0)) {
        rustix::io::write(ours, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(rustix::io::read(&*theirs.eventfd, &mut [0; 8]), Ok(8));
    }
    assert_eq!(second.device.wakes().len(), 3);

    for wrong in [vec![], kept(&Bench::new(1)), kept(&Bench::new(3))] {
        assert!(second.device.adopt(wrong).is_err());
    }
    let no_eventfds = vec![first.file(), first.file()];
    assert!(second.device.adopt(no_eventfds).is_err());
}

/// There are as many as the record has room for, whatever size the driver chose.
#[test]
fn a_record_has_a_word_for_each_descriptor() {
    let mut bench = Bench::new(1);
    let words = bench.device.saved().unwrap().scratch_words();
    assert_eq!(words, 1 + 2 + usize::from(QUEUE_SIZE));
    let scratch = Scratch::private(words).unwrap();
    bench.device.saved().unwrap().set_scratch(scratch.clone());
    assert_ne!(scratch.get(0), 0);
}
