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
    /// There are more devices than are followed.
    TooManyDevices => "more devices than are followed",
    /// There are more mappings of BARs than are followed.
    TooManyMappings => "more mappings of BARs than are followed",
    /// A VFIO device does not tell what is needed.
    DeviceUnreadable => "a VFIO device does not tell what is needed",

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
    /// An access to a BAR that does not decode was made by an instruction that is not known here.
    SigbusInstruction => "an unknown instruction accesses a BAR that does not decode",
    /// Accesses to a BAR are refused again and again although it decodes.
    SigbusRepeats => "accesses to a BAR are refused although it decodes",

    // Of vfio-user connections.
    /// There are more vfio-user connections than are followed.
    TooManyStreams => "more vfio-user connections than are followed",
    /// What the VMM or the server sends is no vfio-user any more, or passes by in calls that are not seen.
    StreamLost => "a vfio-user connection can't be followed",
    /// A server did not say what its BARs are.
    StreamSetup => "a vfio-user server does not tell what is needed",
    /// A server did not answer in time.
    ServerSilent => "a vfio-user server does not answer",
}
