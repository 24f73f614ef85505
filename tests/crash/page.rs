//! Decode pages that are in use while their workers are killed.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

use barkeep_tests::figure;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::decode_page::{DecodePage, LENGTH};
use barkeep_tests::peer::requests::{CONFIG, pci};
use barkeep_tests::supervised::Supervised;

use crate::kills::{Lives, number_of_kills, while_killed};
use crate::random::Random;

fn place(peer: &mut Peer, number: u64) {
    let address = u32::try_from(number % 0xfff).unwrap() + 1;
    peer.write_u32(CONFIG, pci::BAR0, address << 20);
}

fn number(address: u64) -> u64 {
    (address >> 20) - 1
}

/// With each reply the page is true, and at no moment does it show what never was.
#[test]
fn a_page_is_true_while_workers_are_killed_at_random_instants() {
    let mut random = Random::new();
    let run = Supervised::start(&["edu"]);
    let mut peer = Peer::greeted(run.socket(0));
    let page = peer.decode_page();
    let rounds = AtomicU64::new(0);
    let enough = AtomicU64::new(0);
    place(&mut peer, 0);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let (recovery, incomplete) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut incomplete = 0_u64;
            while enough.load(Ordering::Relaxed) == 0 {
                let floor = rounds.load(Ordering::Acquire);
                let Some(shown) = page.shown() else {
                    incomplete += 1;
                    continue;
                };
                let ceiling = rounds.load(Ordering::Acquire) + 1;
                let bar = shown.bars[0].unwrap();
                assert!(bar.decodes && bar.address == bar.decoded_at, "torn: {shown:?}");
                let moved = (number(bar.address) + 0xfff - floor % 0xfff) % 0xfff;
                assert!(moved <= ceiling - floor, "{floor} to {ceiling}: {shown:?}");
            }
            incomplete
        });
        let recovery = while_killed(
            &run,
            0,
            (number_of_kills() / 4, Lives::Short),
            &mut random,
            || rounds.load(Ordering::Relaxed),
            || {
                let next = rounds.load(Ordering::Relaxed) + 1;
                place(&mut peer, next);
                let bar = page.bar(0);
                assert_eq!(number(bar.address), next % 0xfff, "as it was answered");
                assert!(bar.decodes && bar.decoded_at == bar.address);
                rounds.store(next, Ordering::Release);
            },
        );
        enough.store(1, Ordering::Relaxed);
        (recovery, reader.join().unwrap())
    });
    let rounds = rounds.into_inner();
    figure(&format_args!(
        "decode page: {rounds} moves, {} kills, {incomplete} incomplete looks",
        recovery.kills()
    ));
}

/// Whoever may write to any memory of the server's user writes to this as well. It is read by nobody else,
/// so that it costs that client what it sees, and is as it should be with the next change.
#[test]
fn a_page_that_its_client_has_spoiled_costs_nobody_else_anything() {
    let run = Supervised::start(&["edu"]);
    let mut peer = Peer::greeted(run.socket(0));
    let page = peer.decode_page();
    place(&mut peer, 1);
    let path = format!("/proc/self/fd/{}", page.file.as_raw_fd());
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let spoiled = File::options().read(true).write(true).open(&path).unwrap();
    for garbage in [0xff, 0x01, 0x00] {
        spoiled.write_all_at(&vec![garbage; usize::try_from(LENGTH).unwrap()], 0).unwrap();
        run.worker(0).kill();
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
        assert!(page.bar(0).decodes && number(page.bar(0).address) == 1);
        peer.set_config_u16(pci::COMMAND, 0);
        assert_eq!((page.bar(0).decodes, peer.config_u16(0)), (false, 0x1234));
    }
    // It can't be cut, whoever has it, so the server never trips over its end.
    assert!(spoiled.set_len(0).is_err() && spoiled.set_len(2 * LENGTH).is_err());
}

#[test]
fn a_page_outlives_workers_that_are_told_to_end() {
    let run = Supervised::start(&["edu"]);
    let mut peer = Peer::greeted(run.socket(0));
    let page = peer.decode_page();
    for round in 1..5 {
        place(&mut peer, round);
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
        let worker = run.worker(0);
        worker.signal(rustix::process::Signal::TERM);
        assert_eq!(peer.config_u16(pci::COMMAND), pci::MEMORY_SPACE);
        assert!(worker.ends(), "it was told to");
        // Asked of the successor, so that it has come to serve.
        assert_eq!(peer.config_u16(pci::COMMAND), pci::MEMORY_SPACE);
        let bar = page.bar(0);
        assert!(bar.decodes && number(bar.address) == round);
        let again: DecodePage = peer.decode_page();
        assert_eq!(again.shown(), page.shown());
    }
    let held = run.descriptors();
    drop(peer);
    run.until("the end of what was held", || (run.descriptors() < held).then_some(()));
    let next = Peer::greeted(run.socket(0)).decode_page();
    assert!(!page.bar(0).decodes && !next.bar(0).decodes);
}
