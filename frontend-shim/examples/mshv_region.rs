//! A guest touches page 5 of a BAR of 16 pages, and a driver for Microsoft's hypervisor maps the whole
//! BAR. As posted to a mailing list in January 2026, the host frame is resolved for the page that was
//! touched, the guest frame is overwritten with the BAR's first, and then subtracted from itself. What
//! the guest finds behind each page then, and what with the shim's plan:
//!
//!     cargo run -p barkeep-shim --example mshv_region
#![expect(clippy::print_stdout, reason = "it is there to be read")]

use barkeep_shim::hypervisor::mshv::{GuestFrame, HostFrame, MapPlan, MapPolicy};

const BAR: MapPlan = MapPlan { guest: GuestFrame(0xc0000), host: HostFrame(0xfe000), pages: 16 };
const TOUCHED: GuestFrame = GuestFrame(0xc0005);

fn main() {
    show("as posted", Some(as_posted(BAR, TOUCHED)));
    show("whole", MapPolicy::Whole.plan(BAR, TOUCHED));
    show("page", MapPolicy::Page.plan(BAR, TOUCHED));
}

fn as_posted(bar: MapPlan, touched: GuestFrame) -> MapPlan {
    let mut frame = touched.0;
    let resolved = bar.host.0 + (frame - bar.guest.0);
    frame = bar.guest.0;
    let host = HostFrame(resolved - (frame - bar.guest.0));
    MapPlan { guest: GuestFrame(frame), host, pages: bar.pages }
}

/// Every page of the BAR must be backed by the page of the same number, and by nothing else.
fn show(name: &str, plan: Option<MapPlan>) {
    let plan = plan.expect("the page lies in the BAR");
    let (mut right, mut wrong, mut beyond) = (0, 0, 0);
    for page in 0..plan.pages {
        let number = plan.guest.0 + page - BAR.guest.0;
        let host = plan.host.0 + page;
        match host.checked_sub(BAR.host.0) {
            Some(behind) if behind == number => right += 1,
            Some(behind) if behind < BAR.pages => wrong += 1,
            _ => beyond += 1,
        }
    }
    println!(
        "{name:<10} guest {:#x} to host {:#x}, {} pages: {right} right, {wrong} wrong, {beyond} beyond the BAR",
        plan.guest.0, plan.host.0, plan.pages
    );
}
