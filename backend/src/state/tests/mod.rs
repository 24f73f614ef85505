mod basics;
mod crashes;
mod hostile;
mod peer;
mod random;
mod skew;
mod speed;
mod worker;
mod world;

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};

use super::{Journal, PreviousEnd, Recovered, StateError, StateFile, Toll};

const IDENTITY: &str = "edu0: edu,width=28";
const SCRATCH_WORDS: usize = 10;

fn memfd() -> OwnedFd {
    memfd_create("state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap()
}

fn fresh(memfd: &OwnedFd) -> Journal {
    let file = StateFile::create(memfd.try_clone().unwrap()).unwrap();
    Journal::fresh(file, IDENTITY, SCRATCH_WORDS).unwrap()
}

fn recover(memfd: &OwnedFd) -> Result<(Journal, Recovered), StateError> {
    recover_after(memfd, PreviousEnd::ByItself)
}

fn recover_after(memfd: &OwnedFd, end: PreviousEnd) -> Result<(Journal, Recovered), StateError> {
    Journal::recover(StateFile::open(memfd.try_clone()?)?, IDENTITY, SCRATCH_WORDS, end)
}

/// Of so many deaths of its own.
fn toll(deaths: u32) -> Toll {
    (0..deaths).fold(Toll::default(), |toll, _| toll.and(PreviousEnd::ByItself))
}
