//! The preloaded library in processes that are wrapped by it: what has nothing to do with a device is
//! as it was, and what has is completed as bare metal does.

mod calls;
mod devices;
mod same;
mod words;
mod wrapped;
