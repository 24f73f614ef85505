use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::*;

impl Bench {
    /// A client that does not wait, and whether the device let it in is its own affair.
    fn connect(&mut self) -> OwnedFd {
        self.stream().into()
    }

    fn stream(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.settle();
        stream
    }
}

#[test]
fn what_the_guest_says_reaches_the_client() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    let parts = [Part::Readable(b"log"), Part::Readable(b"in: "), Part::Writable(4)];
    let sent = bench.driver.send(TRANSMIT, &parts);
    bench.kick(TRANSMIT);
    assert_eq!(bench.driver.used(TRANSMIT), Some((sent.head, 0)));
    assert!(bench.driver.interrupted(TRANSMIT));
    bench.say(b"");
    assert_eq!(bench.said(), 1);
    assert_eq!(read_exactly(&client, 7), b"login: ");
    assert!(is_quiet(&client));
}

#[test]
fn what_the_client_says_fills_the_buffers_that_the_guest_has() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    bench.listen(3);
    bench.listen(0);
    bench.listen(30);
    assert_eq!(bench.heard(), b"");
    rustix::io::write(&client, b"root\n").unwrap();
    bench.wait();
    assert_eq!(bench.heard(), b"root\n");
    assert!(bench.driver.interrupted(RECEIVE));
    rustix::io::write(&client, b"secret\n").unwrap();
    bench.settle();
    assert_eq!(bench.heard(), b"");
    bench.listen(30);
    assert_eq!(bench.heard(), b"secret\n");
}

#[test]
fn nothing_is_lost_to_a_client_that_reads_slowly() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    say_all_to_a_slow_peer(&mut bench, &client);
}

#[test]
fn nothing_is_lost_of_a_client_that_is_faster_than_the_guest() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    hear_all_of_a_fast_peer(&mut bench, &client);
}

#[test]
fn a_request_of_many_pieces_is_given_back_when_all_of_it_is_out() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    let expected = pattern(MEBIBYTE);
    bench.say(&expected);
    assert_eq!(bench.said(), 0);
    let (mut heard, mut said) = (Vec::new(), 0);
    while heard.len() < expected.len() {
        heard.extend(read(&client, MEBIBYTE));
        bench.settle();
        said += bench.said();
    }
    assert_eq!(said, 1);
    assert!(heard == expected);
}

#[test]
fn without_a_client_the_guest_goes_on() {
    let mut bench = Bench::new("socket");
    for _ in 0..10 {
        bench.say(&pattern(CHUNK));
    }
    assert_eq!(bench.said(), 10);
    let client = bench.connect();
    bench.say(b"now");
    assert_eq!(read_exactly(&client, 3), b"now");
}

#[test]
fn a_client_that_leaves_is_replaced_by_the_next() {
    let mut bench = Bench::new("socket");
    let first = bench.connect();
    let second = bench.connect();
    rustix::io::write(&second, b"second").unwrap();
    rustix::io::write(&first, b"first ").unwrap();
    bench.say(b"1");
    assert_eq!(read_exactly(&first, 1), b"1");
    bench.settle();
    drop(first);
    bench.wait();
    bench.say(b"2");
    assert_eq!(read_exactly(&second, 1), b"2");
    assert!(is_quiet(&second));
    // What the first had said was not forgotten.
    bench.listen(6);
    bench.listen(6);
    assert_eq!(bench.heard(), b"first second");
    drop(second);
    let third = bench.connect();
    bench.say(b"3");
    assert_eq!(read_exactly(&third, 1), b"3");
}

#[test]
fn a_client_that_has_no_more_to_say_still_hears() {
    let mut bench = Bench::new("socket");
    let client = bench.stream();
    rustix::io::write(&client, b"reboot\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    bench.listen(30);
    bench.listen(30);
    bench.settle();
    assert_eq!(bench.heard(), b"reboot\n");
    bench.say(b"bye");
    assert_eq!(read_exactly(&client, 3), b"bye");
    drop(client);
    let next = bench.connect();
    rustix::io::write(&next, b"hello").unwrap();
    bench.settle();
    assert_eq!(bench.heard(), b"hello");
}

#[test]
fn a_client_that_does_not_want_to_hear_is_replaced() {
    let mut bench = Bench::new("socket");
    let deaf = bench.stream();
    let next = bench.connect();
    deaf.shutdown(Shutdown::Read).unwrap();
    bench.say(b"lost");
    bench.wait();
    bench.say(b"heard");
    assert_eq!(bench.said(), 2);
    assert_eq!(read_exactly(&next, 5), b"heard");
}

#[test]
fn a_client_that_leaves_without_reading_holds_nothing_up() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    bench.say(&pattern(MEBIBYTE));
    bench.say(b"more");
    assert_eq!(bench.said(), 0);
    drop(client);
    bench.wait();
    assert_eq!(bench.said(), 2);
    let next = bench.connect();
    bench.say(b"hello");
    assert_eq!(read_exactly(&next, 5), b"hello");
}

