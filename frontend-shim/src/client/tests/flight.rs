//! Several requests on one socket.

use std::io::Write;

use super::*;

fn read_at(client: &Client, offset: u32) -> Result<u32, ClientError> {
    let mut data = [0xee; 4];
    client.region_read(0, offset.into(), &mut data).map(|()| u32::from_ne_bytes(data))
}

#[test]
fn replies_reach_the_threads_that_asked_in_whatever_order_they_come() {
    let script = serve("reversed", |server| {
        server.answer_version(&plain());
        let requests: Vec<_> = (0..3).map(|_| server.request().unwrap()).collect();
        // All were sent before any was answered.
        requests.iter().rev().for_each(|request| server.echo(request));
        server.drain();
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    std::thread::scope(|scope| {
        for offset in [8, 16, 24] {
            let client = &client;
            scope.spawn(move || assert_eq!(read_at(client, offset).unwrap(), offset));
        }
    });
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn many_threads_get_their_own_answers() {
    const THREADS: usize = 8;
    const ROUNDS: u32 = 200;
    let script = serve("many", |server| {
        server.answer_version(&plain());
        for round in 0..ROUNDS as usize {
            let mut requests: Vec<_> = (0..THREADS).map(|_| server.request().unwrap()).collect();
            requests.rotate_left(round % THREADS);
            requests.iter().rev().for_each(|request| server.echo(request));
        }
        server.drain();
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    let round = std::sync::Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for thread in (0..).take(THREADS) {
            let (client, round) = (&client, &round);
            scope.spawn(move || {
                for number in 0..ROUNDS {
                    let offset = thread << 16 | number;
                    assert_eq!(read_at(client, offset).unwrap(), offset);
                    round.wait();
                }
            });
        }
    });
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_refusal_reaches_the_thread_that_asked_and_no_other() {
    let script = serve("refusal", |server| {
        server.answer_version(&plain());
        for request in [server.request().unwrap(), server.request().unwrap()] {
            if request.body[0] == 8 {
                let header = request.header;
                server.send(Frame::error(header.id, header.command, Errno::PERM));
            } else {
                server.echo(&request);
            }
        }
        server.drain();
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| read_at(&client, 8));
        assert_eq!(read_at(&client, 16).unwrap(), 16);
        assert!(matches!(refused.join().unwrap(), Err(ClientError::Refused(Errno::PERM))));
    });
    assert!(!client.is_dead());
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_reply_that_nobody_waits_for_ends_the_session_of_all() {
    type Spoil = fn(&mut Server, Frame);
    let rows: [(&str, Spoil); 3] = [
        ("another command", |server, mut request| {
            request.header.command = Command::RegionWrite.code();
            server.echo(&request);
        }),
        ("another id", |server, mut request| {
            request.header.id.0 ^= 0x4000;
            server.echo(&request);
        }),
        ("twice", |server, request| {
            server.echo(&request);
            server.echo(&request);
        }),
    ];
    for (what, spoil) in rows {
        let script = serve("spoilt", move |server| {
            server.answer_version(&plain());
            let (request, _) = (server.request().unwrap(), server.request().unwrap());
            spoil(server, request);
            server.drain();
        });
        let client = Client::connect(&script.path, NEVER).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| read_at(&client, 8));
            let results = [read_at(&client, 16), other.join().unwrap()];
            assert!(results.iter().any(Result::is_err), "{what}");
            assert!(client.is_dead(), "{what}");
        });
        drop(client);
        script.thread.join().unwrap();
    }
}

#[test]
fn silence_ends_the_wait_of_all_threads() {
    let script = serve("all-silent", |server| {
        server.answer_version(&plain());
        server.drain();
    });
    let client = Client::connect(&script.path, Duration::from_millis(50)).unwrap();
    std::thread::scope(|scope| {
        for offset in [8, 16, 24] {
            let client = &client;
            scope.spawn(move || {
                let error = read_at(client, offset).unwrap_err();
                assert!(
                    matches!(
                        error,
                        ClientError::Deadline(_) | ClientError::Lost | ClientError::Gone
                    ),
                    "{error}"
                );
            });
        }
    });
    assert!(client.is_dead());
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_backend_that_does_not_read_costs_each_thread_its_deadline() {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let script = serve("deaf", move |server| {
        server.answer_version(&plain());
        let _ = held.recv();
    });
    let client = Client::connect(&script.path, Duration::from_millis(50)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let error = client.region_write(0, 0, &[0; 1 << 20]).unwrap_err();
                assert!(
                    matches!(
                        error,
                        ClientError::Deadline(_) | ClientError::Lost | ClientError::Gone
                    ),
                    "{error}"
                );
            });
        }
    });
    assert!(client.is_dead());
    drop(release);
    script.thread.join().unwrap();
}

#[test]
fn a_thread_that_can_not_send_reads_what_keeps_the_backend_from_reading() {
    let script = serve("talks-first", |server| {
        server.answer_version(&plain());
        // More than the sockets hold, before anything is read.
        let mut chatter = Frame::command(MessageId(1), Command::DmaWrite, vec![0; 1 << 20]);
        chatter.header.kind = MessageKind::Command { no_reply: true };
        for _ in 0..4 {
            (&server.socket).write_all(&chatter.header.to_bytes()).unwrap();
            (&server.socket).write_all(&chatter.body).unwrap();
        }
        let request = server.request().unwrap();
        server.send(Frame::reply(&request.header, request.body[..16].to_vec()));
        server.drain();
    });
    let client = Client::connect(&script.path, NEVER).unwrap();
    client.region_write(0, 0, &[0; 1 << 20]).unwrap();
    drop(client);
    script.thread.join().unwrap();
}
