//! What the kernel found when it enumerated the functions.

use crate::pci::{Bar, Capability, Function};
use crate::{Result, ensure};

/// What a function has to look like.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) class: u64,
    pub(crate) revision: u64,
    pub(crate) bars: [Option<Bar>; 6],
}

/// Class 00ff00 (unclassified), revision 0x10, 1 MiB of memory.
pub(crate) const EDU: Identity = Identity {
    class: 0x00_ff00,
    revision: 0x10,
    bars: [Some(memory_bar(1 << 20)), None, None, None, None, None],
};

/// Class 050000 (RAM controller), revision 1, 256 bytes of registers, 4 MiB of shared memory.
pub(crate) const IVSHMEM: Identity = Identity {
    class: 0x05_0000,
    revision: 1,
    bars: [
        Some(memory_bar(256)),
        None,
        Some(Bar { is_64bit: true, is_prefetchable: true, ..memory_bar(4 << 20) }),
        None,
        None,
        None,
    ],
};

const fn memory_bar(len: u64) -> Bar {
    Bar { len, is_memory: true, is_64bit: false, is_prefetchable: false }
}

/// Compares a function with what it has to look like.
pub(crate) fn check(function: &Function, expected: &Identity) -> Result<String> {
    let class = function.hex_attribute("class")?;
    ensure!(class == expected.class, "class {class:06x}, not {:06x}", expected.class);
    let revision = function.hex_attribute("revision")?;
    ensure!(revision == expected.revision, "revision {revision:#x}, not {:#x}", expected.revision);
    for (index, expected) in expected.bars.iter().enumerate() {
        let bar = function.bar(index)?;
        ensure!(bar == *expected, "BAR{index} is {bar:?}, not {expected:?}");
    }
    Ok(format!("{} class {class:06x} revision {revision:#x}", function.address()?))
}

/// Looks for capabilities and says where they are.
pub(crate) fn check_capabilities(function: &Function, wanted: &[Capability]) -> Result<String> {
    let mut seen = Vec::new();
    for &capability in wanted {
        seen.push(format!("{capability:?} at {:#04x}", function.capability(capability)?));
    }
    Ok(seen.join(", "))
}
