//! The library's beginning and end.
