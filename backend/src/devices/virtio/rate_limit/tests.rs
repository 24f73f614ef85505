use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::config::DeviceSpec;

fn limit(amount: u64, period: u32) -> Option<Limit> {
    Some(Limit {
        amount: NonZeroU64::new(amount).unwrap(),
        period: NonZeroU32::new(period).unwrap(),
    })
}

fn operations(amount: u64) -> RateLimiter {
    RateLimiter::new(Limits { operations: limit(amount, 1000), bytes: None }).unwrap()
}

fn bytes(amount: u64) -> RateLimiter {
    RateLimiter::new(Limits { operations: None, bytes: limit(amount, 1000) }).unwrap()
}

/// How many requests of so many bytes are admitted before the first that is not.
fn admitted(limiter: &mut RateLimiter, bytes: u64, now: Instant) -> usize {
    (0..1000).take_while(|_| limiter.admit(1, bytes, now) == Admission::Now).count()
}

#[test]
fn a_burst_of_a_second_passes_and_then_the_rate() {
    let mut limiter = operations(10);
    let start = Instant::now();
    let at = |millis| start + Duration::from_millis(millis);
    assert_eq!(admitted(&mut limiter, 0, at(0)), 10);
    assert_eq!(admitted(&mut limiter, 0, at(99)), 0);
    assert_eq!(admitted(&mut limiter, 0, at(100)), 1);
    assert_eq!(admitted(&mut limiter, 0, at(550)), 4);
    // The half that was left over counts.
    assert_eq!(admitted(&mut limiter, 0, at(600)), 1);
}

#[test]
fn rest_brings_the_burst_back_and_no_more() {
    let mut limiter = operations(10);
    let start = Instant::now();
    assert_eq!(admitted(&mut limiter, 0, start), 10);
    assert_eq!(admitted(&mut limiter, 0, start + Duration::from_secs(1 << 40)), 10);
}

#[test]
fn a_period_of_its_own_is_kept_to() {
    let limits = Limits { operations: None, bytes: limit(64, 5000) };
    let mut limiter = RateLimiter::new(limits).unwrap();
    let start = Instant::now();
    assert_eq!(admitted(&mut limiter, 32, start), 2);
    assert_eq!(admitted(&mut limiter, 32, start + Duration::from_millis(2499)), 0);
    assert_eq!(admitted(&mut limiter, 32, start + Duration::from_millis(2500)), 1);
}

#[test]
fn both_limits_hold_and_a_refused_request_takes_from_neither() {
    let limits = Limits { operations: limit(2, 1000), bytes: limit(100, 1000) };
    let mut limiter = RateLimiter::new(limits).unwrap();
    let now = Instant::now();
    assert_eq!(limiter.admit(1, 90, now), Admission::Now);
    for _ in 0..5 {
        assert_eq!(limiter.admit(1, 11, now), Admission::Later);
    }
    assert_eq!(limiter.admit(1, 10, now), Admission::Now);
    assert_eq!(limiter.admit(1, 0, now), Admission::Later);
    assert_eq!(limiter.admit(1, 0, now + Duration::from_millis(500)), Admission::Now);
}

#[test]
fn a_request_larger_than_the_bucket_passes_when_it_is_full_and_is_made_up_for() {
    let mut limiter = bytes(100);
    let start = Instant::now();
    let at = |millis| start + Duration::from_millis(millis);
    assert_eq!(limiter.admit(1, 1, at(0)), Admission::Now);
    assert_eq!(limiter.admit(1, 1000, at(9)), Admission::Later);
    assert_eq!(limiter.admit(1, 1000, at(10)), Admission::Now);
    // Without bytes it has nothing to make up for.
    assert_eq!(limiter.admit(1, 0, at(9000)), Admission::Now);
    assert_eq!(limiter.admit(1, 1, at(9000)), Admission::Later);
    assert_eq!(limiter.admit(1, 1, at(9020)), Admission::Now);
}

#[test]
fn time_that_goes_back_gives_nothing_twice() {
    let mut limiter = operations(10);
    let start = Instant::now();
    let later = start + Duration::from_secs(1);
    assert_eq!(admitted(&mut limiter, 0, later), 10);
    assert_eq!(admitted(&mut limiter, 0, start), 0);
    assert_eq!(admitted(&mut limiter, 0, later), 0);
}

