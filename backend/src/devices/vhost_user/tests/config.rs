//! The device's configuration.

use std::io::{Read, Write};

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::bench::{Bench, Place, disk};
use super::fake::{Fake, PATIENCE, Traits, message};
use crate::devices::Device;

const CONFIG_CHANGE: u32 = 2;
const NEED_REPLY: u32 = 1 << 3;

fn bench(text: &str, traits: Traits) -> (Bench, Fake, Place) {
    let place = Place::new();
    let fake = Fake::start(&place.socket, traits);
    let bench = Bench::new(text, &place);
    (bench, fake, place)
}

#[test]
fn a_disks_configuration_is_the_daemons_with_the_number_of_queues_of_ours() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let mut expected = fake.config();
    expected[34..36].copy_from_slice(&2_u16.to_le_bytes());
    assert_eq!(bench.config(0, 60), expected);
    assert_eq!(bench.config(56, 8), [0; 8], "zeros behind the end");
}

#[test]
fn what_the_daemon_does_not_know_is_made_here() {
    let without = || Traits::disk().without(Protocol::CONFIG);
    let (mut fs, ..) = bench("type=fs,tag=share,queues=2", without());
    assert_eq!(fs.config(0, 6), *b"share\0");
    assert_eq!(fs.config(36, 4), 2_u32.to_le_bytes());

    let (mut vsock, ..) = bench("type=vsock,guest-cid=77", without());
    assert_eq!(vsock.config(0, 8), 77_u64.to_le_bytes());

    let (mut net, ..) = bench("type=net,mac=52:54:00:0a:0b:0c", Traits::disk());
    assert_eq!(net.config(0, 10), [0x52, 0x54, 0, 0xa, 0xb, 0xc, 1, 0, 1, 0]);

    let (mut scsi, ..) = bench("type=scsi,queues=2", without());
    assert_eq!(scsi.config(0, 8), [2, 0, 0, 0, 126, 0, 0, 0]);
    assert_eq!(scsi.config(28, 8), [0, 0, 255, 0, 0xff, 0x3f, 0, 0]);
}

#[test]
fn a_tag_of_the_operators_goes_before_the_daemons() {
    let mut traits = Traits::disk();
    traits.config[..6].copy_from_slice(b"theirs");
    let (mut asked, ..) = bench("type=fs", traits.clone());
    assert_eq!(asked.config(0, 7), *b"theirs\0");
    let (mut told, ..) = bench("type=fs,tag=ours", traits);
    assert_eq!(told.config(0, 7), *b"ours\0\0\0");
}

#[test]
fn a_field_that_a_driver_may_write_is_written_by_the_daemon() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    bench.write_config(32, &[1]);
    assert_eq!(fake.config()[32], 1);
    assert_eq!(bench.config(32, 1), [1]);
    assert_eq!(bench.signals(0), 0, "the driver knows");

    fake.listen();
    for (offset, data) in [(0, &[1_u8; 8][..]), (31, &[1, 1]), (32, &[1, 1]), (4095, &[1])] {
        bench.write_config(offset, data);
    }
    assert_eq!(fake.heard(FrontendReq::SET_CONFIG), 0, "no other field");
}

#[test]
fn a_change_that_the_daemon_tells_of_reaches_the_driver() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let mut channel = fake.state().channel.as_ref().unwrap().try_clone().unwrap();
    let mut generation = [0];
    bench.read(0x15, &mut generation);

    fake.change_config(0, &128_u64.to_le_bytes());
    channel.write_all(&message(CONFIG_CHANGE, 1 | NEED_REPLY, &[])).unwrap();
    bench.serve_until(|bench| bench.signals(0) > 0);
    assert_eq!(bench.config(0, 8), 128_u64.to_le_bytes());
    let mut later = [0];
    bench.read(0x15, &mut later);
    assert_ne!(later, generation);
    let mut reply = [0; 20];
    channel.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..], message(CONFIG_CHANGE, 5, &[0; 8])[..]);
}

#[test]
fn a_daemon_that_asks_for_something_else_is_told_no() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let mut channel = fake.state().channel.as_ref().unwrap().try_clone().unwrap();
    channel.set_nonblocking(true).unwrap();
    channel.write_all(&message(9, 1 | NEED_REPLY, &[0; 40])).unwrap();
    let mut reply = [0; 20];
    bench.serve_until(|_| channel.read(&mut reply).is_ok());
    assert_eq!(reply[..], message(9, 5, &1_u64.to_ne_bytes())[..]);
    assert_eq!(bench.signals(0), 0);
}

/// The daemon has one thread, which waits for our answer before it gives its own.
#[test]
fn a_daemon_that_waits_for_an_answer_gets_it_while_it_is_asked() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    let mut channel = fake.state().channel.as_ref().unwrap().try_clone().unwrap();
    let (asked, answered) = std::sync::mpsc::channel();
    let daemon = fake.state();
    let thread = std::thread::spawn(move || {
        channel.write_all(&message(CONFIG_CHANGE, 1 | NEED_REPLY, &[])).unwrap();
        channel.read_exact(&mut [0; 20]).unwrap();
        asked.send(()).unwrap();
    });
    // The daemon serves nothing while its state is held.
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| bench.command(false));
        answered.recv_timeout(PATIENCE).unwrap();
        drop(daemon);
        asking.join().unwrap();
    });
    assert_eq!(fake.state().running(), [] as [u32; 0]);
    thread.join().unwrap();
}

#[test]
fn an_operators_reload_asks_the_daemon_again() {
    let (mut bench, fake, _place) = disk(Traits::disk());
    fake.change_config(0, &256_u64.to_le_bytes());
    bench.reload();
    assert_eq!(bench.config(0, 8), 256_u64.to_le_bytes());
    assert_eq!(bench.signals(0), 1);
    bench.reload();
    assert_eq!(bench.signals(0), 0, "nothing changed");
    drop(bench.device.wakes());
}
