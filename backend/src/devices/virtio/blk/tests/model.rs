//! Random requests against a model that is an array of bytes.

use proptest::prelude::*;

use super::*;

const SECTORS: u64 = 64;
const SIZE: usize = 512 * 64;

#[derive(Clone, Debug)]
enum Action {
    Write {
        sector: u64,
        sectors: usize,
        seed: u8,
        cut: usize,
    },
    Read {
        sector: u64,
        sectors: usize,
        cut: usize,
    },
    Clear {
        kind: u32,
        segments: Vec<(u64, u32, u32)>,
    },
    Flush,
    Quiesce,
    /// Any header, any data, any room.
    Any {
        kind: u32,
        sector: u64,
        data: Vec<u8>,
        room: u32,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let sector = || 0..SECTORS + 4;
    let segment = (sector(), 0u32..20, 0u32..2);
    prop_oneof![
        4 => (sector(), 0usize..12, any::<u8>(), 0usize..4000).prop_map(
            |(sector, sectors, seed, cut)| Action::Write { sector, sectors, seed, cut }
        ),
        4 => (sector(), 0usize..12, 0usize..4000)
            .prop_map(|(sector, sectors, cut)| Action::Read { sector, sectors, cut }),
        2 => (prop_oneof![Just(DISCARD), Just(WRITE_ZEROES)], prop::collection::vec(segment, 1..5))
            .prop_map(|(kind, segments)| Action::Clear { kind, segments }),
        1 => Just(Action::Flush),
        1 => Just(Action::Quiesce),
        2 => (
            prop_oneof![0u32..16, any::<u32>()],
            prop_oneof![0..80u64, any::<u64>()],
            prop::collection::vec(any::<u8>(), 0..600),
            0u32..600,
        )
            .prop_map(|(kind, sector, data, room)| Action::Any { kind, sector, data, room }),
    ]
}

struct Model {
    bytes: Vec<u8>,
    /// Discarded, so anything goes.
    undefined: Vec<bool>,
}

impl Model {
    fn range(sector: u64, len: usize) -> Option<std::ops::Range<usize>> {
        let at = usize::try_from(sector.checked_mul(512)?).ok()?;
        let end = at.checked_add(len)?;
        (end <= SIZE && len.is_multiple_of(512)).then_some(at..end)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let Some(range) = Self::range(sector, data.len()) else { return IOERR };
        self.bytes[range.clone()].copy_from_slice(data);
        self.undefined[range].fill(false);
        OK
    }

    fn clear(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        if kind == DISCARD && segments.iter().any(|(_, _, flags)| *flags != 0) {
            return UNSUPP;
        }
        let range =
            |(sector, sectors, _): &(u64, u32, u32)| Self::range(*sector, *sectors as usize * 512);
        let Some(ranges) = segments.iter().map(range).collect::<Option<Vec<_>>>() else {
            return IOERR;
        };
        for range in ranges {
            self.bytes[range.clone()].fill(0);
            self.undefined[range].fill(kind == DISCARD);
        }
        OK
    }

    fn assert_same(&self, at: usize, found: &[u8]) {
        for (index, byte) in found.iter().enumerate() {
            let index = at + index;
            assert!(self.undefined[index] || self.bytes[index] == *byte, "byte {index}");
        }
    }
}

fn run(engine: &str, actions: &[Action]) {
    let mut disk = Fixture::new(SIZE as u64, &format!(",aio={engine}"));
    let mut model = Model { bytes: vec![0; SIZE], undefined: vec![false; SIZE] };
    for action in actions {
        match action {
            Action::Write { sector, sectors, seed, cut } => {
                let data = pattern(sectors * 512, *seed);
                let (first, second) = data.split_at((*cut).min(data.len()));
                let parts = [Part::Readable(first), Part::Readable(second)];
                let outcome = disk.request(OUT, *sector, &parts);
                assert_eq!(outcome, Outcome { status: model.write(*sector, &data), written: 1 });
            }
            Action::Read { sector, sectors, cut } => {
                let len = sectors * 512;
                let cut = (*cut).min(len);
                let size = |len: usize| u32::try_from(len).unwrap();
                let (first, second) = (size(cut), size(len - cut));
                let parts = [Part::Writable(first), Part::Writable(second)];
                let sent = disk.send(0, IN, *sector, &parts);
                let outcome = disk.finish(0, &sent);
                let Some(range) = Model::range(*sector, len) else {
                    let written = u32::from(len == 0);
                    assert_eq!(outcome, Outcome { status: IOERR, written });
                    continue;
                };
                assert_eq!(outcome, Outcome { status: OK, written: size(len) + 1 });
                let mut found = disk.driver.bytes(sent.addresses[1], cut);
                found.extend(disk.driver.bytes(sent.addresses[2], len - cut));
                model.assert_same(range.start, &found);
            }
            Action::Clear { kind, segments } => {
                let bytes = segments
                    .iter()
                    .map(|(sector, sectors, flags)| segment(*sector, *sectors, *flags));
                let bytes = bytes.collect::<Vec<_>>().concat();
                let outcome = disk.request(*kind, 0, &[Part::Readable(&bytes)]);
                let status = model.clear(*kind, segments);
                assert_eq!(outcome, Outcome { status, written: 1 });
            }
            Action::Flush => assert_eq!(disk.request(FLUSH, 0, &[]), DONE),
            Action::Quiesce => disk.block.quiesce(),
            Action::Any { kind, sector, data, room } => {
                let sent =
                    disk.send(0, *kind, *sector, &[Part::Readable(data), Part::Writable(*room)]);
                let outcome = disk.finish(0, &sent);
                assert!(outcome.status <= UNSUPP && outcome.written <= room + 1);
                if *kind == OUT && outcome.status == OK {
                    assert_eq!(model.write(*sector, data), OK);
                }
                if *kind == DISCARD || *kind == WRITE_ZEROES {
                    // Whatever it hit may be anything now.
                    if outcome.status == OK {
                        model.undefined.fill(true);
                    }
                }
            }
        }
    }
    model.assert_same(0, &disk.stored(0, SIZE));
    assert_eq!(disk.file().metadata().unwrap().len(), SIZE as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_is_an_array_of_bytes_whatever_is_asked_of_it(
        actions in prop::collection::vec(action(), 1..60),
    ) {
        for engine in ENGINES {
            run(engine, &actions);
        }
    }
}
