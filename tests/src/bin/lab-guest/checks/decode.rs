//! Memory decode switched off and on under a driver that keeps using the BAR.

use std::collections::BTreeSet;

use crate::edu::{Edu, register};
use crate::mmio::{Mapping, Width};
use crate::pci::{Function, command::MEMORY_SPACE};
use crate::{Result, ensure};

const ROUNDS: u32 = 200;

/// While decode is off, no read sees the function and no write reaches it, in any width; when it
/// is on again, the function is as it was.
///
/// Which value an absent function reads as is the virtual machine monitor's own: QEMU drops the
/// BAR from its memory map and answers without asking the device. The value is reported.
pub(crate) fn check_edu(function: &Function, edu: &Edu) -> Result<String> {
    let mut absent = Absent::default();
    for round in 0..ROUNDS {
        // Neither the value nor its inversion is one that an absent function may read as.
        let value = 0x5a00_0000 | round;
        let read = edu.liveness_of(value);
        ensure!(read == !value, "round {round}: liveness of {value:#x} reads {read:#x}");

        function.set_command(MEMORY_SPACE, false)?;
        absent.read_every_width(&edu.bar, register::LIVENESS);
        write_every_width(&edu.bar, register::LIVENESS);
        function.set_command(MEMORY_SPACE, true)?;

        let read = edu.read(register::LIVENESS);
        ensure!(read == !value, "round {round}: a write landed, liveness reads {read:#x}");
    }
    absent.verdict()
}

/// The same for shared memory, which the guest reaches without the backend's help.
pub(crate) fn check_shared_memory(function: &Function, memory: &Mapping) -> Result<String> {
    let mut absent = Absent::default();
    let before: u64 = memory.read(0);
    for round in 0..ROUNDS {
        let value = 0x5a5a_a5a5_0000_0000 | u64::from(round);
        memory.write(0, value);

        function.set_command(MEMORY_SPACE, false)?;
        absent.read_every_width(memory, 0);
        write_every_width(memory, 0);
        function.set_command(MEMORY_SPACE, true)?;

        let read: u64 = memory.read(0);
        ensure!(read == value, "round {round}: a write landed, memory reads {read:#x}");
    }
    memory.write(0, before);
    absent.verdict()
}

/// What was read where no function answers, per width.
#[derive(Debug, Default)]
struct Absent {
    seen: BTreeSet<(usize, u64)>,
}

impl Absent {
    fn read_every_width(&mut self, bar: &Mapping, offset: usize) {
        self.seen.insert((1, bar.read::<u8>(offset).into()));
        self.seen.insert((2, bar.read::<u16>(offset).into()));
        self.seen.insert((4, bar.read::<u32>(offset).into()));
        self.seen.insert((8, bar.read::<u64>(offset & !7)));
    }

    /// All ones is what hardware reads; zero is what QEMU's own devices read as.
    fn verdict(self) -> Result<String> {
        let mut words = Vec::new();
        for (width, value) in self.seen {
            let ones = u64::MAX >> (64 - 8 * width);
            ensure!(value == ones || value == 0, "{width} bytes read {value:#x} with decode off");
            words.push(format!("{width}:{value:#x}"));
        }
        Ok(format!("{ROUNDS} rounds, decode off reads {}", words.join(" ")))
    }
}

fn write_every_width(bar: &Mapping, offset: usize) {
    fn write<T: Width>(bar: &Mapping, offset: usize, value: T) {
        bar.write(offset, value);
    }
    write(bar, offset, 0x77_u8);
    write(bar, offset, 0x7777_u16);
    write(bar, offset & !7, 0x7777_7777_7777_7777_u64);
    write(bar, offset, 0x7777_7777_u32);
}
