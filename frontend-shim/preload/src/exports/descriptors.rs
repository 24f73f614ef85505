//! Descriptors that come and go.
