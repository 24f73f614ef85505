use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::super::fake::{Fake, config};
use super::super::{Completion, IrqRequest, VfioFunction, VfioIrq, VfioIrqError, VfioRegion};
use crate::irq::EventFd;

/// A step, and what the kernel is told in it.
type Step = (&'static str, fn(&mut VfioFunction), &'static [&'static str]);

fn wire(function: &mut VfioFunction, irq: VfioIrq, start: u32, marks: &str) {
    let eventfd = |mark| {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        (mark == '+').then(|| EventFd::new(fd).unwrap())
    };
    let eventfds = marks.chars().map(eventfd).collect();
    function.set_irqs(irq, IrqRequest::Connect { start, eventfds }).unwrap();
}

fn write(function: &mut VfioFunction, offset: u64, byte: u8) {
    assert_eq!(function.write(VfioRegion::Config, offset, &[byte]), Completion::Done);
}

fn play(fake: &Fake, resizable: bool, steps: &[Step]) {
    let mut function = fake.function(resizable);
    for (what, step, expected) in steps {
        step(&mut function);
        let mut log = fake.log();
        log.retain(|line| !line.starts_with("config") && line != "reset");
        assert_eq!(log, *expected, "{what}");
    }
}

#[test]
fn the_kernel_gets_the_type_that_the_guest_has_enabled() {
    let steps: &[Step] = &[
        ("MSI wired, not enabled", |f| wire(f, VfioIrq::Msi, 0, "++++"), &[]),
        ("the pin", |f| wire(f, VfioIrq::Intx, 0, "+"), &["Intx connect 0 +"]),
        ("MSI, 2 vectors", |f| write(f, 0x42, 0x11), &["Intx disable", "Msi connect 0 ++"]),
        ("the same again", |f| write(f, 0x42, 0x11), &[]),
        ("MSI-X enabled, not wired", |f| write(f, 0x53, 0x80), &["Msi disable"]),
        ("wired", |f| wire(f, VfioIrq::Msix, 1, "+"), &["Msix connect 0 -+"]),
        ("MSI-X off", |f| write(f, 0x53, 0), &["Msix disable", "Msi connect 0 ++"]),
        ("MSI off", |f| write(f, 0x42, 0), &["Msi disable", "Intx connect 0 +"]),
        (
            "a new eventfd",
            |f| wire(f, VfioIrq::Intx, 0, "+"),
            &["Intx disable", "Intx connect 0 +"],
        ),
        ("MSI on", |f| write(f, 0x42, 1), &["Intx disable", "Msi connect 0 +"]),
        ("reset", |f| f.reset().unwrap(), &["Msi disable", "Intx connect 0 +"]),
        ("the pin goes", |f| wire(f, VfioIrq::Intx, 0, "-"), &["Intx disable"]),
    ];
    play(&Fake::new(config(&[])), false, steps);
}

#[test]
fn vectors_come_and_go_one_by_one_with_holes() {
    let steps: &[Step] = &[
        ("MSI-X on", |f| write(f, 0x53, 0x80), &[]),
        ("vector 1", |f| wire(f, VfioIrq::Msix, 1, "+"), &["Msix connect 0 -+"]),
        ("vector 0", |f| wire(f, VfioIrq::Msix, 0, "+"), &["Msix connect 0 +"]),
        ("vector 1 goes", |f| wire(f, VfioIrq::Msix, 1, "-"), &["Msix connect 1 -"]),
        (
            "more than the kernel has enabled",
            |f| wire(f, VfioIrq::Msix, 3, "+"),
            &["Msix disable", "Msix connect 0 +--+", "Msix trigger 0 !!"],
        ),
        ("the last goes", |f| wire(f, VfioIrq::Msix, 3, "-"), &["Msix connect 3 -"]),
        ("all go", |f| f.set_irqs(VfioIrq::Msix, IrqRequest::Disable).unwrap(), &["Msix disable"]),
    ];
    play(&Fake::new(config(&[])), false, steps);
    let resizable: &[Step] = &[
        ("MSI-X on", |f| write(f, 0x53, 0x80), &[]),
        ("vector 0", |f| wire(f, VfioIrq::Msix, 0, "+"), &["Msix connect 0 +"]),
        ("vector 3", |f| wire(f, VfioIrq::Msix, 3, "+"), &["Msix connect 3 +"]),
    ];
    play(&Fake::new(config(&[])), true, resizable);
}

#[test]
fn fewer_vectors_than_the_guest_enabled_are_better_than_none() {
    let fake = Fake::new(config(&[]));
    fake.state().vectors = 2;
    let steps: &[Step] = &[
        ("8 of MSI", |f| write(f, 0x42, 0x31), &[]),
        (
            "wired",
            |f| wire(f, VfioIrq::Msi, 0, "+++"),
            &["Msi connect 0 +++-----", "Msi connect 0 ++"],
        ),
        ("a write to another register", |f| write(f, 0x3c, 11), &[]),
        ("a new eventfd for the last", |f| wire(f, VfioIrq::Msi, 1, "+"), &["Msi connect 1 +"]),
        ("one for a vector that there is not", |f| wire(f, VfioIrq::Msi, 5, "+"), &[]),
        ("fewer", |f| write(f, 0x42, 0x01), &["Msi disable", "Msi connect 0 +", "Msi trigger 0 !"]),
    ];
    play(&fake, false, steps);
}

#[test]
fn what_the_kernel_refuses_is_told_and_not_kept() {
    let fake = Fake::new(config(&[]));
    let mut function = fake.function(false);
    write(&mut function, 0x53, 0x80);
    fake.state().irq_error = Some(Errno::NOSPC);
    let fd = EventFd::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).unwrap();
    let connect = IrqRequest::Connect { start: 0, eventfds: vec![Some(fd)] };
    let refused = function.set_irqs(VfioIrq::Msix, connect);
    assert_eq!(refused, Err(VfioIrqError::Device(Errno::NOSPC)));
    fake.state().irq_error = None;
    fake.log();
    write(&mut function, 0x53, 0);
    write(&mut function, 0x53, 0x80);
    assert_eq!(fake.log(), Vec::<String>::new(), "nothing is wired");
    // A guest that enables what was wired before gets no answer; the operator does.
    write(&mut function, 0x53, 0);
    wire(&mut function, VfioIrq::Msi, 0, "+");
    fake.state().irq_error = Some(Errno::NOSPC);
    let completion = function.write(VfioRegion::Config, 0x42, &[1]);
    assert_eq!(completion, Completion::Failed(Errno::NOSPC));
}

#[test]
fn an_error_eventfd_that_the_kernel_refuses_takes_the_one_before_with_it() {
    let fake = Fake::new(config(&[]));
    let mut function = fake.function(false);
    wire(&mut function, VfioIrq::Error, 0, "+");
    fake.log();
    fake.state().irq_error = Some(Errno::INVAL);
    let fd = EventFd::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).unwrap();
    let connect = IrqRequest::Connect { start: 0, eventfds: vec![Some(fd)] };
    let refused = function.set_irqs(VfioIrq::Error, connect);
    assert_eq!(refused, Err(VfioIrqError::Device(Errno::INVAL)));
    // It would go to this client from the next one's session.
    assert_eq!(fake.log(), ["Error connect 0 +", "Error connect 0 -"]);
}

