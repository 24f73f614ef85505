//! Sessions whose server is killed: at every crash point of a script, and the client sees nothing of it.

mod client;
mod deaths;
mod fragile;
mod hostile;
mod lab;
mod page;
mod talk;
mod windows;

use std::os::fd::{AsFd, OwnedFd};

use barkeep_protocol::wire::{
    Command, DeviceFeature, DmaAccess, DmaMap, DmaUnmap, FeatureRequest, IrqAction, IrqData,
    MigDeviceState, MigrationState, Offer, RegionAccess, SetIrqs, Version,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use self::client::{Client, Step};
use self::lab::Lab;
use crate::config::{DeviceSpec, Parameters};
use crate::devices::{Edu, Registry, TestCrash};
use crate::server::{HostedFunction, ServedFunction};
use crate::state::plan::{killed_at, passed};

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY: u64 = 0x10_0000;
const UNSHARED: u64 = 0x20_0000;
const SIZE: u64 = 0x2000;

fn edu() -> ServedFunction {
    let device = Edu::from_parameters(&mut Parameters::default()).unwrap();
    HostedFunction::new("edu", Box::new(device)).unwrap().into()
}

fn test_crash() -> ServedFunction {
    HostedFunction::new("test-crash", Box::new(TestCrash::default())).unwrap().into()
}

fn ivshmem() -> ServedFunction {
    let described: DeviceSpec = "ivshmem,size=4K".parse().unwrap();
    let (device, _) = Registry::default().create(described).unwrap();
    HostedFunction::new("ivshmem", device).unwrap().into()
}

fn read(region: u32, offset: u64, count: u32) -> Step {
    let mut body = Vec::new();
    RegionAccess { offset, region, count }.write_to(&mut body);
    Step::new(Command::RegionRead, body)
}

fn write(region: u32, offset: u64, data: &[u8]) -> Step {
    let mut body = Vec::new();
    let count = u32::try_from(data.len()).unwrap();
    RegionAccess { offset, region, count }.write_to(&mut body);
    body.extend_from_slice(data);
    Step::new(Command::RegionWrite, body)
}

fn version(offer: Offer) -> Step {
    Step::new(Command::Version, Version::proposal_with(offer).to_bytes())
}

fn enable() -> Step {
    write(CONFIG, COMMAND, &6u16.to_le_bytes())
}

fn map(address: u64, file: Option<&OwnedFd>) -> Step {
    let access = DmaAccess::READ | DmaAccess::WRITE;
    let map = DmaMap { access, file_offset: 0, address, size: SIZE };
    Step::new(Command::DmaMap, map.to_bytes()).with(file)
}

fn set_irq(action: IrqAction, data: IrqData<'_>, index: u32, eventfd: Option<&OwnedFd>) -> Step {
    let set = SetIrqs { action, data, index, start: 0, count: 1 };
    Step::new(Command::SetIrqs, set.to_bytes()).with(eventfd)
}

fn go_to(state: MigrationState) -> Step {
    let request = FeatureRequest::SetState(MigDeviceState::new(state));
    let mut body = Vec::new();
    DeviceFeature::new(request).unwrap().write_to(&mut body);
    Step::new(Command::DeviceFeature, body)
}

fn memory() -> OwnedFd {
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, SIZE).unwrap();
    file
}

