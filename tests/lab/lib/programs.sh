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

# build_guest: prints the path of the program for the guest, which has no shared libraries. Naming
# the target keeps the flag away from build scripts and procedural macros, which can't be static.
build_guest() {
  local target=x86_64-unknown-linux-gnu
  RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
    cargo build --release --target "$target" -p barkeep-tests --bin lab-guest >&2 &&
    echo "$(target_directory)/$target/release/lab-guest"
}
