//! Every order in which vCPUs can get in each other's way over one page.

use super::*;

type HostAct = fn(&GuestMemory);
/// Name, memory, one access for each vCPU, what the host does, most faults of one instruction.
type Race<'a> = (&'a str, fn() -> GuestMemory, &'a [Access], &'a [HostAct], usize);

/// Runs `programs`, and `host` as one more actor, in every possible order of steps, and returns how
/// many orders there are, and the most faults that one instruction took in any of them.
fn explore(
    setup: impl Fn() -> GuestMemory,
    programs: &[Vec<Access>],
    host: &[HostAct],
    check: impl Fn(&GuestMemory, &[Vcpu<'_>]),
) -> (usize, usize) {
    let mut orders = 0;
    let mut most = 0;
    // At each step, which of how many ready actors goes on.
    let mut choices: Vec<(usize, usize)> = Vec::new();
    loop {
        let memory = setup();
        let mut world = World::new(&memory, programs);
        let mut acts = host.iter();
        let replayed = choices.len();
        for depth in 0.. {
            // What comes before was looked at when it came first.
            world.look = depth + 1 >= replayed;
            assert!(depth < 200, "no end: {choices:?}");
            let mut ready = world.ready();
            let host_ready = acts.len() > 0 && memory.table().try_exclusive().is_some();
            if host_ready {
                ready.push(programs.len());
            }
            if ready.is_empty() {
                break;
            }
            if depth == choices.len() {
                choices.push((0, ready.len()));
            }
            match ready[choices[depth].0] {
                actor if actor < programs.len() => world.step(actor),
                _ => assert!(world.host(acts.next().unwrap())),
            }
        }
        assert!(world.finished() && acts.len() == 0, "a deadlock: {choices:?}");
        check(&memory, &world.vcpus);
        let faults = world.vcpus.iter().flat_map(Vcpu::done).map(|done| done.faults.len());
        most = faults.fold(most, usize::max);
        orders += 1;
        while let Some((choice, of)) = choices.pop() {
            if choice + 1 < of {
                choices.push((choice + 1, of));
                break;
            }
        }
        if choices.is_empty() {
            return (orders, most);
        }
    }
}

fn all_retired(vcpus: &[Vcpu<'_>]) {
    for done in vcpus.iter().flat_map(Vcpu::done) {
        assert_eq!(done.completion, Completion::Retired, "{done:?}");
    }
}

/// Pages only, with the neighbour of page 0 mapped, so that the table of pages is there.
fn pages() -> GuestMemory {
    let memory = memory_of(ram(8 * PAGE_SIZE, Perms::RWX));
    memory.table().map(GuestAddress(page(1)), PAGE_SIZE, FRAME + PAGE_SIZE, Perms::R).unwrap();
    memory
}

/// As `pages`, with page 0 mapped too, read-only.
fn read_only() -> GuestMemory {
    let memory = pages();
    memory.table().map(GuestAddress(page(0)), PAGE_SIZE, FRAME, Perms::R).unwrap();
    memory
}

fn block() -> GuestMemory {
    memory_of(ram(BLOCK_SIZE, Perms::RWX))
}

/// A block that is mapped and whose writes are tracked.
fn tracked_block() -> GuestMemory {
    let memory = block();
    memory.table().map(GuestAddress(BASE), BLOCK_SIZE, FRAME, Perms::RW).unwrap();
    memory.track_writes(GuestAddress(BASE), false);
    memory
}

fn bar() -> GuestMemory {
    let kind = RegionKind::Bar { decodes: true, suspended: false };
    let memory = memory_of(region(2 * PAGE_SIZE, Perms::RW, kind));
    memory.table().map(GuestAddress(page(1)), PAGE_SIZE, FRAME + PAGE_SIZE, Perms::R).unwrap();
    memory
}

#[test]
fn vcpus_that_race_for_a_page_all_get_on_in_every_order() {
    let (r, w, x) = (read(page(0)), write(page(0)), fetch(page(0)));
    let empty: fn() -> GuestMemory = || memory_of(ram(8 * PAGE_SIZE, Perms::RWX));
    let invalidate: HostAct = |memory| memory.invalidate(GuestAddress(BASE));
    let rows: [Race<'_>; 7] = [
        ("an empty table, read and fetch", empty, &[r, x], &[], 3),
        ("a page", pages, &[w, w], &[], 1),
        ("a page, read and fetch", pages, &[r, x], &[], 2),
        ("a read-only page, write and fetch", read_only, &[w, x], &[], 2),
        ("a page that is unmapped", pages, &[x], &[invalidate, invalidate], 3),
        ("a block", block, &[r, fetch(page(9))], &[], 2),
        ("a block to be broken", tracked_block, &[w, write(page(9))], &[], 2),
    ];
    for (what, setup, accesses, host, bound) in rows {
        let programs: Vec<_> = accesses.iter().map(|access| vec![*access]).collect();
        let (orders, most) = explore(setup, &programs, host, |memory, vcpus| {
            all_retired(vcpus);
            for access in accesses.iter().filter(|_| host.is_empty()) {
                assert_eq!(memory.access(*access), Ok(()), "{what}: what was granted stays");
            }
        });
        assert!(orders > 20, "{what}: {orders} orders are too few to be all");
        assert_eq!(most, bound, "{what}: {orders} orders");
    }
}

#[test]
fn the_loser_of_a_race_is_told_again_and_its_replay_needs_no_map() {
    let programs = [vec![read(page(0))], vec![fetch(page(0))]];
    let lost = std::cell::Cell::new(0);
    explore(pages, &programs, &[], |_, vcpus| {
        let faults: Vec<_> =
            vcpus.iter().flat_map(Vcpu::done).flat_map(|done| &done.faults).collect();
        let maps = faults.iter().filter(|fault| {
            fault.answer == Answer::Verdict(crate::fault::Verdict::Map)
                && fault.code == Some(Ok(()))
        });
        assert_eq!(maps.count(), 1, "one of them maps, whatever the order: {faults:?}");
        let again = faults.iter().any(|fault| fault.code == Some(Err(TableError::Again)));
        lost.set(lost.get() + usize::from(again));
    });
    assert!(lost.get() > 0, "no order had a loser");
}

#[test]
fn an_access_to_a_bar_that_ceases_to_decode_retires_or_exits_as_mmio() {
    let seen = std::cell::RefCell::new(Vec::new());
    let stop: HostAct = |memory| memory.set_decode(GuestAddress(BASE), false);
    let programs = [vec![read(BASE)], vec![write(BASE)]];
    let (orders, _) = explore(bar, &programs, &[stop], |memory, vcpus| {
        let ends: Vec<_> = vcpus.iter().map(|vcpu| vcpu.done()[0].completion).collect();
        assert!(!ends.contains(&Completion::NotMine));
        assert_eq!(memory.table().leaves(), []);
        let mut seen = seen.borrow_mut();
        if !seen.contains(&ends) {
            seen.push(ends);
        }
    });
    assert_eq!(seen.borrow().len(), 4, "each on either side of the change, in {orders} orders");
}

#[test]
fn threads_that_race_for_pages_all_get_on() {
    let memory = memory_of(ram(BLOCK_SIZE, Perms::RWX));
    memory.track_writes(GuestAddress(BASE), false);
    let accesses: Vec<_> =
        (0..64).flat_map(|index| [read, fetch, write].map(|access| access(page(index)))).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mut program = accesses.clone();
            program.rotate_left(thread);
            let memory = &memory;
            scope.spawn(move || {
                let mut vcpu = Vcpu::new(memory, Policy::RelaxOnPermission, program);
                vcpu.run().unwrap();
                all_retired(std::slice::from_ref(&vcpu));
            });
        }
        for _ in 0..64 {
            memory.invalidate(GuestAddress(BASE));
            std::thread::yield_now();
        }
    });
}
