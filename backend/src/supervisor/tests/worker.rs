//! The workers' program: this test's own binary, started for one test that is none. It does what its
//! client says, which is whatever a worker can do.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Signal, getpid, kill_process};

use super::super::link::{Held, Order, Report, WorkerLink};
use super::super::process::INCARNATION;
use crate::state::{FdKey, Holder};

/// What the workers of a test do before they are ready, from the first on; the last goes for all
/// further ones.
pub(super) const SCRIPT: &str = "BARKEEP_TEST_SCRIPT";

/// What a client can make its worker do. Some are answered with a line: its process ID, incarnation,
/// how much state there is and which keys were held when it began.
pub(super) mod ask {
    /// Nothing; answered.
    pub(in super::super) const STATUS: u8 = b'?';
    /// Write one byte to the state; answered.
    pub(in super::super) const WRITE: u8 = b'w';
    /// Store the state under keys 1 to 3, and forget 2; answered.
    pub(in super::super) const STORE: u8 = b's';
    /// The same and then DIE.
    pub(in super::super) const STORE_AND_DIE: u8 = b'D';
    /// End by SIGKILL.
    pub(in super::super) const DIE: u8 = b'd';
    /// End by SIGTERM, for which it is not prepared.
    pub(in super::super) const TERMINATE: u8 = b'T';
    /// End by SIGABRT.
    pub(in super::super) const ABORT: u8 = b'a';
    /// End with status 1, or 0.
    pub(in super::super) const FAIL: u8 = b'1';
    pub(in super::super) const FINISH: u8 = b'0';
    /// Stop by SIGSTOP.
    pub(in super::super) const FREEZE: u8 = b'f';
    /// Report the end of the session.
    pub(in super::super) const LEAVE: u8 = b'l';
    /// The same and then DIE.
    pub(in super::super) const LEAVE_AND_DIE: u8 = b'L';
    /// Store a socket whose last descriptor can't be closed, and forget it; answered.
    pub(in super::super) const LINGER: u8 = b'c';
    /// Store something for a function that is not its own, and do nothing any more.
    pub(in super::super) const INTRUDE: u8 = b'i';
    /// Close the link, and do nothing any more.
    pub(in super::super) const HIDE: u8 = b'h';
}

#[test]
#[ignore = "other tests start it"]
fn program() {
    let incarnation: usize = std::env::var(INCARNATION).unwrap().parse().unwrap();
    let script = std::env::var(SCRIPT).unwrap();
    let link = WorkerLink::from_stdin().unwrap();
    let Ok(held) = link.begin() else { std::process::exit(0) };
    match script.as_bytes().get(incarnation).or(script.as_bytes().last()) {
        Some(b'2') => std::process::exit(2),
        Some(b'1') => std::process::exit(1),
        Some(b'k') => end_by(Signal::KILL),
        Some(b'z') => end_by(Signal::STOP),
        _ => {}
    }
    Worker { incarnation, link: Some(link), held, stubborn: script.contains('n') }.run();
}

/// Another thread may be the one to take the signal.
fn end_by(signal: Signal) -> ! {
    kill_process(getpid(), signal).unwrap();
    rest()
}

/// Until it is killed, or the test has failed long ago.
fn rest() -> ! {
    std::thread::park_timeout(std::time::Duration::from_secs(120));
    std::process::exit(3)
}

/// The end of a connection with more to send than its other end takes, which waits for that when it is
/// closed.
fn lingering() -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    // It is there until the worker ends.
    std::mem::forget(listener.accept().unwrap());
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65536]).is_ok() {}
    set_socket_linger(&socket, Some(std::time::Duration::from_secs(1000))).unwrap();
    socket
}

struct Worker {
    incarnation: usize,
    /// Until it is closed.
    link: Option<WorkerLink>,
    held: Vec<Held>,
    /// It does not end when it should.
    stubborn: bool,
}

