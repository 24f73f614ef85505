use std::cell::Cell;
use std::sync::Arc;
use std::thread;

use proptest::prelude::*;

use super::*;

const PAGE: usize = LENGTH / size_of::<AtomicU64>();

fn zeros() -> Vec<AtomicU64> {
    (0..PAGE).map(|_| AtomicU64::new(0)).collect()
}

/// As another process sees it that has mapped the same memory.
#[derive(Clone, Debug)]
struct Mapped(Arc<[AtomicU64]>);

impl AsRef<[AtomicU64]> for Mapped {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn mapped() -> Mapped {
    Mapped(zeros().into())
}

fn memory(address: u64, decodes: bool) -> Bar {
    Bar { address, size: 0x1000, space: Space::Memory, decodes }
}

/// A state all of whose words say which it is.
fn state(number: u64) -> DecodeState {
    let bar = |index: u64| {
        let space = if index % 2 == 1 { Space::Io } else { Space::Memory };
        let size = number + index + 1;
        Some(Bar { address: number << 8 | index, size, space, decodes: number.is_multiple_of(2) })
    };
    let bars = [bar(0), bar(1), None, bar(3), bar(4), bar(5)];
    DecodeState { epoch: number, bars }
}

fn bars(shown: &Shown) -> [Option<Bar>; BARS] {
    shown.bars.map(|shown| shown.map(|shown| shown.bar))
}

#[test]
fn what_is_shown_is_read() {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    assert!(DecodeReader::new(page.clone()).is_none(), "nothing is shown yet");
    writer.show(&state(7), || ());
    let reader = DecodeReader::new(page).unwrap();
    for number in [7, 8, 9] {
        let before = reader.sequence().unwrap();
        writer.show(&state(number), || ());
        let shown = reader.read().unwrap();
        assert_eq!((shown.epoch, bars(&shown)), (number, state(number).bars));
        for (index, bar) in shown.bars.into_iter().enumerate() {
            assert_eq!(reader.bar(index), Some(bar));
        }
        assert_eq!(reader.sequence() == Some(before), number == 7, "one state is written once");
    }
    assert_eq!(reader.bar(BARS), Some(None));
}

/// Others code against these words.
#[test]
fn the_layout_is_as_documented() {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    let io = Bar { address: 0xe0, size: 0x20, space: Space::Io, decodes: true };
    let bars = [Some(memory(0x1000, true)), None, Some(io), None, None, Some(memory(0, false))];
    writer.show(&DecodeState { epoch: 9, bars }, || ());
    writer.count(Counters { reads_ur: 4, writes_dropped: 5, memory_faults: 6 });
    let words: Vec<u64> = page.0.iter().map(|word| word.load(Ordering::Relaxed)).collect();
    let magic = u64::from_ne_bytes(*b"bkdecode");
    assert_eq!(words[..8], [magic, 4096 << 32 | 1, 2, 9, 4, 5, 6, 0]);
    assert_eq!(words[8..12], [1, 0x1000, 0x1000, 0x1000]);
    assert_eq!(words[12..16], [0; 4]);
    assert_eq!(words[16..20], [3, 0xe0, 0x20, 0xe0]);
    assert_eq!(words[28..32], [0, 0, 0x1000, 0]);
    assert_eq!(words[32..], [0; PAGE - 32]);
}

#[test]
fn the_page_keeps_the_address_at_which_a_bar_decoded_last() {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    let mut show = |address, decodes| {
        let mut state = DecodeState::default();
        state.bars[2] = Some(memory(address, decodes));
        writer.show(&state, || ());
        DecodeReader::new(page.clone()).unwrap().bar(2).unwrap().unwrap().decoded_at
    };
    assert_eq!(show(0x1000, false), None);
    assert_eq!(show(0x2000, true), Some(0x2000));
    assert_eq!(show(0x2000, false), Some(0x2000));
    // Sizing, and then another place.
    assert_eq!(show(0xffff_f000, false), Some(0x2000));
    assert_eq!(show(0x5000, false), Some(0x2000));
    assert_eq!(show(0x5000, true), Some(0x5000));
    // Whoever goes on knows it too.
    let mut successor = DecodeWriter::new(page.clone()).unwrap();
    let mut state = DecodeState::default();
    state.bars[2] = Some(memory(0x7000, false));
    successor.show(&state, || ());
    let shown = DecodeReader::new(page).unwrap().bar(2).unwrap().unwrap();
    assert_eq!((shown.bar.address, shown.decoded_at), (0x7000, Some(0x5000)));
}

#[test]
fn a_page_that_was_suspended_shows_nothing_until_it_is_written_again() {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    writer.show(&state(1), || ());
    let reader = DecodeReader::new(page.clone()).unwrap();
    let before = reader.sequence().unwrap();
    for _ in 0..2 {
        writer.suspend();
        assert_eq!((reader.read(), reader.sequence()), (None, None));
        writer.show(&state(1), || ());
        assert_eq!(reader.read().unwrap().epoch, 1);
    }
    assert_eq!(reader.sequence(), Some(before + 4));
}

#[test]
fn counting_disturbs_no_reader() {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    writer.show(&state(1), || ());
    let reader = DecodeReader::new(page).unwrap();
    let before = reader.sequence();
    let counters = Counters { reads_ur: 1, writes_dropped: 2, memory_faults: 3 };
    writer.count(counters);
    assert_eq!((reader.counters(), reader.sequence()), (counters, before));
}

/// Copies what a reader would find if the writer stopped before its `stop`-th store.
fn stopped_before(stop: usize, from: &DecodeState, to: &DecodeState) -> Option<Mapped> {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    writer.show(from, || ());
    let (stores, left) = (Cell::new(0), Cell::new(None));
    writer.show(to, || {
        if stores.get() == stop {
            let words = page.0.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed)));
            left.set(Some(Mapped(words.collect())));
        }
        stores.set(stores.get() + 1);
    });
    left.into_inner()
}

