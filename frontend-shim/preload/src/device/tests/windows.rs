use super::{Fake, VM};
use crate::Shim;
use crate::device::windows::Windows;
use crate::device::{BarAddress, Decode, DeviceId, Placement, Source};
use crate::status::Status;

const OFF: (DeviceId, u8) = (DeviceId(1), 0);
const ON: (DeviceId, u8) = (DeviceId(2), 3);

fn at(address: u64, size: u64) -> Placement {
    Placement { size, address, live: address }
}

#[test]
fn of_windows_that_overlap_the_one_that_decodes_claims() {
    for on_first in [false, true] {
        for (start, size) in [(0x10_0000, 0x1000), (0xf_f000, 0x10_0000), (0x10_0800, 0x100)] {
            let mut windows = Windows::default();
            let mut add = |on: bool| match on {
                true => windows.add(ON, &at(start, size), true, None),
                false => windows.add(OFF, &at(0x10_0000, 0x1000), false, None),
            };
            add(on_first);
            add(!on_first);
            let found = windows.sorted().at(VM, 0x10_0880, || true);
            let offset = 0x10_0880 - start;
            assert_eq!(found, Some(BarAddress { device: ON.0, bar: ON.1, offset }));
        }
    }
}

#[test]
fn a_wide_window_is_found_behind_small_ones() {
    let mut windows = Windows::default();
    windows.add(OFF, &at(0x1000, 0x100_0000), false, None);
    for page in 0x10..0x20 {
        windows.add(ON, &at(page << 12, 0x800), true, None);
    }
    let windows = windows.sorted();
    let found = windows.at(VM, 0x20_0000, || true);
    assert_eq!(found, Some(BarAddress { device: OFF.0, bar: 0, offset: 0x1f_f000 }));
    assert_eq!(windows.at(VM, 0x100_1000, || true), None);
}

#[test]
fn windows_of_another_vm_are_not_seen() {
    let mut windows = Windows::default();
    windows.add(ON, &at(0x1000, 0x1000), true, Some(VM + 1));
    windows.add(OFF, &at(0x1000, 0x1000), false, None);
    let windows = windows.sorted();
    let device = |found: Option<BarAddress>| found.map(|found| found.device);
    assert_eq!(device(windows.at(VM, 0x1000, || true)), Some(OFF.0));
    assert_eq!(device(windows.at(VM, 0x1000, || false)), None);
    assert_eq!(device(windows.at(VM + 1, 0x1000, || false)), Some(ON.0));
}

#[test]
fn a_window_that_would_wrap_is_none() {
    let mut windows = Windows::default();
    windows.add(ON, &at(u64::MAX - 0xfff, 0x2000), true, None);
    assert_eq!(windows.sorted().at(VM, u64::MAX, || true), None);
}

#[test]
fn a_backend_that_does_not_tell_for_a_moment_keeps_its_windows() {
    let shim = Shim::new(Fake::default(), Status::private(true));
    let device = shim.add_device(Source::VfioUser(7)).expect("it's the first");
    assert_eq!(shim.source(device), Some(Source::VfioUser(7)));
    assert_eq!(shim.window_at(VM, 0x1000), None);
    let found = shim.devices.table.get(device).expect("it was added");
    found.set_placements(&[at(0x1000, 0x1000); 6]);
    // There is no such connection, and so no page.
    shim.belongs(device, VM);
    assert_eq!(shim.window_at(VM, 0x1010).map(|found| found.offset), Some(0x10));
    assert_eq!(shim.decode(device, 0), Decode::Unknown);
    shim.remove_device(device);
    assert_eq!(shim.window_at(VM, 0x1010), None);
    assert_eq!(shim.source(device), None);
}
