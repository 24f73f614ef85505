//! Operators' mistakes with virtio devices, and images of which there is one owner.

use std::path::Path;
use std::process::Stdio;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;

use crate::process::{Sidecar, arguments, assert_refused, assert_refused_by, socket};

/// Checks the answers to specifications, in each of which `DIR` stands for a directory with the
/// files that they name.
fn assert_all_refused(rows: &[(&str, &str)], prepare: impl Fn(&Path)) {
    let (directory, path) = socket();
    prepare(directory.path());
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(directory.path())
            .expect("the directory")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        names
    };
    let before = names();
    for (spec, reason) in rows {
        let spec = spec.replace("DIR", &directory.path().display().to_string());
        assert_refused(&arguments(&[(&path, &spec)]), &[&format!("--device {spec}: "), reason]);
        assert_eq!(names(), before, "{spec} leaves something behind");
    }
}

fn write(path: &Path, length: usize) {
    std::fs::write(path, vec![0; length]).expect("a file");
}

#[test]
fn what_a_disk_cant_be_is_told() {
    let rows = [
        ("virtio-blk", "'path' is missing"),
        ("virtio-blk,path=DIR/missing", "No such file or directory"),
        ("virtio-blk,path=DIR/good/below", "Not a directory"),
        ("virtio-blk,path=DIR", "is a directory"),
        ("virtio-blk,path=DIR/fifo", "neither a file nor a block device"),
        ("virtio-blk,path=/dev/null", "neither a file nor a block device"),
        ("virtio-blk,path=DIR/empty", "is empty"),
        ("virtio-blk,path=DIR/odd", "1000 bytes, no multiple of 512"),
        ("virtio-blk,path=DIR/small,logical-block-size=4096", "512 bytes, no multiple of 4096"),
        ("virtio-blk,path=DIR/good,path=DIR/good", "'path' is given twice"),
        ("virtio-blk,path=DIR/good,readonly=yes", "'readonly': 'yes' is not on or off"),
        ("virtio-blk,path=DIR/good,readonly", "'readonly' is not of the form key=value"),
        ("virtio-blk,path=DIR/good,serial=123456789012345678901", "'serial': 21 bytes"),
        ("virtio-blk,path=DIR/good,serial=gr\u{fc}n", "'serial'"),
        ("virtio-blk,path=DIR/good,logical-block-size=1024", "'logical-block-size': '1024'"),
        ("virtio-blk,path=DIR/good,logical-block-size=0", "'logical-block-size': '0'"),
        ("virtio-blk,path=DIR/good,queues=0", "'queues': 0"),
        ("virtio-blk,path=DIR/good,queues=65", "'queues': 65"),
        ("virtio-blk,path=DIR/good,queues=many", "'queues': 'many' is no number"),
        ("virtio-blk,path=DIR/good,queue-size=100", "'queue-size': 100 is no power of two"),
        ("virtio-blk,path=DIR/good,queue-size=2", "'queue-size': 2"),
        ("virtio-blk,path=DIR/good,queue-size=65536", "'queue-size': 65536"),
        ("virtio-blk,path=DIR/good,cache=none", "'cache': 'none' is not writeback or writethrough"),
        ("virtio-blk,path=DIR/good,discard=1", "'discard': '1' is not on or off"),
        ("virtio-blk,path=DIR/good,aio=threads", "'aio': 'threads' is not io_uring or sync"),
        ("virtio-blk,path=DIR/good,iops=0", "'iops': 0"),
        ("virtio-blk,path=DIR/good,iops=-1", "'iops': '-1' is no number"),
        ("virtio-blk,path=DIR/good,bps=0", "'bps': 0"),
        ("virtio-blk,path=DIR/good,bps=fast", "'bps': 'fast' is no size"),
        ("virtio-blk,path=DIR/good,format=qcow2", "unknown parameter 'format'"),
        ("virtio-blk,path=DIR/good,decode=never", "'decode': 'never'"),
        ("virtio-blk,path=DIR/good,romfile=DIR/missing", "'romfile': "),
        ("virtio-block,path=DIR/good", "unknown device 'virtio-block' (known: edu, "),
    ];
    assert_all_refused(&rows, |directory| {
        for (name, length) in [("good", 4096), ("empty", 0), ("odd", 1000), ("small", 512)] {
            write(&directory.join(name), length);
        }
        let fifo = directory.join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    });
}

