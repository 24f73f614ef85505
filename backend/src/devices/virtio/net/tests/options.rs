//! What an operator may say, and the one line for what may not be said.

use super::*;

#[test]
fn a_parameter_that_can_not_be_used_is_told_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    let other = std::fs::File::open("/dev/null").unwrap();
    let other = std::os::fd::AsRawFd::as_raw_fd(&other);
    let long = "x".repeat(200);
    let one_of = "parameter 'tap': a device has exactly one of tap, socket and fd";
    let rows = [
        (String::new(), one_of.to_owned()),
        ("tap=a,socket=b".into(), one_of.into()),
        ("socket=a,fd=9".into(), one_of.into()),
        ("tap=a,fd=9".into(), one_of.into()),
        ("tap=absent0".into(), "parameter 'tap': absent0: there is no such interface".into()),
        (
            "tap=a-name-that-is-too-long".into(),
            "parameter 'tap': 'a-name-that-is-too-long' is no name of an interface".into(),
        ),
        ("tap=".into(), "parameter 'tap': '' is no name of an interface".into()),
        (
            format!("socket={path}/none/net"),
            format!("parameter 'socket': {path}/none/net: No such file or directory (os error 2)"),
        ),
        (
            format!("socket={path}/a,peer={long}"),
            format!("parameter 'peer': {long}: path must be shorter than SUN_LEN"),
        ),
        (
            "tap=absent0,peer=/x".into(),
            "parameter 'tap': absent0: there is no such interface".into(),
        ),
        ("fd=1".into(), "parameter 'fd': 1 is no descriptor that can be inherited".into()),
        (
            "fd=99999999999".into(),
            "parameter 'fd': 99999999999 is no descriptor that can be inherited".into(),
        ),
        ("fd=1000000".into(), "parameter 'fd': 1000000: Bad file descriptor (os error 9)".into()),
        (
            format!("fd={other}"),
            format!("parameter 'fd': {other}: neither a tap nor a UNIX datagram socket"),
        ),
        (
            format!("socket={path}/b,mac=01:00:5e:00:00:01"),
            "parameter 'mac': '01:00:5e:00:00:01' is not the address of one interface".into(),
        ),
        (
            format!("socket={path}/b,mac=00:00:00:00:00:00"),
            "parameter 'mac': '00:00:00:00:00:00' is not the address of one interface".into(),
        ),
        (
            format!("socket={path}/b,mac=52:54:00"),
            "parameter 'mac': '52:54:00' is not of the form 52:54:00:12:34:56".into(),
        ),
        (
            format!("socket={path}/b,mac=52:54:00:00:00:00:01"),
            "parameter 'mac': '52:54:00:00:00:00:01' is not of the form 52:54:00:12:34:56".into(),
        ),
        (
            format!("socket={path}/b,mac=52:54:00:00:00:+1"),
            "parameter 'mac': '52:54:00:00:00:+1' is not of the form 52:54:00:12:34:56".into(),
        ),
        (format!("socket={path}/b,mtu=67"), "parameter 'mtu': 67 is not from 68 to 65535".into()),
        (
            format!("socket={path}/b,mtu=65536"),
            "parameter 'mtu': 65536 is not from 68 to 65535".into(),
        ),
        (format!("socket={path}/b,queues=0"), "parameter 'queues': 0 is not from 1 to 16".into()),
        (format!("socket={path}/b,queues=17"), "parameter 'queues': 17 is not from 1 to 16".into()),
        (
            format!("socket={path}/b,queue-size=65536"),
            "parameter 'queue-size': 65536 is not from 2 to 32768".into(),
        ),
        (
            format!("socket={path}/b,queue-size=100"),
            "parameter 'queue-size': 100 is no power of two".into(),
        ),
        (
            format!("socket={path}/b,iops=0"),
            "parameter 'iops': 0 a second is nothing at all".into(),
        ),
        (format!("socket={path}/b,tap-name=x"), "unknown parameter 'tap-name'".into()),
    ];
    for (parameters, expected) in rows {
        let told = if parameters.is_empty() {
            Net::from_parameters(&mut Parameters::default()).unwrap_err().to_string()
        } else {
            device(&parameters).unwrap_err()
        };
        assert_eq!(told, expected, "{parameters}");
        assert!(!told.contains('\n'));
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn an_address_that_nobody_chose_is_local_and_of_one_interface() {
    let address = || Rig::new().net.config.mac;
    let (one, other) = (address(), address());
    assert_eq!(one.bytes()[0] & 3, 2);
    assert_ne!(one, other);
}
