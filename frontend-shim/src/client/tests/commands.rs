//! The server's own commands: DMA by messages.

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use barkeep_protocol::wire::{DmaAccess, TwinSocket};

use super::*;

/// Memory from address 0 on.
#[derive(Default)]
pub(super) struct Ram(Mutex<Vec<u8>>);

impl Ram {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new((0..=255).cycle().take(0x4000).collect())))
    }
}

impl DmaTarget for Ram {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(address).unwrap();
        data.copy_from_slice(&self.0.lock().unwrap()[at..at + data.len()]);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(address).unwrap();
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// A command and its outcome: the payload or the errno.
pub(super) type Outcome = Result<Vec<u8>, Errno>;

pub(super) fn range(address: u64, count: u64) -> Vec<u8> {
    [address.to_ne_bytes(), count.to_ne_bytes()].concat()
}

impl Server {
    fn command(&mut self, command: Command, body: Vec<u8>) -> Outcome {
        let id = MessageId(0x7700 + command.code());
        self.send(Frame::command(id, command, body));
        let reply = self.request().unwrap();
        assert_eq!((reply.header.id, reply.header.command), (id, command.code()));
        match reply.header.kind {
            MessageKind::Reply { error: None } => Ok(reply.body),
            MessageKind::Reply { error: Some(errno) } => Err(errno),
            MessageKind::Command { .. } => panic!("{reply:?}"),
        }
    }

    pub(super) fn dma_read(&mut self, address: u64, count: u64) -> Outcome {
        let reply = self.command(Command::DmaRead, range(address, count))?;
        assert_eq!(reply[..16], range(address, count));
        Ok(reply[16..].to_vec())
    }

    fn dma_write(&mut self, address: u64, data: &[u8]) -> Outcome {
        let body = [&range(address, data.len() as u64)[..], data].concat();
        self.command(Command::DmaWrite, body)
    }

