use super::*;
use crate::devices::Registry;

fn parse(text: &str) -> DeviceSpec {
    text.parse().unwrap()
}

#[test]
fn a_specification_is_written_as_for_qemu() {
    let mut spec = parse("ivshmem,size=4M,path=/tmp/a,,b");
    assert_eq!(spec.name, "ivshmem");
    assert_eq!(spec.parameters.take_size("size"), Ok(Some(4 << 20)));
    assert_eq!(spec.parameters.take_string("path").as_deref(), Some("/tmp/a,b"));
    assert_eq!(spec.parameters.finish(), Ok(()));
}

#[test]
fn numbers_and_sizes_have_their_usual_forms() {
    let mut spec = parse("x,a=0xff,b=10,c=2k,d=1G,e=17179869184G,f=-1,g=0x1000");
    let parameters = &mut spec.parameters;
    assert_eq!(parameters.take_number("a"), Ok(Some(255)));
    assert_eq!(parameters.take_number("b"), Ok(Some(10)));
    assert_eq!(parameters.take_size("c"), Ok(Some(2048)));
    assert_eq!(parameters.take_size("d"), Ok(Some(1 << 30)));
    assert_eq!(parameters.take_size("g"), Ok(Some(4096)));
    assert!(parameters.take_size("e").is_err(), "2^64 overflows");
    assert!(parameters.take_number("f").is_err());
    assert_eq!(parameters.take_number("absent"), Ok(None));
}

#[test]
fn a_bad_specification_is_told_in_one_line_that_names_the_culprit() {
    let known = if cfg!(feature = "passthrough") { ", passthrough" } else { "" };
    let unknown = format!(
        "unknown device 'floppy' (known: edu, ivshmem, vhost-user, virtio-blk, virtio-console, \
         virtio-net, virtio-rng{known})"
    );
    let rows = [
        ("", "device name is missing"),
        (",size=1", "device name is missing"),
        ("floppy", &unknown),
        ("edu,fast", "parameter 'fast' is not of the form key=value"),
        ("edu,a=1,a=2", "parameter 'a' is given twice"),
        ("edu,size=4M", "unknown parameter 'size'"),
        ("edu,dma_mask=wide", "parameter 'dma_mask': 'wide' is no number"),
        ("ivshmem", "parameter 'size' is missing"),
        ("ivshmem,size=", "parameter 'size': '' is no size such as 4M"),
        ("ivshmem,size=4X", "parameter 'size': '4X' is no size such as 4M"),
        (
            "ivshmem,size=3M",
            "parameter 'size': 3145728 bytes is no power of two from 4096 to 1099511627776",
        ),
        (
            "ivshmem,size=4M,path=/nonexistent/memory",
            "parameter 'path': /nonexistent/memory: No such file or directory (os error 2)",
        ),
    ];
    for (text, message) in rows {
        let result = text.parse().and_then(|spec| Registry::default().create(spec));
        assert_eq!(result.map(|_| ()).unwrap_err().to_string(), message, "{text}");
    }
}
