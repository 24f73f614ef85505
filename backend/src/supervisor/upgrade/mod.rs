//! Another program in place of the running one, without an end for any client.
//!
//! The process stays, and so do its number, its parent and its descriptors. Only the program changes:
//! the workers finish their turn and end, the supervisor executes what is at its path by now, and that
//! goes on with what it finds open. What can go wrong is tried before anything is touched: the new
//! program is asked whether it knows the arguments and the [`Handover`].

mod handover;
mod program;

pub use handover::{Handover, HandoverError};
pub use program::{Program, UpgradeError, ready_for_signals};

use std::os::fd::RawFd;

use thiserror::Error;

use super::inheritance;
use super::systemd::{InheritError, Inherited};

/// Announces a handover to the program that is executed: how often that has happened, a colon, and the
/// number of the descriptor with the description.
pub const VARIABLE: &str = "BARKEEP_HANDOVER";

/// Why a program can't go on in the place of the one before it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AdoptError {
    /// The announcement makes no sense.
    #[error("{VARIABLE} is garbled")]
    Garbled,
    /// Its description can't be read.
    #[error("{0}")]
    Handover(#[from] HandoverError),
    /// A descriptor is not what it should be.
    #[error("{0}")]
    Inherit(#[from] InheritError),
}

/// What this process held before it executed this program, and how often it has done that. `None` if
/// it was started in the common way. To be called before anything else opens a descriptor that
/// programs inherit.
///
/// # Errors
/// [`AdoptError`]
pub fn inherited() -> Result<Option<(Inherited, u32)>, AdoptError> {
    match std::env::var(VARIABLE) {
        Ok(announcement) => adopt(&announcement).map(Some),
        Err(_) => Ok(None),
    }
}

fn adopt(announcement: &str) -> Result<(Inherited, u32), AdoptError> {
    let number = announcement.split_once(':').and_then(|(_, number)| number.parse().ok());
    let number: RawFd = number.ok_or(AdoptError::Garbled)?;
    let file = inheritance::take(number).map_err(|errno| InheritError::Missing(number, errno))?;
    let Handover { upgrades, descriptors } = Handover::from_file(&file)?;
    Ok((Inherited::take(descriptors)?, upgrades))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use rustix::io::Errno;

    use super::*;
    use crate::state::FdKey;

    /// A descriptor as an executed program finds it: open, and nobody's.
    fn left(fd: impl AsFd + IntoRawFd) -> RawFd {
        inheritance::leave_open(fd.as_fd(), true).unwrap();
        fd.into_raw_fd()
    }

    #[test]
    fn what_is_handed_over_is_adopted() {
        let (state, _other) = UnixStream::pair().unwrap();
        let (client, _another) = UnixStream::pair().unwrap();
        let descriptors = vec![("disk/state".into(), left(state)), ("disk/9".into(), left(client))];
        let file = Handover { upgrades: 2, descriptors }.to_file().unwrap();
        let (mut inherited, upgrades) = adopt(&format!("2:{}", left(file))).unwrap();
        let held = inherited.function("disk");
        assert!(held.state.is_some() && held.fds.contains_key(&FdKey(9)) && inherited.is_empty());
        assert_eq!(upgrades, 2);
    }

    #[test]
    fn a_descriptor_that_is_not_there_is_told() {
        let (open, _other) = UnixStream::pair().unwrap();
        let ours = open.as_raw_fd();
        let descriptors = vec![("disk/state".into(), ours)];
        let file = Handover { upgrades: 1, descriptors }.to_file().unwrap();
        let missing = InheritError::Missing(ours, Errno::BADF).into();
        assert_eq!(adopt(&format!("1:{}", left(file))).err(), Some(missing));
        assert_eq!(adopt("1").err(), Some(AdoptError::Garbled));
        let (other, _another) = UnixStream::pair().unwrap();
        let foreign = AdoptError::Handover(HandoverError::Unknown);
        let socket = format!("1:{}", left(other));
        assert!(adopt(&socket).is_err_and(|error| error != foreign));
    }
}
