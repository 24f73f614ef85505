mod basics;

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};

use super::{Journal, Recovered, StateError, StateFile};

const IDENTITY: &str = "edu0: edu,width=28";

fn memfd() -> OwnedFd {
    memfd_create("state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap()
}

fn fresh(memfd: &OwnedFd) -> Journal {
    let file = StateFile::create(memfd.try_clone().unwrap()).unwrap();
    Journal::fresh(file, IDENTITY, 10).unwrap()
}

fn recover(memfd: &OwnedFd) -> Result<(Journal, Recovered), StateError> {
    Journal::recover(StateFile::open(memfd.try_clone()?)?, IDENTITY, 10)
}
