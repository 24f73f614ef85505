//! The client against scripted servers, most of them bad ones.

use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use barkeep_protocol::transport::{Frame, Received, Receiver, Sender};
use barkeep_protocol::wire::{Capabilities, Errno, MessageId, MessageKind};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

mod commands;
mod flight;
mod handover;
mod hangup;
mod requests;
mod windows;

/// A server that answers VERSION and then does what its script says.
struct Script {
    path: PathBuf,
    thread: JoinHandle<()>,
    _directory: Directory,
}

struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Server {
    socket: UnixStream,
    receiver: Receiver,
    sender: Sender,
}

impl Server {
    fn request(&mut self) -> Option<Frame> {
        loop {
            match self.receiver.receive(&self.socket) {
                Ok(Received::Message(message)) => return Some(message.into_frame()),
                Ok(Received::Pending) => {}
                _ => return None,
            }
        }
    }

    fn send(&mut self, frame: Frame) {
        self.sender.queue(frame);
        let _ = self.sender.flush(&self.socket);
    }

    fn answer_version(&mut self, version: &Version) {
        let request = self.request().unwrap();
        self.send(Frame::reply(&request.header, version.to_bytes()));
    }
}

fn serve(name: &str, script: impl FnOnce(&mut Server) + Send + 'static) -> Script {
    let directory = std::env::temp_dir().join(format!("barkeep-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("s.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let (receiver, sender) = Default::default();
        script(&mut Server { socket, receiver, sender });
    });
    Script { path, thread, _directory: Directory(directory) }
}

/// So long that a test which waits for it does not end.
const NEVER: Duration = Duration::from_secs(3600);

impl Server {
    /// Answers a read of four bytes with its own offset.
    fn echo(&mut self, request: &Frame) {
        let mut body = request.body.clone();
        body.extend_from_within(..4);
        self.send(Frame::reply(&request.header, body));
    }

    /// Until the client closes.
    fn drain(&mut self) {
        while self.request().is_some() {}
    }
}

fn plain() -> Version {
    Version { major: 0, minor: 1, capabilities: Capabilities::default() }
}

fn connect(script: &Script) -> Client {
    Client::connect(&script.path, DEFAULT_DEADLINE).unwrap()
}

fn read(client: &Client) -> Result<u32, ClientError> {
    let mut data = [0xee; 4];
    client.region_read(0, 0, &mut data).map(|()| u32::from_le_bytes(data))
}

#[test]
fn nobody_at_the_socket_is_an_error_at_once() {
    let path = Path::new("/nonexistent/s.sock");
    let error = Client::connect(path, DEFAULT_DEADLINE).unwrap_err();
    assert!(matches!(error, ClientError::Connect(Errno::NOENT)), "{error}");
}

#[test]
fn a_server_with_a_newer_version_than_offered_is_refused() {
    let script = serve("newer", |server| server.answer_version(&Version { minor: 9, ..plain() }));
    let error = Client::connect(&script.path, DEFAULT_DEADLINE).unwrap_err();
    assert!(matches!(error, ClientError::Version { minor: 9, .. }), "{error}");
    script.thread.join().unwrap();
}

#[test]
fn a_refused_request_does_not_end_the_session() {
    let script = serve("refused", |server| {
        server.answer_version(&plain());
        let first = server.request().unwrap().header;
        server.send(Frame::error(first.id, first.command, Errno::INVAL));
        let second = server.request().unwrap();
        let mut body = second.body.clone();
        body.extend_from_slice(&7u32.to_le_bytes());
        server.send(Frame::reply(&second.header, body));
    });
    let client = connect(&script);
    assert!(matches!(read(&client), Err(ClientError::Refused(Errno::INVAL))));
    assert_eq!(read(&client).unwrap(), 7);
    script.thread.join().unwrap();
}

#[test]
fn a_backend_that_goes_away_is_noticed_at_once_and_for_good() {
    let script = serve("gone", |server| {
        server.answer_version(&plain());
        server.request();
    });
    let client = connect(&script);
    assert!(read(&client).unwrap_err().ends_session());
    assert!(client.is_dead());
    assert!(matches!(read(&client), Err(ClientError::Gone)));
    script.thread.join().unwrap();
}

