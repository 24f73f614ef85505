/// Runs a test on the model, and as a test of its own on KVM.
macro_rules! on_both_hypervisors {
    ($name:ident) => {
        mod $name {
            use super::*;

            #[test]
            fn on_the_model() {
                super::$name(HypervisorChoice::Model);
            }

            #[test]
            fn on_kvm() {
                match barkeep_shim::hypervisor::kvm::Kvm::probe() {
                    Ok(()) => super::$name(HypervisorChoice::Kvm),
                    Err(reason) => barkeep_tests::skip(&reason),
                }
            }
        }
    };
}

pub(crate) use on_both_hypervisors;
