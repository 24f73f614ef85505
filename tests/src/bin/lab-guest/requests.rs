//! What the guest asks the host to do, a word a line on a serial port of its own.

use std::fs::{File, OpenOptions};
use std::io::Write;

use crate::Result;

/// The port. The host answers by doing it.
#[derive(Debug)]
pub(crate) struct Requests {
    port: File,
}

impl Requests {
    pub(crate) fn open() -> Result<Self> {
        let port = OpenOptions::new()
            .write(true)
            .open("/dev/ttyS2")
            .map_err(|error| format!("/dev/ttyS2: {error}"))?;
        Ok(Self { port })
    }

    pub(crate) fn ask(&mut self, what: &str) -> Result<()> {
        writeln!(self.port, "{what}")?;
        Ok(self.port.flush()?)
    }
}
