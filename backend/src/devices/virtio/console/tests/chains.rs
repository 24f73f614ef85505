//! Whatever a driver makes available.

use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::spec::descriptor;

/// Most of them well-formed, or all would end at the first.
fn part() -> impl Strategy<Value = (u64, u32, u16)> {
    let tame = (1u64 << 22..1 << 25, 0..100_000u32, prop_oneof![Just(0), Just(descriptor::WRITE)]);
    let wild = (any::<u64>(), any::<u32>(), 0..8u16);
    prop_oneof![9 => tame, 1 => wild]
}

proptest! {
    /// Requests are given back at most once, and the device is quiet in the end or needs a reset.
    #[test]
    fn no_chain_is_too_much(
        chains in prop::collection::vec(
            (0..2u16, prop::collection::vec(part(), 1..4), 0..4u8),
            1..40,
        ),
    ) {
        let mut bench = Bench::new("socket");
        let mut client = None;
        let (mut sent, mut used) = (0, 0);
        for (queue, parts, action) in chains {
            let parts: Vec<_> = parts
                .into_iter()
                .map(|(address, len, flags)| Part::Raw(address, len, flags & !descriptor::NEXT))
                .collect();
            bench.driver.send(queue, &parts);
            sent += 1;
            match action {
                0 => client = None,
                1 => {
                    let stream = UnixStream::connect(&bench.path).unwrap();
                    stream.set_nonblocking(true).unwrap();
                    client = Some(stream);
                }
                _ => {
                    if let Some(client) = &client {
                        let _ = rustix::io::write(client, &[7; 3000]);
                        let _ = rustix::io::read(client, &mut [0; 30_000]);
                    }
                }
            }
            let mut result = bench.device.kicked(queue, &mut bench.driver);
            while result.is_ok() && bench.is_awake() {
                result = bench.device.woken(0, &mut bench.driver);
            }
            used += [RECEIVE, TRANSMIT]
                .map(|queue| std::iter::from_fn(|| bench.driver.used(queue)).count())
                .iter()
                .sum::<usize>();
            prop_assert!(used <= sent);
            if result.is_err() {
                bench.device.quiesce();
                bench.device.reset();
                prop_assert_eq!(bench.device.in_flight(), []);
                break;
            }
        }
    }
}
