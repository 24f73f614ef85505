//! Real signals.