#[test]
fn ranges_that_are_not_there_and_masks_that_do_not_exist_are_refused() {
    let mut function = Fake::new(config(&[])).function(false);
    let connect =
        |start, count| IrqRequest::Connect { start, eventfds: (0..count).map(|_| None).collect() };
    type Row = (VfioIrq, IrqRequest, VfioIrqError);
    let rows: Vec<Row> = vec![
        (VfioIrq::Msi, connect(8, 1), VfioIrqError::Range { start: 8, count: 1 }),
        (VfioIrq::Msi, connect(0, 9), VfioIrqError::Range { start: 0, count: 9 }),
        (VfioIrq::Msix, connect(u32::MAX, 1), VfioIrqError::Range { start: u32::MAX, count: 1 }),
        (
            VfioIrq::Intx,
            IrqRequest::Trigger { start: 1, which: vec![true] },
            VfioIrqError::Range { start: 1, count: 1 },
        ),
        (VfioIrq::Msi, IrqRequest::Mask, VfioIrqError::NotMaskable),
        (VfioIrq::Error, IrqRequest::Unmask, VfioIrqError::NotMaskable),
        (VfioIrq::Request, IrqRequest::Disable, VfioIrqError::Absent),
    ];
    for (irq, request, error) in rows {
        let what = format!("{irq:?} {request:?}");
        assert_eq!(function.set_irqs(irq, request), Err(error), "{what}");
    }
}

