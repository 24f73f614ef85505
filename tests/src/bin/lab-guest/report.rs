//! The lines the host reads.

use std::io::{self, Write};

use crate::Result;

/// Writes one line per check.
#[derive(Debug)]
pub(crate) struct Report<W> {
    out: W,
}

impl<W: Write> Report<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    /// Runs a check and reports it. The check's text is what it saw, for whoever reads the log.
    ///
    /// # Errors
    /// The line could not be written: then the host must not believe anything.
    pub(crate) fn check(
        &mut self,
        name: &str,
        check: impl FnOnce() -> Result<String>,
    ) -> io::Result<()> {
        let (verdict, detail) = match check() {
            Ok(seen) => ("ok", seen),
            Err(error) => ("fail", error.to_string()),
        };
        self.line(name, verdict, &detail)
    }

    /// Reports a check that can't be carried out here.
    ///
    /// # Errors
    /// The line could not be written.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) -> io::Result<()> {
        self.line(name, "skipped", reason)
    }

    fn line(&mut self, name: &str, verdict: &str, detail: &str) -> io::Result<()> {
        let detail = detail.replace(['\n', '\r'], " ");
        writeln!(self.out, "CHECK {name} {verdict} {detail}")?;
        self.out.flush()
    }
}
