//! What a client sees on its decode page when servers die.

use std::sync::atomic::AtomicU64;

use barkeep_protocol::page::decode::{DecodeReader, LENGTH, Shown};
use barkeep_protocol::wire::{DecodePageQuery, Errno};
use rustix::fs::{SealFlags, fcntl_get_seals};

use super::talk::Talk;
use super::*;
use crate::server::recorded::recorder::PAGE_KEY;
use crate::server::recorded::saved_session::SavedSession;

fn ask_page() -> Step {
    Step::new(Command::DecodePage, DecodePageQuery.to_bytes())
}

fn command(value: u16) -> Step {
    write(CONFIG, COMMAND, &value.to_le_bytes())
}

fn place(address: u32) -> Step {
    write(CONFIG, 0x10, &address.to_le_bytes())
}

/// What the page shows; nothing while a write is not complete.
fn shown(page: &OwnedFd) -> Option<Shown> {
    let mut bytes = vec![0; LENGTH];
    assert_eq!(rustix::io::pread(page, &mut bytes, 0), Ok(LENGTH));
    let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
    let words: Vec<AtomicU64> = words.map(AtomicU64::new).collect();
    DecodeReader::new(words.as_slice()).unwrap().read()
}

/// Address of BAR 0, whether it decodes, and where it did last.
type Bar0 = (u64, bool, Option<u64>);

fn bar0(page: &OwnedFd) -> Option<Bar0> {
    let bar = shown(page)?.bars[0].expect("edu has BAR 0");
    Some((bar.bar.address, bar.bar.decodes, bar.decoded_at))
}

/// With what the page shows once each of them is answered.
fn script() -> Vec<(Step, Option<Bar0>)> {
    const AT: Option<u64> = Some(0xfea0_0000);
    const NEXT: Option<u64> = Some(0xfeb0_0000);
    vec![
        (version(Offer::empty()), None),
        (place(0xfea0_0000), None),
        (ask_page(), Some((0xfea0_0000, false, None))),
        (command(2), Some((0xfea0_0000, true, AT))),
        (read(BAR0, 0, 4), Some((0xfea0_0000, true, AT))),
        (command(0), Some((0xfea0_0000, false, AT))),
        (read(BAR0, 0, 4), Some((0xfea0_0000, false, AT))),
        (place(u32::MAX), Some((0xfff0_0000, false, AT))),
        (place(0xfeb0_0000), Some((0xfeb0_0000, false, AT))),
        (command(6), Some((0xfeb0_0000, true, NEXT))),
        (ask_page(), Some((0xfeb0_0000, true, NEXT))),
        (Step::new(Command::Reset, Vec::new()), Some((0, false, NEXT))),
    ]
}

/// Kills servers at these crash points. Returns how many each of them passed.
fn play(kills: &[u64]) -> Vec<u64> {
    let (steps, expected): (Vec<_>, Vec<_>) = script().into_iter().unzip();
    let (mut lab, socket) = Lab::new(edu);
    let mut client = Client::new(socket, steps, UNSHARED, SIZE);
    let mut points = Vec::new();
    let epoch = |page: &OwnedFd| Some(shown(page)?.epoch);
    for kill in kills.iter().copied().chain([u64::MAX]) {
        let before = client.fd().and_then(epoch);
        let run = || {
            lab.start();
            if let (Some(before), Some(page)) = (before, client.fd()) {
                assert!(epoch(page) >= Some(before), "what was shown is undone, {kills:?}");
            }
            lab.run_until(|| {
                let status = client.step();
                // A server has the word again, so the page is whole, whoever died before.
                if let Some(page) = client.fd() {
                    let bar = bar0(page).expect("a whole page");
                    if let Some(answered) = client.answered() {
                        let last = answered - 1;
                        assert_eq!(Some(bar), expected[last], "after reply {last}, {kills:?}");
                    }
                }
                status
            });
        };
        let survived = killed_at(kill, run).is_ok();
        points.push(passed());
        if survived {
            break;
        }
        lab.bury();
    }
    lab.expect_no_litter();
    points
}

#[test]
fn the_page_is_true_with_each_reply_whenever_servers_die() {
    let points = play(&[])[0];
    assert!(points > 300, "{points}");
    for point in 1..=points {
        play(&[point]);
    }
}