#[test]
fn masks_and_triggers_reach_only_what_is_in_use() {
    fn request(function: &mut VfioFunction, irq: VfioIrq, request: IrqRequest) {
        function.set_irqs(irq, request).unwrap();
    }
    fn all(start: u32, count: usize) -> IrqRequest {
        IrqRequest::Trigger { start, which: vec![true; count] }
    }
    fn unmask_by(any: bool) -> IrqRequest {
        let new = || EventFd::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).unwrap();
        IrqRequest::UnmaskBy(any.then(new))
    }
    let steps: &[Step] = &[
        ("mask an unused pin", |f| request(f, VfioIrq::Intx, IrqRequest::Mask), &[]),
        ("trigger an unused pin", |f| request(f, VfioIrq::Intx, all(0, 1)), &[]),
        ("an unmasking eventfd", |f| request(f, VfioIrq::Intx, unmask_by(true)), &[]),
        ("none any more", |f| request(f, VfioIrq::Intx, unmask_by(false)), &[]),
        ("use the pin", |f| wire(f, VfioIrq::Intx, 0, "+"), &["Intx connect 0 +"]),
        ("mask", |f| request(f, VfioIrq::Intx, IrqRequest::Mask), &["Intx mask"]),
        ("unmask", |f| request(f, VfioIrq::Intx, IrqRequest::Unmask), &["Intx unmask"]),
        ("by an eventfd", |f| request(f, VfioIrq::Intx, unmask_by(true)), &["Intx unmask by true"]),
        // The kernel says EBUSY to a second one.
        (
            "by another",
            |f| request(f, VfioIrq::Intx, unmask_by(true)),
            &["Intx unmask by false", "Intx unmask by true"],
        ),
        (
            "a new pin",
            |f| wire(f, VfioIrq::Intx, 0, "+"),
            &["Intx disable", "Intx connect 0 +", "Intx unmask by true"],
        ),
        ("by none", |f| request(f, VfioIrq::Intx, unmask_by(false)), &["Intx unmask by false"]),
        (
            "by one that goes with the pin",
            |f| {
                request(f, VfioIrq::Intx, unmask_by(true));
                request(f, VfioIrq::Intx, IrqRequest::Disable);
            },
            &["Intx unmask by true", "Intx disable"],
        ),
        ("the pin again", |f| wire(f, VfioIrq::Intx, 0, "+"), &["Intx connect 0 +"]),
        ("the error", |f| wire(f, VfioIrq::Error, 0, "+"), &["Error connect 0 +"]),
        ("trigger it", |f| request(f, VfioIrq::Error, all(0, 1)), &["Error trigger 0 !"]),
        ("it goes", |f| wire(f, VfioIrq::Error, 0, "-"), &["Error connect 0 -"]),
        // The kernel refuses to disable what is not in use.
        ("again", |f| request(f, VfioIrq::Error, IrqRequest::Disable), &["Error connect 0 -"]),
        ("MSI on", |f| write(f, 0x42, 0x11), &["Intx disable"]),
        ("wired", |f| wire(f, VfioIrq::Msi, 0, "++++"), &["Msi connect 0 ++"]),
        (
            "trigger more than are used",
            |f| request(f, VfioIrq::Msi, all(1, 3)),
            &["Msi trigger 1 !"],
        ),
        ("trigger unused ones", |f| request(f, VfioIrq::Msi, all(2, 2)), &[]),
    ];
    play(&Fake::new(config(&[])), false, steps);
}
