//! Another backend takes the place of one that has gone.

use std::time::Duration;

use super::*;
use crate::client::DeadBackend;

/// So long that a test which waits for it does not end.
const NEVER: Duration = Duration::from_secs(3600);

impl Board {
    /// Its function decodes, and accesses wait for a backend that has gone.
    fn waiting() -> Board {
        let board = Board::new(true);
        let mut frontend = Frontend::new(board.slots.clone() as _, vec![(0, 0x1000)], SlotId(0));
        let (peer, order) = (Arc::clone(&board.peer), SuspendOrder::SlotsFirst);
        frontend.attach_backend_with(peer, order, DeadBackend::Stall(NEVER)).unwrap();
        frontend.config_write(0, BAR0, &0x8000_0000_u32.to_le_bytes());
        let board = Board { frontend, ..board };
        board.command(2);
        board
    }

    /// A backend like the one at the start, that has kept its registers and nothing else.
    fn successor(&self) -> Arc<Peer> {
        Arc::new(Peer {
            barkeep: self.peer.barkeep,
            config: Mutex::new(*self.peer.config.lock().unwrap()),
            file: memory(MemfdFlags::ALLOW_SEALING),
            doorbells: self.peer.doorbells.clone(),
            told: Arc::clone(&self.peer.told),
            insists: AtomicBool::new(false),
            life: Mutex::default(),
        })
    }

    fn end(&self) {
        *self.peer.life.lock().unwrap() = Life::Over { writes: 0 };
        self.frontend.session_ended(0);
    }
}

#[test]
fn a_write_whose_answer_was_lost_completes_at_once_and_is_not_done_again() {
    let board = Board::waiting();
    *board.peer.life.lock().unwrap() = Life::OneWrite;
    board.forward_write(0x4000);
    assert_eq!(*board.peer.life.lock().unwrap(), Life::Over { writes: 1 });
    assert_eq!(board.mapped(), 0, "its memory is gone with it");
    let next = board.successor();
    *next.life.lock().unwrap() = Life::OneWrite;
    board.frontend.resume(0, Arc::clone(&next)).unwrap();
    assert_eq!(*next.life.lock().unwrap(), Life::OneWrite, "nobody wrote");
    let outages = board.function().outages();
    assert_eq!((outages.gone, outages.unsupported_requests, outages.resumed), (1, 1, 0));
}

#[test]
fn a_write_that_was_not_sent_waits_and_is_done_once() {
    let board = Board::waiting();
    *board.peer.life.lock().unwrap() = Life::Over { writes: 0 };
    let next = board.successor();
    *next.life.lock().unwrap() = Life::OneWrite;
    std::thread::scope(|scope| {
        scope.spawn(|| board.forward_write(0x4000));
        while board.function().outages().gone == 0 {
            std::thread::yield_now();
        }
        board.frontend.resume(0, Arc::clone(&next)).unwrap();
    });
    assert_eq!(*next.life.lock().unwrap(), Life::Over { writes: 1 });
    assert_eq!(*board.peer.life.lock().unwrap(), Life::Over { writes: 0 });
}

#[test]
fn nobody_waits_any_more_when_the_vmm_says_so() {
    let board = Board::waiting();
    *board.peer.life.lock().unwrap() = Life::Over { writes: 0 };
    std::thread::scope(|scope| {
        scope.spawn(|| board.forward_write(0x4000));
        board.function().stop_waiting();
    });
    board.forward_write(0x4000);
    assert_eq!(board.function().outages().unsupported_requests, 2);
}

#[test]
fn doorbells_and_memory_of_the_next_session_take_the_places_of_the_last_ones() {
    let file = memory(MemfdFlags::ALLOW_SEALING);
    let board = Board::with(file, doorbells(), true, SuspendOrder::SlotsFirst);
    board.command(2);
    assert_eq!(board.touch(0, true), Met::Memory);
    let told = || std::mem::take(&mut *board.peer.told.lock().unwrap());
    let connected = told().into_iter().filter(|told| matches!(told, Told::Connect(_)));
    let connected: Vec<_> = connected.collect();
    board.end();
    assert_eq!((board.mapped(), told().len()), (0, connected.len()), "all are taken away");
    board.frontend.resume(0, board.successor()).unwrap();
    assert_eq!((board.mapped(), told()), (2, connected));
    let slots = board.slots.mapped.lock().unwrap();
    let first = slots.values().find(|mapping| mapping.guest == GuestAddress(BAR)).unwrap();
    assert_eq!(first.memory.load_u32(0).unwrap(), 0, "not the memory that was written to");
}

#[test]
fn a_slot_that_is_stuck_keeps_the_next_session_waiting() {
    let board = Board::decoding(true);
    *board.slots.stuck.lock().unwrap() = Some(SlotId(1));
    board.end();
    assert_eq!(board.touch(0x5000, false), Met::Fault, "its memory refuses");
    let result = board.frontend.resume(0, board.successor());
    assert!(matches!(result, Err(ReconnectError::Slots)), "{result:?}");
    *board.slots.stuck.lock().unwrap() = None;
    board.frontend.resume(0, board.successor()).unwrap();
    assert_eq!((board.mapped(), board.touch(0x5000, false)), (2, Met::Memory));
}
