//! The virtio devices that an operator can name.

use super::blk::Block;
use super::console::Console;
use super::net::Net;
use super::rng::Entropy;
use super::{Core, MemoryGuard};
use crate::config::{ConfigError, Parameters};

/// Makes a virtio device by its name, for a transport whose guest memory is of one kind.
pub type Constructor<G> = fn(&mut Parameters) -> Result<Box<dyn Core<G>>, ConfigError>;

/// What makes the virtio device that is called `name`; `None` when there is none.
#[must_use]
pub fn constructor<G: MemoryGuard>(name: &str) -> Option<Constructor<G>> {
    // One line a device; the names are also in `NAMES`.
    match name {
        "virtio-net" => Some(|p| Ok(Box::new(Net::from_parameters(p)?))),
        "virtio-console" => Some(|p| Ok(Box::new(Console::from_parameters(p)?))),
        "virtio-rng" => Some(|p| Ok(Box::new(Entropy::from_parameters(p)?))),
        "virtio-blk" => Some(|parameters| Ok(Box::new(Block::from_parameters(parameters)?))),
        _ => None,
    }
}

/// Every virtio device by name, sorted.
pub const NAMES: [&str; 4] = ["virtio-blk", "virtio-console", "virtio-net", "virtio-rng"];