#[test]
fn what_a_network_device_cant_be_is_told() {
    let rows = [
        ("virtio-net", "exactly one of tap, socket and fd"),
        ("virtio-net,tap=a,socket=DIR/net", "exactly one of tap, socket and fd"),
        ("virtio-net,tap=a,fd=9", "exactly one of tap, socket and fd"),
        ("virtio-net,socket=DIR/net,fd=9", "exactly one of tap, socket and fd"),
        ("virtio-net,tap=absent0", "'tap': absent0: "),
        ("virtio-net,tap=an-interface-of-a-long-name", "is no name of an interface"),
        ("virtio-net,tap=", "is no name of an interface"),
        ("virtio-net,socket=DIR/missing/net", "No such file or directory"),
        ("virtio-net,socket=DIR/file", "exists and is not a socket"),
        ("virtio-net,socket=DIR", "exists and is not a socket"),
        ("virtio-net,socket=", "'socket'"),
        ("virtio-net,peer=DIR/peer", "exactly one of tap, socket and fd"),
        ("virtio-net,tap=absent0,peer=DIR/peer", "'"),
        ("virtio-net,fd=2", "'fd': 2 is no descriptor"),
        ("virtio-net,fd=999", "'fd': 999: "),
        ("virtio-net,fd=99999999999", "'fd': 99999999999 is no descriptor"),
        ("virtio-net,fd=stdin", "'fd': 'stdin' is no number"),
        ("virtio-net,socket=DIR/net,mac=52:54:00:12:34", "'mac': '52:54:00:12:34' is not of"),
        ("virtio-net,socket=DIR/net,mac=52:54:00:12:34:5x", "'mac': "),
        ("virtio-net,socket=DIR/net,mac=ff:ff:ff:ff:ff:ff", "not the address of one interface"),
        ("virtio-net,socket=DIR/net,mac=00:00:00:00:00:00", "not the address of one interface"),
        ("virtio-net,socket=DIR/net,mtu=10", "'mtu': 10 is not from"),
        ("virtio-net,socket=DIR/net,mtu=70000", "'mtu': 70000 is not from"),
        ("virtio-net,socket=DIR/net,queues=0", "'queues': 0 is not from"),
        ("virtio-net,socket=DIR/net,queues=1000", "'queues': 1000 is not from"),
        ("virtio-net,socket=DIR/net,queue-size=100", "'queue-size': 100 is no power of two"),
        ("virtio-net,socket=DIR/net,queue-size=0", "'queue-size': 0"),
        ("virtio-net,socket=DIR/net,bps=0", "'bps': 0"),
        ("virtio-net,socket=DIR/net,iops=x", "'iops': 'x' is no number"),
        ("virtio-net,socket=DIR/net,vhost=on", "unknown parameter 'vhost'"),
    ];
    assert_all_refused(&rows, |directory| write(&directory.join("file"), 1));
}

#[test]
fn what_an_entropy_device_or_a_console_cant_be_is_told() {
    let rows = [
        ("virtio-rng,max-bytes=0", "'max-bytes': 0 bytes"),
        ("virtio-rng,max-bytes=many,period=1", "'max-bytes': 'many' is no size"),
        ("virtio-rng,period=100", "'period': without max-bytes"),
        ("virtio-rng,max-bytes=64,period=0", "'period': 0"),
        ("virtio-rng,max-bytes=64,period=soon", "'period': 'soon' is no number"),
        ("virtio-rng,path=/dev/random", "unknown parameter 'path'"),
        ("virtio-console", "'socket': missing, and so is pty"),
        ("virtio-console,socket=DIR/console,pty=DIR/pty", "'pty': there is socket already"),
        ("virtio-console,socket=DIR/missing/console", "No such file or directory"),
        ("virtio-console,socket=DIR/file", "exists and is not a socket"),
        ("virtio-console,socket=", "'socket'"),
        ("virtio-console,pty=DIR/missing/pty", "No such file or directory"),
        ("virtio-console,pty=DIR/file", "'pty': "),
        ("virtio-console,pty=", "'pty'"),
        ("virtio-console,socket=DIR/console,baud=9600", "unknown parameter 'baud'"),
        ("virtio-console,pty=DIR/pty,baud=9600", "unknown parameter 'baud'"),
    ];
    assert_all_refused(&rows, |directory| write(&directory.join("file"), 1));
}

