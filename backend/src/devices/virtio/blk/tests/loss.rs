//! Writes that the kernel took and could not write: it says so once.

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

/// The kernel tells it once: another one at the same time could be told of a success.
#[test]
fn a_flush_that_fails_fails_for_all_who_wait_and_for_those_who_wait_for_the_next_one() {
    let (mut disk, script) = Fixture::scripted(MIB, ",queues=2");
    let first = [disk.send(0, FLUSH, 0, &[]), disk.send(0, FLUSH, 0, &[])];
    disk.kick(0);
    let second = disk.send(1, FLUSH, 0, &[]);
    disk.kick(1);
    assert_eq!(script.started(), ["sync"]);
    script.end(0, Err(Errno::IO));
    disk.kick(0);
    assert_eq!(script.started(), [""; 0]);
    for sent in first {
        assert_eq!(disk.outcome(0, &sent), FAILED);
    }
    assert_eq!(disk.outcome(1, &second), FAILED);
}

#[test]
fn only_what_was_taken_can_be_lost() {
    let refused: [&[Result<u64, Errno>]; 2] = [&[Err(Errno::NOSPC)], &[Err(Errno::IO)]];
    let lost: [&[_]; 2] = [&[Ok(512), Err(Errno::NOSPC)], &[Ok(512), Err(Errno::IO)]];
    let rows = [
        ("writeback", refused[0], DONE),
        ("writeback", refused[1], DONE),
        ("writethrough", refused[0], DONE),
        ("writethrough", refused[1], DONE),
        ("writethrough", lost[0], FAILED),
        ("writethrough", lost[1], FAILED),
    ];
    for (cache, ends, expected) in rows {
        let (mut disk, script) = Fixture::scripted(MIB, &format!(",cache={cache}"));
        let write = disk.send(0, OUT, 0, &[Part::Readable(&[1; 512])]);
        disk.kick(0);
        for end in ends {
            script.end(0, *end);
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &write), FAILED);
        let sent = disk.send(0, FLUSH, 0, &[]);
        disk.kick(0);
        if !script.started().is_empty() {
            script.end(0, Ok(0));
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &sent), expected, "{cache} {ends:?}");
    }
}

#[test]
fn after_a_loss_no_write_is_durable() {
    let (mut disk, script) = Fixture::scripted(MIB, ",cache=writethrough");
    let parts = [Part::Readable(&[1; 512])];
    let (first, second) = (disk.send(0, OUT, 0, &parts), disk.send(0, OUT, 1, &parts));
    disk.kick(0);
    script.end(0, Ok(512));
    disk.kick(0);
    assert_eq!(script.started(), ["write 512+512", "sync"]);
    // It reaches the kernel while that finds out, so it may be what the kernel tells of.
    script.end(0, Ok(512));
    disk.kick(0);
    script.end(0, Err(Errno::IO));
    disk.kick(0);
    assert_eq!(disk.outcome(0, &first), FAILED);
    assert_eq!(disk.outcome(0, &second), FAILED);
    assert_eq!(script.started(), [""; 0]);
}

#[test]
fn before_its_first_flush_a_successor_asks_what_its_predecessor_was_told() {
    let (first, (mut disk, script)) = (Fixture::new(MIB, ""), Fixture::scripted(MIB, ""));
    let scratch = Scratch::private(1).unwrap();
    disk.block.set_words(Words::new(scratch.clone()));
    drop(first);
    let witness = kept(&disk);
    disk.block.adopt(witness).unwrap();
    let mut sent = vec![disk.send(0, FLUSH, 0, &[]), disk.send(0, FLUSH, 0, &[])];
    disk.kick(0);
    for (index, (step, end)) in
        [("ask", Err(Errno::INTR)), ("ask", Ok(0)), ("sync", Ok(0))].into_iter().enumerate()
    {
        assert_eq!(script.started(), [step], "{index}");
        assert_eq!(disk.driver.used(0), None, "{index}");
        if index == 1 {
            // One more that comes while it is asked.
            sent.push(disk.send(0, FLUSH, 0, &[]));
            disk.kick(0);
        }
        script.end(0, end);
        disk.kick(0);
    }
    for sent in sent {
        assert_eq!(disk.outcome(0, &sent), DONE);
    }
    assert_eq!(flush(&mut disk, &script, Ok(0)), DONE, "it is asked once");

    let witness = kept(&disk);
    disk.block.adopt(witness).unwrap();
    assert_eq!(flush(&mut disk, &script, Err(Errno::IO)), FAILED);
    assert_eq!(scratch.get(0), 1);
    assert_eq!(disk.request(FLUSH, 0, &[]), FAILED);
}

#[test]
fn a_witness_is_asked_by_every_engine() {
    for engine in ENGINES {
        let first = Fixture::new(MIB, "");
        let witness = kept(&first);
        let Fixture { block, image, .. } = first;
        drop(block);
        let mut second = Fixture::over(image, &format!(",aio={engine}"));
        second.block.adopt(witness).unwrap();
        second.write(3, &[3; 512]);
        assert_eq!(second.request(FLUSH, 0, &[]), DONE, "{engine}");

        // One that knows of a loss: a pipe can't be flushed at all.
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        second.block.syncs.ask(&Arc::new(pipe.into()));
        assert_eq!(second.request(FLUSH, 0, &[]), FAILED, "{engine}");
    }
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
