//! Mappings that come and go, and writes to devices.
