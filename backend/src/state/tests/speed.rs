use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::{fresh, memfd};
use crate::state::{Activity, Commit, Frame, SectionId, StreamId};

/// What this thread has used of a processor: others may use it as well.
fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap()
}

/// `cargo test --release -p barkeep-backend --lib -- --ignored --nocapture costs`
#[test]
#[ignore = "prints times"]
fn what_a_turn_costs() {
    const TURNS: u32 = 200_000;
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let mut journal = fresh(&memfd());
    let section = [7; 200];
    let time = |name: &str, turn: &mut dyn FnMut()| {
        (0..1000).for_each(|_| turn());
        let start = now();
        (0..TURNS).for_each(|_| turn());
        println!("{name}: {} ns", (now() - start).as_nanos() / u128::from(TURNS));
    };
    let mut commit = |sections: &[(SectionId, &[u8])]| {
        let frame = Frame { bytes: &[1; 32], keys: &[] };
        journal.begin(Activity::Message(StreamId::Client));
        let send = [(StreamId::Client, frame)];
        journal.commit(Commit { sections, taken: Some(StreamId::Client), send: &send });
        black_box(journal.clear_session());
    };
    time("a reply of 32 bytes, and the end of its session", &mut || commit(&[]));
    time("the same with a section of 200 bytes", &mut || {
        commit(&[(SectionId::Function, &section)])
    });

    let mut bytes = [0; 32];
    time("a request of 32 bytes, plainly", &mut || {
        peer.write_all(&bytes).unwrap();
        (&socket).read_exact(&mut bytes).unwrap();
        (&socket).write_all(&bytes).unwrap();
        peer.read_exact(&mut bytes).unwrap();
    });
    let mut received = Vec::new();
    time("a request of 32 bytes, as a turn", &mut || {
        peer.write_all(&bytes).unwrap();
        let mut client = journal.stream(StreamId::Client);
        assert_eq!(client.peek(&socket, 4096).unwrap().bytes.len(), 32);
        client.take(&socket, 32).unwrap();
        client.copy_received(&mut received);
        journal.begin(Activity::Message(StreamId::Client));
        let send = [(StreamId::Client, Frame { bytes: &received, keys: &[] })];
        journal.commit(Commit { sections: &[], taken: Some(StreamId::Client), send: &send });
        journal.stream(StreamId::Client).send(&socket, &[]).unwrap();
        peer.read_exact(&mut bytes).unwrap();
    });
}
