//! The network device, with a driver in front and a socket or a tap behind.

mod control;
mod options;
mod random;
mod receive;
mod recovery;
mod sockets;
mod taps;
mod transmit;
mod turns;

use std::os::unix::net::UnixDatagram;

use tempfile::TempDir;

use super::spec::{feature, header};
use super::*;
use crate::config::DeviceSpec;
use crate::devices::virtio::testing::{Driver, Memory, Part, Sent};

/// A device over a socket, its driver and its peer.
struct Rig {
    net: Net,
    driver: Driver,
    peer: UnixDatagram,
    directory: TempDir,
}

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;
/// The wake of the first port of a device without limits.
const PORT: usize = 1;
const NO_HEADER: [u8; header::SIZE] = [0; header::SIZE];

impl Rig {
    /// With all features, and one pair of queues.
    fn new() -> Self {
        Self::with("", 1, u64::MAX)
    }

    /// With further parameters (`,key=value`), so many pairs, and the features of a mask.
    fn with(parameters: &str, pairs: u16, features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        let peer = UnixDatagram::bind(directory.path().join("peer")).unwrap();
        peer.set_nonblocking(true).unwrap();
        let text = format!("socket={path}/net,peer={path}/peer,queues={pairs}{parameters}");
        let mut net = device(&text).unwrap();
        let offered = features_of(&net);
        Core::<Memory>::start(&mut net, offered & features);
        Self { net, driver: Driver::new(2 * pairs + 1), peer, directory }
    }

    /// Has the peer send a frame.
    fn deliver(&self, frame: &[u8]) {
        self.peer.send_to(frame, self.directory.path().join("net")).unwrap();
    }

    fn kick(&mut self, queue: u16) {
        self.net.kicked(queue, &mut self.driver).unwrap();
    }

    fn wake(&mut self, wake: usize) {
        self.net.woken(wake, &mut self.driver).unwrap();
    }

    /// Has the driver send a frame in one buffer.
    fn send(&mut self, header: [u8; header::SIZE], frame: &[u8]) -> Sent {
        self.driver.send(TRANSMIT, &[Part::Readable(&[&header, frame].concat())])
    }

    /// What the peer gets next.
    fn arrived(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let len = self.peer.recv(&mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }
}

/// A device as an operator describes it.
fn device(parameters: &str) -> Result<Net, String> {
    let mut spec: DeviceSpec = format!("virtio-net,{parameters}").parse().unwrap();
    let net = Net::from_parameters(&mut spec.parameters).map_err(|error| error.to_string())?;
    spec.parameters.finish().map_err(|error| error.to_string())?;
    Ok(net)
}

fn features_of(net: &Net) -> u64 {
    Core::<Memory>::features(net)
}

/// A frame of so many bytes, each different from its neighbours.
fn frame(len: usize) -> Vec<u8> {
    let bytes = (0..len).map(|index| u8::try_from(index % 251).unwrap());
    bytes.collect()
}

/// What the driver finds in front of a frame in so many buffers.
fn in_buffers(buffers: u8) -> [u8; header::SIZE] {
    let mut header = NO_HEADER;
    header[header::NUM_BUFFERS] = buffers;
    header
}

fn is_signalled(fd: &impl AsFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&zero)).unwrap() == 1
}

#[test]
fn the_configuration_has_the_address_the_link_the_pairs_and_the_mtu() {
    let rig = Rig::with(",mac=52:54:00:ab:cd:ef,mtu=9000", 3, u64::MAX);
    let mut data = [0; 14];
    Core::<Memory>::config_read(&rig.net, 0, &mut data);
    let expected = [0x52, 0x54, 0, 0xab, 0xcd, 0xef, 1, 0, 3, 0, 0x28, 0x23, 0, 0];
    assert_eq!(data, expected);
    let mut data = [0; 4];
    Core::<Memory>::config_read(&rig.net, 5, &mut data);
    assert_eq!(data, [0xef, 1, 0, 3]);
    Core::<Memory>::config_read(&rig.net, u64::MAX, &mut data);
    assert_eq!(data, [0xef, 1, 0, 3], "nothing lies there");
}

