//! The disposition of signals, and their masks.