#[test]
fn without_limits_everything_passes_and_nothing_is_watched() {
    let mut limiter = RateLimiter::new(Limits::default()).unwrap();
    assert!(limiter.fd().is_none());
    assert_eq!(limiter.admit(u64::MAX, u64::MAX, Instant::now()), Admission::Now);
    limiter.acknowledge();
}

fn readable(limiter: &RateLimiter, wait: bool) -> bool {
    let fd = limiter.fd().unwrap();
    let immediately = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, (!wait).then_some(&immediately)).unwrap() == 1
}

#[test]
fn a_request_that_must_wait_sets_the_timer() {
    let mut limiter = operations(1000);
    let now = Instant::now();
    assert_eq!(limiter.admit(1000, 0, now), Admission::Now);
    assert!(!readable(&limiter, false));
    assert_eq!(limiter.admit(1, 0, now), Admission::Later);
    assert!(readable(&limiter, true));
    limiter.acknowledge();
    assert!(!readable(&limiter, false));
}

#[test]
fn a_long_wait_does_not_put_off_a_short_one() {
    let limits = Limits { operations: limit(1000, 1000), bytes: limit(1, 3_600_000) };
    let mut limiter = RateLimiter::new(limits).unwrap();
    let now = Instant::now();
    assert_eq!(limiter.admit(1000, 1, now), Admission::Now);
    assert_eq!(limiter.admit(1, 0, now), Admission::Later);
    // An hour; neither before the timer goes off nor after it.
    assert_eq!(limiter.admit(1, 1, now), Admission::Later);
    assert!(readable(&limiter, true));
    assert_eq!(limiter.admit(1, 1, now + Duration::from_secs(1)), Admission::Later);
    assert!(readable(&limiter, false));
}

#[test]
fn the_options_are_numbers_a_second_and_never_zero() {
    let parse = |text: &str| {
        let spec: DeviceSpec = format!("x{text}").parse().unwrap();
        let mut parameters = spec.parameters;
        let limits = Limits::from_parameters(&mut parameters)?;
        parameters.finish().map(|()| limits)
    };
    assert_eq!(parse(""), Ok(Limits::default()));
    let both = Limits { operations: limit(500, 1000), bytes: limit(10 << 20, 1000) };
    assert_eq!(parse(",iops=500,bps=10M"), Ok(both));
    let refused = |text| parse(text).unwrap_err().to_string();
    assert_eq!(refused(",iops=0"), "parameter 'iops': 0 a second is nothing at all");
    assert_eq!(refused(",bps=0"), "parameter 'bps': 0 a second is nothing at all");
    assert_eq!(refused(",iops=many"), "parameter 'iops': 'many' is no number");
    assert_eq!(refused(",bps=-1"), "parameter 'bps': '-1' is no size such as 4M");
}

/// Any number, with those at the ends more often than chance has it.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), Just(u64::MAX), Just(1), 0..1000u64]
}

proptest! {
    /// Whatever is asked when, the answer comes, and a limiter that was left alone for as long as it
    /// said lets the request pass.
    #[test]
    fn no_request_waits_for_ever(
        amount in number(),
        period in any::<u32>(),
        steps in prop::collection::vec((number(), number(), 0..u64::MAX >> 40), 1..20),
    ) {
        let limit = limit(amount.max(1), period.max(1)).unwrap();
        let mut bucket = Bucket::new(limit);
        let mut now = Instant::now();
        for (first, second, nanos) in steps {
            now += Duration::from_nanos(nanos);
            bucket.take(first);
            let wait = bucket.wait(second, now);
            let Some(then) = now.checked_add(wait).filter(|_| wait < Duration::from_secs(1 << 40))
            else {
                break;
            };
            prop_assert!(wait.is_zero() || !bucket.wait(second, now).is_zero());
            prop_assert_eq!(bucket.wait(second, then), Duration::ZERO);
            now = then;
        }
    }

    /// In any time, no more is admitted than the rate and one burst.
    #[test]
    fn the_rate_is_never_exceeded(
        amount in 1..10_000u64,
        steps in prop::collection::vec((1..2000u64, 0..500u64), 1..100),
    ) {
        let mut limiter = bytes(amount);
        let start = Instant::now();
        let (mut total, mut largest, mut elapsed) = (0, 0, 0);
        for (demand, millis) in steps {
            elapsed += millis;
            let now = start + Duration::from_millis(elapsed);
            if limiter.admit(1, demand, now) == Admission::Now {
                total += demand;
                largest = largest.max(demand);
            }
        }
        prop_assert!(total <= amount.max(largest) + amount * elapsed / 1000 + 1, "{total}");
    }
}
