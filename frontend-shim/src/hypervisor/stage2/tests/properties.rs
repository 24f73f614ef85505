//! Random programs on several vCPUs, stepped in random order, while the host pulls things away.

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

const VCPUS: usize = 3;

/// What the guest has: everything that differs in kind, alignment or permissions, and a hole.
fn layout() -> Vec<Region> {
    let ram = RegionKind::Ram { private: false };
    let bar = RegionKind::Bar { decodes: true, suspended: false };
    let rows = [
        (0, BLOCK_SIZE + 2 * PAGE_SIZE, 0, Perms::RWX, ram),
        (2 * BLOCK_SIZE, BLOCK_SIZE, PAGE_SIZE, Perms::RW, ram),
        (3 * BLOCK_SIZE, PAGE_SIZE, 0, Perms::R, ram),
        (3 * BLOCK_SIZE + PAGE_SIZE, PAGE_SIZE, 0, Perms::NONE, ram),
        (4 * BLOCK_SIZE, 3 * PAGE_SIZE, 0, Perms::RX, RegionKind::Rom),
        (5 * BLOCK_SIZE, 2 * BLOCK_SIZE, 0, Perms::RW, bar),
        (8 * BLOCK_SIZE, 2 * PAGE_SIZE, 0, Perms::RWX, RegionKind::Ram { private: true }),
    ];
    let region = |(at, size, shift, perms, kind)| {
        let ipa = GuestAddress(BASE + at);
        Region { ipa, size, frame: FRAME + at + shift, perms, kind }
    };
    rows.map(region).to_vec()
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Step(usize),
    Invalidate(u64),
    Decode(u64, bool),
    Suspend(u64, bool),
    Private(u64, bool),
    Track(u64, bool),
    TakeDirty,
}

/// Few addresses, so that vCPUs meet.
fn address() -> impl Strategy<Value = u64> {
    let block =
        |block: u64| (0..3u64).prop_map(move |at| BASE + block * BLOCK_SIZE + at * PAGE_SIZE);
    prop_oneof![3 => block(0), 1 => block(2), 1 => block(3), 1 => block(4), 2 => block(5), 1 => block(8)]
}

fn access() -> impl Strategy<Value = Access> {
    let kinds = select(vec![FaultAccess::Read, FaultAccess::Write, FaultAccess::Execute]);
    (kinds, address(), 0..8u8).prop_map(|(kind, ipa, private)| {
        let beyond = ipa >= BASE + 8 * BLOCK_SIZE;
        Access { private: (private == 0) != beyond, ..Access::new(kind, ipa) }
    })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        24 => (0..VCPUS).prop_map(Event::Step),
        2 => address().prop_map(Event::Invalidate),
        1 => (address(), any::<bool>()).prop_map(|(at, on)| Event::Decode(at, on)),
        1 => (address(), any::<bool>()).prop_map(|(at, on)| Event::Suspend(at, on)),
        1 => (address(), any::<bool>()).prop_map(|(at, on)| Event::Private(at, on)),
        1 => (address(), any::<bool>()).prop_map(|(at, split)| Event::Track(at, split)),
        1 => Just(Event::TakeDirty),
    ]
}

fn act(world: &mut World<'_>, event: Event) {
    let at = GuestAddress;
    match event {
        Event::Step(index) => {
            if world.vcpus[index].standstill().is_none() {
                world.step(index);
            }
            true
        }
        Event::Invalidate(ipa) => world.host(|memory| memory.invalidate(at(ipa))),
        Event::Decode(ipa, on) => world.host(|memory| memory.set_decode(at(ipa), on)),
        Event::Suspend(ipa, on) => world.host(|memory| memory.set_suspended(at(ipa), on)),
        Event::Private(ipa, on) => world.host(|memory| memory.set_private(at(ipa), on)),
        Event::Track(ipa, split) => world.host(|memory| memory.track_writes(at(ipa), split)),
        Event::TakeDirty => world.host(|memory| {
            let dirty = memory.take_dirty();
            assert!(dirty.iter().all(|page| memory.backing(*page).is_some()));
        }),
    };
}

proptest! {
    /// Every access comes to its end: it retires, exits as MMIO or is the VMM's; and what it takes is
    /// bounded (`World::step`), and no entry is ever too large or permits too much (`World::check`).
    #[test]
    fn every_access_ends_after_bounded_faults(
        dic in any::<bool>(),
        programs in prop::collection::vec(prop::collection::vec(access(), 1..6), VCPUS),
        events in prop::collection::vec(event(), 0..160),
    ) {
        let memory = GuestMemory::new(dic);
        for region in layout() {
            memory.add(region).unwrap();
        }
        let mut world = World::new(&memory, &programs);
        for event in events {
            act(&mut world, event);
        }
        // From here on nothing is pulled away: all get to their end, however unfairly stepped.
        for _ in 0..2000 {
            if let Some(index) = world.ready().first() {
                world.step(*index);
            }
        }
        prop_assert!(world.finished(), "{:?}", world.vcpus);
        for done in world.vcpus.iter().flat_map(Vcpu::done) {
            let region = memory.backing(done.access.ipa).map(|backing| backing.region);
            let permitted = region.is_some_and(|region| region.perms.contains(done.access.needs()));
            match done.completion {
                Completion::Retired => prop_assert!(permitted, "{done:?}"),
                Completion::Mmio => prop_assert!(
                    !matches!(region, Some(Region { kind: RegionKind::Ram { .. }, .. })),
                    "memory is never MMIO: {done:?}"
                ),
                Completion::NotMine => {}
            }
        }
    }
}
