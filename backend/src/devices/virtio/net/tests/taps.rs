//! Real taps, each test in a network namespace of its own.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::super::ioctl::{self, Interface, Named};
use super::*;

const NAME: &str = "bk0";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const EVERYBODY: Ipv4Addr = Ipv4Addr::new(10, 255, 255, 255);
/// `<linux/if_tun.h>`
const PLAIN: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const MANY: i32 = PLAIN | libc::IFF_MULTI_QUEUE;

/// Runs a test in a thread with a network of its own, in which there is nothing but a tap that was
/// made with these flags.
fn with_tap(flags: i32, test: impl FnOnce() + Send) {
    let run = || {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            return Some(format!("no network namespace: {errno}"));
        }
        if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
            return Some(format!("/dev/net/tun: {error}"));
        }
        let tap = attached(flags);
        ioctl::set_persistent(tap.as_fd()).unwrap();
        drop(tap);
        test();
        None
    };
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let skipped = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.clone()).spawn_scoped(scope, run);
        thread.unwrap().join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    if let Some(reason) = skipped {
        crate::skip::skip(reason);
    }
}

/// A descriptor that is attached to the tap.
fn attached(flags: i32) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let flags = u16::try_from(flags).unwrap();
    let mut request = Interface::new(NAME).unwrap().with_flags(flags);
    ioctl::interface(file.as_fd(), Named::SetInterface, &mut request).unwrap();
    file
}

/// The host gets an address on the tap, and uses it.
fn bring_up() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = Interface::new(NAME).unwrap().with_address(HOST);
    ioctl::interface(socket.as_fd(), Named::SetAddress, &mut request).unwrap();
    set_flags(u16::try_from(libc::IFF_UP).unwrap());
}

fn set_flags(flags: u16) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = Interface::new(NAME).unwrap().with_flags(flags);
    ioctl::interface(socket.as_fd(), Named::SetFlags, &mut request).unwrap();
}

fn started(parameters: &str, pairs: u16, features: u64) -> (Net, Driver) {
    let mut net = device(parameters).unwrap();
    let features = features_of(&net) & features;
    Core::<Memory>::start(&mut net, features);
    (net, Driver::new(2 * pairs + 1))
}

fn broadcaster() -> UdpSocket {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket
}

/// A datagram of the guest's to everybody, with any checksum.
fn datagram(port: u16, checksum: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = u16::try_from(8 + payload.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(EVERYBODY.octets());
    let sum = ones_complement(&ip);
    ip[10..12].copy_from_slice(&(!sum).to_be_bytes());
    let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 2], &[8, 0]].concat();
    frame.extend(ip);
    for field in [1234, port, udp_len, checksum] {
        frame.extend(field.to_be_bytes());
    }
    frame.extend(payload);
    frame
}

/// The sum of 16-bit words as IP adds them.
fn ones_complement(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// Whether the checksum of a UDP datagram is right: over its pseudo header, too.
fn checksum_is_right(frame: &[u8]) -> bool {
    let (ip, udp) = frame[14..].split_at(20);
    let mut bytes = ip[12..20].to_vec();
    bytes.extend([0, 17, udp[4], udp[5]]);
    bytes.extend(udp);
    ones_complement(&bytes) == 0xffff
}

/// What the driver got of a host's datagram with this payload: header and frame. The host's kernel
/// may have sent other frames.
fn received(net: &mut Net, driver: &mut Driver, payload: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let sent = driver.send(RECEIVE, &[Part::Writable(2000)]);
    let mut buffers = vec![sent];
    loop {
        net.woken(PORT, driver).unwrap();
        let (head, len) = driver.used(RECEIVE)?;
        let at = buffers.iter().find(|sent| sent.head == head).unwrap().addresses[0];
        let bytes = driver.bytes(at, usize::try_from(len).unwrap());
        if bytes.ends_with(payload) {
            let (header, frame) = bytes.split_at(header::SIZE);
            return Some((header.to_vec(), frame.to_vec()));
        }
        buffers.push(driver.send(RECEIVE, &[Part::Writable(2000)]));
    }
}

#[test]
fn a_host_and_a_guest_exchange_frames() {
    with_tap(PLAIN, || {
        let (mut net, mut driver) = started("tap=bk0", 1, u64::MAX);
        bring_up();
        broadcaster().send_to(b"from the host", (EVERYBODY, 9)).unwrap();
        let (header, frame) = received(&mut net, &mut driver, b"from the host").unwrap();
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(header[header::NUM_BUFFERS..], [1, 0]);

        let listener = UdpSocket::bind("0.0.0.0:0").unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let port = listener.local_addr().unwrap().port();
        let frame = datagram(port, 0, b"from the guest");
        driver.send(TRANSMIT, &[Part::Readable(&[&NO_HEADER[..], &frame].concat())]);
        net.kicked(TRANSMIT, &mut driver).unwrap();
        assert!(driver.used(TRANSMIT).is_some());
        let mut bytes = [0; 100];
        let (len, from) = listener.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..len], from.ip()), (&b"from the guest"[..], GUEST.into()));
        assert_eq!((net.transmitters[0].frames, net.transmitters[0].lost), (1, 0));
    });
}

