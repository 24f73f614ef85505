use std::sync::Arc;

use super::EventFd;

/// The INTx pin: a level that is signalled by edges of an eventfd.
///
/// VFIO bridges the two with auto-masking (`VFIO_IRQ_INFO_AUTOMASKED`): a signal masks the pin, the
/// client unmasks it when the guest has serviced the interrupt, and a level that is still asserted
/// then is signalled again.
#[derive(Debug, Default)]
pub struct Intx {
    eventfd: Option<EventFd>,
    /// What unmasks the pin when the client, or KVM for it, signals it.
    unmask: Option<Arc<EventFd>>,
    asserted: bool,
    masked: bool,
}

impl Intx {
    /// The level of the pin, as the function drives it.
    pub fn set_level(&mut self, asserted: bool) {
        self.asserted = asserted;
        self.deliver();
    }

    /// Sets or takes away the eventfd. A new one starts unmasked and learns a pending level.
    pub fn set_eventfd(&mut self, eventfd: Option<EventFd>) {
        self.eventfd = eventfd;
        self.masked = false;
        self.deliver();
    }

    /// Sets or takes away the eventfd whose signal stands for [`unmask`](Self::unmask): KVM's
    /// `resamplefd`. Whoever owns the event loop watches it.
    pub fn set_unmask_eventfd(&mut self, eventfd: Option<Arc<EventFd>>) {
        self.unmask = eventfd;
    }

    /// The eventfd whose signal stands for [`unmask`](Self::unmask), if there is one.
    #[must_use]
    pub fn unmask_eventfd(&self) -> Option<&Arc<EventFd>> {
        self.unmask.as_ref()
    }

    /// Keeps the pin silent until it is unmasked.
    pub fn mask(&mut self) {
        self.masked = true;
    }

    /// Whether it is silent: masked by the client, or by a signal that the client has not answered.
    #[must_use]
    pub fn is_masked(&self) -> bool {
        self.masked
    }

    /// Lets the pin speak again; a level that is still asserted is signalled at once.
    pub fn unmask(&mut self) {
        self.masked = false;
        self.deliver();
    }

    /// Signals once whatever the level is: the client's own trigger.
    pub fn trigger(&mut self) {
        if let Some(eventfd) = &self.eventfd
            && !self.masked
        {
            eventfd.signal();
            self.masked = true;
        }
    }

    /// Forgets what the client set. The level belongs to the function and stays.
    pub fn disconnect(&mut self) {
        self.eventfd = None;
        self.unmask = None;
        self.masked = false;
    }

    fn deliver(&mut self) {
        if self.asserted {
            self.trigger();
        }
    }
}
