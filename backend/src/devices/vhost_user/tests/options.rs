//! What an operator may get wrong.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::bench::{Bench, Place, bridge};
use super::fake::{Fake, PATIENCE, Traits};
use crate::config::DeviceSpec;
use crate::devices::Registry;
use crate::devices::virtio::spec::feature;

/// The one line that an operator gets.
fn refusal(text: &str, traits: Traits) -> String {
    let place = Place::new();
    let _fake = Fake::start(&place.socket, traits);
    let error = bridge(text, &place, PATIENCE).unwrap_err().to_string();
    error.replace(&place.socket.display().to_string(), "SOCKET")
}

#[test]
fn parameters_that_cannot_be_used_are_named_with_the_reason() {
    let rows = [
        (
            "type=floppy",
            "parameter 'type': 'floppy' is none of blk, console, crypto, fs, gpio, gpu, \
                         i2c, input, net, rng, scsi, sound, vsock",
        ),
        ("queues=1", "parameter 'type' is missing"),
        ("type=blk,queues=0", "parameter 'queues': 0 is not 1 to 128"),
        ("type=blk,queues=129", "parameter 'queues': 129 is not 1 to 128"),
        ("type=net,queues=2", "parameter 'queues': 2 is not 1, and net has no more"),
        ("type=blk,queue-size=3", "parameter 'queue-size': 3 is no power of two from 2 to 1024"),
        (
            "type=blk,queue-size=65536",
            "parameter 'queue-size': 65536 is no power of two from 2 to 1024",
        ),
        ("type=fs,tag=", "parameter 'tag': '' has 0 bytes, not 1 to 36"),
        ("type=vsock,guest-cid=2", "parameter 'guest-cid': 2 is not 3 to 4294967294"),
        (
            "type=net,mac=52:54:00:01:02",
            "parameter 'mac': '52:54:00:01:02' is no address such as \
                                         52:54:00:12:34:56",
        ),
        (
            "type=net,mac=01:54:00:01:02:03",
            "parameter 'mac': '01:54:00:01:02:03' is no address such \
                                            as 52:54:00:12:34:56",
        ),
        (
            "type=net,mac=+1:54:00:01:02:03",
            "parameter 'mac': '+1:54:00:01:02:03' is no address such \
                                            as 52:54:00:12:34:56",
        ),
        ("type=blk,tag=share", "unknown parameter 'tag'"),
        ("type=blk,colour=red", "unknown parameter 'colour'"),
    ];
    for (text, line) in rows {
        assert_eq!(refusal(text, Traits::disk()), line);
    }
}

#[test]
fn a_daemon_that_will_not_do_is_refused_at_the_start() {
    let rows = [
        ("type=blk,queues=5", Traits::disk(), "the daemon has fewer queues than queues= says"),
        (
            "type=blk,queues=2",
            Traits::disk().without(Protocol::MQ),
            "the daemon has one queue, and queues= says more",
        ),
        (
            "type=blk",
            Traits::disk().without(Protocol::CONFIG),
            "the daemon has no configuration to give",
        ),
        (
            "type=fs",
            Traits::disk().without(Protocol::CONFIG),
            "the daemon does not know its tag: tag= must say it",
        ),
        (
            "type=vsock",
            Traits::disk().without(Protocol::CONFIG),
            "the daemon does not know the guest's address: guest-cid= must say it",
        ),
        (
            "type=blk",
            Traits { features: Traits::disk().features & !feature::VERSION_1, ..Traits::disk() },
            "the daemon does not know virtio 1",
        ),
    ];
    for (text, traits, line) in rows {
        assert_eq!(refusal(text, traits), format!("parameter 'socket': SOCKET: {line}"));
    }
}

#[test]
fn a_daemon_that_is_not_there_is_one_clear_line() {
    let place = Place::new();
    let spec = format!("vhost-user,type=blk,socket={}", place.socket.display());
    let error = Registry::default().create(spec.parse::<DeviceSpec>().unwrap()).err().unwrap();
    let line = format!(
        "parameter 'socket': {}: No such file or directory (os error 2)",
        place.socket.display()
    );
    assert_eq!(error.to_string(), line);

    let spec = "vhost-user,type=blk".parse::<DeviceSpec>().unwrap();
    let error = Registry::default().create(spec).err().unwrap();
    assert_eq!(error.to_string(), "parameter 'socket' is missing");
}

#[test]
fn every_type_has_the_queues_of_its_specification() {
    let rows = [
        ("blk,queues=3", 3),
        ("console", 2),
        ("crypto", 2),
        ("fs,queues=2,tag=share", 3),
        ("gpio", 2),
        ("gpu", 2),
        ("i2c", 1),
        ("input", 2),
        ("net", 2),
        ("rng", 1),
        ("scsi", 3),
        ("sound", 4),
        ("vsock,guest-cid=3", 3),
    ];
    for (text, queues) in rows {
        let place = Place::new();
        let traits = Traits { config: vec![0; 256], ..Traits::disk() };
        let _fake = Fake::start(&place.socket, traits);
        let mut bench = Bench::new(&format!("type={text}"), &place);
        assert_eq!(bench.queues(), queues, "{text}");
    }
}

#[test]
fn the_registry_knows_the_bridge_by_its_name() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket, Traits::disk());
    let spec = format!("vhost-user,type=blk,socket={},decode=always", place.socket.display());
    let (device, _) = Registry::default().create(spec.parse::<DeviceSpec>().unwrap()).unwrap();
    assert_eq!(device.spec().ids.device, 0x1042);
}