#[test]
fn a_host_leaves_checksums_to_those_who_agreed_and_to_nobody_else() {
    with_tap(PLAIN, || {
        // The last is nonsense that a driver can agree to; checksums are left to it all the same.
        let odd = feature::GUEST_CSUM | feature::GUEST_ECN;
        for (features, partial) in [(u64::MAX, true), (!feature::GUEST_CSUM, false), (odd, true)] {
            let (mut net, mut driver) = started("tap=bk0", 1, features);
            assert_ne!(features_of(&net) & feature::GUEST_CSUM, 0);
            bring_up();
            broadcaster().send_to(b"from the host", (EVERYBODY, 9)).unwrap();
            let (header, frame) = received(&mut net, &mut driver, b"from the host").unwrap();
            assert_eq!(header[header::FLAGS] & header::NEEDS_CSUM != 0, partial);
            assert_eq!(checksum_is_right(&frame), !partial);
            // A reset takes it back.
            Core::<Memory>::reset(&mut net);
            Core::<Memory>::start(&mut net, 0);
            broadcaster().send_to(b"again", (EVERYBODY, 9)).unwrap();
            let (header, frame) = received(&mut net, &mut driver, b"again").unwrap();
            assert_eq!(header[header::FLAGS], 0);
            assert!(checksum_is_right(&frame));
        }
    });
}

#[test]
fn a_guest_leaves_checksums_to_the_host() {
    with_tap(PLAIN, || {
        let (mut net, mut driver) = started("tap=bk0", 1, u64::MAX);
        bring_up();
        let listener = UdpSocket::bind("0.0.0.0:0").unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut partial = NO_HEADER;
        partial[header::FLAGS] = header::NEEDS_CSUM;
        // csum_start and csum_offset.
        partial[6] = 34;
        partial[8] = 6;
        // The first is wrong and says nothing of it, so the host does not take it.
        for (header, payload) in [(NO_HEADER, b"wrong"), (partial, b"right")] {
            let frame = datagram(port, 0xbad, payload);
            driver.send(TRANSMIT, &[Part::Readable(&[&header[..], &frame].concat())]);
        }
        net.kicked(TRANSMIT, &mut driver).unwrap();
        let mut bytes = [0; 100];
        let len = listener.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"right");
    });
}

