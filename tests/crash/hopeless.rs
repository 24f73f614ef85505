//! Requests that kill whoever serves them: three workers die, then the request is answered without
//! the device, and everything else goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barkeep_tests::edu::at;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, command, message};
use barkeep_tests::peer::requests::{CONFIG, access, pci, write};
use barkeep_tests::supervised::{Launch, Supervised};
use barkeep_tests::{binary, skip};

use crate::sessions::crash;

/// A worker that has had the processor for so long is done with everything but a loop without end.
const LONG_AT_IT: Duration = Duration::from_millis(200);
/// Three workers are stopped by the watchdog meanwhile.
const PATIENCE: Duration = Duration::from_secs(60);

/// A function with registers that nobody survives, and an edu beside it.
fn start() -> Option<Supervised> {
    let Some(binary) = binary::with_failpoints() else {
        skip(&"BARKEEP_FAILPOINTS_BIN names no barkeep with a device that crashes");
        return None;
    };
    let arguments = vec!["--watchdog".into(), "1".into()];
    let launch = Launch { binary: Some(binary), arguments, ..Launch::default() };
    let directory = tempfile::tempdir().unwrap();
    Some(Supervised::start_in(directory, &["test-crash", "edu"], &launch))
}

fn client(run: &Supervised, function: usize) -> Peer {
    let mut peer = Peer::greeted(run.socket(function));
    peer.wait_for(PATIENCE);
    peer.write_u32(CONFIG, pci::BAR0, 0xfe00_0000);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    peer
}

/// Does something to the function that crashes while the other one is in use all the time, by one
/// and the same worker.
fn beside_another(run: &Supervised, mut disturb: impl FnMut(&mut Peer)) {
    let (mut peer, mut other) = (client(run, 0), client(run, 1));
    let worker = run.worker(1);
    let over = AtomicBool::new(false);
    peer.write_u32(0, crash::REGISTER, 0x1234_5678);
    std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            let mut value = 0_u32;
            while !over.load(Ordering::Relaxed) {
                value += 1;
                other.write_u32(0, at::LIVENESS, value);
                assert_eq!(other.read_u32(0, at::LIVENESS), !value);
            }
            value
        });
        let stop = Stop(&over);
        disturb(&mut peer);
        drop(stop);
        assert!(user.join().unwrap() > 0);
    });
    assert_eq!(peer.read_u32(0, crash::REGISTER), 0x1234_5678, "the rest of the function goes on");
    assert_eq!(run.worker(1).pid, worker.pid, "the other function's worker noticed nothing");
}

/// Checks how many workers of the function that crashes have died: of what is answered by now.
fn assert_deaths(run: &Supervised, expected: usize) {
    let deaths = || run.logged(&["test-crash", "restarting"]);
    run.until("the log of deaths", || (deaths() >= expected).then_some(()));
    assert_eq!(deaths(), expected, "{}", run.log());
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_read_that_nobody_survives_reads_all_ones_after_three_deaths() {
    for register in [crash::PANIC, crash::ABORT] {
        let Some(run) = start() else { return };
        beside_another(&run, |peer| assert_eq!(peer.read_u32(0, register), u32::MAX));
        assert_deaths(&run, 3);
    }
}

#[test]
fn each_hopeless_request_is_given_up_for_itself() {
    let Some(run) = start() else { return };
    beside_another(&run, |peer| {
        for _ in 0..3 {
            assert_eq!(peer.read_u32(0, crash::PANIC), u32::MAX);
        }
    });
}

#[test]
fn a_write_that_never_ends_is_dropped_after_three_deaths() {
    let Some(run) = start() else { return };
    beside_another(&run, |peer| peer.write_u32(0, crash::LOOP, 1));
    assert_deaths(&run, 3);
}

/// An operator, or the kernel that is short of memory, may kill whoever serves a request: that says
/// nothing about the request.
#[test]
fn kills_from_outside_are_not_held_against_a_request() {
    let Some(run) = start() else { return };
    let mut peer = client(&run, 0);
    let id = peer.take_id();
    let request = message(id, command::REGION_WRITE, COMMAND, &write(0, crash::LOOP, &[1; 4]));
    peer.send(&request);
    for _ in 0..5 {
        let worker = run.worker(0);
        run.until("a worker that is at it", || worker.has_worked(LONG_AT_IT).then_some(()));
        worker.kill();
    }
    let worker = run.worker(0);
    run.until("the next one", || worker.has_worked(LONG_AT_IT).then_some(()));
    assert!(peer.hears_nothing(), "it was given up");
    // The watchdog's kills are held against it.
    let _ = peer.reply_to(id, command::REGION_WRITE).success();
}

#[test]
fn a_request_that_stops_its_process_is_answered_after_three_deaths() {
    let Some(run) = start() else { return };
    beside_another(&run, |peer| assert_eq!(peer.read_u32(0, crash::STOP), u32::MAX));
    assert_deaths(&run, 3);
}

#[test]
fn requests_before_and_behind_a_hopeless_one_are_served_in_order() {
    let Some(run) = start() else { return };
    let mut peer = client(&run, 0);
    let count = |peer: &mut Peer| {
        let id = peer.take_id();
        (id, message(id, command::REGION_WRITE, COMMAND, &write(0, crash::COUNT, &[1; 4])))
    };
    let mut bytes = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let (id, request) = count(&mut peer);
        ids.push((id, command::REGION_WRITE));
        bytes.extend(request);
        let id = peer.take_id();
        ids.push((id, command::REGION_READ));
        bytes.extend(message(id, command::REGION_READ, COMMAND, &access(0, crash::PANIC, 4)));
    }
    peer.send(&bytes);
    for (id, command) in ids {
        let body = peer.reply_to(id, command).success();
        if command == command::REGION_READ {
            assert_eq!(body[16..], [0xff; 4]);
        }
    }
    assert!(peer.hears_nothing());
    assert_eq!(peer.read_u32(0, crash::COUNT), 3, "each of the others is done once");
}
