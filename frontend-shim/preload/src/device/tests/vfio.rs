use std::os::fd::RawFd;

use super::{COMMAND, CONFIG, DEVICE, Fake, GET_REGION_INFO, MEMORY, RESET, VM};
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::device::{BarAddress, Decode, Source};
use crate::status::{Count, Status};

fn shim(fake: Fake) -> Shim<Fake> {
    Shim::new(fake, Status::private(true))
}

#[test]
fn a_device_shows_when_its_regions_are_asked_for() {
    let shim = Shim::faked();
    assert_eq!(shim.descriptors.get(DEVICE), Some(Descriptor::Device(shim.device().0)));
    assert_eq!(shim.source_of(), Some(Source::Vfio(DEVICE)));
    shim.vfio_asked(DEVICE, GET_REGION_INFO);
    assert_eq!(shim.devices.table.all().count(), 1);
}

#[test]
fn other_files_with_regions_are_left_alone() {
    let fake = Fake::default();
    fake.world().plug(30);
    fake.world().links.insert(30, b"/dev/other");
    fake.world().plug(31);
    fake.world().config(31).pci = false;
    let shim = shim(fake);
    shim.vfio_asked(30, GET_REGION_INFO);
    shim.vfio_asked(31, GET_REGION_INFO);
    shim.vfio_asked(32, GET_REGION_INFO);
    assert_eq!(shim.devices.table.all().count(), 0);
    assert_eq!(shim.descriptors.get(30), None);
    assert_eq!(shim.status.get(Count::FailOpens), 0);
}

#[test]
fn a_device_opened_by_name_and_one_without_proc_are_devices() {
    let fake = Fake::default();
    fake.world().plug(30);
    fake.world().links.insert(30, b"/dev/vfio/devices/vfio0");
    let shim = shim(fake);
    shim.vfio_asked(30, GET_REGION_INFO);
    shim.system.world().plug(31);
    shim.system.world().no_proc = true;
    shim.vfio_asked(31, GET_REGION_INFO);
    assert_eq!(shim.devices.table.all().count(), 2);
}

#[test]
fn a_device_that_cannot_be_read_is_left_to_the_vmm() {
    let fake = Fake::with_device();
    fake.world().config(DEVICE).config.truncate(16);
    let shim = shim(fake);
    shim.vfio_asked(DEVICE, GET_REGION_INFO);
    assert_eq!(shim.descriptors.get(DEVICE), None);
    assert_eq!(shim.status.get(Count::FailOpens), 1);
}

#[test]
fn decode_follows_the_command_register() {
    let shim = Shim::faked();
    let device = shim.device();
    assert_eq!(shim.decode(device, 0), Decode::Off);
    shim.system.world().config(DEVICE).config[COMMAND] = MEMORY;
    assert_eq!(shim.decode(device, 0), Decode::On);
    // Ports and bus mastering are no memory.
    shim.system.world().config(DEVICE).config[COMMAND] = 5;
    assert_eq!(shim.decode(device, 0), Decode::Off);
}

#[test]
fn a_function_in_d3hot_does_not_decode() {
    let shim = Shim::faked();
    let device = shim.device();
    shim.system.world().config(DEVICE).config[COMMAND] = MEMORY;
    for (state, decode) in [(1, Decode::On), (2, Decode::On), (3, Decode::Off), (0, Decode::On)] {
        shim.system.world().config(DEVICE).config[0x64] = state;
        assert_eq!(shim.decode(device, 0), decode, "D{state}");
    }
}

#[test]
fn a_circle_of_capabilities_ends() {
    let fake = Fake::with_device();
    fake.world().config(DEVICE).config[0x60] = 5;
    fake.world().config(DEVICE).config[0x61] = 0x50;
    let shim = shim(fake);
    shim.vfio_asked(DEVICE, GET_REGION_INFO);
    shim.system.world().config(DEVICE).config[COMMAND] = MEMORY;
    assert_eq!(shim.decode(shim.device(), 0), Decode::On);
}

#[test]
fn decode_is_unknown_once_the_device_is_closed() {
    let shim = Shim::faked();
    let device = shim.device();
    shim.map(DEVICE, 0x10000, 0x1000, libc::MAP_SHARED, 0);
    shim.close(DEVICE).expect("the test has opened it");
    assert_eq!(shim.decode(device, 0), Decode::Unknown);
    assert_eq!(shim.source(device), None);
    // The number is another device's now.
    shim.system.world().plug(DEVICE);
    assert_eq!(shim.decode(device, 0), Decode::Unknown);
    shim.vfio_asked(DEVICE, GET_REGION_INFO);
    assert_eq!(shim.decode(device, 0), Decode::Unknown);
    assert_eq!(shim.devices.table.all().count(), 2);
    shim.answering(Ok(0)).munmap(0x10000, 0x1000).expect("the kernel unmaps");
    assert_eq!(shim.devices.table.all().count(), 1);
}

