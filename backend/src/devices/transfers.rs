//! DMA that a device begins and does not wait for.
//!
//! Most client memory is mapped here, and a transfer there is done before the access that began it is
//! answered. Memory that the client did not share is reached by messages instead, and their answers
//! come later: a client may answer nothing before it has the reply to the request that began the
//! transfer (QEMU's main loop waits for it). So no device ever waits for one.

use std::collections::VecDeque;

use crate::dma::{DmaAccess, DmaError, DmaTable, Iova, Reach};

/// A transfer that a device asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Tells the device's transfers apart; its own choice.
    pub id: u64,
    /// Where in the device's address space.
    pub address: Iova,
    /// What is to be moved.
    pub payload: Payload,
}

/// What a transfer moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// So many bytes from memory to the device. The device bounds it: the buffer is made at once.
    Read(usize),
    /// These bytes from the device to memory.
    Write(Vec<u8>),
}

impl Payload {
    /// How many bytes are to be moved.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Read(length) => *length,
            Self::Write(data) => data.len(),
        }
    }

    /// Whether nothing is to be moved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How a transfer ended: with the bytes that were read (none for a write), or not at all. A part may
/// have been moved all the same, as on a bus.
pub type TransferResult = Result<Vec<u8>, DmaError>;

/// A part of a transfer that only the client can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMessage {
    /// Names it in the answer.
    pub ticket: Ticket,
    /// Where in the device's address space.
    pub address: Iova,
    /// What is to be moved.
    pub payload: Payload,
}

/// Which message an answer belongs to. One that is no longer waited for is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// The transfers of one function, done one after the other in the order that they were begun.
#[derive(Debug, Default)]
pub struct Transfers {
    queue: VecDeque<Active>,
    tickets: u64,
}

#[derive(Debug)]
struct Active {
    id: u64,
    address: Iova,
    direction: Direction,
    /// What was read so far, or is to be written.
    data: Vec<u8>,
    length: usize,
    done: usize,
    waits: Option<Waiting>,
}

/// For the answer to a message about so many bytes.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    ticket: Ticket,
    length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// What became of the first transfer.
#[derive(Debug)]
pub enum Step {
    /// There is nothing to do, or nothing before an answer comes.
    Idle,
    /// The client must be asked.
    Message(MemoryMessage),
    /// The transfer with this id is over.
    Done(u64, TransferResult),
}

impl Transfers {
    /// Puts a transfer behind those that are under way.
    pub fn begin(&mut self, transfer: Transfer) {
        let Transfer { id, address, payload } = transfer;
        let (direction, data, length) = match payload {
            Payload::Read(length) => (Direction::Read, vec![0; length], length),
            Payload::Write(data) => {
                let length = data.len();
                (Direction::Write, data, length)
            }
        };
        let active = Active { id, address, direction, data, length, done: 0, waits: None };
        self.queue.push_back(active);
    }

