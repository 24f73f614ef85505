//! Whatever the driver and the peer do, the device goes on or asks for a reset.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Chain { queue: u16, parts: Vec<RandomPart> },
    Head { queue: u16, head: u16 },
    Overstate { queue: u16, by: u16 },
    Deliver(usize),
    Kick(u16),
    Wake(usize),
    Pause(bool),
    StopQueue(u16),
    Reset(u64),
    Restore(Vec<u8>),
}

#[derive(Clone, Debug)]
enum RandomPart {
    Readable(Vec<u8>),
    Writable(u32),
    Raw(u64, u32, u16),
}

fn part() -> impl Strategy<Value = RandomPart> {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..100),
        // Headers and commands that are nearly right.
        prop::collection::vec(0..5_u8, 0..30),
    ];
    prop_oneof![
        4 => bytes.prop_map(RandomPart::Readable),
        4 => (0..200_u32).prop_map(RandomPart::Writable),
        1 => (any::<u64>(), any::<u32>(), 0..8_u16).prop_map(|(a, b, c)| RandomPart::Raw(a, b, c)),
        1 => (0..64_u64 << 20, 0..70_000_u32, 0..8_u16)
            .prop_map(|(a, b, c)| RandomPart::Raw(a, b, c)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..6_u16;
    prop_oneof![
        8 => (queue.clone(), prop::collection::vec(part(), 1..5))
            .prop_map(|(queue, parts)| Step::Chain { queue: queue.min(4), parts }),
        1 => (0..5_u16, any::<u16>()).prop_map(|(queue, head)| Step::Head { queue, head }),
        1 => (0..5_u16, 0..300_u16).prop_map(|(queue, by)| Step::Overstate { queue, by }),
        4 => (0..300_usize).prop_map(Step::Deliver),
        6 => queue.clone().prop_map(Step::Kick),
        4 => (0..3_usize).prop_map(Step::Wake),
        1 => any::<bool>().prop_map(Step::Pause),
        1 => queue.prop_map(Step::StopQueue),
        1 => any::<u64>().prop_map(Step::Reset),
        1 => prop::collection::vec(any::<u8>(), 0..12).prop_map(Step::Restore),
    ]
}

fn play(rig: &mut Rig, step: &Step) {
    match step {
        Step::Chain { queue, parts } => {
            let parts = parts.iter().map(|part| match part {
                RandomPart::Readable(bytes) => Part::Readable(bytes),
                RandomPart::Writable(len) => Part::Writable(*len),
                RandomPart::Raw(address, len, flags) => Part::Raw(*address, *len, *flags),
            });
            rig.driver.send(*queue, &parts.collect::<Vec<_>>());
        }
        Step::Head { queue, head } => rig.driver.make_available(*queue, *head),
        Step::Overstate { queue, by } => rig.driver.overstate(*queue, *by),
        Step::Deliver(len) => {
            let _ = rig.peer.send_to(&frame(*len), rig.directory.path().join("net"));
        }
        Step::Kick(queue) => drop(rig.net.kicked(*queue, &mut rig.driver)),
        Step::Wake(wake) => drop(rig.net.woken(*wake, &mut rig.driver)),
        Step::Pause(paused) => rig.driver.paused = *paused,
        Step::StopQueue(queue) => Core::<Memory>::queue_stopped(&mut rig.net, *queue),
        Step::Reset(features) => {
            Core::<Memory>::reset(&mut rig.net);
            let offered = features_of(&rig.net);
            Core::<Memory>::start(&mut rig.net, offered & features);
        }
        Step::Restore(state) => drop(Core::<Memory>::restore(&mut rig.net, state)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_driver_does_is_our_end(
        features in any::<u64>(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut rig = Rig::with("", 2, features);
        rig.peer.set_nonblocking(true).unwrap();
        for step in &steps {
            play(&mut rig, step);
        }
    }
}
