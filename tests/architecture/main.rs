//! The law of the house: who may know whom, and where unsafe code may be.
#![expect(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod coverage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every Rust file below a folder of the repository, by its path from the root.
fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&root().join(folder), &mut files);
    assert!(!files.is_empty(), "{folder} has sources");
    let name = |path: &Path| path.strip_prefix(root()).unwrap().display().to_string();
    files.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// Lines of code that contain `word`; comments may speak of anything.
fn mentions(folder: &str, word: &str) -> Vec<String> {
    let code = |line: &&str| !line.trim_start().starts_with("//");
    let mut found = Vec::new();
    for (name, text) in sources(folder) {
        let lines = text.lines().filter(code).filter(|line| line.contains(word));
        found.extend(lines.map(|line| format!("{name}: {}", line.trim())));
    }
    found
}

fn assert_never(folder: &str, words: &[&str]) {
    for word in words {
        let found = mentions(folder, word);
        assert!(found.is_empty(), "{folder} must not know {word}:\n{}", found.join("\n"));
    }
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    let metadata =
        MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec().unwrap();
    let mut edges = BTreeMap::new();
    for package in &metadata.packages {
        let ours = package.dependencies.iter().filter(|dependency| {
            dependency.kind == DependencyKind::Normal && dependency.name.starts_with("barkeep-")
        });
        let edge = ours.map(|dependency| (dependency.name.clone(), dependency.optional));
        edges.insert(package.name.to_string(), edge.collect::<BTreeSet<_>>());
    }
    let required = |name: &str| (name.to_owned(), false);
    let optional = |name: &str| (name.to_owned(), true);
    assert_eq!(edges["barkeep-protocol"], BTreeSet::new());
    assert_eq!(edges["barkeep-shim"], BTreeSet::from([required("barkeep-protocol")]));
    // The binary's demo embeds the reference VMM; the library knows nothing of it (see below).
    assert_eq!(
        edges["barkeep-backend"],
        BTreeSet::from([required("barkeep-protocol"), optional("barkeep-shim")])
    );
    assert_eq!(
        edges["barkeep-preload"],
        BTreeSet::from([required("barkeep-protocol"), required("barkeep-shim")])
    );
    assert_eq!(edges.len(), 5, "no crate without a place in the law: {:?}", edges.keys());
}

#[test]
fn modules_know_only_what_is_below_them() {
    assert_never("protocol/src/wire", &["crate::transport", "std::net", "std::io", "std::fs"]);
    assert_never("protocol/src/page", &["crate::wire", "crate::transport", "std::os", "std::io"]);

    let below_devices =
        ["crate::devices", "crate::server", "crate::config", "barkeep_protocol", "barkeep_shim"];
    for folder in ["backend/src/pci", "backend/src/dma", "backend/src/irq", "backend/src/state"] {
        assert_never(folder, &below_devices);
    }
    assert_never("backend/src/pci", &["crate::dma", "crate::irq", "std::os::fd", "rustix"]);
    assert_never("backend/src/devices", &["crate::server", "barkeep_protocol", "barkeep_shim"]);
    assert_never("backend/src/server", &["crate::cli", "barkeep_shim"]);
    // It parses nothing of a guest or a client, so it knows nothing of what they say.
    assert_never("backend/src/supervisor", &below_devices);
    let guests = ["crate::pci", "crate::dma", "crate::irq", "vm_memory", "virtio"];
    assert_never("backend/src/supervisor", &guests);
    assert_never("backend/src/config", &["crate::server", "barkeep_protocol", "barkeep_shim"]);

    assert_never("frontend-shim/src", &["barkeep_backend"]);
    assert_never(
        "frontend-shim/src/fault",
        &["crate::hypervisor", "crate::client", "crate::bar", "kvm_", "mshv", "rustix", "std::os"],
    );
    assert_never("frontend-shim/src/client", &["crate::bar", "crate::fault", "crate::hypervisor"]);
    assert_never("frontend-shim/preload/src", &["barkeep_backend"]);
    // What happened to slots is plain data; how a VMM calls us is the exports' alone.
    assert_never("frontend-shim/preload/src/kvm", &["crate::exports", "libc::"]);
}

