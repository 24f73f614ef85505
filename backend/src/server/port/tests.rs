//! Turns without an event loop: what happens, and when, is the test's choice.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use barkeep_protocol::wire::{Command, DmaAccess, DmaMap, RegionAccess, Version};
use tempfile::TempDir;

use super::*;
use crate::devices::{Context, Device, Payload, Transfer, TransferResult};
use crate::dma::Iova;
use crate::pci::{BarIndex, BarKind, BarSpec, ClassCode, FunctionSpec, Ids};
use crate::server::HostedFunction;

/// Memory that the client does not share.
const WINDOW: u64 = 0x10_0000;
const NOWHERE: u64 = 0;
const SIZE: u64 = 0x1000;
/// As much as one request may move.
const BAR_SIZE: u64 = 1 << 20;
const CONFIG: u32 = 7;

/// Does as many transfers in a row as are written to offset 8, at the address in offset 0.
#[derive(Default)]
struct Busy {
    left: u64,
    address: u64,
}

impl Busy {
    fn go_on(&mut self, context: &mut Context<'_>) {
        if self.left > 0 {
            self.left -= 1;
            let payload = Payload::Read(8);
            context.start_dma(Transfer { id: 0, address: Iova(self.address), payload });
        }
    }
}

impl Device for Busy {
    fn spec(&self) -> FunctionSpec {
        let kind = BarKind::Memory32 { prefetchable: false };
        FunctionSpec {
            bars: vec![BarSpec { index: BarIndex::BAR0, kind, size: BAR_SIZE }],
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 1,
                subsystem_vendor: 0x1234,
                subsystem: 1,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    fn bar_read(&mut self, _: BarIndex, _: u64, data: &mut [u8], _: &mut Context<'_>) {
        data.fill(0);
    }

    fn bar_write(&mut self, _: BarIndex, offset: u64, data: &[u8], context: &mut Context<'_>) {
        let Ok(data) = data.try_into() else { return };
        let value = u64::from_le_bytes(data);
        if offset == 0 {
            self.address = value;
        } else {
            self.left = value;
            self.go_on(context);
        }
    }

    fn dma_done(&mut self, _: u64, _: TransferResult, context: &mut Context<'_>) {
        self.go_on(context);
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// A port and its client, in one thread.
struct Bench {
    port: Port,
    epoll: Epoll,
    client: UnixStream,
    _directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.sock");
        let socket = SocketPath::claim(&path).unwrap();
        let function = HostedFunction::new("busy", Box::<Busy>::default()).unwrap();
        let port = Port::new(0, socket, function.into());
        let epoll = Epoll::new().unwrap();
        port.add(&epoll).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        let mut bench = Self { port, epoll, client, _directory: directory };
        bench.turn(Source::Listener);
        bench.send(&message(Command::Version, &Version::proposal().to_bytes()));
        bench.turn(Source::Client);
        let window =
            DmaMap { access: DmaAccess::all(), file_offset: 0, address: WINDOW, size: SIZE };
        bench.send(&message(Command::DmaMap, &window.to_bytes()));
        bench.enable();
        bench.turn(Source::Client);
        bench.hear();
        bench
    }

    fn turn(&mut self, source: Source) -> Turn {
        self.port.turn(&self.epoll, source).unwrap()
    }

    fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).unwrap();
    }

    /// What has come from the server so far.
    fn hear(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // It ends with an error, as nothing more is there now.
        let _ = self.client.read_to_end(&mut bytes);
        bytes
    }

    fn enable(&mut self) {
        self.send(&write(CONFIG, 4, &[0b110, 0]));
    }

    fn start(&mut self, address: u64, transfers: u64) {
        self.send(&write(0, 0, &address.to_le_bytes()));
        self.send(&write(0, 8, &transfers.to_le_bytes()));
    }
}

fn message(command: Command, body: &[u8]) -> Vec<u8> {
    raw(0, command, 0, body)
}

fn raw(id: u16, command: Command, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).unwrap();
    let mut bytes = [id, command.code()].map(u16::to_ne_bytes).concat();
    bytes.extend([size, flags, 0].map(u32::to_ne_bytes).concat());
    bytes.extend_from_slice(body);
    bytes
}

fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let access = RegionAccess { offset, region, count: u32::try_from(data.len()).unwrap() };
    message(Command::RegionWrite, &[&access.to_bytes(), data].concat())
}

fn read(region: u32, count: u32) -> Vec<u8> {
    message(Command::RegionRead, &RegionAccess { offset: 0, region, count }.to_bytes())
}

#[test]
fn work_that_is_left_ends_with_the_session() {
    let mut bench = Bench::new();
    bench.start(NOWHERE, u64::MAX);
    bench.turn(Source::Client);
    assert!(bench.port.has_work());
    bench.client.shutdown(Shutdown::Both).unwrap();
    assert_eq!(bench.turn(Source::Client), Turn::Ended);
    assert!(!bench.port.has_work(), "the event loop would spin");
}

#[test]
fn work_goes_on_while_the_client_owes_all_the_answers_it_may() {
    let mut bench = Bench::new();
    bench.start(WINDOW, 1);
    bench.turn(Source::Client);
    for _ in 0..20 {
        bench.send(&message(Command::Reset, &[]));
        bench.enable();
        bench.start(WINDOW, 1);
        bench.turn(Source::Client);
    }
    bench.send(&message(Command::Reset, &[]));
    bench.enable();
    bench.start(NOWHERE, 10_000);
    bench.turn(Source::Client);
    assert!(bench.port.has_work());
    for _ in 0..100 {
        bench.turn(Source::Work);
    }
    assert!(!bench.port.has_work());
}

#[test]
fn what_was_read_before_the_client_was_too_slow_is_served_when_it_has_caught_up() {
    let mut bench = Bench::new();
    // 4 of them may wait.
    let requests = 10;
    bench.send(&read(0, 1 << 20).repeat(requests));
    bench.turn(Source::Client);
    let mut heard = 0;
    // It is not the client's own event that finds it ready again.
    for _ in 0..100_000 {
        heard += bench.hear().len();
        bench.turn(Source::Unmask);
        while bench.port.has_work() {
            bench.turn(Source::Work);
        }
    }
    assert_eq!(heard, requests * (32 + (1 << 20)));
}

#[test]
fn a_client_that_says_no_more_still_gets_its_answers() {
    let mut bench = Bench::new();
    let request = write(CONFIG, 0, &[0; 96]);
    // As much as is read at once: the end is found in the same turn.
    bench.send(&request.repeat(4096 / request.len()));
    bench.client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.turn(Source::Client), Turn::Ended);
    assert_eq!(bench.hear().len(), 4096 / request.len() * 32);
}

#[test]
fn large_requests_get_fewer_of_them_into_a_turn() {
    let mut bench = Bench::new();
    let request = write(0, 0, &[0; 70 << 10]);
    bench.send(&request.repeat(2));
    bench.turn(Source::Client);
    assert!(bench.port.has_work());
    assert_eq!(bench.hear().len(), 32);
    bench.turn(Source::Work);
    assert_eq!(bench.hear().len(), 32);
}
