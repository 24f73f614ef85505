# Sourced: the programs of this repository that the lab runs.
# shellcheck shell=bash

# target_directory: where cargo puts what it builds.
target_directory() {
  cargo metadata --no-deps --format-version 1 |
    sed 's/.*"target_directory":"\([^"]*\)".*/\1/'
}

# build_barkeep: prints the path of the backend.
build_barkeep() {
  cargo build --release -p barkeep-backend --bin barkeep >&2 &&
    echo "$(target_directory)/release/barkeep"
}

# build_guest: prints the path of the program for the guest of `run`.
build_guest() {
  local programs
  programs=$(build_static -p barkeep-tests --bin lab-guest) && echo "$programs/lab-guest"
}

# build_nested: prints the directory of what runs in the guest of `nested`.
build_nested() {
  build_static -p barkeep-backend -p barkeep-shim -p barkeep-tests \
    --bin barkeep --bin barkeep-vmm --bin lab-toggler
}

# build_static CARGO_ARGUMENT...: prints the directory of programs without shared libraries and, as
# an initramfs is unpacked by an emulated processor, without symbols. Naming the target keeps the
# flags away from build scripts and procedural macros, which can't be static.
build_static() {
  local target=x86_64-unknown-linux-gnu
  RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static -C strip=symbols" \
    cargo build --release --target "$target" "$@" >&2 &&
    echo "$(target_directory)/$target/release"
}

# build_wrap: prints the directory of what runs in the guest of `wrap`, and of what makes its VM's guest.
build_wrap() {
  build_static -p barkeep-backend -p barkeep-tests --bin barkeep --bin lab-toggler --bin lab-guest --bin lab-bare
}

# build_preload: prints the path of the library. The dynamic loader takes it into a program, so it is built apart.
build_preload() {
  cargo build --release -p barkeep-preload >&2 && echo "$(target_directory)/release/libbarkeep_preload.so"
}
