//! A VM with functions, its virtual CPUs, and what must hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use super::device::{
    Access, BAR2, BARS, Backing, COMMAND, DEVICE_CONTROL, Device, Kind, Link, PMCSR, parts,
};
use super::hypervisor::{ModelHypervisor, Outcome, RAM_SIZE};
use crate::bar::{AddressSpace, AttachedFunction, Backend, Outages, ReconnectError, SuspendOrder};
use crate::client::DeadBackend;
use crate::fault::{FaultCounts, FaultPlace, GuestAccess, MemoryFault, ProgressGuard, Unlocated};
use crate::hypervisor::{Hypervisor, SlotId};
use crate::{FaultOutcome, Frontend, GuestAddress};

/// A VM and what its threads do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) devices: &'static [Kind],
    pub(super) order: SuspendOrder,
    pub(super) style: Style,
    /// What becomes of accesses while a backend is gone.
    pub(super) dead_backend: DeadBackend,
    /// How many calls of the hypervisor fail.
    pub(super) failures: u32,
    /// The guest places BARs over each other, the VMM takes slots away, or memory is broken: not
    /// everything gets mapped.
    pub(super) stays_trapped: bool,
    /// The most memory faults that one access may take.
    pub(super) max_faults: u32,
    /// By thread.
    pub(super) actors: &'static [&'static [Op]],
    /// Each thread does as many operations as it has, drawn from all of them.
    pub(super) shuffled: bool,
    /// It takes this much longer than others, and runs as much less often.
    pub(super) effort: usize,
}

/// What a memory fault tells.
#[derive(Clone, Copy, Debug)]
pub(super) enum Style {
    /// The page.
    Reported,
    /// The page, or one of another function.
    OneOf,
    /// Nothing.
    Unknown,
}

/// What a thread does; functions are told by index.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Read(u64),
    Write(u64),
    /// A write that is checked only where it lands: with fewer points where threads change.
    Touch(u64),
    /// The guest sets decode.
    Command(usize, bool),
    /// The guest moves BAR2.
    Move(usize, u32),
    /// The guest sets the power state.
    Power(usize, u8),
    Flr(usize),
    /// The guest sets everything up again.
    Setup(usize),
    ConfigRead(usize),
    /// The VMM resets the machine.
    Reset,
    /// The VMM takes the slots away.
    Detach(usize),
    /// The VMM asks again, as for a fault of unknown address.
    Recheck(usize),
    /// Somebody else sets decode.
    Behind(usize, bool),
    ResetBehind(usize),
    RestoreBehind(usize),
    Die(usize),
    /// The backend does what it is asked next and dies before it answers.
    DieAnswering(usize),
    /// An attendant looks whether the backend has gone.
    Attend(usize),
    /// The backend is started again if it has died, and somebody connects to it.
    StartAgain(usize),
    /// Nobody will connect to it any more.
    GiveUp(usize),
    /// A genuine fault.
    TouchRam,
}

/// Where BAR2 of each function is in the beginning.
pub(super) const PLACES: [u32; 2] = [0x8000_0000, 0x9000_0000];
const BAR0_DISTANCE: u32 = 0x800_0000;
pub(super) const BAR2_0: u64 = PLACES[0] as u64;
pub(super) const BAR2_1: u64 = PLACES[1] as u64;
pub(super) const BAR0_0: u64 = (PLACES[0] + BAR0_DISTANCE) as u64;

struct World {
    scenario: Scenario,
    devices: Vec<Arc<Device>>,
    hypervisor: Arc<ModelHypervisor>,
    frontend: Frontend<Link>,
    // Of std, as they must not add scheduling points.
    changes: AtomicU64,
    under_way: AtomicU32,
    writes: AtomicU32,
}

/// Runs a scenario once, under a schedule of shuttle's. Returns the memory faults that there were.
pub(super) fn run(scenario: Scenario) -> FaultCounts {
    let world = Arc::new(World::new(scenario));
    world.hypervisor.fail(scenario.failures);
    let all: &'static [&'static [Op]] = scenario.actors;
    let act = move |world: &World, ops: &[Op]| {
        let mut vcpu = VcpuThread { world, guard: ProgressGuard::default() };
        for op in ops {
            let op = if scenario.shuffled { draw(all) } else { *op };
            vcpu.run(op);
        }
    };
    let (first, others) = all.split_first().unwrap();
    let threads: Vec<_> = others
        .iter()
        .map(|ops| {
            let world = Arc::clone(&world);
            thread::spawn(move || act(&world, ops))
        })
        .collect();
    act(&world, first);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    Arc::into_inner(world).unwrap().finish()
}

