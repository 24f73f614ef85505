use std::os::fd::AsFd;
use std::os::unix::fs::symlink;

use rustix::io::Errno;

use super::super::device::{IrqCommand, RegionDescription, VfioIrq};
use super::super::kernel::{irq_set, sparse_areas};
use super::super::{OpenError, PciAddress, iommu_group};

#[test]
fn an_address_is_written_with_or_without_its_domain() {
    let rows = [
        ("0000:00:02.0", Some("0000:00:02.0")),
        ("00:02.0", Some("0000:00:02.0")),
        ("3b:1f.7", Some("0000:3b:1f.7")),
        ("10000:E1:00.0", Some("10000:e1:00.0")),
        ("", None),
        ("00:02", None),
        ("02.0", None),
        ("00:20.0", None),
        ("00:02.8", None),
        ("00:002.0", None),
        ("0:0:0:02.0", None),
        ("+0:02.0", None),
        ("100:00.0", None),
        ("00:02.0/../..", None),
    ];
    for (text, expected) in rows {
        let parsed = text.parse::<PciAddress>().ok().map(|address| address.to_string());
        assert_eq!(parsed.as_deref(), expected, "{text}");
    }
}

#[test]
fn a_device_that_is_not_ready_is_refused_with_what_to_do() {
    let sysfs = tempfile::tempdir().unwrap();
    let address: PciAddress = "00:02.0".parse().unwrap();
    let device = sysfs.path().join("0000:00:02.0");
    let text = |result: Result<String, OpenError>| result.unwrap_err().to_string();
    assert!(
        text(iommu_group(sysfs.path(), address)).starts_with("there is no PCI device 0000:00:02.0")
    );
    std::fs::create_dir(&device).unwrap();
    // No driver would help: vfio-pci itself refuses a device without a group.
    assert_eq!(iommu_group(sysfs.path(), address), Err(OpenError::NoGroup(address)));
    symlink("../../kernel/iommu_groups/17", device.join("iommu_group")).unwrap();
    let unbound = text(iommu_group(sysfs.path(), address));
    assert!(unbound.contains("not bound to vfio-pci but to no driver"), "{unbound}");
    symlink("../drivers/e1000e", device.join("driver")).unwrap();
    assert_eq!(
        text(iommu_group(sysfs.path(), address)),
        "0000:00:02.0 is not bound to vfio-pci but to e1000e; bind it: modprobe vfio-pci; \
         echo vfio-pci > /sys/bus/pci/devices/0000:00:02.0/driver_override; \
         echo 0000:00:02.0 > /sys/bus/pci/drivers/e1000e/unbind; \
         echo 0000:00:02.0 > /sys/bus/pci/drivers_probe"
    );
    for driver in ["vfio-pci", "mlx5_vfio_pci"] {
        std::fs::remove_file(device.join("driver")).unwrap();
        symlink(format!("../drivers/{driver}"), device.join("driver")).unwrap();
        assert_eq!(iommu_group(sysfs.path(), address).as_deref(), Ok("17"), "{driver}");
    }
}

#[test]
fn a_file_that_cannot_be_opened_is_told_with_what_to_do() {
    let rows = [
        (Errno::ACCESS, "/dev/vfio/17: Permission denied (os error 13); run as root, "),
        (Errno::NOENT, "/dev/vfio/17: No such file or directory (os error 2); a container "),
        (Errno::IO, "/dev/vfio/17: Input/output error (os error 5)"),
    ];
    for (errno, start) in rows {
        let text = OpenError::File { path: "/dev/vfio/17".to_owned(), errno }.to_string();
        assert!(text.starts_with(start) && !text.contains('\n'), "{text}");
        assert!(!text.contains("modprobe"), "vfio-pci has the device by then: {text}");
    }
}

#[test]
fn interrupts_are_told_in_the_kernels_layout() {
    let file = tempfile::tempfile().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file).cast_unsigned();
    let eventfds = [None, Some(file.as_fd()), None];
    let which = [true, false, true, false, true];
    let rows: &[(&str, VfioIrq, IrqCommand<'_>, &[u32])] = &[
        ("disable", VfioIrq::Msix, IrqCommand::Disable, &[0, 0x21, 2, 0, 0]),
        ("mask", VfioIrq::Intx, IrqCommand::Mask, &[0, 0x09, 0, 0, 1]),
        ("unmask", VfioIrq::Intx, IrqCommand::Unmask, &[0, 0x11, 0, 0, 1]),
        (
            "unmask by none",
            VfioIrq::Intx,
            IrqCommand::UnmaskBy(None),
            &[0, 0x14, 0, 0, 1, u32::MAX],
        ),
        (
            "holes",
            VfioIrq::Msi,
            IrqCommand::Connect { start: 4, eventfds: &eventfds },
            &[0, 0x24, 1, 4, 3, u32::MAX, number, u32::MAX],
        ),
        (
            "trigger",
            VfioIrq::Msi,
            IrqCommand::Trigger { start: 1, which: &which },
            &[0, 0x22, 1, 1, 5, u32::from_ne_bytes([1, 0, 1, 0]), u32::from_ne_bytes([1, 0, 0, 0])],
        ),
    ];
    for (what, irq, command, words) in rows {
        assert_eq!(irq_set(*irq, *command), *words, "{what}");
    }
}

#[test]
fn sparse_areas_are_found_among_the_capabilities() {
    let head = |cap_offset| [88, 0xf, 0, cap_offset, 0, 1, 0, 0];
    let msix_mappable = [0x0001_0003, 40];
    let sparse = [0x0001_0001, 0, 2, 0, 0x8000, 0, 0x4000, 0, 0, 0, 0x1000, 0];
    let words = [&head(32)[..], &msix_mappable, &sparse].concat();
    assert_eq!(sparse_areas(&words, 0x10000), Some(vec![0..0x1000, 0x8000..0xc000]));
    assert_eq!(sparse_areas(&words, 0x9000), Some(vec![0..0x1000, 0x8000..0x9000]), "cut");
    assert_eq!(sparse_areas(&head(0), 0x10000), None, "none");
    assert_eq!(sparse_areas(&[&head(32)[..], &[0x0001_0003, 32]].concat(), 1), None, "a loop");
    assert_eq!(sparse_areas(&words[..12], 0x10000), None, "cut off");
}

#[test]
fn pages_that_hold_the_msix_table_are_not_mapped() {
    type Parts = &'static [(u64, u64)];
    let rows: &[(&str, Parts, std::ops::Range<u64>, Parts)] = &[
        ("in the middle", &[(0, 0x8000)], 0x2010..0x2020, &[(0, 0x2000), (0x3000, 0x8000)]),
        ("at the start", &[(0, 0x8000)], 0..0x1001, &[(0x2000, 0x8000)]),
        ("at the end", &[(0, 0x8000)], 0x7ff0..0x8000, &[(0, 0x7000)]),
        ("all of it", &[(0, 0x1000)], 0x800..0x810, &[]),
        ("two parts", &[(0, 0x1000), (0x4000, 0x8000)], 0x800..0x4800, &[(0x5000, 0x8000)]),
        ("nothing to take", &[(0x4000, 0x8000)], 0..0x10, &[(0x4000, 0x8000)]),
        ("nothing there", &[], 0..0x10, &[]),
    ];
    for (what, before, table, after) in rows {
        let mappable = before.iter().map(|(start, end)| *start..*end).collect();
        let mut region = RegionDescription { mappable, ..Default::default() };
        region.unmappable(table);
        let left: Vec<_> = region.mappable.iter().map(|part| (part.start, part.end)).collect();
        assert_eq!(left, *after, "{what}");
    }
}
