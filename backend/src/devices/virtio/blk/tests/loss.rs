//! Writes that the kernel took and could not write: it says so once.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::*;
use crate::devices::virtio::Words;
use crate::state::Scratch;

fn kept(disk: &Fixture) -> Vec<OwnedFd> {
    disk.block.kept().iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect()
}

/// A flush that reaches the engine and ends there like this.
fn flush(disk: &mut Fixture, script: &Script, result: Result<u64, Errno>) -> Outcome {
    let sent = disk.send(0, FLUSH, 0, &[]);
    disk.kick(0);
    script.end(0, result);
    disk.kick(0);
    disk.outcome(0, &sent)
}

#[test]
fn no_flush_succeeds_after_one_that_failed_not_even_in_another_process() {
    let scratch = Scratch::private(1).unwrap();
    let (mut disk, script) = Fixture::scripted(MIB, "");
    disk.block.set_words(Words::new(scratch.clone()));
    assert_eq!(flush(&mut disk, &script, Ok(0)), DONE);
    assert_eq!(flush(&mut disk, &script, Err(Errno::IO)), FAILED);
    assert_eq!(disk.request(FLUSH, 0, &[]), FAILED);
    assert!(script.started().is_empty(), "it is not asked of the kernel, which has forgotten");

    // The rest goes on, and a reset of the device does not help.
    let sent = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
    disk.kick(0);
    script.end(0, Ok(512));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &sent), DONE);
    disk.block.reset();
    disk.block.start(disk.driver.features | disk.block.features());
    assert_eq!(disk.request(FLUSH, 0, &[]), FAILED);

    let (mut other, _script) = Fixture::scripted(MIB, "");
    other.block.set_words(Words::new(scratch));
    assert_eq!(other.request(FLUSH, 0, &[]), FAILED);
}

#[test]
fn a_flush_under_way_while_another_one_fails_fails_too() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    let (first, second) = (disk.send(0, FLUSH, 0, &[]), disk.send(0, FLUSH, 0, &[]));
    disk.kick(0);
    script.end(0, Err(Errno::IO));
    script.end(0, Ok(0));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &first), FAILED);
    assert_eq!(disk.outcome(0, &second), FAILED);
}

#[test]
fn only_what_was_taken_can_be_lost() {
    let rows = [
        (Errno::NOSPC, true, DONE),
        (Errno::IO, true, FAILED),
        (Errno::NOSPC, false, DONE),
        (Errno::IO, false, DONE),
    ];
    for (errno, durable, expected) in rows {
        let cache = if durable { "writethrough" } else { "writeback" };
        let (mut disk, script) = Fixture::scripted(MIB, &format!(",cache={cache}"));
        let write = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
        disk.kick(0);
        script.end(0, Err(errno));
        disk.kick(0);
        assert_eq!(disk.outcome(0, &write), FAILED);
        let sent = disk.send(0, FLUSH, 0, &[]);
        disk.kick(0);
        if !script.started().is_empty() {
            script.end(0, Ok(0));
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &sent), expected, "{errno} {durable}");
    }
}

#[test]
fn the_first_flush_of_a_successor_asks_what_its_predecessor_was_told() {
    let first = Fixture::new(MIB, "");
    let witness = kept(&first);
    let Fixture { block, image, .. } = first;
    drop(block);
    let mut second = Fixture::over(image, "");
    second.block.adopt(witness).unwrap();
    assert_eq!(second.request(FLUSH, 0, &[]), DONE);

    // One that knows of a loss: a pipe can't be flushed at all.
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    second.block.image.witness = Some(File::from(pipe));
    assert_eq!(second.request(FLUSH, 0, &[]), DONE, "it is asked once");
    second.block.ask_witness = true;
    assert_eq!(second.request(FLUSH, 0, &[]), FAILED);
    assert_eq!(second.request(FLUSH, 0, &[]), FAILED);
}

#[test]
fn a_disk_is_not_gone_on_with_from_another_file() {
    let (first, mut second) = (Fixture::new(MIB, ""), Fixture::new(MIB, ""));
    let error = second.block.adopt(kept(&first)).unwrap_err();
    assert!(error.to_string().contains("is another file than it was"), "{error}");
    assert!(second.block.adopt(Vec::new()).is_err());
    assert!(
        second.block.adopt([kept(&second), kept(&second)].into_iter().flatten().collect()).is_err()
    );

    let mut reader = Fixture::new(MIB, ",readonly=on");
    assert!(kept(&reader).is_empty());
    reader.block.adopt(Vec::new()).unwrap();
    assert!(reader.block.adopt(kept(&second)).is_err());
}
