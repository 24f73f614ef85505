//! Each test drives a function as a guest's driver does, with a device behind it that gives back
//! what it gets.

mod bench;
mod core;
mod interrupts;
mod moving;
mod properties;
mod queues;
mod recovery;
mod registers;
