# Sourced by `run` and `nested`, whose variables it uses (`host`, `kernel`, `work`; `run` has `nonce`,
# `nested` has `limit`, `megabytes` and `parameters`): one boot of the guest.
# shellcheck shell=bash disable=SC2154

qemu=

# BARKEEP_LAB_QEMU_ARGS: more arguments, for example `-trace vfio_user*` to see every message.
read -r -a extra_arguments <<< "${BARKEEP_LAB_QEMU_ARGS:-}"

# boot_guest BOOT QEMU_ARGUMENT...: boots the guest for the checks of BOOT and waits until it is
# off. Leaves BOOT.results, BOOT.console and BOOT.qemu (QEMU's own messages) in `work`.
boot_guest() {
  local boot=$1 status=0 append
  shift
  append="console=ttyS0 quiet panic=-1 lab_boot=$boot lab_nonce=$nonce"
  [ "$boot" != vfio ] || append+=" intel_iommu=on"
  : > "$work/$boot.results"
  # Emulation, not KVM: the same everywhere, and it is fast enough. Shared memory: the backend
  # maps the guest's RAM.
  timeout --kill-after=5 120 "$host/bin/qemu-system-x86_64" \
    -accel tcg -m 256 -machine q35,memory-backend=m0 \
    -object memory-backend-memfd,id=m0,size=256M,share=on \
    -nodefaults -display none -no-reboot \
    -serial "file:$work/$boot.console" -serial "file:$work/$boot.results" \
    -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" -append "$append" \
    "$@" "${extra_arguments[@]}" > "$work/$boot.qemu" 2>&1 &
  qemu=$!
  wait "$qemu" || status=$?
  qemu=
  return "$status"
}

# boot_nested BOOT QEMU_ARGUMENT...: the same with the guest of the nested lab, whose processors have
# SVM and which has QEMU's edu function behind an IOMMU. One thread emulates both processors, and timers
# tick: with a thread each, thousands of memory slots that came and went ended in a corrupted stack, a
# triple fault or a lost timer, before and after the gate of decision 0009.
boot_nested() {
  local boot=$1 status=0
  shift
  : > "$work/$boot.results"
  timeout --kill-after=5 "$limit" "$host/bin/qemu-system-x86_64" \
    -accel tcg,thread=single -smp 2 -cpu EPYC,+svm -m "$megabytes" -machine q35 \
    -nodefaults -display none -no-reboot \
    -serial "file:$work/$boot.console" -serial "file:$work/$boot.results" \
    -device intel-iommu,intremap=on,caching-mode=on -device edu \
    -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 intel_iommu=on nohz=off highres=off $parameters" \
    "$@" "${extra_arguments[@]}" > "$work/$boot.qemu" 2>&1 &
  qemu=$!
  wait "$qemu" || status=$?
  qemu=
  return "$status"
}

# boot_problem BOOT STATUS: why a check has no result, in one line.
boot_problem() {
  local last
  if [ "$2" = 124 ] || [ "$2" = 137 ]; then
    echo "the guest did not power off in time"
    return
  fi
  # QEMU's complaint if it has one, or else the last the guest said.
  last=$(cat "$work/$1.console" "$work/$1.qemu" 2> /dev/null | tr -d '\r' |
    grep . | grep -v "TCG doesn't support" | tail -n 1) || true
  echo "the guest did not report it (QEMU ended with $2; last message: ${last:-none})"
}

# The functions as QEMU arguments.

# served_by_barkeep: sets `functions` to the backend's.
served_by_barkeep() {
  functions=()
  local name
  for name in edu ivshmem; do
    functions+=(-device
      "{\"driver\":\"vfio-user-pci\",\"socket\":{\"path\":\"$work/$name.sock\",\"type\":\"unix\"}}")
  done
}

# built_into_qemu: sets `functions` to QEMU's own.
built_into_qemu() {
  functions=(-device edu
    -object "memory-backend-file,id=shared,size=4M,mem-path=$work/shared,share=on"
    -device "ivshmem-plain,memdev=shared")
}
