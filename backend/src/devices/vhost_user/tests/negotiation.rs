//! What driver and daemon get to know of each other.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::bench::{Bench, Place, disk};
use super::fake::{Fake, HAS_PROTOCOL, Traits};
use crate::devices::virtio::spec::{feature, status};

const RO: u64 = 1 << 5;
const PACKED: u64 = 1 << 34;
const NOTIFICATION_DATA: u64 = 1 << 38;
const LOG_ALL: u64 = 1 << 26;

fn offered(text: &str, features: u64) -> u64 {
    let place = Place::new();
    let traits =
        Traits { features: feature::VERSION_1 | HAS_PROTOCOL | features, ..Traits::disk() };
    let _fake = Fake::start(&place.socket, traits);
    Bench::new(text, &place).offered()
}

#[test]
fn a_driver_is_offered_what_the_daemon_knows_and_the_transport_can_pass_on() {
    let always = feature::VERSION_1 | feature::ACCESS_PLATFORM;
    let rows = [
        ("type=blk", 0, 0),
        ("type=blk", RO | 1 << 9 | feature::EVENT_IDX, RO | 1 << 9 | feature::EVENT_IDX),
        ("type=blk", feature::INDIRECT_DESC, feature::INDIRECT_DESC),
        ("type=blk", feature::RING_RESET, feature::RING_RESET),
        // Their fields lie behind the configuration that daemons have.
        ("type=blk", 1 << 16 | 1 << 17, 0),
        ("type=blk", LOG_ALL | PACKED | NOTIFICATION_DATA, 0),
        // A control queue and many pairs, which are not the daemon's.
        ("type=net", 1 << 15 | 1 << 17 | 1 << 22 | 1 << 3 | 1 << 60, 1 << 15),
        ("type=net", 1 << 5, 0),
        ("type=net,mac=52:54:00:01:02:03", 0, 1 << 5),
        ("type=console", 0b11, 0b01),
    ];
    for (text, daemon, driver) in rows {
        assert_eq!(offered(text, daemon), always | driver, "{text} {daemon:#x}");
    }
}

#[test]
fn the_daemon_is_told_what_the_driver_accepted_and_nothing_that_is_not_its_business() {
    let (bench, fake, _place) = disk(Traits::disk());
    let expected = feature::VERSION_1 | feature::EVENT_IDX | 1 << 9 | 1 << 11 | HAS_PROTOCOL;
    assert_eq!(fake.state().features, Some(expected));
    drop(bench);
}

#[test]
fn only_what_the_daemon_knows_of_the_protocol_is_used() {
    let known = Traits::disk().with(Protocol::LOG_SHMFD | Protocol::INBAND_NOTIFICATIONS);
    let (_bench, fake, _place) = disk(known);
    let agreed = fake.state().protocol.unwrap();
    assert!(agreed.contains(Protocol::REPLY_ACK | Protocol::CONFIG | Protocol::INFLIGHT_SHMFD));
    assert!(!agreed.intersects(Protocol::LOG_SHMFD | Protocol::INBAND_NOTIFICATIONS));
    assert_eq!(fake.heard(FrontendReq::SET_STATUS), 0);
    assert_eq!(fake.heard(FrontendReq::GET_MAX_MEM_SLOTS), 1);
}

#[test]
fn a_daemon_that_acknowledges_nothing_is_served_as_well() {
    let few = Traits::disk().without(Protocol::all()).with(Protocol::CONFIG | Protocol::MQ);
    let (mut bench, fake, _place) = disk(few);
    assert_eq!(fake.state().running(), [0, 1]);
    assert_eq!(fake.heard(FrontendReq::GET_INFLIGHT_FD), 0);
    assert_eq!(fake.heard(FrontendReq::SET_MEM_TABLE), 1);
    assert!(!bench.needs_reset());
}

#[test]
fn a_daemon_without_protocol_features_has_its_rings_enabled_from_the_start() {
    let place = Place::new();
    let traits = Traits { features: feature::VERSION_1, ..Traits::disk() };
    let fake = Fake::start(&place.socket, traits);
    let mut bench = Bench::new("type=rng", &place);
    bench.drive();
    assert_eq!(fake.heard(FrontendReq::GET_PROTOCOL_FEATURES), 0);
    assert_eq!(fake.heard(FrontendReq::SET_VRING_ENABLE), 0);
    assert_eq!(fake.heard(FrontendReq::SET_VRING_KICK), 1);
    assert_eq!(fake.state().features, Some(feature::VERSION_1));
}

#[test]
fn a_daemon_that_wants_the_drivers_status_gets_it() {
    let (mut bench, fake, _place) = disk(Traits::disk().with(Protocol::STATUS));
    let found = u64::from(status::ACKNOWLEDGE | status::DRIVER);
    let agreed = found | u64::from(status::FEATURES_OK);
    let ready = agreed | u64::from(status::DRIVER_OK);
    assert_eq!(fake.state().status, [found, agreed, ready]);
    bench.set_status(0);
    assert_eq!(fake.state().status.last(), Some(&0));
}

#[test]
fn a_reset_reaches_a_daemon_that_knows_resets() {
    let (mut bench, fake, _place) = disk(Traits::disk().with(Protocol::RESET_DEVICE));
    fake.listen();
    bench.set_status(0);
    let heard = fake.state().heard.clone();
    let stop = heard.iter().position(|heard| *heard == FrontendReq::GET_VRING_BASE).unwrap();
    let reset = heard.iter().position(|heard| *heard == FrontendReq::RESET_DEVICE).unwrap();
    assert!(stop < reset, "{heard:?}");
    assert_eq!(fake.heard(FrontendReq::GET_VRING_BASE), 2);
}

#[test]
fn a_driver_that_comes_after_a_reset_is_served_from_the_start() {
    let (mut bench, fake, _place) = disk(Traits::disk().with(Protocol::RESET_DEVICE));
    bench.send(0, b"one");
    assert_eq!(fake.take(0), Some(0));
    fake.give_back(0, 0);
    bench.set_up(feature::VERSION_1);
    assert_eq!(fake.state().features, Some(feature::VERSION_1 | HAS_PROTOCOL));
    assert_eq!(fake.state().vrings[&0].base, 0);
    assert_eq!(fake.heard(FrontendReq::GET_INFLIGHT_FD), 2, "nothing of the last one is in flight");
}
