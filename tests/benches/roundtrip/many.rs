//! One busy function among many that are connected and idle.

use crate::clients::{Measured, Raw};
use crate::servers::{Kind, Served};
use crate::worlds::World;
use crate::{Effort, tabulate};

const FUNCTIONS: usize = 256;

/// Compares a process that has one function with one that has 256, of which 255 have idle clients.
pub(crate) fn measure(world: &World, effort: Effort) {
    let alone = Served::start(Kind::Barkeep { functions: 1 }, world);
    let crowd = Served::start(Kind::Barkeep { functions: FUNCTIONS }, world);
    let _idle: Vec<Raw> = (1..FUNCTIONS).map(|index| Raw::connect(&crowd, index, false)).collect();
    let mut measured: Vec<(String, Box<dyn Measured>)> = vec![
        ("1".into(), Box::new(Raw::connect(&alone, 0, false))),
        (format!("{FUNCTIONS}"), Box::new(Raw::connect(&crowd, 0, false))),
    ];
    tabulate(world, effort, &mut measured);
}
