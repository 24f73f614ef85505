//! What an operator may get wrong.

use std::os::unix::net::UnixListener;

use super::*;

fn error(text: &str) -> String {
    create(text).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_bad_parameter_is_told_in_one_line() {
    let image = image(MIB);
    let path = image.path().display();
    let rows = [
        ("", "parameter 'path' is missing"),
        (",path=P,readonly=yes", "parameter 'readonly': 'yes' is not on or off"),
        (",path=P,discard=1", "parameter 'discard': '1' is not on or off"),
        (
            ",path=P,logical-block-size=1024",
            "parameter 'logical-block-size': '1024' is not 512 or 4096",
        ),
        (",path=P,cache=none", "parameter 'cache': 'none' is not writeback or writethrough"),
        (",path=P,aio=threads", "parameter 'aio': 'threads' is not io_uring or sync"),
        (",path=P,queues=0", "parameter 'queues': 0 is not from 1 to 64"),
        (",path=P,queues=65", "parameter 'queues': 65 is not from 1 to 64"),
        (",path=P,queues=65537", "parameter 'queues': 65537 is not from 1 to 64"),
        (",path=P,queues=two", "parameter 'queues': 'two' is no number"),
        (",path=P,queue-size=2", "parameter 'queue-size': 2 is not from 4 to 1024"),
        (",path=P,queue-size=2048", "parameter 'queue-size': 2048 is not from 4 to 1024"),
        (",path=P,queue-size=100", "parameter 'queue-size': 100 is no power of two"),
        (",path=P,serial=123456789012345678901", "parameter 'serial': 21 bytes, longer than 20"),
        (",path=P,serial=é", "parameter 'serial': holds more than printable ASCII characters"),
        (",path=P,size=1M", "unknown parameter 'size'"),
    ];
    for (parameters, message) in rows {
        let text = format!("virtio-blk{}", parameters.replace('P', &path.to_string()));
        assert_eq!(error(&text), message, "{parameters}");
        assert!(!message.contains('\n'));
    }
}

#[test]
fn a_bad_image_is_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    for (name, size) in [("empty", 0), ("odd", 1000), ("sectors", 1536)] {
        File::create(place(name)).unwrap().set_len(size).unwrap();
    }
    let _listener = UnixListener::bind(place("socket")).unwrap();
    let rows = [
        ("missing", "", "No such file or directory (os error 2)"),
        ("", "", "is a directory"),
        ("socket", "", "neither a file nor a block device"),
        ("empty", "", "is empty"),
        ("odd", "", "1000 bytes, no multiple of 512"),
        ("sectors", ",logical-block-size=4096", "1536 bytes, no multiple of 4096"),
        ("sectors/below", "", "Not a directory (os error 20)"),
    ];
    for (name, options, reason) in rows {
        let path = place(name).display().to_string();
        let text = format!("virtio-blk,path={path}{options}");
        assert_eq!(error(&text), format!("parameter 'path': {path}: {reason}"), "{name}");
    }
    assert!(create(&format!("virtio-blk,path={}", place("sectors").display())).is_ok());
}

#[test]
fn one_disk_has_an_image_alone_or_all_of_them_only_read_it() {
    // How it is held, how it is wanted, whether that works.
    let rows =
        [("off", "off", false), ("off", "on", false), ("on", "off", false), ("on", "on", true)];
    for (held, wanted, works) in rows {
        let image = image(MIB);
        let path = image.path().display();
        let text = |read_only| format!("virtio-blk,path={path},readonly={read_only}");
        let holder = create(&text(held)).unwrap();
        let second = create(&text(wanted)).map(|_| ()).map_err(|error| error.to_string());
        let reason = format!("parameter 'path': {path}: in use: another process has locked it");
        assert_eq!(second, if works { Ok(()) } else { Err(reason) }, "{held}, {wanted}");
        drop(holder);
        assert!(create(&text(wanted)).is_ok(), "{held}, {wanted}: given back");
    }
}

#[test]
fn a_disk_for_reading_needs_no_right_to_write() {
    use std::os::unix::fs::PermissionsExt;
    let image = image(MIB);
    let mode = std::fs::Permissions::from_mode(0o400);
    std::fs::set_permissions(image.path(), mode).unwrap();
    let disk = create(&format!("virtio-blk,path={},readonly=on", image.path().display())).unwrap();
    let flags = rustix::fs::fcntl_getfl(&*disk.image.file).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::RDWR));
}

#[test]
fn a_kernel_without_io_uring_is_no_obstacle() {
    let image = image(MIB);
    let mut spec: DeviceSpec =
        format!("virtio-blk,path={}", image.path().display()).parse().unwrap();
    let options = Options::from_parameters(&mut spec.parameters).unwrap();
    let refused = Err(io::ErrorKind::PermissionDenied.into());
    let engine = choose_engine(&options.image, Some(refused));
    let wake = Arc::new(EventFd::create().unwrap());
    let mut disk = Fixture::started(Block::new(options, engine, wake).unwrap(), image);
    disk.write(1, &[3; 512]);
    assert_eq!(disk.read(1, 512), [3; 512]);
}

#[test]
fn a_block_device_is_a_disk_of_its_size() {
    let image = image(MIB);
    let attached = std::process::Command::new("losetup")
        .args(["--find", "--show", "--nooverlap"])
        .arg(image.path())
        .output();
    let Some(attached) = attached.ok().filter(|output| output.status.success()) else {
        crate::skip::skip("may not attach a loop device");
        return;
    };
    let device = String::from_utf8(attached.stdout).unwrap().trim().to_owned();
    let made: Vec<_> =
        ENGINES.map(|engine| create(&format!("virtio-blk,path={device},aio={engine}"))).into();
    // It goes away when the last one closes it.
    let detached = std::process::Command::new("losetup").args(["-d", &device]).status();
    assert!(detached.unwrap().success());
    let made: Vec<_> =
        made.into_iter().map(|made| made.map_err(|error| error.to_string())).collect();
    for made in made {
        let Ok(block) = made else {
            assert!(made.is_err_and(|error| error.contains("in use")));
            continue;
        };
        let mut disk = Fixture::started(block, tempfile::NamedTempFile::new().unwrap());
        let mut capacity = [0; 8];
        disk.block.config_read(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2048);
        let data = pattern(8192, 10);
        disk.write(4, &data);
        let zeroes = segment(5, 1, 1);
        assert_eq!(disk.request(WRITE_ZEROES, 0, &[Part::Readable(&zeroes)]), DONE);
        assert_eq!(disk.request(DISCARD, 0, &[Part::Readable(&segment(16, 8, 0))]), DONE);
        assert_eq!(disk.request(FLUSH, 0, &[]), DONE);
        assert_eq!(disk.read(4, 1536), [&data[..512], &[0; 512], &data[1024..1536]].concat());
    }
}