#[test]
fn rust_vmm_types_stay_inside_their_adapter() {
    let adapters = [
        ("kvm/", &["kvm_ioctls", "kvm_bindings", "vmm_sys_util"][..]),
        ("mshv/", &["mshv_ioctls", "mshv_bindings"]),
        ("nowhere/", &["vm_memory"]),
    ];
    for (name, text) in sources("frontend-shim/src") {
        for (adapter, words) in adapters {
            if !name.starts_with(&format!("frontend-shim/src/hypervisor/{adapter}")) {
                for word in words {
                    assert!(!text.contains(word), "{name} mentions {word}");
                }
            }
        }
    }
}

#[test]
fn unsafe_code_is_where_the_design_puts_it() {
    let allowed = BTreeSet::from([
        "backend/src/devices/passthrough/ioctl.rs",
        "backend/src/devices/virtio/blk/uring.rs",
        "backend/src/devices/virtio/net/ioctl.rs",
        "backend/src/dma/mapping.rs",
        "backend/src/dma/sigbus.rs",
        "backend/src/irq/signaller/aio.rs",
        "backend/src/irq/signaller/ring.rs",
        "backend/src/server/event_loop.rs",
        "backend/src/state/memory.rs",
        "backend/src/state/socket.rs",
        "backend/src/supervisor/inheritance.rs",
        "frontend-shim/preload/src/exports/descriptors.rs",
        "frontend-shim/preload/src/exports/memory.rs",
        "frontend-shim/preload/src/exports/mod.rs",
        "frontend-shim/preload/src/exports/signals.rs",
        "frontend-shim/preload/src/exports/sockets.rs",
        "frontend-shim/preload/src/kvm/run_area.rs",
        "frontend-shim/preload/src/sigbus/frame.rs",
        "frontend-shim/preload/src/sigbus/handler.rs",
        "frontend-shim/preload/src/sigbus/tests/allocations.rs",
        "frontend-shim/preload/src/sigbus/tests/children.rs",
        "frontend-shim/preload/src/sigbus/tests/genuine.rs",
        "frontend-shim/preload/src/sigbus/tests/instructions.rs",
        "frontend-shim/preload/src/sigbus/tests/machine.rs",
        "frontend-shim/preload/src/sigbus/tests/mod.rs",
        "frontend-shim/preload/src/sigbus/tests/stubborn.rs",
        "frontend-shim/preload/src/sigbus/tests/vforked.rs",
        "frontend-shim/preload/src/start.rs",
        "frontend-shim/preload/src/status/memory.rs",
        "frontend-shim/preload/src/system/kernel.rs",
        "frontend-shim/preload/src/system/real.rs",
        "frontend-shim/preload/src/system/real_sockets.rs",
        "frontend-shim/preload/src/system/signals.rs",
        "frontend-shim/src/hypervisor/kvm/gate.rs",
        "frontend-shim/src/hypervisor/kvm/mod.rs",
        "frontend-shim/src/hypervisor/kvm/vcpu.rs",
        "frontend-shim/src/hypervisor/memory.rs",
        "frontend-shim/src/hypervisor/mshv/vm.rs",
        "tests/allocations/main.rs",
        "tests/preload/beneath.rs",
        "tests/src/bin/lab-guest/mmio.rs",
        "tests/src/bin/lab-guest/vfio/uapi.rs",
        "tests/src/bin/preload-vmm/raw.rs",
    ]);
    let mut found = BTreeSet::new();
    for folder in ["protocol", "backend", "frontend-shim", "tests"] {
        for (name, text) in sources(folder) {
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let unsafe_block =
                |line: &str| line.contains("unsafe {") || line.contains("unsafe impl");
            if !name.starts_with("tests/architecture/") && code.clone().any(unsafe_block) {
                found.insert(name);
            }
        }
    }
    let found: BTreeSet<&str> = found.iter().map(String::as_str).collect();
    assert_eq!(found, allowed);
}

#[test]
fn files_stay_small_enough_to_be_read() {
    for folder in ["protocol", "backend", "frontend-shim", "tests"] {
        for (name, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(lines <= 700, "{name} has {lines} lines: does it still hold one idea?");
        }
    }
}

#[test]
fn the_top_level_has_the_folders_of_the_house_and_no_others() {
    let tracked = BTreeSet::from(["backend", "docs", "frontend-shim", "protocol", "tests"]);
    let folders: BTreeSet<String> = std::fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.') && name != "target")
        .collect();
    assert_eq!(folders, tracked.into_iter().map(str::to_owned).collect());
}
