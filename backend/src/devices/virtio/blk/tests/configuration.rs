//! Features and configuration space (5.2.3, 5.2.4).

use super::*;

fn bytes(block: &Block<Memory>) -> [u8; 64] {
    let mut bytes = [0; 64];
    block.config_read(0, &mut bytes);
    bytes
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let mut expected = [0; 64];
    let mut put = |at: usize, field: &[u8]| expected[at..at + field.len()].copy_from_slice(field);
    put(0, &2048u64.to_le_bytes());
    put(12, &126u32.to_le_bytes());
    put(20, &512u32.to_le_bytes());
    // 8 logical blocks in a physical one.
    put(24, &[3]);
    put(26, &8u16.to_le_bytes());
    put(32, &[1]);
    put(34, &4u16.to_le_bytes());
    for (at, field) in [(36, 1u32 << 21), (40, 16), (44, 8), (48, 1 << 17), (52, 16)] {
        put(at, &field.to_le_bytes());
    }
    put(56, &[1]);
    let disk = Fixture::new(MIB, ",queues=4,queue-size=128");
    assert_eq!(bytes(&disk.block), expected);
    assert_eq!(disk.block.queue_sizes(), [128; 4]);
    assert_eq!(disk.block.device_type(), DeviceType::BLOCK);
}

#[test]
fn a_part_of_the_configuration_is_read_from_anywhere() {
    let disk = Fixture::new(MIB, "");
    let all = bytes(&disk.block);
    for (offset, len) in [(0, 4), (4, 4), (1, 3), (20, 8), (56, 8), (60, 4), (63, 1)] {
        let mut part = vec![0; len];
        disk.block.config_read(offset as u64, &mut part);
        assert_eq!(part, all[offset..offset + len], "{offset}+{len}");
    }
    for offset in [64, 4096, u64::MAX] {
        let mut part = [0; 8];
        disk.block.config_read(offset, &mut part);
        assert_eq!(part, [0; 8], "{offset}");
    }
}

#[test]
fn only_the_mode_of_the_cache_can_be_written() {
    let mut disk = Fixture::new(MIB, "");
    let all = bytes(&disk.block);
    for offset in [0, 20, 31, 33, 34, 60, u64::MAX] {
        disk.block.config_write(offset, &[0]);
        assert_eq!(bytes(&disk.block), all, "{offset}");
    }
    disk.block.config_write(24, &[0xff; 8]);
    assert_eq!(bytes(&disk.block), all);
    disk.block.config_write(30, &[0; 4]);
    assert_eq!(bytes(&disk.block)[32], 0);
}

#[test]
fn a_feature_is_offered_where_it_makes_sense() {
    const ALWAYS: u64 = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE;
    let rows = [
        ("", ALWAYS | feature::DISCARD | feature::WRITE_ZEROES),
        (",queues=2", ALWAYS | feature::MQ | feature::DISCARD | feature::WRITE_ZEROES),
        (",discard=off", ALWAYS | feature::WRITE_ZEROES),
        (",readonly=on", ALWAYS | feature::RO),
    ];
    for (options, features) in rows {
        let disk = Fixture::new(MIB, options);
        assert_eq!(disk.block.features(), features, "{options}");
        let fields = bytes(&disk.block);
        // Nothing is said of what is not offered.
        let discard = features & feature::DISCARD != 0;
        assert_eq!(fields[36..48] != [0; 12], discard, "{options}");
        assert_eq!(fields[56] != 0, discard, "{options}");
        let zeroes = features & feature::WRITE_ZEROES != 0;
        assert_eq!(fields[48..56] != [0; 8], zeroes, "{options}");
    }
}

#[test]
fn a_disk_of_large_blocks_says_so() {
    let disk = Fixture::new(MIB, ",logical-block-size=4096");
    let fields = bytes(&disk.block);
    assert_eq!(fields[..8], 2048u64.to_le_bytes(), "the capacity is in sectors of 512 bytes");
    assert_eq!(fields[20..24], 4096u32.to_le_bytes());
    assert_eq!(fields[24..28], [0, 0, 1, 0]);
}