    /// Takes the windows that the client announces.
    pub(super) fn accept(&mut self, windows: usize) {
        for _ in 0..windows {
            let request = self.request().unwrap();
            self.send(Frame::reply(&request.header, Vec::new()));
        }
    }
}

pub(super) fn options(target: &Arc<Ram>) -> ClientOptions {
    ClientOptions {
        deadline: NEVER,
        dma_target: Some(target.clone() as _),
        ..ClientOptions::default()
    }
}

pub(super) fn map(client: &Client, address: u64, size: u64, access: DmaAccess) {
    client.dma_map(&DmaMap { access, file_offset: 0, address, size }, None).unwrap();
}

pub(super) const BOTH: DmaAccess = DmaAccess::READ.union(DmaAccess::WRITE);

#[test]
fn the_thread_that_waits_serves_what_lies_in_the_announced_windows() {
    let script = serve("served", |server| {
        server.answer_version(&plain());
        server.accept(3);
        let request = server.request().unwrap();
        assert_eq!(server.dma_read(0x1002, 3), Ok(vec![2, 3, 4]));
        assert_eq!(server.dma_write(0x1004, &[9, 8]), Ok(range(0x1004, 2)));
        assert_eq!(server.dma_read(0x1ffe, 4), Ok(vec![254, 255, 0, 1]), "over two windows");
        let refused: [(&str, Outcome); 8] = [
            ("below", server.dma_read(0xfff, 2)),
            ("above", server.dma_read(0x2fff, 2)),
            ("read-only", server.dma_write(0x2000, &[1])),
            ("into read-only", server.dma_write(0x1fff, &[1, 2])),
            ("write-only", server.dma_read(0x3800, 1)),
            ("around the end", server.dma_read(u64::MAX, 2)),
            ("too much", server.dma_read(0x1000, 1 << 40)),
            ("no data", server.command(Command::DmaWrite, range(0x1000, 4))),
        ];
        let [memory @ .., wraps, much, short] = &refused;
        for (what, outcome) in memory {
            assert_eq!(*outcome, Err(Errno::FAULT), "{what}");
        }
        for (what, outcome) in [wraps, much, short] {
            assert_eq!(*outcome, Err(Errno::INVAL), "{what}");
        }
        assert_eq!(server.command(Command::Reset, Vec::new()), Err(Errno::NOTSUP));
        server.echo(&request);
        server.drain();
    });
    let ram = Ram::new();
    let client = Client::connect_with(&script.path, options(&ram)).unwrap();
    map(&client, 0x1000, 0x1000, BOTH);
    map(&client, 0x2000, 0x1000, DmaAccess::READ);
    map(&client, 0x3800, 0x800, DmaAccess::WRITE);
    assert_eq!(read(&client).unwrap(), 0);
    assert_eq!(ram.0.lock().unwrap()[0x1004..0x1006], [9, 8]);
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_withdrawn_window_is_served_until_the_server_has_agreed_and_no_longer() {
    let script = serve("withdrawn", |server| {
        server.answer_version(&plain());
        server.accept(1);
        let unmap = server.request().unwrap();
        assert_eq!(server.dma_read(0x1000, 1), Ok(vec![0]), "what it had begun");
        server.send(Frame::reply(&unmap.header, unmap.body.clone()));
        let request = server.request().unwrap();
        assert_eq!(server.dma_read(0x1000, 1), Err(Errno::FAULT));
        server.echo(&request);
        server.drain();
    });
    let client = Client::connect_with(&script.path, options(&Ram::new())).unwrap();
    map(&client, 0x1000, 0x1000, BOTH);
    client.dma_unmap(&DmaUnmap::range(0x1000, 0x1000)).unwrap();
    assert_eq!(read(&client).unwrap(), 0);
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn an_attendant_serves_while_nobody_waits() {
    // Expected for a window without a file; found out after a while for others.
    for announced in [true, false] {
        let (tell, told) = mpsc::channel();
        let script = serve("idle", move |server| {
            server.answer_version(&plain());
            server.accept(1);
            told.recv().unwrap();
            assert_eq!(server.dma_read(0x1005, 1), Ok(vec![5]));
            assert_eq!(server.dma_read(0x1006, 1), Ok(vec![6]));
        });
        let client = Client::connect_with(&script.path, options(&Ram::new())).unwrap();
        let window = DmaMap { access: BOTH, file_offset: 0, address: 0x1000, size: 0x1000 };
        let file = (!announced).then(|| std::fs::File::open("/dev/zero").unwrap().into());
        client.dma_map(&window, file).unwrap();
        tell.send(()).unwrap();
        assert_eq!(client.attendant().attend(), Attended::Ended);
        script.thread.join().unwrap();
    }
}

#[test]
fn a_command_that_came_with_a_reply_does_not_wait_for_the_next_request() {
    let script = serve("behind", |server| {
        server.answer_version(&plain());
        server.accept(1);
        let request = server.request().unwrap();
        let mut body = request.body.clone();
        body.extend_from_slice(&[0; 4]);
        // Both in one write, and so in one read.
        server.sender.queue(Frame::reply(&request.header, body));
        assert_eq!(server.dma_read(0x1009, 1), Ok(vec![9]));
        server.drain();
    });
    let client = Client::connect_with(&script.path, options(&Ram::new())).unwrap();
    map(&client, 0x1000, 0x1000, BOTH);
    assert_eq!(read(&client).unwrap(), 0);
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn commands_and_replies_find_their_way_beside_each_other() {
    let script = serve("beside", |server| {
        server.answer_version(&plain());
        server.accept(1);
        for _ in 0..500 {
            let request = server.request().unwrap();
            server.echo(&request);
            // As a device does after a doorbell: nobody may be waiting any more.
            let id = MessageId(0x7777);
            server.send(Frame::command(id, Command::DmaRead, range(0x1000, 4)));
            let mut next = server.request().unwrap();
            if next.header.id != id {
                server.echo(&next);
                next = server.request().unwrap();
            }
            assert_eq!(next.header.id, id);
        }
        server.drain();
    });
    let client = Client::connect_with(&script.path, options(&Ram::new())).unwrap();
    map(&client, 0x1000, 0x1000, BOTH);
    std::thread::scope(|scope| {
        let attendant = client.attendant();
        scope.spawn(move || attendant.attend());
        for _ in 0..500 {
            read(&client).unwrap();
        }
        client.attendant().stop();
    });
    drop(client);
    // It may have been stopped in the middle of a round.
    let _ = script.thread.join();
}

#[test]
fn a_thread_that_sleeps_misses_no_deadline_because_of_the_one_that_reads() {
    struct Stuck(Mutex<mpsc::Receiver<()>>);
    impl DmaTarget for Stuck {
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            let _ = self.0.lock().unwrap().recv();
            Err(Errno::IO)
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
            Err(Errno::IO)
        }
    }
    let script = serve("stuck", |server| {
        server.answer_version(&plain());
        server.accept(1);
        server.request().unwrap();
        server.send(Frame::command(MessageId(1), Command::DmaRead, range(0x1000, 1)));
        server.drain();
    });
    let (release, held) = mpsc::channel();
    let target = Arc::new(Stuck(Mutex::new(held)));
    let deadline = Duration::from_millis(50);
    let options =
        ClientOptions { deadline, dma_target: Some(target as _), ..ClientOptions::default() };
    let client = Client::connect_with(&script.path, options).unwrap();
    map(&client, 0x1000, 0x1000, BOTH);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| read(&client));
        let second = scope.spawn(|| read(&client));
        let attendant = scope.spawn(|| client.attendant().attend());
        // One of the three reads and is stuck; whoever waits for an answer beside it returns.
        while !client.is_dead() {
            std::thread::yield_now();
        }
        drop(release);
        for thread in [first, second] {
            assert!(thread.join().unwrap().is_err());
        }
        assert_eq!(attendant.join().unwrap(), Attended::Ended);
    });
    drop(client);
    script.thread.join().unwrap();
}

