//! virtio-console (5.3).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use barkeep_tests::virtio::{DATA, Driver, Part, Setup};

use crate::sidecar::{Sidecar, drive};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Behind what [`Driver::transmit`] uses.
const INPUT: u64 = DATA + (1 << 20);

fn start() -> (Sidecar, Driver, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.sock");
    let device = format!("virtio-console,socket={}", path.display());
    let sidecar = Sidecar::start_in(directory, &device);
    let driver = drive(&sidecar, Setup { queues: 2, ..Setup::default() });
    (sidecar, driver, path)
}

/// A terminal; what takes so long is lost.
fn connect(path: &Path) -> UnixStream {
    let terminal = UnixStream::connect(path).unwrap();
    terminal.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    terminal.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    terminal
}

/// Receives so many bytes, with one buffer at a time.
fn receive(driver: &mut Driver, length: usize) -> Vec<u8> {
    let mut received = Vec::new();
    while received.len() < length {
        driver.send(RECEIVE, &[Part::Write(INPUT, 100)]);
        let len = driver.next_used(RECEIVE).len as usize;
        assert!((1..=100).contains(&len));
        received.extend(driver.memory.data.bytes(INPUT, len));
    }
    received
}

#[test]
fn what_one_side_says_the_other_one_hears() {
    let (_sidecar, mut driver, path) = start();
    let mut terminal = connect(&path);
    driver.transmit(TRANSMIT, &[b"login: "]);
    let mut prompt = [0; 7];
    terminal.read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"login: ");
    terminal.write_all(b"root\n").unwrap();
    assert_eq!(receive(&mut driver, 5), b"root\n");
    driver.transmit(TRANSMIT, &[b"pass", b"", b"word: "]);
    let mut prompt = [0; 10];
    terminal.read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"password: ");
}

#[test]
fn much_in_both_directions_arrives_in_order_and_whole() {
    let (_sidecar, mut driver, path) = start();
    let mut terminal = connect(&path);
    let said: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut other = terminal.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| other.write_all(&said).unwrap());
        assert!(receive(&mut driver, said.len()) == said);
    });
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let mut heard = vec![0; said.len()];
            terminal.read_exact(&mut heard).unwrap();
            heard
        });
        for part in said.chunks(4000) {
            driver.transmit(TRANSMIT, &[part]);
        }
        assert!(heard.join().unwrap() == said);
    });
}

#[test]
fn a_terminal_that_leaves_makes_room_for_the_next() {
    let (_sidecar, mut driver, path) = start();
    for round in 0..5_u8 {
        let mut terminal = connect(&path);
        terminal.write_all(&[b'a' + round; 10]).unwrap();
        assert_eq!(receive(&mut driver, 10), [b'a' + round; 10]);
        driver.transmit(TRANSMIT, &[&[b'A' + round; 10]]);
        let mut heard = [0; 10];
        terminal.read_exact(&mut heard).unwrap();
        assert_eq!(heard, [b'A' + round; 10]);
    }
    // Nobody is there: what is said is lost, and nothing hangs.
    driver.transmit(TRANSMIT, &[b"anybody?"]);
}