    /// Whether anything is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether the first of them needs a message next.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.queue.front().is_some_and(|active| active.waits.is_none())
    }

    /// Where the first of them goes on.
    #[must_use]
    pub fn address(&self) -> Option<Iova> {
        let active = self.queue.front()?;
        Some(Iova(active.address.0.wrapping_add(active.done as u64)))
    }

    /// Forgets all of them: the device is reset or stopped. What a client answers later is ignored.
    pub fn clear(&mut self, dma: &DmaTable) {
        self.give_up_waiting(dma);
        self.queue.clear();
    }

    /// Goes on with the first transfer. A message carries at most `limit` bytes; with `None`, no
    /// message can be sent now.
    pub fn step(&mut self, dma: &DmaTable, bus_master: bool, limit: Option<usize>) -> Step {
        if !bus_master && !self.queue.is_empty() {
            self.give_up_waiting(dma);
            return self.finish(Err(DmaError::BusMasterDisabled));
        }
        let Some(active) = self.queue.front_mut() else { return Step::Idle };
        if active.waits.is_some() {
            return Step::Idle;
        }
        match active.advance(dma, limit) {
            Ok(Progress::Finished) => self.finish(Ok(())),
            Ok(Progress::Stuck) => Step::Idle,
            Ok(Progress::Ask(address, payload)) => {
                self.tickets += 1;
                let ticket = Ticket(self.tickets);
                active.waits = Some(Waiting { ticket, length: payload.len() });
                Step::Message(MemoryMessage { ticket, address, payload })
            }
            Err(error) => self.finish(Err(error)),
        }
    }

    /// The client's answer to a message: the bytes that were read, or for a write none. Memory that it
    /// has or may have written is noted as dirty.
    pub fn answered(
        &mut self,
        dma: &DmaTable,
        ticket: Ticket,
        answer: Result<&[u8], DmaError>,
    ) -> Step {
        let Some(active) = self.queue.front_mut() else { return Step::Idle };
        let Some(waiting) = active.waits.take_if(|waiting| waiting.ticket == ticket) else {
            return Step::Idle;
        };
        let end = active.done + waiting.length;
        active.note_written(dma, waiting);
        match answer {
            Ok(data) if active.direction == Direction::Read => {
                // The session has compared the answer's length with the question's.
                active.data[active.done..end].copy_from_slice(data);
                active.done = end;
                Step::Idle
            }
            Ok(_) => {
                active.done = end;
                Step::Idle
            }
            Err(error) => self.finish(Err(error)),
        }
    }

    /// Waits for no answer any more. A write may be done all the same, and is noted now: nobody will
    /// when its answer comes.
    fn give_up_waiting(&mut self, dma: &DmaTable) {
        if let Some(active) = self.queue.front_mut()
            && let Some(waiting) = active.waits.take()
        {
            active.note_written(dma, waiting);
        }
    }

    fn finish(&mut self, outcome: Result<(), DmaError>) -> Step {
        let active = self.queue.pop_front().expect("the first transfer has just been worked on");
        let data = if active.direction == Direction::Read { active.data } else { Vec::new() };
        Step::Done(active.id, outcome.map(|()| data))
    }
}

impl Active {
    fn note_written(&self, dma: &DmaTable, waiting: Waiting) {
        if self.direction == Direction::Write {
            let address = self.address.0.wrapping_add(self.done as u64);
            dma.mark_dirty(Iova(address), waiting.length as u64);
        }
    }

    /// Moves what can be moved here, up to the next part that only the client can move.
    fn advance(&mut self, dma: &DmaTable, limit: Option<usize>) -> Result<Progress, DmaError> {
        let access = match self.direction {
            Direction::Read => DmaAccess::READ,
            Direction::Write => DmaAccess::WRITE,
        };
        if self.done == self.length {
            return Ok(Progress::Finished);
        }
        let address = self.address.0.checked_add(self.done as u64).ok_or(DmaError::Overflow)?;
        let rest = (self.length - self.done) as u64;
        // Checked once for all of them: a guest may make tens of thousands of windows.
        for piece in dma.pieces(Iova(address), rest, access)? {
            let length = usize::try_from(piece.len).expect("a part of the transfer");
            let end = self.done + length;
            let part = self.done..end;
            match (piece.reach, self.direction) {
                (Reach::Mapped, Direction::Read) => dma.read(piece.iova, &mut self.data[part])?,
                (Reach::Mapped, Direction::Write) => dma.write(piece.iova, &self.data[part])?,
                (Reach::Message, direction) => {
                    let Some(limit) = limit else { return Ok(Progress::Stuck) };
                    if limit == 0 {
                        // It would be asked for nothing, and that for ever.
                        return Err(DmaError::NotShared(piece.iova.0));
                    }
                    let length = length.min(limit);
                    let payload = match direction {
                        Direction::Read => Payload::Read(length),
                        Direction::Write => {
                            Payload::Write(self.data[self.done..self.done + length].to_vec())
                        }
                    };
                    return Ok(Progress::Ask(piece.iova, payload));
                }
            }
            self.done = end;
        }
        Ok(Progress::Finished)
    }
}

/// How far a transfer came.
enum Progress {
    Finished,
    /// It goes on when messages can be sent.
    Stuck,
    /// The client is to be asked.
    Ask(Iova, Payload),
}

#[cfg(test)]
mod tests;