#[test]
fn what_is_offered_depends_on_the_parameters() {
    const ALWAYS: u64 = feature::MAC
        | feature::STATUS
        | feature::MRG_RXBUF
        | feature::CTRL_VQ
        | feature::CTRL_RX
        | feature::CTRL_MAC_ADDR;
    let rows =
        [("", 1, ALWAYS), (",mtu=68", 1, ALWAYS | feature::MTU), ("", 2, ALWAYS | feature::MQ)];
    for (parameters, pairs, expected) in rows {
        let rig = Rig::with(parameters, pairs, u64::MAX);
        assert_eq!(features_of(&rig.net), expected, "{parameters} {pairs}");
    }
    let rig = Rig::with(",queue-size=512", 2, u64::MAX);
    assert_eq!(Core::<Memory>::queue_sizes(&rig.net), [512, 512, 512, 512, 64]);
}

#[test]
fn address_and_pairs_move() {
    let mut old = Rig::with("", 4, u64::MAX);
    old.net.obey(Command::SetPairs(3));
    old.net.obey(Command::SetMac("52:54:00:00:00:07".parse().unwrap()));
    let state = Core::<Memory>::save(&old.net);

    let mut new = Rig::with("", 4, u64::MAX);
    Core::<Memory>::restore(&mut new.net, &state).unwrap();
    assert_eq!(Core::<Memory>::save(&new.net), state);
    assert_eq!(new.net.driver.unwrap().pairs, 3);

    // Too many pairs; no driver; cut; more behind it.
    let longer = [&state[..], &[0]].concat();
    let mut idle = Rig::with("", 4, u64::MAX);
    Core::<Memory>::reset(&mut idle.net);
    let refused = [
        Core::<Memory>::restore(&mut Rig::with("", 2, u64::MAX).net, &state),
        Core::<Memory>::restore(&mut Rig::with("", 4, !feature::MQ).net, &state),
        Core::<Memory>::restore(&mut idle.net, &state),
        Core::<Memory>::restore(&mut new.net, &state[..state.len() - 1]),
        Core::<Memory>::restore(&mut new.net, &longer),
        Core::<Memory>::restore(&mut new.net, &[]),
    ];
    assert_eq!(refused, [Err(RestoreError); 6]);
    let idle = Core::<Memory>::save(&idle.net);
    let mut other = device(&format!("socket={}/other", new.directory.path().display())).unwrap();
    assert_eq!(Core::<Memory>::restore(&mut other, &idle), Ok(()));
    assert_eq!(Core::<Memory>::save(&other), idle);
}

#[test]
fn a_reset_brings_the_first_address_back_and_ends_all_traffic() {
    let mut rig = Rig::with(",mac=52:54:00:00:00:01", 1, u64::MAX);
    rig.net.obey(Command::SetMac("52:54:00:00:00:02".parse().unwrap()));
    rig.deliver(&frame(60));
    // It waits for buffers, and is not for the next driver.
    rig.wake(PORT);
    Core::<Memory>::reset(&mut rig.net);
    assert_eq!(rig.net.config.mac.to_string(), "52:54:00:00:00:01");

    rig.deliver(&frame(61));
    rig.driver.send(RECEIVE, &[Part::Writable(2000)]);
    rig.send(NO_HEADER, &frame(60));
    rig.kick(RECEIVE);
    rig.kick(TRANSMIT);
    rig.wake(PORT);
    assert_eq!((rig.driver.used(RECEIVE), rig.arrived()), (None, None), "there is no driver");

    let features = features_of(&rig.net);
    Core::<Memory>::start(&mut rig.net, features);
    rig.kick(RECEIVE);
    assert_eq!(rig.driver.used(RECEIVE), Some((0, 12 + 61)));
}
