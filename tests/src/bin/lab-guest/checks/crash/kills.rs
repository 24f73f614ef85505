//! The host's part: workers are killed when the guest asks for it, until enough of them were.

use std::thread;
use std::time::{Duration, Instant};

use crate::requests::Requests;
use crate::{Result, ensure};

/// Workers of one function, being killed.
#[derive(Debug)]
pub(crate) struct Kills {
    requests: Requests,
    asked: Instant,
}

impl Kills {
    /// How often the guest asks whether it goes on.
    const PAUSE: Duration = Duration::from_millis(500);

    /// The host starts to kill the workers of the function that it calls `name`; `all` stands for every
    /// function's.
    ///
    /// # Errors
    /// It does not.
    pub(crate) fn begin(name: &str) -> Result<Self> {
        let mut requests = Requests::open()?;
        requests.ask_and_await(&format!("kill-{name}"))?;
        Ok(Self { requests, asked: Instant::now() })
    }

    /// Whether there are more to come.
    ///
    /// # Errors
    /// The host can't be asked.
    pub(crate) fn go_on(&mut self) -> Result<bool> {
        if self.asked.elapsed() < Self::PAUSE {
            return Ok(true);
        }
        self.asked = Instant::now();
        Ok(!self.requests.ask_whether("killed")?)
    }

    /// Waits until the last was killed.
    ///
    /// # Errors
    /// The host can't be asked.
    pub(crate) fn wait(mut self) -> Result<()> {
        while self.go_on()? {
            thread::sleep(Self::PAUSE);
        }
        Ok(())
    }

    /// Repeats something until the last was killed, and once more; how often.
    ///
    /// # Errors
    /// It failed, or the host can't be asked.
    pub(crate) fn during(mut self, mut work: impl FnMut(u32) -> Result<()>) -> Result<u32> {
        let mut rounds = 0;
        loop {
            let is_last = !self.go_on()?;
            work(rounds).map_err(|error| format!("round {rounds}: {error}"))?;
            rounds += 1;
            if is_last {
                return Ok(rounds);
            }
        }
    }
}

/// Waits for something that others bring about.
///
/// # Errors
/// It can't be determined, or does not happen in time.
pub(crate) fn await_that(
    what: &str,
    patience: Duration,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what}: not for {patience:?}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
