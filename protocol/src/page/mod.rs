//! Pages of memory that one process writes and others read.

pub mod wrap;