#[test]
fn decode_is_unknown_if_the_number_becomes_another_file_while_it_is_read() {
    let shim = Shim::faked();
    // As another thread that closes it in between.
    shim.descriptors.clear(DEVICE);
    assert_eq!(shim.decode(shim.device(), 0), Decode::Unknown);
}

#[test]
fn a_duplicate_is_the_same_device_and_outlives_the_first() {
    let shim = Shim::faked();
    let device = shim.device();
    let second: RawFd = 40;
    let how = crate::system::Duplicate::Lowest;
    assert_eq!(shim.answering(Ok(40)).duplicate(DEVICE, how), Ok(second));
    assert_eq!(shim.descriptors.get(second), Some(Descriptor::Device(device.0)));
    shim.close(DEVICE).expect("the test has opened it");
    assert_eq!(shim.source(device), Some(Source::Vfio(second)));
    assert_eq!(shim.decode(device, 0), Decode::Off);
    shim.close(second).expect("the test has opened it");
    assert_eq!(shim.source(device), None);
    assert_eq!(shim.devices.table.all().count(), 0);
}

#[test]
fn places_of_gone_devices_are_taken_by_others_with_other_ids() {
    let shim = Shim::faked();
    let mut last = shim.device();
    for _ in 0..600 {
        shim.close(DEVICE).expect("the test has opened it");
        shim.system.world().plug(DEVICE);
        shim.vfio_asked(DEVICE, GET_REGION_INFO);
        assert_ne!(shim.device(), last);
        assert_eq!(shim.source(last), None);
        last = shim.device();
    }
    assert_eq!(shim.status.get(Count::FailOpens), 0);
}

#[test]
fn more_devices_than_are_followed_are_left_to_the_vmm() {
    let shim = Shim::faked();
    for fd in 100..500 {
        shim.system.world().plug(fd);
        shim.vfio_asked(fd, GET_REGION_INFO);
    }
    assert_eq!(shim.devices.table.all().count(), 256);
    assert_eq!(shim.descriptors.get(499), None);
    assert_eq!(shim.status.get(Count::FailOpens), 145);
}

fn bar(shim: &Shim<Fake>, bar: u8, offset: u64) -> Option<BarAddress> {
    Some(BarAddress { device: shim.device(), bar, offset })
}

#[test]
fn windows_are_where_bars_last_decoded() {
    let shim = Shim::faked();
    assert_eq!(shim.window_at(VM, 0xfe00_0010), None);
    shim.write_config(COMMAND, &[MEMORY, 0]);
    for _ in 0..2 {
        assert_eq!(shim.window_at(VM, 0xfe00_0010), bar(&shim, 0, 0x10));
        assert_eq!(shim.window_at(VM, 0xfe00_0fff), bar(&shim, 0, 0xfff));
        assert_eq!(shim.window_at(VM, 0xfe00_107f), bar(&shim, 4, 0x7f));
        assert_eq!(shim.window_at(VM, 0xfe00_1080), None);
        assert_eq!(shim.window_at(VM, 0xfdff_ffff), None);
        assert_eq!(shim.window_at(VM, 0x38_000f_fffe), bar(&shim, 2, 0xf_fffe));
        assert_eq!(shim.window_at(VM, 0x38_0010_0000), None);
        // Ports have no window.
        assert_eq!(shim.window_at(VM, 0xc001), None);
        shim.write_config(COMMAND, &[0, 0]);
    }
}

#[test]
fn a_window_is_not_live_while_the_size_is_asked_for() {
    let shim = Shim::faked();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    shim.write_config(COMMAND, &[0, 0]);
    // What the register of a BAR of a page holds then; an IOAPIC or the ROM may be there.
    shim.write_config(0x10, &[0x00, 0xf0, 0xff, 0xff]);
    assert_eq!(shim.window_at(VM, 0xfe00_0010), None);
    assert_eq!(shim.window_at(VM, 0xffff_f010), None);
    shim.write_config(0x10, &[0x00, 0x00, 0x00, 0xfe]);
    assert_eq!(shim.window_at(VM, 0xfe00_0010), bar(&shim, 0, 0x10));
}