fn counter() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn signals(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(eventfd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

/// A DMA of edu's: from its buffer to the address, or from there into the buffer.
fn dma(to_memory: bool, address: u64, count: u64) -> Vec<Step> {
    let (source, destination) = if to_memory { (0x40000, address) } else { (address, 0x40000) };
    let command: u64 = if to_memory { 0b111 } else { 0b101 };
    [(0x80, source), (0x88, destination), (0x90, count), (0x98, command)]
        .into_iter()
        .map(|(offset, value)| write(BAR0, offset, &u64::to_le_bytes(value)))
        .collect()
}

/// What a script leaves behind, besides replies.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    replies: Vec<Vec<u8>>,
    memory: Vec<u8>,
    unshared: Vec<u8>,
}

impl Outcome {
    fn expect(&self, expected: &Self, kills: &[u64]) {
        for (index, (reply, expected)) in self.replies.iter().zip(&expected.replies).enumerate() {
            assert_eq!(reply, expected, "reply {index}, killed at {kills:?}");
        }
        assert_eq!(self.replies.len(), expected.replies.len(), "killed at {kills:?}");
        assert!(self.memory == expected.memory, "memory, killed at {kills:?}");
        assert!(self.unshared == expected.unshared, "memory not shared, killed at {kills:?}");
    }
}

/// A script's fixed parts.
struct Scene {
    function: fn() -> ServedFunction,
    offer: Offer,
    steps: fn(&OwnedFd, &OwnedFd, &OwnedFd) -> Vec<Step>,
}

impl Scene {
    /// Runs the script and kills the server at these crash points, one incarnation after the other.
    fn play(&self, kills: &[u64]) -> (Outcome, Vec<u64>, u64) {
        let (memory, irq, unmask) = (memory(), counter(), counter());
        let mut steps = vec![version(self.offer)];
        steps.extend((self.steps)(&memory, &irq, &unmask));
        let (mut lab, socket) = Lab::new(self.function);
        let mut client = Client::new(socket, steps, UNSHARED, SIZE);
        let mut points = Vec::new();
        for kill in kills.iter().copied().chain([u64::MAX]) {
            let run = || {
                lab.start();
                lab.run_until(|| client.step());
            };
            let survived = killed_at(kill, run).is_ok();
            points.push(passed());
            if survived {
                break;
            }
            lab.bury();
        }
        lab.expect_no_litter();
        let outcome = Outcome {
            replies: client.replies(),
            memory: contents(&memory),
            unshared: client.unshared(),
        };
        (outcome, points, signals(&irq))
    }

    fn survives_a_kill_anywhere(&self) {
        let (expected, points, signals) = self.play(&[]);
        assert!(points[0] > 300, "{points:?}");
        for point in 1..=points[0] {
            let (outcome, _, signalled) = self.play(&[point]);
            outcome.expect(&expected, &[point]);
            assert!(signalled >= signals, "killed at {point}");
        }
    }

    fn survives_two_kills(&self, every: usize) {
        let (expected, points, _) = self.play(&[]);
        for first in (1..=points[0]).step_by(every) {
            let (_, points, _) = self.play(&[first]);
            for second in (1..=points[1]).step_by(every) {
                let (outcome, ..) = self.play(&[first, second]);
                outcome.expect(&expected, &[first, second]);
            }
        }
    }
}

fn contents(file: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    rustix::io::pread(file.as_fd(), &mut bytes, 0).unwrap();
    bytes
}

const COUNTED: Scene = Scene {
    function: test_crash,
    offer: Offer::empty(),
    steps: |_, _, _| {
        let mut steps = vec![enable()];
        for round in 0..4u64 {
            steps.push(write(BAR0, 0x28, &round.to_le_bytes()));
            steps.push(read(BAR0, 0x28, 8));
            steps.push(write(BAR0, 0x20, &(round * 3).to_le_bytes()));
            steps.push(read(BAR0, 0x20, 8));
        }
        steps
    },
};

#[test]
fn every_write_counts_once() {
    let (outcome, ..) = COUNTED.play(&[]);
    assert!(outcome.replies.last().unwrap().ends_with(&9u64.to_le_bytes()));
    COUNTED.survives_a_kill_anywhere();
}

#[test]
fn every_write_counts_once_whatever_happens_to_the_successor() {
    COUNTED.survives_two_kills(29);
}

fn edu_steps(memory: &OwnedFd, irq: &OwnedFd, unmask: &OwnedFd) -> Vec<Step> {
    let mut steps = vec![
        Step::new(Command::GetInfo, 16u32.to_ne_bytes().into_iter().chain([0; 12]).collect()),
        map(MEMORY, Some(memory)),
        map(UNSHARED, None),
        set_irq(IrqAction::Trigger, IrqData::Eventfd, 0, Some(irq)),
        set_irq(IrqAction::Unmask, IrqData::Eventfd, 0, Some(unmask)),
        enable(),
        write(BAR0, 4, &0x1234_5678u32.to_le_bytes()),
        read(BAR0, 4, 4),
        write(BAR0, 0x60, &1u32.to_le_bytes()),
        read(BAR0, 0x24, 4),
    ];
    steps.extend(dma(false, UNSHARED, 16));
    steps.push(Step::until_clear(read(BAR0, 0x98, 8)));
    steps.extend(dma(true, MEMORY + 0x100, 16));
    steps.push(Step::until_clear(read(BAR0, 0x98, 8)));
    steps.extend(dma(true, UNSHARED + 0x200, 16));
    steps.push(Step::until_clear(read(BAR0, 0x98, 8)));
    steps.push(write(BAR0, 0x64, &0x101u32.to_le_bytes()));
    steps.push(read(BAR0, 0x24, 4));
    steps.push(Step::new(Command::DmaUnmap, DmaUnmap::range(MEMORY, SIZE).to_bytes()));
    steps
}

#[test]
fn dma_and_interrupts_survive_a_kill_anywhere() {
    Scene { function: edu, offer: Offer::empty(), steps: edu_steps }.survives_a_kill_anywhere();
}

#[test]
fn commands_of_their_own_socket_survive_a_kill_anywhere() {
    Scene { function: edu, offer: Offer::TWIN_SOCKET, steps: edu_steps }.survives_a_kill_anywhere();
}

#[test]
fn a_second_kill_changes_nothing() {
    Scene { function: edu, offer: Offer::TWIN_SOCKET, steps: edu_steps }.survives_two_kills(61);
}

#[test]
fn a_stopped_function_stays_stopped() {
    let steps = |_: &OwnedFd, _: &OwnedFd, _: &OwnedFd| {
        let state = || {
            let mut body = Vec::new();
            DeviceFeature::new(FeatureRequest::GetState).unwrap().write_to(&mut body);
            Step::new(Command::DeviceFeature, body)
        };
        let get = |size: u32| {
            let body = [(8 + size).to_ne_bytes(), size.to_ne_bytes()].concat();
            Step::new(Command::MigDataRead, body)
        };
        vec![
            enable(),
            write(BAR0, 4, &7u32.to_le_bytes()),
            go_to(MigrationState::Stop),
            state(),
            read(BAR0, 4, 4),
            go_to(MigrationState::StopCopy),
            get(100),
            get(100),
            get(1 << 20),
            get(100),
            go_to(MigrationState::Running),
            read(BAR0, 4, 4),
        ]
    };
    Scene { function: edu, offer: Offer::MIGRATION, steps }.survives_a_kill_anywhere();
}
