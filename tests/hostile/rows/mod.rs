//! The rows, by what they lie about.

mod dma;
mod extensions;
mod framing;
mod information;
mod interrupts;
mod optional;
mod regions;
mod version;

use crate::table::Row;

/// Everything that every backend of ours answers as documented.
pub(crate) fn all() -> Vec<Row> {
    let files = [
        framing::rows(),
        version::rows(),
        dma::map_rows(),
        dma::unmap_rows(),
        information::rows(),
        interrupts::rows(),
        regions::rows(),
        extensions::rows(),
    ];
    files.into_iter().flatten().collect()
}

pub(crate) use optional::rows as of_optional_commands;
