//! What one message costs in the codec and in the transport, without a server.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark that fails has no result")]

use std::hint::black_box;
use std::os::unix::net::UnixStream;

use barkeep_protocol::transport::{Received, Receiver, Sender};
use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind, RegionData, Request};
use barkeep_tests::peer::requests::{access, write};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const COMMAND: MessageKind = MessageKind::Command { no_reply: false };

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    let code = Command::RegionRead.code();
    let header = Header { id: MessageId(7), command: code, body_size: 16, kind: COMMAND };
    let bytes = header.to_bytes();
    group.bench_function("parse header", |b| b.iter(|| Header::parse(black_box(&bytes))));
    group.bench_function("serialise header", |b| b.iter(|| black_box(&header).to_bytes()));

    let read = access(0, 0x10, 4);
    group.bench_function("parse REGION_READ", |b| {
        b.iter(|| matches!(Request::parse(code, black_box(&read)), Ok(Request::RegionRead(_))));
    });
    let code = Command::RegionWrite.code();
    let small = write(0, 0x10, &[1, 2, 3, 4]);
    group.bench_function("parse REGION_WRITE of 4 bytes", |b| {
        b.iter(|| matches!(Request::parse(code, black_box(&small)), Ok(Request::RegionWrite(_))));
    });
    let data = RegionData::parse(&small).unwrap();
    group.bench_function("serialise REGION_WRITE of 4 bytes", |b| {
        b.iter(|| black_box(&data).to_bytes());
    });
    group.finish();
}

/// Both ends in one thread: the system calls of one request and its reply, and no wake-up.
fn transport(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("transport");
    for (name, count, size) in [
        ("round trip of 4 bytes", 1u16, 4),
        ("100 pipelined round trips of 4 bytes", 100, 4),
        ("round trip of 64 KiB", 1, 64 << 10),
    ] {
        group.throughput(Throughput::Elements(count.into()));
        let (mut client, mut server) = ends();
        let data = vec![0x5a; size];
        group.bench_function(name, |b| {
            b.iter_batched(
                || (),
                |()| round_trips(&mut client, &mut server, count, &data),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

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

/// Reads of `data`, sent together, served together.
fn round_trips(client: &mut End, server: &mut End, count: u16, data: &[u8]) {
    let request = [0; 16];
    for id in 0..count {
        client.sender.command(MessageId(id), Command::RegionRead, false, Vec::new(), |body| {
            body.extend_from_slice(&request);
        });
    }
    client.sender.flush(&client.socket).unwrap();
    let mut received = server.receiver.receive(&server.socket).unwrap();
    while let Received::Message(message) = received {
        server.sender.reply(&message.header, message.fds, |body| {
            body.extend_from_slice(message.body);
            body.extend_from_slice(data);
        });
        received = server.receiver.receive_more(&server.socket).unwrap();
    }
    server.sender.flush(&server.socket).unwrap();
    for _ in 0..count {
        match client.receiver.receive(&client.socket).unwrap() {
            Received::Message(reply) => assert_eq!(reply.body.len(), 16 + data.len()),
            other => panic!("{other:?}"),
        }
    }
}

criterion_group!(benches, codec, transport);
criterion_main!(benches);
