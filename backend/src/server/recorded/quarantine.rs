//! What a request is answered that nobody has survived.

use barkeep_protocol::transport::Sender;
use barkeep_protocol::wire::{Errno, Header, MessageKind, PciRegion, RegionWrites, Request};

/// Nothing of it is done. A read of a BAR brings all ones and a write is dropped, as when no function
/// claims the access; everything else is an error. What was an answer to us is not answered.
pub(super) fn answer(header: &Header, body: &[u8], sender: &mut Sender) {
    let MessageKind::Command { no_reply: false } = header.kind else { return };
    let is_bar = |region: u32| matches!(PciRegion::from_index(region), Some(PciRegion::Bar(_)));
    match Request::parse(header.command, body) {
        Ok(Request::RegionRead(access)) if is_bar(access.region) => {
            let answered = sender.try_reply(header, |body, _| {
                access.write_reply(body, |data| {
                    data.fill(0xff);
                    Ok::<_, Errno>(())
                })
            });
            if let Err(errno) = answered {
                sender.error(header.id, header.command, errno);
            }
        }
        Ok(Request::RegionWrite(write)) => {
            sender.reply(header, Vec::new(), |body| write.access.write_to(body));
        }
        Ok(Request::RegionWriteMulti(writes)) => {
            let all = writes.writes.len();
            sender.reply(header, Vec::new(), |body| RegionWrites::write_reply(body, all));
        }
        _ => sender.error(header.id, header.command, Errno::IO),
    }
}
