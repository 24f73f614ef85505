/// Declares the reasons with their texts, in order.
macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident => $text:literal,)*) => {
        /// Why something is left to the VMM.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub(crate) enum FailOpen {
            $($(#[$doc])* $reason,)*
        }

        impl FailOpen {
            /// All of them, in order.
            pub(crate) const ALL: [Self; [$($text),*].len()] = [$(Self::$reason),*];

            /// What happened, as the log and `barkeep ctl wrap-status` say it.
            pub(crate) const fn text(self) -> &'static str {
                match self {
                    $(Self::$reason => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// A descriptor's number is too high to be followed.
    TooManyDescriptors => "a descriptor's number is too high to be followed",
    /// There is no page that other processes can read.
    NoPage => "no page for barkeep ctl wrap-status",
    /// There is no handler of `SIGBUS`.
    NoHandler => "a SIGBUS about a BAR can't be received",
    /// Forks go unseen.
    Forks => "a child that is forked will be counted as its parent",
    /// Our own code has panicked.
    Panic => "a bug in barkeep",

    // Of devices.

    // Of VMs.
    /// There are more VMs or virtual CPUs than are followed.
    TooManyVms => "more VMs or virtual CPUs than are followed",
    /// The VMM has closed its VM, and goes on running virtual CPUs.
    NoVmDescriptor => "the VMM has closed its VM and runs on",
    /// KVM refuses to delete a slot.
    SlotNotSuspended => "KVM refuses to delete a slot",
    /// KVM refuses to take a slot back.
    SlotNotRestored => "KVM refuses to take a slot back",
    /// What the VMM asks KVM for can't be read, for no fault of its own.
    MemoryUnreadable => "this process may not read its own memory by process_vm_readv",
    /// A virtual CPU fails again and again, whatever is done.
    NoProgress => "KVM_RUN fails without end",

    // Of SIGBUS.

    // Of vfio-user connections.
}
