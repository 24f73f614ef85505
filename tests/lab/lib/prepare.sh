# Sourced by `virtio` and `crash`, whose variables it uses (`lab`, `work`, `boots`, `reference`): what every boot needs,
# and what is said of those that can't be carried out.
# shellcheck shell=bash disable=SC2154,SC2034

# skip_boot BOOT REASON: nothing of a boot can be carried out.
skip_boot() {
  scope="$1/"
  skip_listed "$1" "$2"
  skip_listed "host-$1" "$2"
  scope=
}

skip_all() {
  local boot
  for boot in "${boots[@]}"; do
    skip_boot "$boot" "$1"
  done
}

# attempt NAME COMMAND...: runs COMMAND, whose output is a path that goes to `result`. If it fails,
# `problem` is its last word.
attempt() {
  local name=$1
  shift
  (cd "$lab" && "$@") > "$work/$name.path" 2> "$work/$name.log" || {
    problem=$(grep -m 1 -E '^(error|lab:)' "$work/$name.log" || tail -n 1 "$work/$name.log")
    return 1
  }
  result=$(< "$work/$name.path")
}

# needed NAME COMMAND...: the same for what does not come from elsewhere: then it is a failure.
needed() {
  attempt "$@" && return
  tail -n 50 "$work/$1.log" >&2
  fail "build-$1" "$problem"
  skip_all "$1 is not built"
  return 1
}

# prepare_programs: sets `host`, `kernel`, `guest` and `barkeep`. Fails if there is nothing to run; what is
# missing is reported.
prepare_programs() {
  local name
  for name in host kernel; do
    case $name in
      host) attempt host ./get-host && host=$result ;;
      kernel) attempt kernel ./get-kernel trixie linux-image-cloud-amd64 && kernel=$result ;;
    esac || {
      skip_all "no QEMU or no kernel: ${problem#lab: }"
      return 1
    }
  done
  guest=${BARKEEP_LAB_GUEST:-}
  if [ -z "$guest" ]; then
    needed guest build_guest || return
    guest=$result
  fi
  barkeep=${BARKEEP_BIN:-}
  if [ "$reference" = no ] && [ -z "$barkeep" ]; then
    needed barkeep build_barkeep || return
    barkeep=$result
  fi
}

# repeated LINE MEBIBYTES: the pattern that the guest expects and makes, too.
repeated() {
  # `yes` ends by SIGPIPE.
  { yes "$1" || true; } | head -c "${2}M"
}
