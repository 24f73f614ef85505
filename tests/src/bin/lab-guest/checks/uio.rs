//! INTx through a second driver of the kernel's, uio_pci_generic. It masks with Interrupt Disable
//! and asks Interrupt Status whose interrupt it is, where vfio-pci's own user never sees either.

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::edu::{Edu, register};
use crate::pci::command::INTERRUPT_DISABLE;
use crate::pci::{COMMAND, Function, STATUS, status};
use crate::{Result, ensure};

/// A function that uio_pci_generic drives, until this is dropped.
#[derive(Debug)]
pub(crate) struct Uio<'a> {
    function: &'a Function,
    node: File,
    /// How many interrupts the kernel had counted when it was last asked.
    counted: u32,
}

impl<'a> Uio<'a> {
    /// # Errors
    /// The driver does not want the function, for example as it has no working Interrupt Disable.
    pub(crate) fn bind(function: &'a Function) -> Result<Self> {
        function.bind("uio_pci_generic")?;
        let names = function.names_in("uio")?;
        let [name] = names.as_slice() else {
            return Err(format!("{} uio devices", names.len()).into());
        };
        let node = File::open(format!("/dev/{name}"))?;
        Ok(Self { function, node, counted: 0 })
    }

    /// Waits for the next interrupt, which the driver has masked then.
    fn wait(&mut self) -> Result<()> {
        const BOUND: Duration = Duration::from_secs(10);
        ensure!(self.within(BOUND)?, "no interrupt in {BOUND:?}");
        let mut count = [0; 4];
        self.node.read_exact(&mut count)?;
        let counted = u32::from_ne_bytes(count);
        ensure!(counted == self.counted + 1, "{} interrupts for one", counted - self.counted);
        self.counted = counted;
        ensure!(self.is_disabled()?, "the driver did not set Interrupt Disable");
        Ok(())
    }

    fn expect_none(&self) -> Result<()> {
        ensure!(!self.within(Duration::from_millis(200))?, "an interrupt arrived");
        Ok(())
    }

    /// Clears Interrupt Disable. What asserts makes the driver set it again at once, so that a look
    /// whether it is clear proves nothing.
    fn unmask(&self) -> Result<()> {
        let command = self.function.read_u16(COMMAND)?;
        self.function.write_u16(COMMAND, command & !INTERRUPT_DISABLE)
    }

    fn is_disabled(&self) -> Result<bool> {
        Ok(self.function.read_u16(COMMAND)? & INTERRUPT_DISABLE != 0)
    }

    /// Interrupt Status, which Interrupt Disable has no influence on.
    fn is_asserted(&self) -> Result<bool> {
        Ok(self.function.read_u16(STATUS)? & status::INTERRUPT != 0)
    }

    fn within(&self, bound: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(&self.node, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::try_from(bound)?))? != 0)
    }
}

impl Drop for Uio<'_> {
    fn drop(&mut self) {
        self.function.unbind().expect("what was bound can be unbound");
    }
}

/// Each interrupt arrives once, and Interrupt Status follows the device.
pub(crate) fn check(uio: &mut Uio<'_>, edu: &Edu) -> Result<String> {
    settle(uio, edu)?;
    for value in [0x1, 0x8000_0000, 0x10] {
        ensure!(!uio.is_asserted()?, "Interrupt Status is set before {value:#x} is raised");
        edu.write(register::INTERRUPT_RAISE, value);
        uio.wait().map_err(|error| format!("raising {value:#x}: {error}"))?;
        ensure!(uio.is_asserted()?, "Interrupt Status is clear while {value:#x} is pending");
        edu.write(register::INTERRUPT_ACKNOWLEDGE, value);
        ensure!(!uio.is_asserted()?, "Interrupt Status is set after {value:#x}'s acknowledgement");
        uio.unmask()?;
    }
    uio.expect_none()?;
    Ok("three interrupts, none after the acknowledgement".into())
}

/// Clearing Interrupt Disable while the device asserts makes the interrupt arrive again.
pub(crate) fn check_level(uio: &mut Uio<'_>, edu: &Edu) -> Result<String> {
    settle(uio, edu)?;
    edu.write(register::INTERRUPT_RAISE, 0x2);
    for round in 0..5 {
        uio.wait().map_err(|error| format!("round {round}: {error}"))?;
        uio.unmask()?;
    }
    uio.wait()?;
    edu.write(register::INTERRUPT_ACKNOWLEDGE, 0x2);
    uio.unmask()?;
    uio.expect_none()?;
    Ok("arrives again until acknowledged".into())
}

/// With Interrupt Disable set nothing arrives, and nothing is lost.
pub(crate) fn check_disable(uio: &mut Uio<'_>, edu: &Edu) -> Result<String> {
    settle(uio, edu)?;
    for value in [0x4, 0x8] {
        uio.function.set_command(INTERRUPT_DISABLE, true)?;
        edu.write(register::INTERRUPT_RAISE, value);
        uio.expect_none()?;
        ensure!(uio.is_asserted()?, "Interrupt Status is clear with Interrupt Disable set");
        uio.unmask()?;
        uio.wait()?;
        edu.write(register::INTERRUPT_ACKNOWLEDGE, value);
        uio.unmask()?;
        uio.expect_none()?;
    }
    Ok("held back, then delivered".into())
}

/// Leaves nothing pending of a check that failed.
fn settle(uio: &mut Uio<'_>, edu: &Edu) -> Result<()> {
    edu.write(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
    uio.unmask()?;
    while uio.within(Duration::ZERO)? {
        let mut count = [0; 4];
        uio.node.read_exact(&mut count)?;
        uio.counted = u32::from_ne_bytes(count);
    }
    Ok(())
}
