//! What an operator may say about any function: `decode=always` and `romfile=`.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::memory::{bytes_at, sealed};
use barkeep_tests::peer::message::{command, u32_at, u64_at};
use barkeep_tests::peer::requests::{CONFIG, pci, region_info};

const ROM: u32 = 6;
const ROM_ADDRESS: u64 = 0x30;

/// Sample programs and drivers in user space often never write the Command register.
#[test]
fn a_function_that_decodes_always_serves_clients_that_never_enable_it() {
    let backend = Backend::serve(&["edu,decode=always", "edu,decode=strict"]);
    let mut peer = backend.client();
    peer.write_u32(0, at::LIVENESS, 1);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !1);
    let memory = sealed(0x1000);
    std::os::unix::fs::FileExt::write_all_at(&memory, b"no enables", 0).unwrap();
    peer.map(3, 0, 0x1000, memory.as_fd());
    edu::copy(&mut peer, 0, 0x800, 10);
    assert_eq!(bytes_at(&memory, 0x800, 10), b"no enables");
    // What is written reads back, and changes nothing.
    assert_eq!(peer.config_u16(pci::COMMAND), 0);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    peer.set_config_u16(pci::COMMAND, 0);
    assert_eq!(peer.config_u16(pci::COMMAND), 0);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !1);

    let mut strict = barkeep_tests::peer::Peer::greeted(backend.socket_of(1));
    assert_eq!(strict.read_u32(0, at::LIVENESS), 0xffff_ffff);
}

#[test]
fn an_expansion_rom_is_there_while_it_is_enabled() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = vec![0x55, 0xaa];
    bytes.resize(5000, 0x77);
    std::fs::write(image.path(), &bytes).unwrap();
    let backend = Backend::serve(&[&format!("edu,romfile={}", image.path().display())]);
    let mut peer = backend.client();
    let info = peer.call(command::GET_REGION_INFO, &region_info(32, ROM)).success();
    assert_eq!((u32_at(&info, 4), u64_at(&info, 16)), (1, 8192), "readable, the next power of two");

    assert_eq!(peer.read(ROM, 0, 4), [0xff; 4], "neither enable is set");
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert_eq!(peer.read(ROM, 0, 4), [0xff; 4], "its own is missing");
    peer.write_u32(CONFIG, ROM_ADDRESS, 0xffff_ffff);
    assert_eq!(peer.read_u32(CONFIG, ROM_ADDRESS), 0xffff_e001, "8 KiB, and the enable");
    assert_eq!(peer.read(ROM, 0, 4), [0x55, 0xaa, 0x77, 0x77]);
    peer.write(ROM, 0, &[0; 4]);
    assert_eq!(peer.read(ROM, 0, 2), [0x55, 0xaa], "it is read-only");
    assert_eq!(peer.read(ROM, 4998, 4), [0x77, 0x77, 0xff, 0xff], "behind the image");
    peer.set_config_u16(pci::COMMAND, 0);
    assert_eq!(peer.read(ROM, 0, 4), [0xff; 4]);
}
