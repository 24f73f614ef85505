//! "VFIO_USER_DMA_READ" and "VFIO_USER_DMA_WRITE": memory that came without a descriptor.

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::peer::message::{
    ERROR, NO_REPLY, Payload, REPLY, Reply, command, header, message, u64_at,
};
use barkeep_tests::peer::requests::{CONFIG, access, dma_map, dma_unmap, pci, write};
use barkeep_tests::peer::{Peer, version_body};
use rustix::io::Errno;

const READ_WRITE: u32 = 3;
const WINDOW: u64 = 0x10_0000;
const SIZE: u64 = 0x2000;

/// How the client lays out transfers: the specification's way, or QEMU's, where data comes 4 bytes
/// earlier and a DMA_WRITE's reply has no payload.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Spec,
    Qemu,
    LaterQemu,
}

const QEMU: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,
    "migration":{"pgsize":4096,"max_bitmap_size":268435456}}}"#;

/// A client with guest memory that it does not share.
struct Client {
    peer: Peer,
    memory: Vec<u8>,
    layout: Layout,
}

impl Client {
    fn new(backend: &Backend, layout: Layout) -> Self {
        let mut peer = Peer::connect(backend.socket());
        let (minor, json) = match layout {
            Layout::Spec => (1, "{}"),
            // What QEMU proposes; some of its versions have the specification's layout.
            Layout::Qemu | Layout::LaterQemu => (0, QEMU),
        };
        let _ = peer.call(command::VERSION, &version_body(0, minor, json)).success();
        let _ = peer.call(command::DMA_MAP, &dma_map(READ_WRITE, 0, WINDOW, SIZE)).success();
        edu::enable(&mut peer);
        Self { peer, memory: vec![0; SIZE.try_into().unwrap()], layout }
    }

    /// Answers one command of the server; tells which it was and about how many bytes.
    fn serve(&mut self) -> (u16, usize) {
        let request = self.peer.receive();
        self.answer(&request)
    }

    fn answer(&mut self, request: &Reply) -> (u16, usize) {
        assert_eq!(request.flags, 0, "a command that wants a reply");
        let count = usize::try_from(u64_at(&request.body, 8) & 0xffff_ffff).unwrap();
        if count == 0 {
            assert_eq!(request.command, command::DMA_WRITE, "the question for the layout");
            let body = if self.layout == Layout::Qemu { &[][..] } else { &request.body };
            self.peer.send(&message(request.id, request.command, REPLY, body));
            return (request.command, 0);
        }
        let start = usize::try_from(u64_at(&request.body, 0) - WINDOW).unwrap();
        let range = start..start + count;
        let at = if self.layout == Layout::Qemu { 12 } else { 16 };
        let reply = match request.command {
            command::DMA_READ => {
                assert_eq!(request.body.len(), 16);
                let mut body = request.body[..at].to_vec();
                body.extend_from_slice(&self.memory[range]);
                body.resize(16 + count, 0);
                body
            }
            command::DMA_WRITE => {
                assert_eq!(request.body.len(), 16 + count);
                self.memory[range].copy_from_slice(&request.body[at..at + count]);
                if self.layout == Layout::Qemu { Vec::new() } else { request.body[..16].to_vec() }
            }
            other => unreachable!("command {other}"),
        };
        self.peer.send(&message(request.id, request.command, REPLY, &reply));
        (request.command, count)
    }

    fn busy(&mut self) -> bool {
        self.peer.read(0, at::DMA_COMMAND, 4)[0] & 1 != 0
    }
}

#[test]
fn a_device_moves_memory_by_messages_in_either_layout() {
    let backend = Backend::serve(&["edu"]);
    for layout in [Layout::Spec, Layout::Qemu, Layout::LaterQemu] {
        let mut client = Client::new(&backend, layout);
        client.memory[0x123..0x12a].copy_from_slice(b"by post");
        // The write that starts it is answered first: the client need not serve while it waits.
        edu::load(&mut client.peer, WINDOW + 0x123, 7);
        if layout != Layout::Spec {
            // Whoever may have either is asked with a write of nothing.
            assert_eq!(client.serve(), (command::DMA_WRITE, 0));
        }
        assert_eq!(client.serve(), (command::DMA_READ, 7));
        assert!(!client.busy());
        edu::store(&mut client.peer, WINDOW + 0x1000, 7);
        assert_eq!(client.serve(), (command::DMA_WRITE, 7), "{layout:?}");
        assert!(!client.busy());
        assert_eq!(&client.memory[0x1000..0x1007], b"by post");
    }
}

