//! What a server must not reach any more.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use barkeep_protocol::wire::DmaAccess;

use super::commands::{BOTH, Ram, map, options, range};
use super::*;

#[test]
fn a_server_that_agrees_to_withdraw_half_a_window_keeps_the_other_half_and_no_more() {
    let script = serve("half", |server| {
        server.answer_version(&plain());
        server.accept(1);
        for _ in 0..3 {
            let unmap = server.request().unwrap();
            server.send(Frame::reply(&unmap.header, unmap.body.clone()));
        }
        let request = server.request().unwrap();
        for (address, served) in [
            (0x0fff, false),
            (0x1000, false),
            (0x17ff, false),
            (0x1800, true),
            (0x1fff, true),
            (0x2000, false),
            (0x27ff, false),
            (0x2800, true),
            (0x2fff, true),
            (0x3000, false),
            (0x3fff, false),
        ] {
            let outcome = server.dma_read(address, 1);
            assert_eq!(outcome.is_ok(), served, "{address:#x}");
        }
        assert_eq!(server.dma_read(0x1fff, 2), Err(Errno::FAULT), "over a hole");
        server.echo(&request);
        server.drain();
    });
    let client = Client::connect_with(&script.path, options(&Ram::new())).unwrap();
    map(&client, 0x1000, 0x3000, BOTH);
    client.dma_unmap(&DmaUnmap::range(0x1000, 0x800)).unwrap();
    client.dma_unmap(&DmaUnmap::range(0x2000, 0x800)).unwrap();
    client.dma_unmap(&DmaUnmap::range(0x3000, 0x1_0000)).unwrap();
    assert_eq!(read(&client).unwrap(), 0);
    drop(client);
    script.thread.join().unwrap();
}

/// Memory whose first access lasts until it is let go.
struct Slow {
    accesses: AtomicUsize,
    held: Mutex<mpsc::Receiver<()>>,
}

impl DmaTarget for Slow {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        self.accesses.fetch_add(1, Ordering::SeqCst);
        let _ = self.held.lock().unwrap().recv();
        Ok(())
    }

    fn write(&self, address: u64, _: &[u8]) -> Result<(), Errno> {
        self.read(address, &mut [])
    }
}

/// A server that is asked to make several writes at once, which it wants no answer for.
fn eager(name: &str) -> Script {
    serve(name, |server| {
        server.answer_version(&plain());
        server.accept(1);
        server.request().unwrap();
        for id in 0..4 {
            let body = [&range(0x1000, 1)[..], &[1]].concat();
            let mut write = Frame::command(MessageId(id), Command::DmaWrite, body);
            write.header.kind = MessageKind::Command { no_reply: true };
            server.sender.queue(write);
        }
        let _ = server.sender.flush(&server.socket);
        server.drain();
    })
}

fn slow(deadline: Duration) -> (mpsc::Sender<()>, Arc<Slow>, ClientOptions) {
    let (release, held) = mpsc::channel();
    let target = Arc::new(Slow { accesses: AtomicUsize::new(0), held: Mutex::new(held) });
    let options = ClientOptions {
        deadline,
        dma_target: Some(target.clone() as _),
        ..ClientOptions::default()
    };
    (release, target, options)
}

#[test]
fn a_window_is_not_served_after_its_withdrawal_was_not_answered() {
    let script = eager("unanswered");
    let (release, target, options) = slow(Duration::from_millis(50));
    let client = Client::connect_with(&script.path, options).unwrap();
    map(&client, 0x1000, 0x1000, DmaAccess::WRITE);
    client.region_write_posted(0, 0, &[1]).unwrap();
    std::thread::scope(|scope| {
        let attendant = scope.spawn(|| client.attendant().attend());
        while target.accesses.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let unmap = scope.spawn(|| client.dma_unmap(&DmaUnmap::range(0x1000, 0x1000)));
        while !client.is_dead() {
            std::thread::yield_now();
        }
        drop(release);
        assert!(unmap.join().unwrap().is_err());
        assert_eq!(attendant.join().unwrap(), Attended::Ended);
    });
    assert_eq!(target.accesses.load(Ordering::SeqCst), 1, "what was under way, and no more");
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn nothing_is_served_after_the_client_is_gone() {
    let script = eager("dropped");
    let (release, target, options) = slow(NEVER);
    let client = Client::connect_with(&script.path, options).unwrap();
    map(&client, 0x1000, 0x1000, DmaAccess::WRITE);
    client.region_write_posted(0, 0, &[1]).unwrap();
    let attendant = client.attendant();
    let attending = std::thread::spawn(move || attendant.attend());
    while target.accesses.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let attendant = client.attendant();
    let dropping = std::thread::spawn(move || drop(client));
    while attendant.attend_within(Duration::ZERO) != Attended::Ended {
        std::thread::yield_now();
    }
    release.send(()).unwrap();
    dropping.join().unwrap();
    drop(release);
    assert_eq!(attending.join().unwrap(), Attended::Ended);
    assert_eq!(target.accesses.load(Ordering::SeqCst), 1, "what was under way, and no more");
    script.thread.join().unwrap();
}