#[test]
fn a_stopped_queue_forgets_what_waits_and_the_client_stays() {
    type Stop = fn(&mut dyn Core<Memory>);
    let stops: [Stop; 2] = [|device| device.reset(), |device| device.queue_stopped(TRANSMIT)];
    for stop in stops {
        let mut bench = Bench::new("socket");
        let client = bench.connect();
        bench.say(&pattern(MEBIBYTE));
        assert_eq!(bench.device.in_flight().len(), 1);
        bench.device.quiesce();
        stop(&mut *bench.device);
        assert_eq!(bench.device.in_flight(), []);
        // The guest starts anew, with other queues; what is out already is a part of the first.
        bench.driver = Driver::new(2);
        bench.device.start(0);
        bench.say(b"again");
        let mut heard = Vec::new();
        while !heard.ends_with(b"again") {
            bench.settle();
            heard.extend(read(&client, MEBIBYTE));
        }
        let before = heard.len() - 5;
        assert!(before < MEBIBYTE && heard[..before] == pattern(MEBIBYTE)[..before]);
        assert_eq!(bench.said(), 1);
    }
}

#[test]
fn a_request_in_flight_goes_on_in_another_instance_where_it_was() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    let expected = pattern(MEBIBYTE);
    let sent = bench.driver.send(TRANSMIT, &[Part::Readable(&expected)]);
    bench.kick(TRANSMIT);
    let mut heard = read_exactly(&client, 1000);
    bench.device.quiesce();
    let in_flight = bench.device.in_flight();
    assert_eq!(in_flight, [InFlight { queue: TRANSMIT, head: sent.head }]);
    let state = bench.device.save();

    let Bench { driver, device, .. } = bench;
    drop(device);
    loop {
        let more = read(&client, MEBIBYTE);
        if more.is_empty() {
            break;
        }
        heard.extend(more);
    }
    let mut other = Bench::new("socket");
    other.driver = driver;
    let client = other.connect();
    other.device.start(0);
    other.device.restore(&state).unwrap();
    other.device.resubmit(in_flight[0], &mut other.driver).unwrap();
    while heard.len() < expected.len() {
        heard.extend(read(&client, MEBIBYTE));
        other.settle();
    }
    assert!(heard == expected);
    assert_eq!(other.driver.used(TRANSMIT), Some((sent.head, 0)));
    assert_eq!(other.device.in_flight(), []);

    assert!(other.device.restore(&[0; 7]).is_err());
    let input = InFlight { queue: RECEIVE, head: 0 };
    assert!(other.device.resubmit(input, &mut other.driver).is_err());
}

#[test]
fn queues_that_can_not_be_served_are_left_alone() {
    let mut bench = Bench::new("socket");
    let client = bench.connect();
    bench.driver.paused = true;
    bench.say(b"later");
    bench.listen(5);
    rustix::io::write(&client, b"input").unwrap();
    bench.settle();
    assert_eq!((bench.said(), bench.heard()), (0, vec![]));
    bench.driver.paused = false;
    bench.kick(TRANSMIT);
    assert_eq!((bench.said(), bench.heard()), (1, b"input".to_vec()));
    assert_eq!(read_exactly(&client, 5), b"later");
}

#[test]
fn long_queues_are_served_in_turns() {
    let mut bench = Bench::new("socket");
    for _ in 0..200 {
        bench.driver.send(TRANSMIT, &[Part::Readable(b"x")]);
        bench.driver.send(RECEIVE, &[Part::Writable(0)]);
    }
    bench.kick(TRANSMIT);
    let heard = |bench: &mut Bench| std::iter::from_fn(|| bench.driver.used(RECEIVE)).count();
    assert_eq!((bench.said(), heard(&mut bench)), (TURN, TURN));
    bench.wait();
    assert_eq!((bench.said(), heard(&mut bench)), (200 - TURN, 200 - TURN));
    assert!(!bench.is_awake());
}

#[test]
fn an_emergency_write_needs_no_queue() {
    let mut bench = Bench::new("socket");
    assert_eq!(bench.device.features(), 1 << 2);
    let client = UnixStream::connect(&bench.path).unwrap();
    client.set_nonblocking(true).unwrap();
    rustix::io::write(&client, b"input").unwrap();
    for (offset, data) in
        [(8, &b"P"[..]), (8, b"A\0\0\0"), (0, &[0; 12]), (9, b"x"), (0, b"y"), (u64::MAX, b"z")]
    {
        bench.device.config_write(offset, data);
    }
    // What else there was to see is still to be seen.
    assert!(bench.is_awake());
    assert_eq!(read_exactly(&client, 3), b"PA\0");
    assert!(is_quiet(&client));
    bench.listen(5);
    assert_eq!(bench.heard(), b"input");
    let mut config = [0; 12];
    bench.device.config_read(0, &mut config);
    assert_eq!(config, [0; 12]);
}

#[test]
fn the_socket_has_one_owner_and_goes_with_it() {
    let bench = Bench::new("socket");
    let path = bench.path.clone();
    let text = format!(",socket={}", path.display());
    let expected = format!("parameter 'socket': {}: in use by another process", path.display());
    assert_eq!(parse(&text).unwrap_err(), expected);
    let Bench { device, _directory, .. } = bench;
    drop(device);
    assert!(!path.exists());
    parse(&text).unwrap();
}
