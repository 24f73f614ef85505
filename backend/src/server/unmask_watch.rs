use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::event_loop::{Epoll, Interest, Source, Token};
use crate::irq::EventFd;

/// The eventfd of the client's that is watched for unmasking INTx. Kept here until it is taken from
/// the event loop: as long as the client has a copy, closing ours would not do that.
#[derive(Debug, Default)]
pub(super) struct UnmaskWatch(Option<Arc<EventFd>>);

impl UnmaskWatch {
    /// Follows the client's choice.
    pub(super) fn follow(
        &mut self,
        wanted: Option<&Arc<EventFd>>,
        epoll: &Epoll,
        port: usize,
    ) -> io::Result<()> {
        if wanted.map(Arc::as_ptr) == self.0.as_ref().map(Arc::as_ptr) {
            return Ok(());
        }
        if let Some(watched) = self.0.take() {
            epoll.remove(watched.as_fd())?;
        }
        // What the client calls an eventfd may be something that can't be watched; then nothing that it
        // does unmasks the pin, which is its own loss.
        let token = Token::Port(port, Source::Unmask);
        self.0 = wanted
            .cloned()
            .filter(|eventfd| epoll.add(eventfd.as_fd(), token, Interest::Edge).is_ok());
        Ok(())
    }
}
