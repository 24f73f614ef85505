use rustix::io::Errno;
use thiserror::Error;

use super::address::PciAddress;

/// Why a device can't be passed through; one line that tells the operator what to do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OpenError {
    /// No PCI function has this address.
    #[error("there is no PCI device {0} (lspci -D lists them)")]
    NoDevice(PciAddress),
    /// It belongs to another driver, or to none.
    #[error(
        "{address} is not bound to vfio-pci but to {}; bind it: {}",
        name_of(.driver),
        bind(*.address, .driver)
    )]
    NotBound {
        /// Which function.
        address: PciAddress,
        /// Whose it is now.
        driver: Option<String>,
    },
    /// There is no IOMMU in front of it.
    #[error(
        "{0} has no IOMMU group; enable the IOMMU in the firmware and on the kernel's command line (intel_iommu=on or amd_iommu=on)"
    )]
    NoGroup(PciAddress),
    /// A file of the kernel's that can't be opened.
    #[error("{path}: {errno}{}", file_hint(.path, *.errno))]
    File {
        /// Its path.
        path: String,
        /// Why.
        errno: Errno,
    },
    /// Somebody else has the group.
    #[error(
        "IOMMU group {group} is in use: by another process, or by another function of this one"
    )]
    InUse {
        /// Its number.
        group: String,
    },
    /// Another device of the group belongs to a driver of the host.
    #[error(
        "IOMMU group {group} is not viable: bind every device in /sys/kernel/iommu_groups/{group}/devices to vfio-pci"
    )]
    NotViable {
        /// Its number.
        group: String,
    },
    /// The kernel's container is of an unknown kind.
    #[error("the kernel has no type 1 IOMMU for VFIO; load it: modprobe vfio_iommu_type1")]
    NoType1,
    /// A step that should have worked.
    #[error("{what}: {errno}{}", step_hint(*.errno))]
    Step {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        errno: Errno,
    },
}

fn name_of(driver: &Option<String>) -> &str {
    driver.as_deref().unwrap_or("no driver")
}

fn bind(address: PciAddress, driver: &Option<String>) -> String {
    let unbind = driver.as_ref().map_or(String::new(), |driver| {
        format!("echo {address} > /sys/bus/pci/drivers/{driver}/unbind; ")
    });
    format!(
        "modprobe vfio-pci; echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override; \
         {unbind}echo {address} > /sys/bus/pci/drivers_probe"
    )
}

fn file_hint(path: &str, errno: Errno) -> String {
    match errno {
        Errno::ACCESS | Errno::PERM => {
            format!("; run as root, or give the file to this user: chown USER {path}")
        }
        // vfio-pci has the device by then, so its modules are loaded.
        Errno::NOENT => "; a container needs the file too, and the kernel groups \
                         (CONFIG_VFIO_GROUP) with a real IOMMU behind them"
            .to_owned(),
        _ => String::new(),
    }
}

fn step_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::PERM => {
            "; without interrupt remapping the kernel refuses, unless vfio_iommu_type1.allow_unsafe_interrupts=1"
        }
        _ => "",
    }
}
