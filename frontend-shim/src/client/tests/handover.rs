//! Who reads, while somebody can't send.

use std::io::Write;

use rustix::net::{RecvFlags, recv};

use super::*;

/// So long that nothing but a missed wake-up takes it.
const MISSED: Duration = Duration::from_secs(5);

impl Server {
    /// Sends more than the sockets hold before it reads anything more.
    fn talks_first(&mut self) {
        let mut chatter = Frame::command(MessageId(1), Command::DmaWrite, vec![0; 1 << 20]);
        chatter.header.kind = MessageKind::Command { no_reply: true };
        for _ in 0..4 {
            let sent = (&self.socket)
                .write_all(&chatter.header.to_bytes())
                .and_then(|()| (&self.socket).write_all(&chatter.body));
            sent.unwrap();
        }
    }

    /// Until the client has begun to send.
    fn wait_for_data(&mut self) {
        let count = recv(&self.socket, &mut [0; 1][..], RecvFlags::PEEK).unwrap().0;
        assert_eq!(count, 1);
    }
}

#[test]
fn a_posted_write_that_can_not_be_sent_reads_what_keeps_the_backend_from_reading() {
    let script = serve("posted-talks-first", |server| {
        server.answer_version(&plain());
        server.wait_for_data();
        server.talks_first();
        assert_eq!(server.request().unwrap().body.len(), 16 + (1 << 20));
        server.drain();
    });
    let client = Client::connect(&script.path, MISSED).unwrap();
    client.region_write_posted(0, 0, &[0; 1 << 20]).unwrap();
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn a_thread_that_can_not_send_reads_when_the_one_that_read_stops() {
    let script = serve("left-alone", |server| {
        server.answer_version(&plain());
        server.wait_for_data();
        server.talks_first();
        let request = server.request().unwrap();
        server.send(Frame::reply(&request.header, request.body[..16].to_vec()));
        server.drain();
    });
    let client = Client::connect(&script.path, MISSED).unwrap();
    let reading = client.connection.try_read().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| client.region_write(0, 0, &[0; 1 << 20]).unwrap());
        // It waits for room in the socket, and for nothing else.
        while client.connection.turned_away() == 0 {
            std::thread::yield_now();
        }
        drop(reading);
    });
    drop(client);
    script.thread.join().unwrap();
}

#[test]
fn an_answer_that_has_come_counts_although_the_backend_is_gone_then() {
    let script = serve("last-words", |server| {
        server.answer_version(&plain());
        let request = server.request().unwrap();
        // It listens to nothing more, and wants an answer all the same.
        server.socket.shutdown(std::net::Shutdown::Read).unwrap();
        let body = [&request.body[..], &7u32.to_ne_bytes()].concat();
        server.sender.queue(Frame::reply(&request.header, body));
        server.send(Frame::command(MessageId(1), Command::DmaRead, vec![0; 16]));
    });
    let client = Client::connect(&script.path, MISSED).unwrap();
    assert_eq!(read(&client).unwrap(), 7);
    assert!(client.is_dead());
    script.thread.join().unwrap();
}
