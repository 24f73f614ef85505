//! Writes the committed corpus: real messages, as the clients that there are send them.
//!
//! `cargo run --manifest-path tests/fuzz/Cargo.toml --example seeds`

mod config_space;
mod messages;
mod sessions;
mod virtio;

use std::path::Path;

use barkeep_fuzz::script::{GREETED, Script};
use barkeep_protocol::wire::limits::HEADER_SIZE_U32;
use barkeep_protocol::wire::{Command, Errno, Header, MessageId, MessageKind};

fn main() {
    let requests = messages::requests();
    for (name, command, body) in &requests {
        save("codec", name, &message(*command, MessageKind::Command { no_reply: false }, body));
    }
    for (name, command, body) in messages::replies() {
        save("codec", name, &message(command, MessageKind::Reply { error: None }, &body));
    }
    let refused = MessageKind::Reply { error: Some(Errno::INVAL) };
    save("codec", "reply_error", &message(Command::DmaMap, refused, &[]));

    for (name, command, body) in &requests {
        let script = Script::new(GREETED).message(&[], command.code(), 0, body);
        save("session", name, &script.done());
    }
    sessions::write_seeds();
    config_space::write_seeds();
    virtio::write_seeds();
}

fn save(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder).expect("a writable tree");
    std::fs::write(folder.join(name), bytes).expect("a writable tree");
}

/// The id is one that the codec target takes for a number, as well.
fn message(command: Command, kind: MessageKind, body: &[u8]) -> Vec<u8> {
    let body_size = u32::try_from(body.len()).expect("a seed is small");
    let header = Header { id: MessageId(0x4201), command: command.code(), body_size, kind };
    [&header.to_bytes()[..], body].concat()
}

/// A message whose header says something else than its length.
fn with_size(mut message: Vec<u8>, body_size: u32) -> Vec<u8> {
    message[4..8].copy_from_slice(&HEADER_SIZE_U32.wrapping_add(body_size).to_ne_bytes());
    message
}
