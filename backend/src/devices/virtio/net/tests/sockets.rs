//! UNIX datagram sockets.

use std::os::fd::AsRawFd;

use super::*;

fn driven(mut net: Net) -> (Net, Driver) {
    let features = features_of(&net);
    Core::<Memory>::start(&mut net, features);
    (net, Driver::new(3))
}

/// Has the device send a frame.
fn send(net: &mut Net, driver: &mut Driver) {
    driver.send(TRANSMIT, &[Part::Readable(&[&NO_HEADER[..], &frame(60)].concat())]);
    net.kicked(TRANSMIT, driver).unwrap();
    assert!(driver.used(TRANSMIT).is_some());
}

#[test]
fn without_a_peer_the_first_that_sends_something_is_one_until_it_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net");
    let (mut net, mut driver) = driven(device(&format!("socket={}", path.display())).unwrap());
    send(&mut net, &mut driver);
    assert_eq!(net.transmitters[0].lost, 1, "there is nobody yet");

    // Somebody without a name can send, but nobody can answer.
    UnixDatagram::unbound().unwrap().send_to(&frame(60), &path).unwrap();
    let mut peers = Vec::new();
    for name in ["first", "second"] {
        let peer = UnixDatagram::bind(directory.path().join(name)).unwrap();
        peer.send_to(&frame(60), &path).unwrap();
        peer.set_nonblocking(true).unwrap();
        peers.push(peer);
    }
    for _ in 0..4 {
        driver.send(RECEIVE, &[Part::Writable(100)]);
    }
    net.woken(PORT, &mut driver).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used(RECEIVE)).count(), 3, "all are heard");
    send(&mut net, &mut driver);
    let mut bytes = [0; 100];
    assert_eq!(peers[0].recv(&mut bytes).unwrap(), 60);
    assert!(peers[1].recv(&mut bytes).is_err());

    peers.remove(0);
    send(&mut net, &mut driver);
    assert_eq!(net.transmitters[0].lost, 2);
    peers[0].send_to(&frame(60), &path).unwrap();
    net.woken(PORT, &mut driver).unwrap();
    send(&mut net, &mut driver);
    assert_eq!(peers[0].recv(&mut bytes).unwrap(), 60);
}

#[test]
fn one_end_of_a_pair_can_be_inherited() {
    let (peer, ours) = UnixDatagram::pair().unwrap();
    let net = device(&format!("fd={}", ours.as_raw_fd())).unwrap();
    drop(ours);
    let (mut net, mut driver) = driven(net);
    send(&mut net, &mut driver);
    let mut bytes = [0; 100];
    assert_eq!(peer.recv(&mut bytes).unwrap(), 60);
    driver.send(RECEIVE, &[Part::Writable(100)]);
    peer.send(&frame(60)).unwrap();
    net.woken(PORT, &mut driver).unwrap();
    assert!(driver.used(RECEIVE).is_some());
    // Nobody is there any more, and that is no error and no endless loop.
    drop(peer);
    net.woken(PORT, &mut driver).unwrap();
    send(&mut net, &mut driver);
    assert_eq!(net.transmitters[0].lost, 1);
}

#[test]
fn a_socket_in_use_is_not_stolen_and_a_stale_one_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net");
    let parameters = format!("socket={}", path.display());
    let net = device(&parameters).unwrap();
    let refused = device(&parameters).unwrap_err();
    assert_eq!(
        refused,
        format!("parameter 'socket': {}: in use by another process", path.display())
    );
    drop(net);
    assert!(!path.exists(), "it is removed with the device");

    drop(UnixDatagram::bind(&path).unwrap());
    assert!(path.exists());
    let net = device(&parameters).unwrap();
    // What somebody else put there stays.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "theirs").unwrap();
    drop(net);
    assert!(path.exists());
    let refused = device(&parameters).unwrap_err();
    let expected = format!("parameter 'socket': {}: exists and is not a socket", path.display());
    assert_eq!(refused, expected);

    std::fs::remove_file(&path).unwrap();
    let _stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let refused = device(&parameters).unwrap_err();
    assert_eq!(
        refused,
        format!("parameter 'socket': {}: in use by another process", path.display())
    );
}