#[test]
fn a_silent_backend_costs_its_deadline_once() {
    let script = serve("silent", |server| {
        server.answer_version(&plain());
        // Reads without answering, until the client closes.
        while server.request().is_some() {}
    });
    let client = Client::connect(&script.path, Duration::from_millis(50)).unwrap();
    assert!(matches!(read(&client), Err(ClientError::Deadline(_))));
    assert!(matches!(read(&client), Err(ClientError::Gone)), "not a second wait");
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_reply_to_another_request_ends_the_session() {
    let script = serve("foreign", |server| {
        server.answer_version(&plain());
        let mut header = server.request().unwrap().header;
        header.id = MessageId(header.id.0.wrapping_add(1));
        server.send(Frame::reply(&header, Vec::new()));
    });
    let client = connect(&script);
    assert!(matches!(read(&client), Err(ClientError::Protocol(_))));
    assert!(client.is_dead());
    script.thread.join().unwrap();
}

#[test]
fn a_short_read_reply_is_no_data() {
    let script = serve("short", |server| {
        server.answer_version(&plain());
        let request = server.request().unwrap();
        server.send(Frame::reply(&request.header, request.body[..8].to_vec()));
    });
    let client = connect(&script);
    assert!(matches!(read(&client), Err(ClientError::Malformed(_))));
    assert!(client.is_dead(), "its words can't be trusted");
    script.thread.join().unwrap();
}

#[test]
fn a_servers_own_command_is_refused_and_the_answer_still_awaited() {
    let script = serve("dma", |server| {
        server.answer_version(&plain());
        let request = server.request().unwrap();
        server.send(Frame::command(MessageId(77), Command::DmaRead, vec![0; 16]));
        let refusal = server.request().unwrap().header;
        assert_eq!(refusal.id, MessageId(77));
        let mut body = request.body.clone();
        body.extend_from_slice(&9u32.to_le_bytes());
        server.send(Frame::reply(&request.header, body));
    });
    let client = connect(&script);
    assert_eq!(read(&client).unwrap(), 9);
    script.thread.join().unwrap();
}

#[test]
fn extensions_are_not_used_with_a_server_that_did_not_offer_them() {
    let script = serve("plain", |server| {
        server.answer_version(&plain());
        assert!(server.request().is_none(), "nothing may be sent");
    });
    let client = connect(&script);
    assert!(matches!(client.region_state(0), Err(ClientError::NotOffered(_))));
    assert!(!client.is_dead());
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_backend_that_talks_without_answering_gains_no_time() {
    let script = serve("flood", |server| {
        server.answer_version(&plain());
        server.request();
        let mut chatter = Frame::command(MessageId(1), Command::DmaRead, vec![0; 16]);
        chatter.header.kind = MessageKind::Command { no_reply: true };
        let bytes = [&chatter.header.to_bytes()[..], &chatter.body].concat();
        // Until the client gives up and closes.
        while std::io::Write::write_all(&mut &server.socket, &bytes).is_ok() {}
    });
    let client = Client::connect(&script.path, Duration::from_millis(50)).unwrap();
    assert!(matches!(read(&client), Err(ClientError::Deadline(_))));
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_backend_that_drips_bytes_gains_no_time() {
    let script = serve("drip", |server| {
        server.answer_version(&plain());
        let header = server.request().unwrap().header;
        let mut reply = Frame::reply(&header, vec![0; 1 << 20]).header.to_bytes().to_vec();
        reply.extend_from_slice(&[0; 4096]);
        for byte in reply {
            if std::io::Write::write_all(&mut &server.socket, &[byte]).is_err() {
                break;
            }
            std::thread::yield_now();
        }
        // Never the rest: the client closes.
        while server.request().is_some() {}
    });
    let client = Client::connect(&script.path, Duration::from_millis(50)).unwrap();
    assert!(matches!(read(&client), Err(ClientError::Deadline(_))));
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_decode_page_comes_with_its_file() {
    let script = serve("page", |server| {
        server.answer_version(&Version::proposal());
        for with_file in [true, false] {
            let request = server.request().unwrap();
            assert_eq!(request.header.command, Command::DecodePage.code());
            let body = DecodePageInfo { length: 4096 }.to_bytes();
            let mut reply = Frame::reply(&request.header, body);
            if with_file {
                let file = memfd_create("page", MemfdFlags::CLOEXEC).unwrap();
                reply = reply.with_fds(vec![file]);
            }
            server.send(reply);
        }
    });
    let client = connect(&script);
    let (info, _file) = client.decode_page().unwrap();
    assert_eq!(info.length, 4096);
    assert!(matches!(client.decode_page(), Err(ClientError::Protocol(_))));
    assert!(client.is_dead());
    script.thread.join().unwrap();
}

#[test]
fn a_server_without_decode_pages_is_not_asked() {
    let script = serve("no-page", |server| server.answer_version(&plain()));
    let client = connect(&script);
    assert!(matches!(client.decode_page(), Err(ClientError::NotOffered("decode_page"))));
    assert!(!client.is_dead());
    script.thread.join().unwrap();
}
