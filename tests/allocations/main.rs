//! What a request costs in allocations: nothing, once the buffers have their size.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic in a test is a failed test")]
#![expect(unsafe_code, reason = "an allocator is an unsafe trait")]

mod client;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use barkeep_backend::devices::{Context, Device};
use barkeep_backend::pci::{BarIndex, BarKind, BarSpec, ClassCode, FunctionSpec, Ids};
use barkeep_protocol::transport::{Flush, Received, Receiver, Sender};
use barkeep_protocol::wire::{Command, MessageId, Request};
use barkeep_tests::backend::Backend;
use barkeep_tests::peer::requests::{access, pci};

/// The system's allocator, which counts for each thread how often it is asked for memory.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is going away has no counter any more, and nobody who asks.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every method does what the system's allocator does, with the same arguments; the counter is
// a plain cell of the thread, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often this thread asks for memory while it does something.
fn allocations(work: impl FnOnce()) -> usize {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

/// One end of a connection.
struct End {
    socket: UnixStream,
    receiver: Receiver,
    sender: Sender,
}

fn ends() -> (End, End) {
    let (a, b) = UnixStream::pair().unwrap();
    let end = |socket: UnixStream| {
        socket.set_nonblocking(true).unwrap();
        End { socket, receiver: Receiver::default(), sender: Sender::default() }
    };
    (end(a), end(b))
}

impl End {
    fn flush(&mut self) {
        assert_eq!(self.sender.flush(self.socket.as_fd()).unwrap(), Flush::Done);
    }

    /// Answers what has arrived, as a server does with a register of 4 bytes.
    fn serve(&mut self) {
        for turn in 0.. {
            let received = match turn {
                0 => self.receiver.receive(&self.socket),
                _ => self.receiver.receive_more(&self.socket),
            };
            let message = match received.unwrap() {
                Received::Message(message) => message,
                Received::Pending => break,
                other => panic!("{other:?}"),
            };
            let request = Request::parse(message.header.command, message.body).unwrap();
            assert!(matches!(request, Request::RegionRead(_)));
            self.sender.reply(&message.header, message.fds, |body| {
                body.extend_from_slice(message.body);
                body.extend_from_slice(&0x0100_00ed_u32.to_le_bytes());
            });
        }
        self.flush();
    }
}

/// `count` requests, sent together, and their replies.
fn round_trips(client: &mut End, server: &mut End, request: &[u8], count: u16) {
    for id in 0..count {
        let id = MessageId(id);
        client.sender.command(id, Command::RegionRead, false, Vec::new(), |body| {
            body.extend_from_slice(request);
        });
    }
    client.flush();
    // The wake-up.
    assert!(matches!(
        server.receiver.receive_within(&server.socket, 0).unwrap(),
        Received::Pending
    ));
    server.serve();
    for id in 0..count {
        match client.receiver.receive(&client.socket).unwrap() {
            Received::Message(reply) => assert_eq!(reply.header.id, MessageId(id)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![0u8; 100]))), 1);
}

#[test]
fn a_region_read_and_its_reply_allocate_nothing() {
    let (mut client, mut server) = ends();
    let request = access(0, 0, 4);
    // The buffers get their size.
    round_trips(&mut client, &mut server, &request, 1);
    let allocated = allocations(|| {
        for _ in 0..1000 {
            round_trips(&mut client, &mut server, &request, 1);
        }
    });
    assert_eq!(allocated, 0, "allocations in 1000 round trips");
}

#[test]
fn pipelined_requests_allocate_nothing() {
    let (mut client, mut server) = ends();
    let request = access(0, 0, 4);
    round_trips(&mut client, &mut server, &request, 200);
    let allocated = allocations(|| {
        for _ in 0..20 {
            round_trips(&mut client, &mut server, &request, 200);
        }
    });
    assert_eq!(allocated, 0, "allocations in 20 batches of 200 round trips");
}

/// Its register is what its server's thread has allocated so far.
struct Meter;

impl Device for Meter {
    fn spec(&self) -> FunctionSpec {
        FunctionSpec {
            bars: vec![BarSpec {
                index: BarIndex::BAR0,
                kind: BarKind::Memory32 { prefetchable: false },
                size: 4096,
            }],
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 0x3e7e,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    fn bar_read(&mut self, _: BarIndex, _: u64, data: &mut [u8], _: &mut Context<'_>) {
        data.copy_from_slice(&COUNT.get().to_le_bytes()[..data.len()]);
    }

    fn bar_write(&mut self, _: BarIndex, _: u64, _: &[u8], _: &mut Context<'_>) {}

    fn reset(&mut self) {}
}

#[test]
fn a_server_allocates_nothing_for_accesses_to_a_bar() {
    let backend = Backend::host(vec![Box::new(Meter)]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let mut round = |count| {
        for _ in 0..count {
            peer.write_u32(0, 0, 1);
            peer.read_u32(0, 0);
            // Of configuration space, too.
            peer.config_u16(0);
            peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
        }
        peer.read_u32(0, 0)
    };
    // The buffers get their size.
    let before = round(10);
    assert_eq!(round(1000), before, "allocations in 4000 requests");
}

#[test]
fn a_server_allocates_nothing_for_accesses_that_nobody_claims() {
    let backend = Backend::host(vec![Box::new(Meter)]);
    let mut peer = backend.client();
    let mut round = |count| {
        peer.set_config_u16(pci::COMMAND, 0);
        for _ in 0..count {
            assert_eq!(peer.read_u32(0, 0), 0xffff_ffff);
            peer.write_u32(0, 0, 1);
        }
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
        peer.read_u32(0, 0)
    };
    // The first of them are logged.
    let before = round(50);
    assert_eq!(round(1000), before, "allocations in 2000 Unsupported Requests");
}
