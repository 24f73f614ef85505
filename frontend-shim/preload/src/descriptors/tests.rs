use std::os::fd::RawFd;

use rustix::io::Errno;

use super::{Descriptor, Descriptors, LIMIT};
use crate::Shim;
use crate::status::{Count, Status};
use crate::system::{Answer, Duplicate, System};

/// Answers what a descriptor's duplicate is: the number that the test asks for, or none.
#[derive(Debug, Default)]
struct Fake {
    /// As kernels before 5.9, and filters of system calls.
    no_ranges: bool,
}

impl System for Fake {
    fn duplicate(&self, _: RawFd, how: Duplicate) -> Answer<RawFd> {
        match how {
            Duplicate::Lowest => Ok(9),
            Duplicate::Over(to) => Ok(to),
            Duplicate::OverWith(..) => Err(Errno::BADF),
            Duplicate::Command(_, at_least) => RawFd::try_from(at_least).map_err(|_| Errno::INVAL),
        }
    }

    fn close(&self, _: RawFd) -> Answer<()> {
        Ok(())
    }

    fn close_range(&self, first: u32, last: u32, _: i32) -> Answer<()> {
        match self.no_ranges {
            true => Err(Errno::NOSYS),
            false if first > last => Err(Errno::INVAL),
            false => Ok(()),
        }
    }
}

fn shim() -> Shim<Fake> {
    Shim::new(Fake::default(), Status::private(true))
}

const ALL: [Descriptor; 4] = [
    Descriptor::Vm(0),
    Descriptor::Vcpu(17),
    Descriptor::Device((1 << 28) - 1),
    Descriptor::Stream(3),
];

#[test]
fn each_kind_comes_back_as_it_was_set() {
    let descriptors = Descriptors::new();
    for (fd, descriptor) in (0..).zip(ALL) {
        assert!(descriptors.set(fd, descriptor));
        assert_eq!(descriptors.get(fd), Some(descriptor));
    }
    for (fd, descriptor) in (0..).zip(ALL) {
        assert_eq!(descriptors.clear(fd), Some(descriptor));
        assert_eq!(descriptors.get(fd), None);
    }
}

#[test]
fn numbers_that_are_not_followed_are_nothing() {
    let descriptors = Descriptors::new();
    let limit = RawFd::try_from(LIMIT).expect("it's small");
    for fd in [-1, RawFd::MIN, RawFd::MAX, limit] {
        assert!(!descriptors.set(fd, Descriptor::Vm(0)));
        assert_eq!(descriptors.get(fd), None);
        assert_eq!(descriptors.clear(fd), None);
    }
    assert!(descriptors.set(limit - 1, Descriptor::Vm(0)));
    assert!(!descriptors.set(4, Descriptor::Vm(1 << 28)));
    assert_eq!(descriptors.get(4), None);
}

#[test]
fn another_of_the_same_is_found() {
    let descriptors = Descriptors::new();
    descriptors.set(3, Descriptor::Vm(1));
    descriptors.set(5, Descriptor::Vcpu(1));
    assert_eq!(descriptors.another(3, Descriptor::Vm(1)), None);
    descriptors.set(9, Descriptor::Vm(1));
    assert_eq!(descriptors.another(3, Descriptor::Vm(1)), Some(9));
    assert_eq!(descriptors.another(9, Descriptor::Vm(1)), Some(3));
    assert_eq!(descriptors.another(9, Descriptor::Vm(2)), None);
}

#[test]
fn a_duplicate_is_what_the_first_is() {
    let shim = shim();
    shim.descriptors.set(3, Descriptor::Vm(1));
    assert_eq!(shim.duplicate(3, Duplicate::Lowest), Ok(9));
    assert_eq!(shim.duplicate(3, Duplicate::Over(10)), Ok(10));
    assert_eq!(shim.duplicate(3, Duplicate::Command(libc::F_DUPFD_CLOEXEC, 11)), Ok(11));
    for fd in [3, 9, 10, 11] {
        assert_eq!(shim.descriptors.get(fd), Some(Descriptor::Vm(1)));
    }
    assert_eq!(shim.close(3), Ok(()));
    assert_eq!(shim.descriptors.get(3), None);
    assert_eq!(shim.descriptors.get(10), Some(Descriptor::Vm(1)));
}

#[test]
fn what_another_file_is_duplicated_over_is_forgotten() {
    let shim = shim();
    shim.descriptors.set(10, Descriptor::Vm(1));
    assert_eq!(shim.duplicate(4, Duplicate::Over(10)), Ok(10));
    assert_eq!(shim.descriptors.get(10), None);
    // Closed by nobody that we saw.
    shim.descriptors.set(9, Descriptor::Vcpu(1));
    assert_eq!(shim.duplicate(4, Duplicate::Lowest), Ok(9));
    assert_eq!(shim.descriptors.get(9), None);
}

#[test]
fn a_descriptor_duplicated_over_itself_stays() {
    let shim = shim();
    shim.descriptors.set(3, Descriptor::Vm(1));
    assert_eq!(shim.duplicate(3, Duplicate::Over(3)), Ok(3));
    assert_eq!(shim.descriptors.get(3), Some(Descriptor::Vm(1)));
}

#[test]
fn a_duplicate_that_fails_leaves_what_was_there() {
    let shim = shim();
    shim.descriptors.set(10, Descriptor::Vm(1));
    assert_eq!(shim.duplicate(4, Duplicate::OverWith(10, 0)), Err(Errno::BADF));
    assert_eq!(shim.descriptors.get(10), Some(Descriptor::Vm(1)));
}

#[test]
fn a_duplicate_that_is_not_followed_is_counted() {
    let shim = shim();
    shim.descriptors.set(3, Descriptor::Vm(1));
    let far = Duplicate::Command(libc::F_DUPFD, LIMIT);
    assert_eq!(shim.duplicate(3, far), RawFd::try_from(LIMIT).map_err(|_| Errno::INVAL));
    assert_eq!(shim.status.get(Count::FailOpens), 1);
}

#[test]
fn a_range_is_closed_with_both_ends() {
    let shim = shim();
    for fd in 3..8 {
        shim.descriptors.set(fd, Descriptor::Vm(1));
    }
    assert_eq!(shim.close_range(4, 6, 0), Ok(()));
    let left: Vec<_> = (0..10).filter(|fd| shim.descriptors.get(*fd).is_some()).collect();
    assert_eq!(left, [3, 7]);
    assert_eq!(shim.close_range(6, 2, 0), Err(Errno::INVAL));
    assert_eq!(shim.close_range(0, u32::MAX, 0), Ok(()));
    assert_eq!(shim.descriptors.get(3).or(shim.descriptors.get(7)), None);
}

#[test]
fn a_range_that_is_only_marked_or_another_tables_stays() {
    let shim = shim();
    shim.descriptors.set(3, Descriptor::Vm(1));
    // CLOSE_RANGE_UNSHARE and CLOSE_RANGE_CLOEXEC.
    for flags in [2, 4] {
        assert_eq!(shim.close_range(0, 10, flags), Ok(()));
        assert_eq!(shim.descriptors.get(3), Some(Descriptor::Vm(1)));
    }
}

#[test]
fn a_range_that_can_not_be_closed_stays() {
    let shim = Shim::new(Fake { no_ranges: true }, Status::private(true));
    shim.descriptors.set(3, Descriptor::Vm(1));
    assert_eq!(shim.close_range(3, u32::MAX, 0), Err(Errno::NOSYS));
    assert_eq!(shim.descriptors.get(3), Some(Descriptor::Vm(1)));
}
