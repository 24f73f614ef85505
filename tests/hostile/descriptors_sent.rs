//! File descriptors where none, or not so many, belong.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::message::{COMMAND, command, header, message};
use barkeep_tests::peer::requests::{
    access, dma_map, dma_unmap, info, irq::*, region_info, set_irqs, write,
};
use rustix::io::Errno;

#[test]
fn a_command_that_takes_no_descriptors_is_refused_with_one() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let file = shrinkable(4096);
    for (command, body) in [
        (command::GET_INFO, info(16, 0)),
        (command::GET_REGION_INFO, region_info(32, 0)),
        (command::GET_IRQ_INFO, info(16, 0)),
        (command::REGION_READ, access(7, 0, 4)),
        (command::REGION_WRITE, write(7, 4, &[2])),
        (command::RESET, vec![]),
    ] {
        for count in [1, 16] {
            peer.call_with_fds(command, &body, &vec![file.as_fd(); count]).failure(Errno::INVAL);
        }
    }
    let unmap = dma_unmap(0, 0, 4096);
    peer.map(0b11, 0, 4096, file.as_fd());
    let two = [file.as_fd(); 2];
    peer.call_with_fds(command::DMA_UNMAP, &unmap, &two).failure(Errno::INVAL);
    let _ = peer.call(command::DMA_UNMAP, &unmap).success();
    assert_eq!(peer.config_u16(4), 0, "nothing was written");
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn more_descriptors_than_announced_refuse_one_message() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let file = shrinkable(4096);
    let map = dma_map(0b11, 0, 0, 4096);
    for count in [17, 40] {
        let fds = vec![file.as_fd(); count];
        for (command, body) in [
            (command::DMA_MAP, map.clone()),
            (command::SET_IRQS, set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 17, &[])),
            (command::GET_INFO, info(16, 0)),
            (0x4444, vec![]),
        ] {
            peer.call_with_fds(command, &body, &fds).failure(Errno::INVAL);
        }
    }
    let _ = peer.call_with_fds(command::DMA_MAP, &map, &[file.as_fd()]).success();
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn descriptors_that_come_in_parts_are_counted_together() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let file = shrinkable(4096);
    let sixteen = [file.as_fd(); 16];
    let bytes = message(6, command::DMA_MAP, COMMAND, &dma_map(0b11, 0, 0, 4096));
    for part in bytes.chunks(12) {
        peer.send_with_fds(part, &sixteen);
    }
    peer.reply_to(6, command::DMA_MAP).failure(Errno::INVAL);
    // One descriptor is one, wherever in the message it is.
    peer.send(&bytes[..20]);
    peer.send_with_fds(&bytes[20..], &[file.as_fd()]);
    let _ = peer.reply_to(6, command::DMA_MAP).success();
    drop(peer);
    edu::assert_served(backend.socket());
}

/// Descriptors of a message that is drained must not be taken for those of the next one.
#[test]
fn descriptors_of_an_oversized_message_go_with_it() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let file = shrinkable(4096);
    let size = 2 << 20;
    for count in [1, 20] {
        let fds = vec![file.as_fd(); count];
        peer.send_with_fds(&header(7, command::DMA_MAP, size, COMMAND), &fds);
        peer.send_with_fds(&[0; 100], &fds);
        peer.send(&vec![0; size as usize - 116]);
        peer.reply_to(7, command::DMA_MAP).failure(Errno::INVAL);
        // This one takes no descriptor, so it would be refused with one.
        let _ = peer.call(command::GET_INFO, &info(16, 0)).success();
    }
    drop(peer);
    edu::assert_served(backend.socket());
}