#[test]
fn requests_are_served_while_a_transfer_waits_and_an_answer_may_take_its_time() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Spec);
    edu::load(&mut client.peer, WINDOW, 16);
    let held = client.peer.receive();
    assert_eq!(held.command, command::DMA_READ);
    assert!(client.busy());
    client.peer.write_u32(0, at::LIVENESS, 1);
    assert_eq!(client.peer.read_u32(0, at::LIVENESS), !1);
    // Registers that describe it can't be changed meanwhile.
    client.peer.write(0, at::DMA_COUNT, &1_u64.to_le_bytes());
    assert_eq!(client.peer.read(0, at::DMA_COUNT, 8), 16_u64.to_le_bytes());
    client.answer(&held);
    assert!(!client.busy());
}

#[test]
fn an_interrupt_does_not_overtake_the_data() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Spec);
    let counter = barkeep_tests::event_counter::EventCounter::new();
    client.peer.set_eventfd(0, 0, std::os::fd::AsFd::as_fd(&counter));
    edu::store(&mut client.peer, WINDOW, 4);
    client.serve();
    assert!(!client.busy());
    assert_eq!(counter.take(), 0, "not asked for");
    for (register, value) in [(at::DMA_SOURCE, 0x40000), (at::DMA_DESTINATION, WINDOW)] {
        client.peer.write(0, register, &value.to_le_bytes());
    }
    client.peer.write(0, at::DMA_COMMAND, &7_u64.to_le_bytes());
    let held = client.peer.receive();
    assert!(client.busy());
    assert_eq!(counter.take(), 0);
    client.answer(&held);
    assert!(!client.busy());
    assert_eq!(counter.take(), 1);
}

#[test]
fn a_refusal_ends_the_transfer_and_nothing_else() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Spec);
    edu::load(&mut client.peer, WINDOW, 8);
    let refused = client.peer.receive();
    let mut error = message(refused.id, refused.command, REPLY | ERROR, &[]);
    error[12..16].copy_from_slice(&Errno::FAULT.raw_os_error().to_ne_bytes());
    client.peer.send(&error);
    assert!(!client.busy());
    client.memory[..4].copy_from_slice(b"next");
    edu::load(&mut client.peer, WINDOW, 4);
    client.serve();
    edu::store(&mut client.peer, WINDOW + 8, 4);
    client.serve();
    assert_eq!(&client.memory[8..12], b"next");
}

#[test]
fn clearing_bus_master_enable_stops_a_transfer_and_a_late_answer_moves_nothing() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Spec);
    client.memory.fill(0xaa);
    edu::load(&mut client.peer, WINDOW, 8);
    let held = client.peer.receive();
    client.peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert!(!client.busy(), "no answer is needed for that");
    client.peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
    client.answer(&held);
    client.peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    // And none begins.
    edu::load(&mut client.peer, WINDOW, 8);
    assert!(!client.busy());
    assert!(client.peer.hears_nothing());
    client.peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
    edu::store(&mut client.peer, WINDOW, 8);
    client.serve();
    assert_eq!(client.memory[..8], [0; 8], "the buffer never saw the memory");
}

#[test]
fn a_reset_forgets_transfers_and_takes_no_notice_of_late_answers() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Spec);
    edu::load(&mut client.peer, WINDOW, 8);
    let held = client.peer.receive();
    let _ = client.peer.call(command::RESET, &[]).success();
    client.answer(&held);
    assert_eq!(client.peer.read(CONFIG, 0, 2), [0x34, 0x12]);
    edu::enable(&mut client.peer);
    assert!(!client.busy());
}

#[test]
fn unmapping_does_not_wait_for_a_transfer() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Spec);
    edu::load(&mut client.peer, WINDOW, 8);
    let held = client.peer.receive();
    let _ = client.peer.call(command::DMA_UNMAP, &dma_unmap(0, WINDOW, SIZE)).success();
    client.answer(&held);
    assert!(!client.busy());
    edu::load(&mut client.peer, WINDOW, 8);
    assert!(client.peer.hears_nothing(), "no window, no message");
}

#[test]
fn large_transfers_keep_to_what_the_client_takes_at_once() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    let json = r#"{"capabilities":{"max_data_xfer_size":1000}}"#;
    let _ = peer.call(command::VERSION, &version_body(0, 1, json)).success();
    let _ = peer.call(command::DMA_MAP, &dma_map(READ_WRITE, 0, WINDOW, SIZE)).success();
    edu::enable(&mut peer);
    let memory = (0..SIZE).map(|i| i.to_le_bytes()[0]).collect();
    let mut client = Client { peer, memory, layout: Layout::Spec };
    edu::load(&mut client.peer, WINDOW, 2500);
    let sizes: Vec<usize> = (0..3).map(|_| client.serve().1).collect();
    assert_eq!(sizes, [1000, 1000, 500]);
    edu::store(&mut client.peer, WINDOW + 0x1000, 2500);
    (0..3).for_each(|_| _ = client.serve());
    assert!(!client.busy());
    let (from, to) = client.memory.split_at(0x1000);
    assert_eq!(from[..2500], to[..2500]);
}