#[test]
fn the_size_of_a_decoding_bar_is_no_window() {
    let shim = Shim::faked();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    shim.write_config(0x10, &[0x00, 0xf0, 0xff, 0xff]);
    shim.write_config(COMMAND, &[0, 0]);
    assert_eq!(shim.window_at(VM, 0xffff_f010), None);
}

#[test]
fn a_bar_that_moves_takes_its_window_along_once_it_decodes() {
    let shim = Shim::faked();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    shim.write_config(COMMAND, &[0, 0]);
    shim.write_config(0x1c, &[0x39, 0, 0, 0]);
    assert_eq!(shim.window_at(VM, 0x38_0000_0000), None);
    assert_eq!(shim.window_at(VM, 0x39_0000_0000), None);
    shim.write_config(COMMAND, &[MEMORY, 0]);
    assert_eq!(shim.window_at(VM, 0x39_0000_0000), bar(&shim, 2, 0));
}

#[test]
fn waking_from_d3hot_makes_windows() {
    let shim = Shim::faked();
    shim.write_config(0x64, &[3]);
    shim.write_config(COMMAND, &[MEMORY, 0]);
    assert_eq!(shim.window_at(VM, 0xfe00_0000), None);
    shim.write_config(0x64, &[0]);
    assert_eq!(shim.window_at(VM, 0xfe00_0000), bar(&shim, 0, 0));
}

#[test]
fn a_reset_shows_in_the_windows() {
    let shim = Shim::faked();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    shim.system.world().config(DEVICE).set(0x10, 0);
    shim.system.world().config(DEVICE).config[COMMAND] = 0;
    shim.vfio_asked(DEVICE, 0x3b6f);
    assert_eq!(shim.window_at(VM, 0xfe00_0000), None);
    assert_eq!(shim.window_at(VM, 0xfe00_1000), bar(&shim, 4, 0));
}

#[test]
fn a_slot_shows_windows_that_no_write_showed() {
    let shim = Shim::faked();
    shim.system.world().config(DEVICE).config[COMMAND] = MEMORY;
    assert_eq!(shim.window_at(VM, 0xfe00_0000), None);
    shim.belongs(shim.device(), VM);
    assert_eq!(shim.window_at(VM, 0xfe00_0000), bar(&shim, 0, 0));
    assert_eq!(shim.window_at(VM + 1, 0xfe00_0000), None);
    // Its number may be another's next.
    shim.descriptors.set(50, Descriptor::Vm(VM));
    let _ = shim.close(50);
    assert_eq!(shim.window_at(VM + 1, 0xfe00_0000), bar(&shim, 0, 0));
}

#[test]
fn writes_that_say_nothing_of_decoding_are_not_looked_at() {
    let shim = Shim::faked();
    let before = shim.system.world().reads;
    shim.write_config(0x06, &[0, 0]);
    shim.write_config(0x0c, &[0, 0, 0, 0]);
    shim.write_config(0x28, &[0, 0, 0, 0]);
    shim.write_config(0x66, &[0, 0]);
    assert_eq!(shim.device_to_be_written(shim.device().0, 0, 0x1000), None);
    assert_eq!(shim.system.world().reads, before);
    shim.write_config(0x02, &[0, 0, 0, 0]);
    assert_ne!(shim.system.world().reads, before);
}

#[test]
fn a_device_that_was_looked_at_during_the_write_is_known_to_have_stopped() {
    let shim = Shim::faked();
    let device = shim.device();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    assert_eq!(shim.losses_of(device), 0);
    let before = shim.device_to_be_written(device.0, CONFIG + COMMAND as u64, 2).unwrap();
    shim.system.world().config(DEVICE).config[COMMAND] = 0;
    shim.belongs(device, VM);
    shim.vfio_asked(DEVICE, RESET);
    shim.device_written(device.0, before);
    assert_eq!(shim.losses_of(device), 1);
}

#[test]
fn a_window_is_found_without_the_kernel() {
    let shim = Shim::faked();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    let before = shim.system.world().reads;
    for gpa in [0xfe00_0000, 0xfe00_1000, 0xfee0_0000, 0x38_0000_0000] {
        shim.window_at(VM, gpa);
    }
    assert_eq!(shim.system.world().reads, before);
}

#[test]
fn a_closed_device_has_no_windows() {
    let shim = Shim::faked();
    shim.write_config(COMMAND, &[MEMORY, 0]);
    shim.close(DEVICE).expect("the test has opened it");
    assert_eq!(shim.window_at(VM, 0xfe00_0000), None);
}