fn draw(all: &[&[Op]]) -> Op {
    let ops = all[thread_rng().gen_range(0..all.len())];
    ops[thread_rng().gen_range(0..ops.len())]
}

impl World {
    fn new(scenario: Scenario) -> Self {
        let devices = scenario.devices.iter().enumerate();
        let devices: Vec<_> =
            devices.map(|(index, kind)| Arc::new(Device::new(index, *kind))).collect();
        let hypervisor = Arc::new(ModelHypervisor::new(&devices));
        let adapter: Arc<dyn Hypervisor> = hypervisor.clone();
        let mut frontend = Frontend::new(adapter, vec![(0, RAM_SIZE)], SlotId(0));
        for device in &devices {
            let (link, policy) = (Link::first(device), scenario.dead_backend);
            frontend.attach_backend_with(link, scenario.order, policy).unwrap();
        }
        let zero = || AtomicU32::new(0);
        let (changes, under_way, writes) = (AtomicU64::new(0), zero(), zero());
        let world = Self { scenario, devices, hypervisor, frontend, changes, under_way, writes };
        (0..world.devices.len()).for_each(|function| world.set_up(function));
        world
    }

    fn set_up(&self, function: usize) {
        let place = PLACES[function];
        self.config_write(function, PMCSR, &[0]);
        self.config_write(function, BARS, &(place + BAR0_DISTANCE).to_le_bytes());
        self.config_write(function, BARS + 8, &place.to_le_bytes());
        self.config_write(function, COMMAND, &[2, 0]);
    }

    fn config_write(&self, function: usize, offset: u16, data: &[u8]) {
        self.changing(|| self.frontend.config_write(function, offset, data));
    }

    fn attend(&self, function: usize) {
        let attached = &self.frontend.functions()[function];
        let link = attached.backend();
        if link.is_over() {
            attached.session_of_ended(self.hypervisor.as_ref(), &link);
            let left = self.hypervisor.slots_of(&self.devices[function]);
            // Of another session by now, perhaps.
            let is_last = Arc::ptr_eq(&link, &attached.backend());
            // One that the hypervisor failed to remove has memory that refuses access.
            let expected = self.scenario.failures > 0 || !is_last;
            assert!(left == 0 || expected, "slots outlive the session");
        }
    }

    fn start_again(&self, function: usize) {
        let device = &self.devices[function];
        let Some(link) = device.start_again() else { return };
        let process = link.process();
        loop {
            match self.frontend.resume(function, link.clone()) {
                Ok(()) => break,
                // The hypervisor had no memory to remove a slot.
                Err(ReconnectError::Slots) => {}
                Err(error) => {
                    assert!(link.is_over(), "{error}");
                    return;
                }
            }
        }
        let mut state = device.lock();
        state.resumed = state.resumed.max(process);
    }

    /// Notes that something about decode changes.
    fn changing(&self, change: impl FnOnce()) {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Relaxed);
        change();
        self.under_way.fetch_sub(1, Ordering::Relaxed);
    }

    /// A number that stands still while nothing changes; `None` while something does.
    fn calm(&self) -> Option<u64> {
        let calm = self.under_way.load(Ordering::Relaxed) == 0;
        calm.then(|| self.changes.load(Ordering::Relaxed))
    }

    /// What must become of an access to `address` while all is calm.
    fn due(&self, address: u64) -> Due {
        let mut due = Due::UnsupportedRequest;
        for device in &self.devices {
            let state = device.lock();
            let Some((bar, offset)) = state.find(address) else { continue };
            if state.dies_answering {
                due = Due::Either;
                continue;
            }
            let guest_agrees = bar != BAR2 || state.placed == state.address(BAR2);
            due = match (due, state.decodes()) {
                // A server without extensions need not look at decode, nor does memory that is open.
                (due @ Due::UnsupportedRequest, false) => {
                    if state.dead || state.decode_behind {
                        Due::Either
                    } else {
                        due
                    }
                }
                (Due::UnsupportedRequest, true) if state.wanted && guest_agrees => {
                    Due::Value(device.value(bar, offset))
                }
                _ => Due::Either,
            };
        }
        due
    }

    fn applied(&self, value: u32) -> usize {
        let count = |device: &Arc<Device>| {
            device.lock().applied.iter().filter(|applied| **applied == value).count()
        };
        self.devices.iter().map(count).sum()
    }

    /// When all is quiet: what must hold in the end.
    fn finish(self) -> FaultCounts {
        self.hypervisor.fail(0);
        self.devices.iter().for_each(|device| device.live_on());
        self.frontend.functions().iter().for_each(AttachedFunction::stop_waiting);
        for function in 0..self.devices.len() {
            self.check_quiet(function);
        }
        for (function, device) in self.devices.iter().enumerate() {
            if !device.lock().dead {
                self.set_up(function);
                self.check_quiet(function);
                assert!(device.lock().decodes(), "it was set up");
            }
        }
        for function in self.frontend.functions() {
            let Outages { gone, back, .. } = function.outages();
            let away = u64::from(function.backend().is_dead());
            assert!(gone == back + away, "{gone} ends, {back} sessions after one");
        }
        let counts = self.frontend.fault_counters().get();
        let Self { frontend, hypervisor, devices, .. } = self;
        drop(frontend);
        for device in devices {
            assert_eq!(hypervisor.slots_of(&device), 0, "slots outlive the frontend");
        }
        counts
    }

    fn check_quiet(&self, function: usize) {
        let device = &self.devices[function];
        let state = device.lock();
        let (dead, noticed, place) = (state.dead, state.noticed, state.placed);
        drop(state);
        if dead {
            if !noticed || self.scenario.failures > 0 {
                self.frontend.config_read(function, 0, &mut [0; 4]);
            }
            assert_eq!(self.hypervisor.slots_of(device), 0, "the backend is dead, and known to be");
            return;
        }
        if place < RAM_SIZE {
            return;
        }
        let mut vcpu = VcpuThread { world: self, guard: ProgressGuard::default() };
        for offset in [0x3000, 0x8000] {
            vcpu.run(Op::Read(place + offset));
            let state = device.lock();
            let due = state.decodes() && state.wanted && state.placed == state.address(BAR2);
            drop(state);
            if due && !self.scenario.stays_trapped && self.scenario.failures == 0 {
                let slots = parts(device.kind.sparse).len();
                assert_eq!(
                    self.hypervisor.slots_of(device),
                    slots,
                    "it answers, and is not mapped"
                );
            }
        }
    }
}