#[test]
fn replies_that_answer_nothing_or_not_the_question_end_the_session() {
    let backend = Backend::serve(&["edu"]);
    let answers: [fn(&Reply) -> Vec<u8>; 4] = [
        |request| message(request.id.wrapping_add(1), request.command, REPLY, &request.body),
        |request| message(request.id, command::DMA_WRITE, REPLY, &request.body),
        |request| message(request.id, request.command, REPLY, &request.body[..15]),
        |request| {
            let body = Payload::new().bytes(&request.body).bytes(&[0; 9]).done();
            message(request.id, request.command, REPLY, &body)
        },
    ];
    for (row, answer) in answers.into_iter().enumerate() {
        let mut client = Client::new(&backend, Layout::Spec);
        edu::load(&mut client.peer, WINDOW, 8);
        let request = client.peer.receive();
        client.peer.send(&answer(&request));
        let farewell = client.peer.receive();
        assert_eq!(farewell.flags, REPLY | ERROR, "row {row}");
        client.peer.expect_closed();
    }
    edu::assert_served(backend.socket());
}

/// A client's first socket and its twin.
fn connect_twins(backend: &Backend) -> (Peer, Peer) {
    let mut peer = Peer::connect(backend.socket());
    let json = r#"{"capabilities":{"max_msg_fds":2,"twin_socket":{"supported":true}}}"#;
    let mut reply = peer.call(command::VERSION, &version_body(0, 1, json));
    let fd = reply.fds.pop().expect("the other end of the twin socket");
    assert!(reply.fds.is_empty());
    let answer: serde_json::Value =
        serde_json::from_slice(reply.body[4..].strip_suffix(&[0]).unwrap()).unwrap();
    let expected = serde_json::json!({ "supported": true, "fd_index": 0 });
    assert_eq!(answer["capabilities"]["twin_socket"], expected);
    (peer, Peer::over(fd))
}

#[test]
fn each_of_many_commands_over_a_twin_socket_is_refused_at_once() {
    let backend = Backend::serve(&["edu"]);
    let (mut peer, mut twin) = connect_twins(&backend);
    let ids = 0..200;
    let commands = ids.clone().map(|id| message(id, command::RESET, 0, &[]));
    twin.send(&commands.flatten().collect::<Vec<_>>());
    for id in ids {
        twin.reply_to(id, command::RESET).failure(Errno::INVAL);
    }
    let _ = peer.call(command::RESET, &[]).success();
}

#[test]
fn what_is_no_answer_ends_the_session_over_a_twin_socket_with_a_farewell_too() {
    let backend = Backend::serve(&["edu"]);
    let nonsense = [
        message(7, command::DMA_READ, REPLY, &[0; 16]),
        header(7, command::DMA_READ, 15, REPLY),
        header(7, command::DMA_READ, 16, 2),
    ];
    for bytes in nonsense {
        let (mut peer, mut twin) = connect_twins(&backend);
        twin.send(&bytes);
        twin.reply_to(7, command::DMA_READ).failure(Errno::INVAL);
        twin.expect_closed();
        peer.expect_closed();
    }
    edu::assert_served(backend.socket());
}

