//! Which kinds of access the guest program `instructions` makes here.

use super::guest::{InstructionGroup, InstructionsParameters};
use crate::hypervisor::HypervisorKind;

/// All kinds that this hypervisor's virtual CPUs have. What is left out shows in the report.
pub(super) fn parameters(kind: HypervisorKind, memory: bool, each: bool) -> InstructionsParameters {
    let on_processor = kind == HypervisorKind::Kvm;
    let selected = InstructionsParameters::select(|kind| match on_processor {
        false => true,
        // Where the kernel emulates the whole guest, its emulator is all that a virtual CPU has.
        true if has_hardware_virtualisation() => the_processor_has(kind.group),
        true => kind.is_emulated_by_kvm(),
    });
    InstructionsParameters { selected, memory, each, enable: on_processor }
}

fn the_processor_has(group: InstructionGroup) -> bool {
    match group {
        InstructionGroup::Integer | InstructionGroup::Sse | InstructionGroup::SseScalar => true,
        InstructionGroup::Movbe => cpu_flags().iter().any(|flag| flag == "movbe"),
        InstructionGroup::Avx => cpu_flags().iter().any(|flag| flag == "avx"),
    }
}

fn has_hardware_virtualisation() -> bool {
    cpu_flags().iter().any(|flag| flag == "vmx" || flag == "svm")
}

/// What Linux says of the first processor; nothing if it says nothing.
fn cpu_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    flags.map_or(Vec::new(), |(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
}
