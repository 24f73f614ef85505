//! Which pages of a region are mapped when the guest touches one of them: pure arithmetic.
//!
//! Page `k` of a region is guest frame `first + k` and host frame `first + k`, each counted from the start
//! of the region. Nothing here is computed from the page that faulted, except which page that is.

/// Bits of an address below the frame number.
const PAGE_SHIFT: u32 = 12;

/// How much of a device's memory a guest access maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MapPolicy {
    /// All of it at the first access.
    #[default]
    Whole,
    /// The page that is accessed.
    Page,
}

/// Number of a guest-physical page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestFrame(pub u64);

/// Number of a page of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostFrame(pub u64);

/// Consecutive guest pages and the consecutive host pages behind them: a region, or what one hypercall
/// maps of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapPlan {
    /// The first guest page.
    pub guest: GuestFrame,
    /// The host page behind it.
    pub host: HostFrame,
    /// How many.
    pub pages: u64,
}

impl GuestFrame {
    /// The frame that has `address`.
    pub(super) fn of(address: u64) -> GuestFrame {
        GuestFrame(address >> PAGE_SHIFT)
    }
}

impl HostFrame {
    /// The frame that has `address`.
    pub(super) fn of(address: u64) -> HostFrame {
        HostFrame(address >> PAGE_SHIFT)
    }

    /// Address of its first byte.
    pub(super) fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl MapPlan {
    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }

    pub(super) fn contains(&self, frame: GuestFrame) -> bool {
        self.page(frame).is_some()
    }

    /// Which page of it `frame` is.
    fn page(&self, frame: GuestFrame) -> Option<u64> {
        frame.0.checked_sub(self.guest.0).filter(|page| *page < self.pages)
    }
}

impl MapPolicy {
    /// What to map of `region` when the guest accesses `fault`; `None` if that is not in it.
    #[must_use]
    pub fn plan(self, region: MapPlan, fault: GuestFrame) -> Option<MapPlan> {
        let page = region.page(fault)?;
        Some(match self {
            MapPolicy::Whole => region,
            MapPolicy::Page => {
                MapPlan { guest: fault, host: HostFrame(region.host.0 + page), pages: 1 }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any region that fits both address spaces, and one of its pages.
    fn region_and_page() -> impl Strategy<Value = (MapPlan, u64)> {
        const FRAMES: u64 = 1 << (64 - PAGE_SHIFT);
        (1_u64..=1 << 30).prop_flat_map(|pages| {
            let first = 0..=FRAMES - pages;
            (first.clone(), first, 0..pages).prop_map(move |(guest, host, page)| {
                let (guest, host) = (GuestFrame(guest), HostFrame(host));
                (MapPlan { guest, host, pages }, page)
            })
        })
    }

    fn policy() -> impl Strategy<Value = MapPolicy> {
        prop_oneof![Just(MapPolicy::Whole), Just(MapPolicy::Page)]
    }

    fn fault(region: MapPlan, page: u64) -> GuestFrame {
        GuestFrame(region.guest.0 + page)
    }

    /// What the posted driver computes: the host frame is resolved for the page that faulted, the guest
    /// frame is overwritten with the region's first, and then subtracted from itself.
    fn subtract_after_overwriting(region: MapPlan, fault: GuestFrame) -> MapPlan {
        let mut gfn = fault.0;
        let resolved = region.host.0 + (gfn - region.guest.0);
        gfn = region.guest.0;
        let host = resolved - (gfn - region.guest.0);
        MapPlan { guest: GuestFrame(gfn), host: HostFrame(host), pages: region.pages }
    }

    proptest! {
        #[test]
        fn a_plan_lies_in_its_region_and_has_the_page_that_faulted(
            (region, page) in region_and_page(),
            policy in policy(),
        ) {
            let fault = fault(region, page);
            let plan = policy.plan(region, fault).expect("the page is in the region");
            prop_assert!(region.guest <= plan.guest);
            prop_assert!(plan.guest.0 + plan.pages <= region.guest.0 + region.pages);
            prop_assert!(plan.guest <= fault && fault.0 < plan.guest.0 + plan.pages);
        }

        #[test]
        fn every_page_of_a_plan_keeps_its_distance_to_its_host_page(
            (region, page) in region_and_page(),
            policy in policy(),
        ) {
            let plan = policy.plan(region, fault(region, page)).expect("in the region");
            let distance = |plan: MapPlan| plan.host.0.wrapping_sub(plan.guest.0);
            prop_assert_eq!(distance(plan), distance(region));
        }

        #[test]
        fn whole_plans_are_the_same_whatever_page_faulted(
            (region, page) in region_and_page(),
        ) {
            prop_assert_eq!(MapPolicy::Whole.plan(region, fault(region, page)), Some(region));
        }

        #[test]
        fn page_plans_have_one_page((region, page) in region_and_page()) {
            let plan = MapPolicy::Page.plan(region, fault(region, page)).expect("in the region");
            prop_assert_eq!((plan.guest, plan.pages), (fault(region, page), 1));
        }

        #[test]
        fn a_page_outside_of_the_region_has_no_plan(
            (region, _) in region_and_page(),
            other in any::<u64>(),
            policy in policy(),
        ) {
            for frame in [region.guest.0.wrapping_sub(1), region.guest.0 + region.pages, other] {
                let inside = (region.guest.0..region.guest.0 + region.pages).contains(&frame);
                prop_assert_eq!(policy.plan(region, GuestFrame(frame)).is_some(), inside);
            }
        }

        #[test]
        fn subtracting_after_overwriting_shifts_the_region_by_the_page_that_faulted(
            (region, page) in region_and_page(),
        ) {
            let wrong = subtract_after_overwriting(region, fault(region, page));
            prop_assert_eq!(wrong.host.0, region.host.0 + page);
            let right = MapPolicy::Whole.plan(region, fault(region, page));
            prop_assert_eq!(right == Some(wrong), page == 0);
        }
    }

    #[test]
    fn the_default_maps_everything() {
        assert_eq!(MapPolicy::default(), MapPolicy::Whole);
    }
}