#[test]
fn a_writer_that_dies_in_the_middle_shows_nothing_and_its_successor_ends_that() {
    let mut stop = 0;
    while let Some(page) = stopped_before(stop, &state(4), &state(5)) {
        let reader = DecodeReader::new(page.clone()).unwrap();
        if stop == 0 {
            assert_eq!(reader.read().unwrap().epoch, 4);
        } else {
            assert_eq!((reader.read(), reader.bar(0), reader.sequence()), (None, None, None));
        }
        // One that finds the state in which the dead one began, or the one that it wanted.
        for number in [4, 5] {
            let mut successor = DecodeWriter::new(page.clone()).unwrap();
            let before = page.0[at::SEQUENCE].load(Ordering::Relaxed);
            let mut first = true;
            successor.show(&state(number), || {
                assert!(std::mem::take(&mut first) || reader.read().is_none(), "{stop}");
            });
            assert_eq!(bars(&reader.read().unwrap()), state(number).bars, "{stop}");
            assert!(reader.sequence().unwrap() > before, "{stop}: a reader may have begun before");
        }
        stop += 1;
    }
    assert_eq!(stop, 29, "all stores of a write");
}

#[test]
fn nobody_reads_a_state_that_was_never_shown() {
    let page = mapped();
    let mut writer = DecodeWriter::new(page.clone()).unwrap();
    writer.show(&state(0), || ());
    let reader = DecodeReader::new(page).unwrap();
    let check = |shown: &Shown| {
        assert_eq!(bars(shown), state(shown.epoch).bars, "torn");
        for shown in shown.bars.iter().flatten() {
            let decoded_at =
                if shown.bar.decodes { shown.bar.address } else { shown.bar.address - 0x100 };
            assert_eq!(shown.decoded_at.unwrap_or(0), decoded_at, "torn");
        }
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let reader = reader.clone();
                scope.spawn(move || {
                    let (mut last, mut seen) = (0, 0);
                    // Until the last one, which is shown for ever.
                    while last < 20_000 {
                        let Some(shown) = reader.read() else { continue };
                        check(&shown);
                        assert!(shown.epoch >= last, "what was replaced does not come back");
                        if let Some(Some(bar)) = reader.bar(0) {
                            let number = bar.bar.address >> 8;
                            assert_eq!(Some(bar.bar), state(number).bars[0], "torn");
                            assert!(number >= shown.epoch);
                        }
                        seen += u64::from(shown.epoch != last);
                        last = shown.epoch;
                    }
                    seen
                })
            })
            .collect();
        for number in 1..=20_000 {
            writer.show(&state(number), || ());
        }
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
}

#[test]
fn something_else_than_a_page_is_refused() {
    let mut page = zeros();
    DecodeWriter::new(page.as_slice()).unwrap().show(&state(1), || ());
    assert!(DecodeReader::new(page.as_slice()).is_some());
    assert!(DecodeReader::new(&page[..PAGE - 1]).is_none());
    assert!(DecodeWriter::new(&page[..PAGE - 1]).is_none());
    *page[at::VERSION].get_mut() += 1;
    assert!(DecodeReader::new(page.as_slice()).is_none());
    *page[at::VERSION].get_mut() -= 1;
    *page[at::MAGIC].get_mut() += 1;
    assert!(DecodeReader::new(page.as_slice()).is_none());
}

proptest! {
    /// The writer may be hostile.
    #[test]
    fn any_words_can_be_read_and_written_over(words in prop::collection::vec(
        prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(MAGIC), any::<u64>()], WORDS,
    )) {
        let page = zeros();
        page.iter().zip(words).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        page[at::MAGIC].store(MAGIC, Ordering::Relaxed);
        page[at::VERSION].store(VERSION, Ordering::Relaxed);
        let reader = DecodeReader::new(page.as_slice()).unwrap();
        let odd = page[at::SEQUENCE].load(Ordering::Relaxed) % 2 == 1;
        prop_assert_eq!(reader.read().is_none(), odd);
        let _ = (reader.counters(), reader.sequence(), reader.bar(3));
        let mut writer = DecodeWriter::new(page.as_slice()).unwrap();
        writer.show(&state(2), || ());
        prop_assert_eq!(bars(&reader.read().unwrap()), state(2).bars);
    }
}