#[test]
fn a_twin_socket_carries_the_servers_commands() {
    let backend = Backend::serve(&["edu"]);
    let (mut peer, twin) = connect_twins(&backend);
    let _ = peer.call(command::DMA_MAP, &dma_map(READ_WRITE, 0, WINDOW, SIZE)).success();
    edu::enable(&mut peer);

    let memory = vec![0x5a; SIZE.try_into().unwrap()];
    let mut client = Client { peer: twin, memory, layout: Layout::Spec };
    edu::load(&mut peer, WINDOW, 4);
    assert_eq!(client.serve(), (command::DMA_READ, 4));
    edu::store(&mut peer, WINDOW + 0x1000, 4);
    assert_eq!(client.serve(), (command::DMA_WRITE, 4));
    assert!(peer.hears_nothing());
    // Requests belong on the first socket.
    let id = client.peer.take_id();
    client.peer.send(&message(id, command::GET_INFO, 0, &[0; 16]));
    client.peer.reply_to(id, command::GET_INFO).failure(Errno::INVAL);
    // A client that closes it serves no memory any more, and that is all.
    edu::load(&mut peer, WINDOW, 4);
    drop(client);
    edu::load(&mut peer, WINDOW, 4);
    // The server finds it closed before it looks at what was asked meanwhile.
    (0..2).for_each(|_| _ = peer.read(CONFIG, 0, 4));
    assert_eq!(peer.read(0, at::DMA_COMMAND, 4)[0] & 1, 0, "the transfers have failed");
    edu::load(&mut peer, WINDOW, 4);
    assert_eq!(peer.read(0, at::DMA_COMMAND, 4)[0] & 1, 0);
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn a_twin_socket_carries_them_from_the_first_one_on() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    // Everything at once, without waiting for what was negotiated.
    let json = r#"{"capabilities":{"twin_socket":{"supported":true}}}"#;
    let enable = pci::MEMORY_SPACE | pci::BUS_MASTER;
    let requests = [
        (command::VERSION, version_body(0, 1, json)),
        (command::DMA_MAP, dma_map(READ_WRITE, 0, WINDOW, SIZE)),
        (command::REGION_WRITE, write(CONFIG, pci::COMMAND, &enable.to_le_bytes())),
        (command::REGION_WRITE, write(0, at::DMA_SOURCE, &WINDOW.to_le_bytes())),
        (command::REGION_WRITE, write(0, at::DMA_DESTINATION, &0x40000_u64.to_le_bytes())),
        (command::REGION_WRITE, write(0, at::DMA_COUNT, &4_u64.to_le_bytes())),
        (command::REGION_WRITE, write(0, at::DMA_COMMAND, &1_u64.to_le_bytes())),
    ];
    let mut bytes = Vec::new();
    for (command, body) in &requests {
        bytes.extend(message(7, *command, 0, body));
    }
    bytes.extend(message(8, command::REGION_READ, NO_REPLY, &access(CONFIG, 0, 4)));
    peer.send(&bytes);
    let mut twin = None;
    for (command, _) in requests {
        twin = peer.reply_to(7, command).fds.pop().or(twin);
    }
    let mut client = Client {
        peer: Peer::over(twin.expect("the other end of the twin socket")),
        memory: vec![0; SIZE.try_into().unwrap()],
        layout: Layout::Spec,
    };
    assert_eq!(client.serve(), (command::DMA_READ, 4));
    assert!(peer.hears_nothing());
}

/// There is no reply for the socket to travel with.
#[test]
fn a_version_without_reply_makes_no_twin_socket() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    let json = r#"{"capabilities":{"twin_socket":{"supported":true}}}"#;
    peer.send(&message(1, command::VERSION, NO_REPLY, &version_body(0, 1, json)));
    let _ = peer.call(command::DMA_MAP, &dma_map(READ_WRITE, 0, WINDOW, SIZE)).success();
    edu::enable(&mut peer);
    let mut client = Client { peer, memory: vec![0; 0x2000], layout: Layout::Spec };
    edu::load(&mut client.peer, WINDOW, 4);
    assert_eq!(client.serve(), (command::DMA_READ, 4));
}

#[test]
fn the_answer_to_another_command_does_not_tell_the_layout() {
    let backend = Backend::serve(&["edu"]);
    let mut client = Client::new(&backend, Layout::Qemu);
    edu::load(&mut client.peer, WINDOW, 8);
    let question = client.peer.receive();
    client.peer.send(&message(question.id, command::DMA_READ, REPLY, &question.body));
    assert_eq!(client.peer.receive().flags, REPLY | ERROR);
    client.peer.expect_closed();
}

/// It says what QEMU alone says, and refuses the question.
#[test]
fn a_refused_question_leaves_the_layout_to_what_the_client_said() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    let json = r#"{"capabilities":{"migration":{"pgsize":4096,"max_bitmap_size":4096}}}"#;
    let _ = peer.call(command::VERSION, &version_body(0, 0, json)).success();
    let _ = peer.call(command::DMA_MAP, &dma_map(READ_WRITE, 0, WINDOW, SIZE)).success();
    edu::enable(&mut peer);
    let mut client = Client { peer, memory: vec![7; 0x2000], layout: Layout::Qemu };
    edu::load(&mut client.peer, WINDOW, 4);
    let question = client.peer.receive();
    let mut error = message(question.id, question.command, REPLY | ERROR, &[]);
    error[12..16].copy_from_slice(&Errno::FAULT.raw_os_error().to_ne_bytes());
    client.peer.send(&error);
    client.serve();
    edu::store(&mut client.peer, WINDOW + 8, 4);
    assert_eq!(client.serve(), (command::DMA_WRITE, 4));
    assert_eq!(client.memory[..16], [7; 16]);
}