/// A server whose commands have a socket of their own.
fn with_twin(name: &str, script: impl FnOnce(&mut Server, &mut Server) + Send + 'static) -> Script {
    serve(name, |server| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let request = server.request().unwrap();
        let version = Version::parse(&request.body).unwrap();
        assert!(version.capabilities.twin_socket.unwrap().supported, "offered");
        let mut answer = plain();
        answer.capabilities.twin_socket = Some(TwinSocket { supported: true, fd_index: Some(1) });
        let other = theirs.as_fd().try_clone_to_owned().unwrap();
        let reply = Frame::reply(&request.header, answer.to_bytes());
        server.send(reply.with_fds(vec![other, theirs.into()]));
        let (receiver, sender) = Default::default();
        script(server, &mut Server { socket: ours, receiver, sender });
    })
}

fn twin_options() -> ClientOptions {
    ClientOptions { twin_socket: true, ..options(&Ram::new()) }
}

#[test]
fn commands_on_a_twin_socket_are_served_beside_requests_and_without() {
    let script = with_twin("twin", |server, twin| {
        server.accept(1);
        let request = server.request().unwrap();
        assert_eq!(twin.dma_read(0x1001, 2), Ok(vec![1, 2]));
        assert_eq!(twin.dma_read(0, 2), Err(Errno::FAULT));
        server.echo(&request);
        assert_eq!(twin.dma_read(0x1007, 1), Ok(vec![7]), "nobody waits");
    });
    let client = Client::connect_with(&script.path, twin_options()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(client.attendant().attend(), Attended::Ended));
        map(&client, 0x1000, 0x1000, BOTH);
        assert_eq!(read(&client).unwrap(), 0);
    });
    script.thread.join().unwrap();
}

#[test]
fn nonsense_on_a_twin_socket_ends_the_session_and_its_end_alone_does_not() {
    let script = with_twin("twin-bad", |server, twin| {
        let header = server.request().unwrap().header;
        twin.send(Frame::reply(&header, Vec::new()));
        server.drain();
    });
    let client = Client::connect_with(&script.path, twin_options()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(matches!(read(&client), Err(ClientError::Lost))));
        assert_eq!(client.attendant().attend(), Attended::Ended);
    });
    script.thread.join().unwrap();

    let script = with_twin("twin-end", |server, twin| {
        twin.socket.shutdown(std::net::Shutdown::Both).unwrap();
        let request = server.request().unwrap();
        server.echo(&request);
    });
    let client = Client::connect_with(&script.path, twin_options()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(client.attendant().attend(), Attended::Ended));
        assert_eq!(read(&client).unwrap(), 0);
    });
    script.thread.join().unwrap();
}