impl Worker {
    fn run(mut self) {
        self.link().report(Report::Ready).unwrap();
        loop {
            let clients = self.held.iter().filter_map(|held| held.client.as_ref());
            let mut fds: Vec<_> =
                clients.map(|client| PollFd::new(client, PollFlags::IN)).collect();
            fds.extend(self.link.as_ref().map(|link| PollFd::new(link, PollFlags::IN)));
            poll(&mut fds, None).unwrap();
            self.obey();
            for index in 0..self.held.len() {
                self.serve(index);
            }
        }
    }

    fn link(&self) -> &WorkerLink {
        self.link.as_ref().unwrap()
    }

    fn obey(&mut self) {
        while let Some(link) = &self.link {
            match link.next() {
                Ok(None) => return,
                Ok(Some(Order::Client { function, socket })) => {
                    let held = self.held.iter_mut().find(|held| held.function == function);
                    held.unwrap().client = Some(socket);
                }
                Ok(Some(Order::Ping(number))) => link.report(Report::Pong(number)).unwrap(),
                Ok(Some(Order::Drain | Order::Stop)) if self.stubborn => {}
                Ok(Some(Order::Drain)) => {
                    link.report(Report::Drained).unwrap();
                    std::process::exit(0);
                }
                // Or the supervisor has gone, with its test.
                Ok(Some(Order::Stop)) | Err(_) => std::process::exit(0),
            }
        }
    }

    fn serve(&mut self, index: usize) {
        let Held { function, state, client: Some(client), fds, previous_end } = &self.held[index]
        else {
            return;
        };
        let (function, mut byte) = (*function, [0]);
        match rustix::io::read(client, &mut byte) {
            Ok(1) => {}
            Ok(_) | Err(Errno::CONNRESET) => return self.end_session(index),
            Err(errno) => return assert_eq!(errno, Errno::AGAIN),
        }
        let store = |function: u16, keys: &[u64]| {
            let mut holder = self.link().holder(function);
            keys.iter().for_each(|key| holder.store(FdKey(*key), state.as_fd()).unwrap());
            holder.forget(FdKey(2));
        };
        match byte[0] {
            ask::STATUS => {}
            ask::WRITE => drop(File::from(state.try_clone().unwrap()).write(b"x").unwrap()),
            ask::STORE => store(function, &[1, 2, 3]),
            ask::STORE_AND_DIE => {
                store(function, &[1, 2, 3]);
                end_by(Signal::KILL);
            }
            ask::LINGER => {
                let mut holder = self.link().holder(function);
                holder.store(FdKey(9), lingering().as_fd()).unwrap();
                holder.forget(FdKey(9));
            }
            ask::DIE => end_by(Signal::KILL),
            ask::TERMINATE => end_by(Signal::TERM),
            ask::ABORT => end_by(Signal::ABORT),
            ask::FAIL => std::process::exit(1),
            ask::FINISH => std::process::exit(0),
            ask::FREEZE => end_by(Signal::STOP),
            ask::LEAVE => return self.end_session(index),
            ask::LEAVE_AND_DIE => {
                self.end_session(index);
                end_by(Signal::KILL);
            }
            ask::INTRUDE => {
                store(function + 1, &[1]);
                rest();
            }
            ask::HIDE => {
                self.link = None;
                rest();
            }
            other => panic!("{other}"),
        }
        let keys: Vec<_> = fds.keys().map(|key| key.0).collect();
        let size = rustix::fs::fstat(state).unwrap().st_size;
        let (process, incarnation) = (std::process::id(), self.incarnation);
        let line = format!("{process} {incarnation} {size} {previous_end:?} {keys:?}\n");
        assert_eq!(rustix::io::write(client, line.as_bytes()), Ok(line.len()));
    }

    fn end_session(&mut self, index: usize) {
        let held = &mut self.held[index];
        held.client = None;
        let function = held.function;
        self.link().report(Report::SessionEnded { function }).unwrap();
    }
}
