use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

/// 4 KiB that are shared at 0, 4 KiB that only the client reaches behind them.
fn memory() -> DmaTable {
    let mut dma = DmaTable::new(8);
    let shared = memfd_create("shared", MemfdFlags::empty()).unwrap();
    ftruncate(&shared, 0x1000).unwrap();
    dma.map(Iova(0), 0x1000, DmaAccess::all(), Some((shared, 0))).unwrap();
    dma.map(Iova(0x1000), 0x1000, DmaAccess::all(), None).unwrap();
    dma
}

fn read(id: u64, address: u64, length: usize) -> Transfer {
    Transfer { id, address: Iova(address), payload: Payload::Read(length) }
}

fn message(step: Step) -> MemoryMessage {
    match step {
        Step::Message(message) => message,
        other => unreachable!("{other:?}"),
    }
}

fn done(step: Step) -> (u64, TransferResult) {
    match step {
        Step::Done(id, result) => (id, result),
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn shared_memory_is_moved_at_once() {
    let dma = memory();
    let mut transfers = Transfers::default();
    let payload = Payload::Write(b"hello".to_vec());
    transfers.begin(Transfer { id: 1, address: Iova(0x10), payload });
    transfers.begin(read(2, 0x10, 5));
    assert_eq!(done(transfers.step(&dma, true, None)), (1, Ok(Vec::new())));
    assert_eq!(done(transfers.step(&dma, true, None)), (2, Ok(b"hello".to_vec())));
    assert!(matches!(transfers.step(&dma, true, None), Step::Idle));
}

#[test]
fn other_memory_is_asked_for_in_parts_that_fit_and_in_order() {
    let dma = memory();
    dma.write(Iova(0xffe), b"ab").unwrap();
    let mut transfers = Transfers::default();
    transfers.begin(read(7, 0xffe, 8));
    transfers.begin(read(8, 0, 1));
    assert!(matches!(transfers.step(&dma, true, None), Step::Idle));
    assert!(transfers.is_stuck());
    let first = message(transfers.step(&dma, true, Some(4)));
    assert_eq!((first.address, &first.payload), (Iova(0x1000), &Payload::Read(4)));
    assert!(!transfers.is_stuck(), "it waits");
    assert!(matches!(transfers.step(&dma, true, Some(4)), Step::Idle), "one at a time");
    assert!(matches!(transfers.answered(&dma, first.ticket, Ok(b"cdef")), Step::Idle));
    let second = message(transfers.step(&dma, true, Some(4)));
    assert_eq!((second.address, &second.payload), (Iova(0x1004), &Payload::Read(2)));
    assert!(matches!(transfers.answered(&dma, second.ticket, Ok(b"gh")), Step::Idle));
    assert_eq!(done(transfers.step(&dma, true, None)), (7, Ok(b"abcdefgh".to_vec())));
    assert_eq!(done(transfers.step(&dma, true, None)).0, 8);
}

#[test]
fn answers_that_nobody_waits_for_any_more_are_ignored() {
    let dma = memory();
    let mut transfers = Transfers::default();
    transfers.begin(read(1, 0x1000, 4));
    let old = message(transfers.step(&dma, true, Some(4)));
    transfers.clear(&dma);
    transfers.begin(read(2, 0x1000, 4));
    let new = message(transfers.step(&dma, true, Some(4)));
    assert!(matches!(transfers.answered(&dma, old.ticket, Ok(b"olds")), Step::Idle));
    assert!(matches!(transfers.answered(&dma, new.ticket, Ok(b"news")), Step::Idle));
    assert!(matches!(transfers.answered(&dma, new.ticket, Ok(b"more")), Step::Idle));
    assert_eq!(done(transfers.step(&dma, true, None)), (2, Ok(b"news".to_vec())));
}

#[test]
fn a_refusal_and_a_range_that_is_not_mapped_end_the_transfer_alone() {
    let dma = memory();
    let mut transfers = Transfers::default();
    transfers.begin(read(1, 0x1000, 4));
    transfers.begin(read(2, 0x1ffe, 4));
    transfers.begin(read(3, 0, 4));
    let ticket = message(transfers.step(&dma, true, Some(4))).ticket;
    let error = DmaError::Unmapped(0x1000);
    assert_eq!(done(transfers.answered(&dma, ticket, Err(error.clone()))), (1, Err(error)));
    // The whole range is looked at first.
    assert_eq!(done(transfers.step(&dma, true, Some(4))), (2, Err(DmaError::Unmapped(0x2000))));
    assert_eq!(done(transfers.step(&dma, true, None)), (3, Ok(vec![0; 4])));
}

#[test]
fn without_bus_mastering_nothing_moves_and_nobody_is_asked() {
    let dma = memory();
    let mut transfers = Transfers::default();
    transfers.begin(read(1, 0x1000, 8));
    let ticket = message(transfers.step(&dma, true, Some(4))).ticket;
    assert!(matches!(transfers.answered(&dma, ticket, Ok(b"part")), Step::Idle));
    let stopped = (1, Err(DmaError::BusMasterDisabled));
    assert_eq!(done(transfers.step(&dma, false, Some(4))), stopped);
}

#[test]
fn losing_bus_mastering_ends_a_transfer_that_waits_and_its_answer_is_ignored() {
    let dma = memory();
    let mut transfers = Transfers::default();
    transfers.begin(read(1, 0x1000, 4));
    let ticket = message(transfers.step(&dma, true, Some(4))).ticket;
    let stopped = (1, Err(DmaError::BusMasterDisabled));
    assert_eq!(done(transfers.step(&dma, false, None)), stopped);
    assert!(matches!(transfers.answered(&dma, ticket, Ok(b"late")), Step::Idle));
    assert!(transfers.is_empty());
}

#[test]
fn a_write_that_was_sent_and_given_up_is_dirty() {
    let give_up: [fn(&mut Transfers, &DmaTable); 2] = [
        |transfers, dma| transfers.clear(dma),
        |transfers, dma| _ = done(transfers.step(dma, false, None)),
    ];
    for give_up in give_up {
        let mut dma = memory();
        assert_eq!(dma.start_logging(&[], 0x1000), Ok(0x1000));
        let mut transfers = Transfers::default();
        let payload = Payload::Write(b"sent".to_vec());
        transfers.begin(Transfer { id: 1, address: Iova(0x1800), payload });
        let _sent = message(transfers.step(&dma, true, Some(4)));
        give_up(&mut transfers, &dma);
        let mut bitmap = [0; 8];
        dma.report(Iova(0), 0x2000, 0x1000, &mut bitmap).unwrap();
        assert_eq!(bitmap[0], 0b10);
    }
}

#[test]
fn a_client_that_takes_nothing_at_once_is_not_asked() {
    let dma = memory();
    let mut transfers = Transfers::default();
    transfers.begin(read(1, 0x1000, 4));
    let refused = (1, Err(DmaError::NotShared(0x1000)));
    assert_eq!(done(transfers.step(&dma, true, Some(0))), refused);
}
