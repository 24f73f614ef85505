//! Messages on sockets.
