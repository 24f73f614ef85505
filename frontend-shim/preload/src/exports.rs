//! The functions that take the C library's place. They do nothing but translate: what a C function is
//! given, and the errno that it leaves.