#[test]
fn a_twin_socket_that_is_promised_and_missing_is_an_error() {
    let script = serve("twin-missing", |server| {
        let mut answer = plain();
        answer.capabilities.twin_socket = Some(TwinSocket { supported: true, fd_index: Some(0) });
        server.answer_version(&answer);
    });
    let error = Client::connect_with(&script.path, twin_options()).unwrap_err();
    assert!(matches!(error, ClientError::Malformed(_)), "{error}");
    script.thread.join().unwrap();
}

#[test]
fn an_attendant_that_can_not_answer_on_a_twin_socket_learns_that_the_backend_has_gone() {
    let (learnt, told) = mpsc::channel();
    let script = with_twin("twin-deaf", move |server, twin| {
        server.accept(1);
        // Answers of 4 MiB, which nobody reads. The first one shows that the others are being sent.
        for id in 0..64 {
            let id = MessageId(id);
            twin.sender.queue(Frame::command(id, Command::DmaRead, range(0, 0x1_0000)));
        }
        twin.sender.flush(&twin.socket).unwrap();
        let flags = rustix::net::RecvFlags::PEEK;
        rustix::net::recv(&twin.socket, &mut [0; 1][..], flags).unwrap();
        server.socket.shutdown(std::net::Shutdown::Both).unwrap();
        // The other end stays open meanwhile, as it does in another process.
        told.recv_timeout(Duration::from_secs(10)).unwrap();
    });
    let ram = Arc::new(Ram(Mutex::new(vec![0; 0x1_0000])));
    let options = ClientOptions { twin_socket: true, ..options(&ram) };
    let client = Client::connect_with(&script.path, options).unwrap();
    map(&client, 0, 0x1_0000, BOTH);
    assert_eq!(client.attendant().attend(), Attended::Ended);
    let _ = learnt.send(());
    script.thread.join().unwrap();
}

#[test]
fn a_twin_socket_that_is_no_stream_between_processes_is_refused() {
    use rustix::net::{AddressFamily, SocketType, socket};
    let sockets = [
        socket(AddressFamily::NETLINK, SocketType::RAW, None),
        socket(AddressFamily::UNIX, SocketType::DGRAM, None),
        socket(AddressFamily::INET, SocketType::STREAM, None),
        Ok(std::fs::File::open("/dev/zero").unwrap().into()),
    ];
    for twin in sockets.into_iter().flatten() {
        let script = serve("twin-strange", |server| {
            let request = server.request().unwrap();
            let mut answer = plain();
            answer.capabilities.twin_socket =
                Some(TwinSocket { supported: true, fd_index: Some(0) });
            let reply = Frame::reply(&request.header, answer.to_bytes());
            server.send(reply.with_fds(vec![twin]));
            server.drain();
        });
        let error = Client::connect_with(&script.path, twin_options()).unwrap_err();
        assert!(matches!(error, ClientError::Protocol(_)), "{error}");
        script.thread.join().unwrap();
    }
}

#[test]
fn a_session_with_a_twin_socket_goes_on_when_its_attendant_is_stopped() {
    let script = with_twin("twin-stopped", |server, twin| {
        let request = server.request().unwrap();
        twin.socket.set_nonblocking(true).unwrap();
        let error = std::io::Read::read(&mut twin.socket, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "it is open");
        server.echo(&request);
        server.drain();
    });
    let client = Client::connect_with(&script.path, twin_options()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(client.attendant().attend(), Attended::Stopped));
        client.attendant().stop();
    });
    assert_eq!(read(&client).unwrap(), 0);
    drop(client);
    script.thread.join().unwrap();
}
