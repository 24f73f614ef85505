use std::os::fd::OwnedFd;
use std::thread::Thread;

use barkeep_protocol::wire::{Errno, Header, MessageId};

/// Who waits for which reply, and who reads the socket for all of them.
///
/// One thread at a time reads: the leader. It hands out the replies of the others, and when its own
/// has come, another one that waits goes on reading. Plain data: [`Connection`](super::connection)
/// holds the lock.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    waiting: Vec<Waiter>,
    /// Buffers of answers, to be used again.
    spare: Vec<Vec<u8>>,
    next_id: u16,
    led: bool,
    ended: bool,
    /// Attendants that want to read when nobody else does.
    attendants: Vec<Thread>,
    #[cfg(test)]
    pub(super) turned_away: usize,
}

/// A request that was sent, or is about to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) id: MessageId,
    pub(super) command: u16,
}

#[derive(Debug)]
struct Waiter {
    ticket: Ticket,
    /// Set while it sleeps.
    thread: Option<Thread>,
    answer: Option<Answer>,
}

/// A reply that another thread has read.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) error: Option<Errno>,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What a thread that waits does next.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing: its answer is here.
    Answered(Answer),
    /// It reads the socket from now on.
    Lead,
    /// It sleeps until it is woken.
    Sleep,
    /// Nothing: no answer will come.
    Ended,
}

/// Far more than threads that wait for one function, and few enough that a free id is found.
const MAX_WAITING: usize = 1 << 12;
const MAX_SPARE: usize = 16;
/// Larger buffers are given back: a transfer of that size is dear anyway.
const MAX_SPARE_SIZE: usize = 64 << 10;

impl Waiters {
    /// Gives out a message id that no request in flight has; `None` when the session has ended, or
    /// with more requests in flight than any VM has threads.
    pub(super) fn enter(&mut self, command: u16) -> Option<Ticket> {
        if self.ended || self.waiting.len() >= MAX_WAITING {
            return None;
        }
        let ticket = Ticket { id: self.free_id(), command };
        self.waiting.push(Waiter { ticket, thread: None, answer: None });
        Some(ticket)
    }

    /// An id for a request that nobody waits for.
    pub(super) fn free_id(&mut self) -> MessageId {
        loop {
            let id = MessageId(self.next_id);
            self.next_id = self.next_id.wrapping_add(1);
            if self.position(id).is_none() {
                return id;
            }
        }
    }

    /// Forgets a request.
    pub(super) fn leave(&mut self, ticket: Ticket) {
        if let Some(at) = self.position(ticket.id) {
            self.waiting.swap_remove(at);
        }
    }

    /// What the thread of `ticket` does next. With an answer, or at the end, it has left.
    pub(super) fn turn(&mut self, ticket: Ticket) -> Turn {
        let Some(at) = self.position(ticket.id) else { return Turn::Ended };
        if let Some(answer) = self.waiting[at].answer.take() {
            self.waiting.swap_remove(at);
            return Turn::Answered(answer);
        }
        if self.ended {
            self.waiting.swap_remove(at);
            return Turn::Ended;
        }
        if self.lead() {
            self.waiting[at].thread = None;
            return Turn::Lead;
        }
        self.waiting[at].thread.get_or_insert_with(std::thread::current);
        Turn::Sleep
    }

    /// Whether an answer is here already.
    pub(super) fn is_answered(&self, ticket: Ticket) -> bool {
        self.position(ticket.id).is_some_and(|at| self.waiting[at].answer.is_some())
    }

    /// Makes the caller the one that reads, if nobody does.
    pub(super) fn lead(&mut self) -> bool {
        #[cfg(test)]
        if self.led {
            self.turned_away += 1;
        }
        !self.ended && !std::mem::replace(&mut self.led, true)
    }

    /// Somebody else may read now. Only who sleeps is woken: the others look by themselves.
    pub(super) fn pass_on(&mut self) {
        self.led = false;
        let sleeper = self.waiting.iter().find(|waiter| waiter.answer.is_none() && waiter.sleeps());
        match sleeper.and_then(|waiter| waiter.thread.as_ref()) {
            Some(thread) => thread.unpark(),
            None => self.wake_attendants(),
        }
    }

    /// Hands a reply to the thread that waits for it; `false` if nobody does.
    pub(super) fn answer(
        &mut self,
        header: &Header,
        error: Option<Errno>,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> bool {
        let Some(at) = self.position(header.id) else { return false };
        let waiter = &mut self.waiting[at];
        if waiter.ticket.command != header.command || waiter.answer.is_some() {
            return false;
        }
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(body);
        waiter.answer = Some(Answer { error, body: buffer, fds });
        if let Some(thread) = &waiter.thread {
            thread.unpark();
        }
        true
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < MAX_SPARE && buffer.capacity() <= MAX_SPARE_SIZE {
            self.spare.push(buffer);
        }
    }

    /// No more answers come: wakes everybody.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.waiting.iter().filter_map(|waiter| waiter.thread.as_ref()).for_each(Thread::unpark);
        self.wake_attendants();
    }

    /// Whether somebody reads. If so, the calling thread is woken when that ends.
    pub(super) fn attend(&mut self) -> bool {
        let waits = self.led && !self.ended;
        let me = std::thread::current();
        // It may have given up waiting before, and come again.
        if waits && self.attendants.iter().all(|thread| thread.id() != me.id()) {
            self.attendants.push(me);
        }
        waits
    }

    pub(super) fn wake_attendants(&mut self) {
        self.attendants.drain(..).for_each(|thread| thread.unpark());
    }

    fn position(&self, id: MessageId) -> Option<usize> {
        self.waiting.iter().position(|waiter| waiter.ticket.id == id)
    }
}

impl Waiter {
    fn sleeps(&self) -> bool {
        self.thread.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attendant_that_comes_again_and_again_is_remembered_once() {
        let mut waiters = Waiters::default();
        assert!(waiters.lead());
        for _ in 0..10 {
            assert!(waiters.attend());
        }
        assert_eq!(waiters.attendants.len(), 1);
    }
}
