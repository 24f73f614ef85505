//! When a write is acknowledged (5.2.5, 5.2.6.2).

use super::*;

/// Negotiates anew.
fn restart(disk: &mut Fixture, without: u64) {
    disk.block.reset();
    let features = disk.driver.features | disk.block.features();
    disk.block.start(features & !without);
}

fn writeback(disk: &Fixture) -> u8 {
    let mut byte = [9];
    disk.block.config_read(32, &mut byte);
    byte[0]
}

/// What a write and a write-zeroes do, until both are done.
fn steps(disk: &mut Fixture, script: &Script) -> Vec<String> {
    let mut steps = Vec::new();
    let zeroes = segment(8, 1, 0);
    for (kind, data) in [(OUT, vec![1; 512]), (WRITE_ZEROES, zeroes)] {
        let sent = disk.send(0, kind, 0, &[Part::Readable(&data)]);
        disk.kick(0);
        while let Some(step) = script.started().first() {
            assert_eq!(disk.driver.used(0), None, "{step}");
            steps.push(step.clone());
            script.clone().wait();
            disk.kick(0);
        }
        assert_eq!(disk.outcome(0, &sent), DONE);
    }
    steps
}

const VOLATILE: [&str; 2] = ["write 0+512", "zero 4096+512"];
const DURABLE: [&str; 4] = ["write 0+512", "sync", "zero 4096+512", "sync"];

#[test]
fn a_write_is_durable_unless_the_driver_knows_of_a_cache() {
    const FLUSH: u64 = feature::FLUSH;
    const WCE: u64 = feature::CONFIG_WCE;
    // Option, features not negotiated, what the driver writes, the mode it reads, durable.
    let rows: [(&str, u64, Option<u8>, u8, bool); 9] = [
        ("writeback", 0, None, 1, false),
        ("writeback", WCE, None, 1, false),
        ("writeback", FLUSH, None, 0, true),
        ("writeback", FLUSH | WCE, None, 0, true),
        ("writeback", 0, Some(0), 0, true),
        ("writeback", WCE, Some(0), 1, false),
        ("writethrough", 0, None, 0, true),
        ("writethrough", WCE, None, 0, true),
        ("writethrough", 0, Some(1), 1, false),
    ];
    for (option, without, written, mode, durable) in rows {
        let name = format!("{option}, without {without:#x}, driver writes {written:?}");
        let (mut disk, script) = Fixture::scripted(MIB, &format!(",cache={option}"));
        restart(&mut disk, without);
        if let Some(written) = written {
            disk.block.config_write(32, &[written]);
        }
        assert_eq!(writeback(&disk), mode, "{name}");
        let expected = if durable { &DURABLE[..] } else { &VOLATILE };
        assert_eq!(steps(&mut disk, &script), expected, "{name}");
        disk.block.reset();
        assert_eq!(writeback(&disk), u8::from(option == "writeback"), "{name}");
    }
}

#[test]
fn a_driver_may_choose_before_it_is_set_up() {
    let (mut disk, script) = Fixture::scripted(MIB, "");
    disk.block.reset();
    disk.block.config_write(30, &[7, 7, 0]);
    restart_without_reset(&mut disk);
    assert_eq!(writeback(&disk), 0);
    assert_eq!(steps(&mut disk, &script), DURABLE);
}

fn restart_without_reset(disk: &mut Fixture) {
    let features = disk.driver.features | disk.block.features();
    disk.block.start(features);
}

#[test]
fn the_mode_moves_with_the_device() {
    for mode in [0, 1] {
        let (mut disk, _script) = Fixture::scripted(MIB, "");
        disk.block.config_write(32, &[mode]);
        let (mut other, _script) = Fixture::scripted(MIB, "");
        other.block.restore(&disk.block.save()).unwrap();
        assert_eq!(writeback(&other), mode);
    }
    let (mut disk, _script) = Fixture::scripted(MIB, "");
    for bad in [&[][..], &[2], &[0, 0]] {
        assert!(disk.block.restore(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn each_change_of_the_mode_is_told() {
    let (mut disk, _script) = Fixture::scripted(MIB, "");
    let told = |disk: &mut Fixture, change: fn(&mut Fixture)| {
        let before = (disk.block.save(), disk.block.revision());
        change(disk);
        let after = (disk.block.save(), disk.block.revision());
        assert_ne!(after.0, before.0);
        assert_ne!(after.1, before.1);
    };
    told(&mut disk, |disk| disk.block.config_write(32, &[0]));
    told(&mut disk, |disk| disk.block.reset());
    told(&mut disk, |disk| disk.block.start(0));
    told(&mut disk, |disk| disk.block.restore(&[1]).unwrap());
    let before = disk.block.revision();
    disk.request(OUT, 0, &[Part::Readable(&[])]);
    assert_eq!(disk.block.revision(), before);
}

#[test]
fn durable_writes_work_on_a_real_image() {
    for engine in ENGINES {
        let mut disk = Fixture::new(MIB, &format!(",aio={engine},cache=writethrough"));
        let data = pattern(4096, 9);
        disk.write(1, &data);
        let zeroes = segment(2, 1, 0);
        assert_eq!(disk.request(WRITE_ZEROES, 0, &[Part::Readable(&zeroes)]), DONE, "{engine}");
        let expected = [&data[..512], &[0; 512], &data[1024..]].concat();
        assert_eq!(disk.read(1, 4096), expected, "{engine}");
    }
}
