//! The rules themselves: what the adapter is tested against must hold.

use super::*;

const RW: SlotAccess = SlotAccess::ReadWrite;

struct Bench {
    partition: ModelPartition,
    memory: Arc<HostMapping>,
}

fn bench(second_map: SecondMap) -> Bench {
    let partition = ModelPartition::new(second_map);
    let memory = Arc::new(HostMapping::anonymous(8 * PAGE_SIZE).unwrap());
    partition.add_host_memory(&memory);
    Bench { partition, memory }
}

impl Bench {
    fn plan(&self, guest: u64, page: u64, pages: u64) -> MapPlan {
        let host = HostFrame::of(self.memory.host_address()).0 + page;
        MapPlan { guest: GuestFrame(guest), host: HostFrame(host), pages }
    }

    fn map(&self, plan: MapPlan) -> &'static str {
        name(self.partition.map_gpa(plan, RW))
    }

    fn unmap(&self, plan: MapPlan) -> &'static str {
        name(self.partition.unmap_gpa(plan))
    }

    fn guest_pages(&self) -> Vec<u64> {
        self.partition.mapped_pages().into_iter().map(|(guest, _)| guest).collect()
    }
}

fn name(result: Result<(), CallError>) -> &'static str {
    match result.map_err(|error| error.kind) {
        Ok(()) => "ok",
        Err(CallErrorKind::Mapped) => "mapped",
        Err(CallErrorKind::NotMapped) => "not mapped",
        Err(CallErrorKind::NoBacking) => "no backing",
        Err(CallErrorKind::Interrupted) => "interrupted",
        Err(CallErrorKind::Other(_)) => "invalid",
    }
}

#[test]
fn the_same_range_again_is_as_configured() {
    for (second, expected) in [(SecondMap::Refused, "mapped"), (SecondMap::Accepted, "ok")] {
        let bench = bench(second);
        assert_eq!(bench.map(bench.plan(10, 0, 4)), "ok");
        assert_eq!(bench.map(bench.plan(10, 0, 4)), expected);
        assert_eq!(bench.guest_pages(), [10, 11, 12, 13]);
    }
}

#[test]
fn an_overlap_maps_nothing() {
    for second in [SecondMap::Refused, SecondMap::Accepted] {
        let bench = bench(second);
        assert_eq!(bench.map(bench.plan(10, 0, 2)), "ok");
        for (guest, page, pages) in [(10, 1, 2), (9, 0, 2), (11, 1, 4), (8, 0, 8), (10, 0, 1)] {
            let before = bench.partition.mapped_pages();
            assert_eq!(bench.map(bench.plan(guest, page, pages)), "mapped", "{guest} {pages}");
            assert_eq!(bench.partition.mapped_pages(), before);
        }
        assert_eq!(bench.map(bench.plan(12, 0, 1)), "ok");
    }
}

#[test]
fn a_range_goes_as_it_came() {
    let bench = bench(SecondMap::Refused);
    assert_eq!(bench.unmap(bench.plan(10, 0, 4)), "not mapped");
    assert_eq!(bench.map(bench.plan(10, 0, 4)), "ok");
    for (guest, page, pages) in [(10, 0, 3), (11, 1, 3), (10, 0, 5), (10, 1, 4)] {
        assert_eq!(bench.unmap(bench.plan(guest, page, pages)), "invalid", "{guest} {pages}");
    }
    assert_eq!(bench.guest_pages(), [10, 11, 12, 13]);
    assert_eq!(bench.unmap(bench.plan(10, 0, 4)), "ok");
    assert!(bench.guest_pages().is_empty());
}

#[test]
fn host_pages_that_go_away_take_their_guest_pages_along() {
    let bench = bench(SecondMap::Refused);
    let plan = bench.plan(10, 0, 4);
    assert_eq!(bench.map(plan), "ok");
    bench.partition.withdraw(&bench.memory);
    assert!(bench.guest_pages().is_empty());
    assert_eq!(bench.map(bench.plan(20, 0, 1)), "no backing");

    bench.partition.restore(&bench.memory);
    assert!(bench.guest_pages().is_empty());
    assert_eq!(bench.map(plan), "mapped", "the driver remembers the range");
    assert_eq!(bench.unmap(plan), "ok");
    assert_eq!(bench.map(plan), "ok");
}

#[test]
fn memory_that_the_process_does_not_have_is_refused() {
    let bench = bench(SecondMap::Refused);
    assert_eq!(bench.map(bench.plan(10, 7, 2)), "no backing");
    assert!(bench.guest_pages().is_empty());
}