#[test]
fn the_page_is_true_whatever_happens_to_the_successor() {
    let points = play(&[])[0];
    for first in (1..=points).step_by(23) {
        for second in (1..=play(&[first])[1]).step_by(31) {
            play(&[first, second]);
        }
    }
}

fn with_page() -> (Talk, OwnedFd) {
    let mut talk = Talk::begin(edu);
    let _ = talk.expect(ask_page());
    let page = talk.client.fd().unwrap().try_clone().unwrap();
    (talk, page)
}

#[test]
fn a_page_that_somebody_else_goes_on_with_can_be_neither_cut_nor_grown() {
    let (talk, page) = with_page();
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    assert_eq!(fcntl_get_seals(&page), Ok(seals));
    assert!(talk.lab.held().contains(&PAGE_KEY));
}

/// A successor of a version without pages would leave it as it is.
#[test]
fn while_a_server_hands_over_nothing_is_known() {
    let (mut talk, page) = with_page();
    assert!(bar0(&page).unwrap().1);
    talk.lab.port().drain();
    assert_eq!(bar0(&page), None);
    talk.restart();
    assert!(bar0(&page).unwrap().1);
}

#[test]
fn a_session_that_ends_leaves_a_page_on_which_nothing_decodes() {
    let (mut talk, page) = with_page();
    assert!(bar0(&page).unwrap().1);
    talk.client.leave();
    talk.lab.round();
    assert!(!bar0(&page).unwrap().1);
    assert_eq!(talk.lab.held(), []);
    // The next client has one of its own, of which this one sees nothing.
    let socket = talk.lab.accept(false);
    talk.client = Client::new(socket, Vec::new(), UNSHARED, SIZE);
    let _ = talk.expect(version(Offer::empty()));
    let _ = talk.expect(command(2));
    let _ = talk.expect(ask_page());
    assert!(bar0(talk.client.fd().unwrap()).unwrap().1);
    assert!(!bar0(&page).unwrap().1);
}

#[test]
fn a_successor_gives_back_what_was_held_before_it() {
    let (mut talk, page) = with_page();
    talk.restart();
    talk.client.leave();
    talk.lab.round();
    talk.lab.round();
    assert_eq!((talk.lab.held(), bar0(&page).unwrap().1), (vec![], false));
}

#[test]
fn a_page_of_a_session_that_is_lost_shows_that_too() {
    for stop in [false, true] {
        let (mut talk, page) = with_page();
        if stop {
            talk.lab.port().stop();
        } else {
            talk.lab.bury();
            talk.lab.rename("another");
            talk.lab.start();
        }
        assert!(talk.client.is_hung_up());
        assert!(!bar0(&page).unwrap().1, "{stop}");
        assert_eq!(talk.lab.held(), []);
    }
}

#[test]
fn without_the_page_that_the_client_has_the_session_is_over() {
    let (mut talk, _page) = with_page();
    talk.lab.lose_held();
    talk.restart();
    talk.expect_end();
}

#[test]
fn a_page_that_cant_be_held_is_refused() {
    let mut talk = Talk::begin(edu);
    talk.lab.hold_no_more();
    assert_eq!(talk.ask(ask_page()).0, Err(Errno::MFILE));
    let _ = talk.expect(command(2));
}

/// Postcard knows no versions: an earlier program stops reading where its own fields end.
#[test]
fn sessions_of_the_version_before_pages_are_understood() {
    let now = SavedSession::parse(&[1, 1, 1, 0x80, 0x80, 0x40, 16, 0, 0, 0, 0, 0, 1, 1]).unwrap();
    assert!(now.has_page());
    let before = SavedSession::parse(&[1, 1, 1, 0x80, 0x80, 0x40, 16, 0, 0, 0, 0, 0]).unwrap();
    assert!(!before.has_page());
    let bytes = postcard::to_allocvec(&now).unwrap();
    assert_eq!(bytes, [1, 1, 1, 0x80, 0x80, 0x40, 16, 0, 0, 0, 0, 0, 1, 1]);
    assert!(SavedSession::parse(&bytes[..13]).is_none() && SavedSession::parse(&[9]).is_none());
}