/// What must become of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Value(u32),
    UnsupportedRequest,
    Either,
}

/// One virtual CPU, as the reference VMM runs it.
struct VcpuThread<'a> {
    world: &'a World,
    guard: ProgressGuard,
}

impl VcpuThread<'_> {
    fn run(&mut self, op: Op) {
        let world = self.world;
        let frontend = &world.frontend;
        match op {
            Op::Read(address) => self.checked(address, Access::Read),
            Op::Write(address) => {
                let value = 1 + world.writes.fetch_add(1, Ordering::Relaxed);
                self.checked(address, Access::Write(value));
            }
            Op::Touch(address) => {
                let ended = self.complete(address, Access::Write(0));
                assert_eq!(ended.map(|_| ()), Ok(()));
            }
            Op::Command(function, on) => {
                world.config_write(function, COMMAND, &[u8::from(on) << 1, 0]);
            }
            Op::Move(function, to) => world.config_write(function, BARS + 8, &to.to_le_bytes()),
            Op::Power(function, state) => world.config_write(function, PMCSR, &[state]),
            Op::Flr(function) => world.config_write(function, DEVICE_CONTROL, &[0, 0x80]),
            Op::Setup(function) => world.set_up(function),
            Op::ConfigRead(function) => frontend.config_read(function, 0, &mut [0; 4]),
            Op::Reset => world.changing(|| frontend.reset()),
            Op::Detach(function) => {
                frontend.functions()[function].detach(world.hypervisor.as_ref());
                let left = world.hypervisor.slots_of(&world.devices[function]);
                assert_eq!(left, 0, "slots outlive their revoke");
            }
            Op::Recheck(function) => {
                frontend.functions()[function].recheck(world.hypervisor.as_ref());
            }
            Op::Behind(function, on) => {
                world.changing(|| world.devices[function].decode_behind(on));
            }
            Op::ResetBehind(function) => {
                world.changing(|| world.devices[function].reset_behind());
            }
            Op::RestoreBehind(function) => {
                world.changing(|| world.devices[function].restore_behind());
            }
            Op::Die(function) => world.changing(|| world.devices[function].die()),
            Op::DieAnswering(function) => {
                world.changing(|| world.devices[function].die_answering());
            }
            Op::Attend(function) => world.changing(|| world.attend(function)),
            Op::StartAgain(function) => world.changing(|| world.start_again(function)),
            Op::GiveUp(function) => frontend.functions()[function].stop_waiting(),
            Op::TouchRam => self.touch_ram(),
        }
    }

    /// One access, and whether it has become what it must.
    fn checked(&mut self, address: u64, access: Access) {
        let before = self.world.calm();
        let due = self.world.due(address);
        let found = self.complete(address, access).unwrap_or_else(|failure| {
            panic!("{access:?} at {address:#x} does not end: {failure}");
        });
        let calm = self.world.calm();
        let due = if before.is_some() && calm == before { due } else { Due::Either };
        match (access, due) {
            (Access::Read, Due::Value(value)) => {
                assert_eq!(found, value, "read at {address:#x} of a function that decodes");
            }
            (Access::Read, Due::UnsupportedRequest) => {
                assert_eq!(found, u32::MAX, "read at {address:#x} where nothing decodes");
            }
            (Access::Read, Due::Either) => {
                let own = found >> 28 == 0xd && u64::from(found & 0xfff) == address & 0xfff;
                assert!(found == u32::MAX || own, "read at {address:#x} returns {found:#x}");
            }
            (Access::Write(value), due) => {
                let applied = self.world.applied(value);
                let fits = match due {
                    Due::Value(_) => applied == 1,
                    Due::UnsupportedRequest => applied == 0,
                    Due::Either => applied <= 1,
                };
                assert!(fits, "write at {address:#x} applied {applied} times, and {due:?} is due");
            }
        }
    }

    /// Runs the vCPU until its access has retired.
    fn complete(&mut self, address: u64, access: Access) -> Result<u32, String> {
        let world = self.world;
        let mut faults = 0;
        loop {
            match world.hypervisor.access(address, access) {
                Outcome::Landed(value) => return Ok(value),
                Outcome::Mmio => {
                    let found = self.mmio(address, access);
                    self.guard.progress();
                    return Ok(found);
                }
                Outcome::Fault => {
                    faults += 1;
                    if faults > world.scenario.max_faults {
                        return Err(format!("{faults} memory faults"));
                    }
                    let fault = self.fault(address, access);
                    if let FaultOutcome::NotMine = self.resolve(&fault)? {
                        return Err(format!("{fault} is said to be in no BAR"));
                    }
                }
            }
        }
    }

    fn mmio(&self, address: u64, access: Access) -> u32 {
        let frontend = &self.world.frontend;
        assert!(!frontend.is_claimed(address), "MMIO in RAM");
        let mut data = [0; 4];
        match access {
            Access::Read => frontend.read(AddressSpace::Memory, address, &mut data),
            Access::Write(value) => {
                frontend.write(AddressSpace::Memory, address, &value.to_le_bytes());
            }
        }
        u32::from_le_bytes(data)
    }

    /// As the reference VMM does it.
    fn resolve(&mut self, fault: &MemoryFault) -> Result<FaultOutcome, String> {
        let frontend = &self.world.frontend;
        if let Err(error) = self.guard.fault(fault, frontend.progress(fault)) {
            self.guard.progress();
            let broken = |device: &Arc<Device>| device.kind.backing == Backing::Broken;
            let expected = self.world.devices.iter().any(broken) || self.is_of_ram(fault);
            assert!(expected, "escalates: {error}");
            if !frontend.quarantine(fault) {
                return Err(error.to_string());
            }
        }
        Ok(frontend.memory_fault(fault))
    }

    fn is_of_ram(&self, fault: &MemoryFault) -> bool {
        let in_ram = |access: &GuestAccess| access.address.0 < RAM_SIZE;
        fault.candidates().iter().any(in_ram) || fault.candidates().is_empty()
    }

    /// The memory of the VMM itself is gone: never MMIO, and where it is told, never ours.
    fn touch_ram(&mut self) {
        let world = self.world;
        for _ in 0..10_000 {
            assert_eq!(world.hypervisor.access(0x5000, Access::Read), Outcome::Fault);
            let fault = self.fault(0x5000, Access::Read);
            match (self.resolve(&fault), world.scenario.style) {
                (Ok(FaultOutcome::Reenter(verdict)), Style::Reported) => {
                    panic!("a fault in RAM is resolved as {verdict:?}");
                }
                (Ok(FaultOutcome::Reenter(_)), _) => {}
                (Ok(FaultOutcome::NotMine) | Err(_), _) => return,
            }
        }
        panic!("a fault in RAM is resolved for ever");
    }

    fn fault(&self, address: u64, access: Access) -> MemoryFault {
        let kind = match access {
            Access::Read => crate::fault::FaultAccess::Read,
            Access::Write(_) => crate::fault::FaultAccess::Write,
        };
        let page = |address: u64| {
            let address = GuestAddress(address & !0xfff);
            GuestAccess { address, size: 0x1000, kind: Some(kind) }
        };
        let place = match self.world.scenario.style {
            Style::Reported => FaultPlace::Reported(page(address)),
            Style::OneOf => {
                let other = if address < BAR2_1 { BAR2_1 } else { BAR2_0 };
                FaultPlace::OneOf(vec![page(other), page(address)])
            }
            Style::Unknown => FaultPlace::Unknown(Unlocated::NotTried),
        };
        MemoryFault { place, private: false }
    }
}