#[test]
fn an_image_has_one_writer_or_readers() {
    let (directory, path) = socket();
    let other = directory.path().join("other.sock");
    let image = directory.path().join("image");
    write(&image, 4096);
    let [writer, reader] =
        ["", ",readonly=on"].map(|mode| format!("virtio-blk,path={}{mode}", image.display()));
    for (first, second, both) in [
        (&writer, &writer, false),
        (&writer, &reader, false),
        (&reader, &writer, false),
        (&reader, &reader, true),
    ] {
        let sidecar = Sidecar::start(&[(&path, first)]);
        if both {
            let second = Sidecar::start(&[(&other, second)]);
            second.signal(Signal::TERM);
            assert_eq!(second.wait(), Some(0));
        } else {
            let words = [&format!("{}: in use", image.display())[..], "'path'"];
            // Each waits a while for the other to end: one command will do.
            assert_refused_by("serve", &arguments(&[(&other, second)]), &words);
        }
        // Whoever was refused has taken nothing away.
        sidecar.signal(Signal::TERM);
        assert_eq!(sidecar.wait(), Some(0));
    }
    // One process is no better than two.
    let twice = arguments(&[(&path, &writer), (&other, &writer)]);
    assert_refused(&twice, &["in use"]);
    assert!(!path.exists() && !other.exists());
}

#[test]
fn an_image_is_free_again_when_its_server_is_gone() {
    let (directory, path) = socket();
    let image = directory.path().join("image");
    write(&image, 4096);
    let spec = format!("virtio-blk,path={}", image.display());
    for signal in [Signal::TERM, Signal::KILL, Signal::INT, Signal::KILL] {
        let sidecar = Sidecar::start(&[(&path, &spec)]);
        sidecar.signal(signal);
        sidecar.wait();
    }
    drop(Sidecar::start(&[(&path, &spec)]));
}

#[test]
fn sockets_of_devices_are_of_one_owner_and_go_away_with_it() {
    let (directory, path) = socket();
    let other = directory.path().join("other.sock");
    let own = directory.path().join("own");
    for device in ["virtio-net,socket=", "virtio-console,socket=", "virtio-console,pty="] {
        let spec = format!("{device}{}", own.display());
        let sidecar = Sidecar::start(&[(&path, &spec)]);
        assert!(own.symlink_metadata().is_ok(), "{spec}");
        assert_refused(&arguments(&[(&other, &spec)]), &[&own.display().to_string()]);
        assert!(own.symlink_metadata().is_ok(), "{spec} is still the first one's");
        sidecar.signal(Signal::KILL);
        sidecar.wait();
        let sidecar = Sidecar::start_with(&[(&path, &spec)], &[], Stdio::piped());
        sidecar.signal(Signal::TERM);
        assert_eq!(sidecar.wait(), Some(0));
        assert!(own.symlink_metadata().is_err(), "{spec} is gone");
    }
}

#[test]
fn a_signal_to_look_anew_leaves_devices_that_have_nothing_to_look_at_alone() {
    let (directory, path) = socket();
    let other = directory.path().join("other.sock");
    let image = directory.path().join("image");
    write(&image, 4096);
    let spec = format!("virtio-blk,path={}", image.display());
    let sidecar = Sidecar::start(&[(&path, "edu"), (&other, &spec)]);
    std::fs::remove_file(&image).expect("the image");
    for _ in 0..3 {
        sidecar.signal(Signal::HUP);
        barkeep_tests::edu::assert_served(&path);
    }
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
}
