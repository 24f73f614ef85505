//! What the guest asks the host to do, a word a line on a serial port of its own.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use crate::{Result, ensure};

/// The port. The host answers by doing it.
#[derive(Debug)]
pub(crate) struct Requests {
    port: File,
}

impl Requests {
    pub(crate) fn open() -> Result<Self> {
        let port = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/ttyS2")
            .map_err(|error| format!("/dev/ttyS2: {error}"))?;
        Ok(Self { port })
    }

    pub(crate) fn ask(&mut self, what: &str) -> Result<()> {
        writeln!(self.port, "{what}")?;
        Ok(self.port.flush()?)
    }

    /// The same for what has to be done before the guest goes on: the host says `done`.
    pub(crate) fn ask_and_await(&mut self, what: &str) -> Result<()> {
        let answer = self.ask_and_read(what)?;
        ensure!(answer == "done\n", "the host answers '{}' to '{what}'", answer.trim());
        Ok(())
    }

    /// The same for what may not be so: then the host says `failed`.
    pub(crate) fn ask_whether(&mut self, what: &str) -> Result<bool> {
        match self.ask_and_read(what)?.as_str() {
            "done\n" => Ok(true),
            "failed\n" => Ok(false),
            answer => Err(format!("the host answers '{}' to '{what}'", answer.trim()).into()),
        }
    }

    fn ask_and_read(&mut self, what: &str) -> Result<String> {
        self.ask(what)?;
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while byte != *b"\n" {
            self.port.read_exact(&mut byte)?;
            answer.extend(byte);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}
