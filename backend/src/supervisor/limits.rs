//! How many descriptors the supervisor can hold.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use tracing::warn;

/// More than a client can have in use: 65535 DMA windows, and eventfds.
const MOST: usize = 70_000;
/// With fewer, a client with a usual number of DMA windows may be refused one.
const FEW: usize = 512;
/// Of this process: logs, the event loop, signals.
const OWN: usize = 64;
/// For each function: its listener, state, and client, its worker's link and pidfd, and a few that
/// come and go.
const EACH: usize = 16;
/// The kernel's default for `fs.nr_open`, which bounds what a limit can be.
const UNLIMITED: usize = 1 << 20;

/// There are not enough to serve so many functions at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the limit of open files ({allowed}) is too low for so many functions ({functions})")]
pub(super) struct TooFew {
    allowed: usize,
    functions: usize,
}

/// Takes what the operator allows, and shares it among the functions.
pub(super) fn share(functions: usize) -> Result<usize, TooFew> {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let mut allowed = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, most) {
        warn!("can't raise the limit of open files: {errno}");
        allowed = limit.current;
    }
    let allowed =
        allowed.map_or(UNLIMITED, |allowed| usize::try_from(allowed).unwrap_or(UNLIMITED));
    let share = share_of(allowed, functions).ok_or(TooFew { allowed, functions })?;
    if share < FEW {
        warn!(
            "the limit of open files ({allowed}) leaves {share} for each function: a client may be \
             refused DMA windows"
        );
    }
    Ok(share)
}

fn share_of(allowed: usize, functions: usize) -> Option<usize> {
    let functions = functions.max(1);
    let rest = allowed.checked_sub(OWN)?.checked_sub(EACH.checked_mul(functions)?)?;
    Some((rest / functions).min(MOST)).filter(|share| *share > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_share_what_is_left() {
        assert_eq!(share_of(1024, 1), Some(944));
        assert_eq!(share_of(20_000, 4), Some(4968));
        assert_eq!(share_of(UNLIMITED, 2), Some(MOST));
        assert_eq!(share_of(OWN + EACH, 1), None);
        assert_eq!(share_of(10, 1), None);
        assert_eq!(share_of(1024, 100), None);
        assert_eq!(share_of(1024, usize::MAX), None);
    }

    #[test]
    fn together_they_never_have_more_than_is_allowed() {
        for functions in 1..200 {
            if let Some(share) = share_of(4096, functions) {
                assert!(share * functions + EACH * functions + OWN <= 4096, "{functions}");
            }
        }
    }
}
