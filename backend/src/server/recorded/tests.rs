//! Sessions whose server is killed.
