use super::{GuestAccess, MemoryFault, WindowTable};

/// Whose business a memory fault is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Not ours: a conversion between private and shared memory, or an access to what the VMM itself
    /// claims. It goes back untouched.
    NotMine,
    /// About one of these BARs. Usually there is one; an instruction that accesses two can have
    /// faulted on either.
    Bars(Vec<BarTarget>),
    /// About an address where nothing is any more. A BAR may have moved away while the fault was on
    /// its way, or the VMM has a slot there that it did not tell of.
    Nowhere,
    /// About an unknown address: any function with mapped BARs may be meant.
    Anywhere,
}

/// A BAR that a memory fault may be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarTarget {
    /// Which function, by the order of attachment.
    pub function: usize,
    /// Region index of the BAR.
    pub bar: u8,
    /// Where in the BAR, in bytes.
    pub offset: u64,
    /// The access itself.
    pub access: GuestAccess,
}

impl WindowTable {
    /// Finds out whose business `fault` is. A fault with several candidates is ours if one of them
    /// is: what the VMM claims has been looked at by whoever narrowed them down.
    #[must_use]
    pub fn route(&self, fault: &MemoryFault) -> Route {
        if fault.private {
            return Route::NotMine;
        }
        let candidates = fault.candidates();
        let bars: Vec<BarTarget> = candidates.iter().filter_map(|a| self.target(a)).collect();
        if !bars.is_empty() {
            return Route::Bars(bars);
        }
        if candidates.is_empty() {
            Route::Anywhere
        } else if candidates.iter().any(|access| self.is_claimed(access.address.0)) {
            Route::NotMine
        } else {
            Route::Nowhere
        }
    }

    fn target(&self, access: &GuestAccess) -> Option<BarTarget> {
        let (window, offset) = self.find_faulting(access.address.0)?;
        Some(BarTarget { function: window.function, bar: window.bar, offset, access: *access })
    }
}