#[test]
fn a_host_spreads_frames_over_the_pairs_that_are_used() {
    with_tap(MANY, || {
        let (mut net, mut driver) = started("tap=bk0,queues=2", 2, u64::MAX);
        bring_up();
        let hosts: Vec<_> = (0..40).map(|_| broadcaster()).collect();
        let flood = || {
            for host in &hosts {
                host.send_to(b"hello", (EVERYBODY, 9)).unwrap();
            }
        };
        let count = |net: &mut Net, driver: &mut Driver| {
            [0, 1].map(|pair| {
                for _ in 0..60 {
                    driver.send(2 * pair, &[Part::Writable(200)]);
                }
                let wake = PORT + usize::from(pair);
                net.woken(wake, driver).unwrap();
                std::iter::from_fn(|| driver.used(2 * pair)).count()
            })
        };
        flood();
        let [first, second] = count(&mut net, &mut driver);
        assert!(first >= hosts.len() && second == 0, "{first} {second}");

        net.obey(Command::SetPairs(2));
        flood();
        let [first, second] = count(&mut net, &mut driver);
        assert!(first > 0 && second > 0 && first + second >= hosts.len(), "{first} {second}");

        net.obey(Command::SetPairs(1));
        flood();
        let [first, second] = count(&mut net, &mut driver);
        assert!(first >= hosts.len() && second == 0, "{first} {second}");
    });
}

#[test]
fn a_host_with_much_to_send_lets_others_have_their_turn() {
    with_tap(PLAIN, || {
        let (mut net, mut driver) = started("tap=bk0", 1, u64::MAX);
        bring_up();
        let host = broadcaster();
        for _ in 0..=TURN {
            host.send_to(b"hello", (EVERYBODY, 9)).unwrap();
        }
        for _ in 0..3 * TURN {
            driver.send(RECEIVE, &[Part::Writable(200)]);
        }
        net.woken(PORT, &mut driver).unwrap();
        assert_eq!(std::iter::from_fn(|| driver.used(RECEIVE)).count(), TURN);
        assert!(is_signalled(&net.more));
        net.woken(MORE, &mut driver).unwrap();
        assert!(driver.used(RECEIVE).is_some());
        assert!(!is_signalled(&net.more));
    });
}

#[test]
fn a_tap_that_is_down_loses_frames() {
    with_tap(PLAIN, || {
        let (mut net, mut driver) = started("tap=bk0", 1, u64::MAX);
        bring_up();
        set_flags(0);
        driver.send(TRANSMIT, &[Part::Readable(&[&NO_HEADER[..], &frame(60)].concat())]);
        net.kicked(TRANSMIT, &mut driver).unwrap();
        assert!(driver.used(TRANSMIT).is_some());
        assert_eq!(net.transmitters[0].lost, 1);
        net.woken(PORT, &mut driver).unwrap();
    });
}

#[test]
fn a_tap_can_be_inherited() {
    with_tap(PLAIN, || {
        let tap = attached(PLAIN);
        let (mut net, mut driver) = started(&format!("fd={}", tap.as_raw_fd()), 1, u64::MAX);
        assert_ne!(features_of(&net) & feature::HOST_TSO4, 0);
        drop(tap);
        bring_up();
        broadcaster().send_to(b"from the host", (EVERYBODY, 9)).unwrap();
        assert!(received(&mut net, &mut driver, b"from the host").is_some());
        drop(net);

        let bare = attached(libc::IFF_TAP | libc::IFF_NO_PI);
        let fd = bare.as_raw_fd();
        let reason = "the tap is not of the kind IFF_TAP, IFF_NO_PI, IFF_VNET_HDR";
        let refused = device(&format!("fd={fd}")).unwrap_err();
        assert_eq!(refused, format!("parameter 'fd': {fd}: {reason}"));
    });
}

#[test]
fn a_tap_that_can_not_be_used_is_told_in_one_line() {
    let told = |parameters: &str| device(parameters).unwrap_err();
    with_tap(PLAIN, || {
        assert_eq!(told("tap=lo"), "parameter 'tap': lo: no tap");
        let several = "parameter 'tap': bk0: no tap with several queues (multi_queue)";
        assert_eq!(told("tap=bk0,queues=2"), several);
        let _net = device("tap=bk0").unwrap();
        assert_eq!(told("tap=bk0"), "parameter 'tap': bk0: in use by another process");
    });
    with_tap(MANY, || {
        // One pair is enough for a tap that could have more.
        assert!(device("tap=bk0").is_ok());
        assert!(device("tap=bk0,queues=16").is_ok());
    });
}
