//! `SIGBUS` inside a BAR's mapping: the load or store completes as an Unsupported Request.
