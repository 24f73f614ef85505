use barkeep_protocol::page::wrap::Snapshot;

use super::*;

fn read(status: &Status) -> Snapshot {
    let words = status.page.words().as_ref();
    let bytes: Vec<u8> = words
        .iter()
        .flat_map(|word| word.load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes())
        .collect();
    Snapshot::parse(&bytes).expect("a page")
}

#[test]
fn everything_that_happens_is_in_the_page() {
    let status = Status::private(true);
    for count in Count::ALL {
        status.count(count);
    }
    status.vm_made();
    status.device_came(0, "vfio 8086:1234");
    status.device_came(1, "gone");
    status.device_went(1);
    status.fail_open(FailOpen::TooManyDescriptors);
    status.fail_open(FailOpen::TooManyDescriptors);
    let page = read(&status);
    assert_eq!((page.pid, page.vms, page.vms_ever), (std::process::id(), 1, 1));
    assert_eq!(page.devices, ["vfio 8086:1234"]);
    assert_eq!(page.reasons, [(FailOpen::TooManyDescriptors.text().to_owned(), 2)]);
    assert_eq!(page.count(Count::UrReads), 1);
    assert_eq!(page.count(Count::FailOpens), 3);
    status.vm_gone();
    assert_eq!((read(&status).vms, read(&status).vms_ever), (0, 1));
}

/// A page has a place for each, and a whole line.
#[test]
fn every_reason_has_a_place_and_fits_a_page_and_a_line() {
    use barkeep_protocol::page::wrap::{REASON_LENGTH, REASONS};
    assert!(FailOpen::ALL.len() <= REASONS);
    for (number, reason) in FailOpen::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, number);
        assert!(reason.text().len() <= REASON_LENGTH, "{reason:?}");
    }
}

#[test]
fn a_child_counts_for_itself() {
    let status = Status::shared(true).expect("a memfd");
    status.count(Count::UrReads);
    status.vm_made();
    status.device_came(0, "vfio 8086:1234");
    status.fail_open(FailOpen::TooManyDescriptors);
    status.forked();
    let page = read(&status);
    assert_eq!((page.pid, page.vms, page.vms_ever), (std::process::id(), 0, 0));
    assert_eq!((page.counts, page.reasons.len()), ([0; Count::ALL.len()], 0));
    assert_eq!(page.devices, ["vfio 8086:1234"], "it has its parent's devices");
}

#[test]
fn a_process_that_had_a_vm_says_what_was_done() {
    let status = Status::private(true);
    status.count(Count::UrReads);
    assert!(status.summary().is_none(), "a helper of the VMM says nothing");
    status.vm_made();
    status.vm_gone();
    let line = status.summary().expect("a VM").shown();
    assert!(
        line.starts_with("barkeep: 1 VM, 0 KVM_RUN failures located in a disabled BAR, "),
        "{line}"
    );
    assert!(line.contains(", 1 reads answered with all ones, "), "{line}");
    status.vm_made();
    for count in Count::ALL {
        status.page.add(count, u64::MAX - status.get(count));
    }
    let line = status.summary().expect("VMs").shown();
    assert!(line.starts_with("barkeep: 2 VMs, "), "{line}");
    assert!(
        line.ends_with(&format!(" {} {}\n", u64::MAX, Count::FailOpens.text())),
        "it fits: {line}"
    );
}
