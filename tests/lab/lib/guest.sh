# Sourced by `run`, `virtio`, `crash`, `nested` and `wrap`, whose variables it uses (`host`, `kernel`, `work`,
# `limit`; the last two have `megabytes`, the others `nonce`, `rounds`, `memory` and `processors`; more
# for the guest's kernel is in `parameters`): one boot of the guest.
# shellcheck shell=bash disable=SC2154

qemu=
# What QEMU is run by, if its network is not this script's.
inside=()

# BARKEEP_LAB_QEMU_ARGS: more arguments, for example `-trace vfio_user*` to see every message.
read -r -a extra_arguments <<< "${BARKEEP_LAB_QEMU_ARGS:-}"

# boot_guest BOOT QEMU_ARGUMENT...: boots the guest for the checks of BOOT and waits until it is
# off; meanwhile does what the guest asks for. Leaves BOOT.results, BOOT.console, BOOT.qemu (QEMU's own
# messages) and BOOT.monitor (commands and answers) in `work`. `rounds` is how often the guest repeats
# what it repeats; `memory` and `processors` describe the machine.
boot_guest() {
  local boot=$1 status=0 append restart=(-no-reboot)
  shift
  # A busy host keeps an emulated timer from passing the kernel's test of it, which panics with an IOMMU.
  append="console=ttyS0 quiet panic=-1 no_timer_check lab_boot=$boot lab_nonce=$nonce lab_rounds=$rounds"
  append+=" ${parameters:-}"
  case " $* " in *" intel-iommu"*) append+=" intel_iommu=on" ;; esac
  [[ $boot != reboot && $boot != restarted ]] || restart=()
  : > "$work/$boot.results"
  mkfifo "$work/$boot.requests."{in,out} "$work/$boot.commands."{in,out}
  # Emulation, not KVM: the same everywhere, and it is fast enough.
  "${inside[@]}" timeout --kill-after=5 "$limit" "$host/bin/qemu-system-x86_64" \
    -accel tcg -smp "$processors" -m 256 -machine q35,memory-backend=m0 -object "$memory,id=m0,size=256M" \
    -nodefaults -display none "${restart[@]}" \
    -serial "file:$work/$boot.console" -serial "file:$work/$boot.results" \
    -serial "pipe:$work/$boot.requests" \
    -chardev "pipe,id=commands,path=$work/$boot.commands" -mon chardev=commands,mode=control \
    -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" -append "$append" \
    "$@" "${extra_arguments[@]}" > "$work/$boot.qemu" 2>&1 &
  qemu=$!
  attend "$boot"
  wait "$qemu" || status=$?
  qemu=
  rm -f "$work/$boot".{requests,commands}.{in,out}
  return "$status"
}

# boot_nested BOOT QEMU_ARGUMENT...: the same with the guest of the nested lab, whose processors have
# SVM and which has QEMU's edu function behind an IOMMU. One thread emulates both processors, and timers
# tick: with a thread each, thousands of memory slots that came and went ended in a corrupted stack, a
# triple fault or a lost timer, before and after the gate of decision 0009. `threads=multi` has a thread each.
boot_nested() {
  local boot=$1 status=0
  shift
  : > "$work/$boot.results"
  timeout --kill-after=5 "$limit" "$host/bin/qemu-system-x86_64" \
    -accel "tcg,thread=${threads:-single}" -smp 2 -cpu "EPYC,+svm" -m "$megabytes" -machine q35 \
    -nodefaults -display none -no-reboot \
    -serial "file:$work/$boot.console" -serial "file:$work/$boot.results" \
    -device intel-iommu,intremap=on,caching-mode=on -device edu \
    -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=on nohz=off highres=off $parameters" \
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
    grep . | grep -v -e "TCG doesn't support" -e "'-mon' is deprecated" | tail -n 1) || true
  echo "the guest did not report it (QEMU ended with $2; last message: ${last:-none})"
}

# The functions as QEMU arguments, one of them after the other in the guest's order of addresses.

# of_barkeep NAME...: sets `functions` to those of the backend.
of_barkeep() {
  functions=()
  local name
  for name; do
    functions+=(-device "{$(barkeep_function "$name")}")
  done
}

# barkeep_function NAME: the members of a JSON object that describes a function of the backend.
barkeep_function() {
  echo "\"driver\":\"vfio-user-pci\",\"socket\":{\"path\":\"$work/$1.sock\",\"type\":\"unix\"}"
}

# of_qemu NAME...: the same with QEMU's own.
of_qemu() {
  functions=()
  local name
  for name; do
    case $name in
      edu*) functions+=(-device edu) ;;
      ivshmem*)
        functions+=(
          -object "memory-backend-file,id=$name,size=4M,mem-path=$work/shared${name#ivshmem},share=on"
          -device "ivshmem-plain,memdev=$name"
        )
        ;;
      doorbell)
        functions+=(
          -chardev "socket,id=doorbell,path=$work/doorbell.sock"
          -device ivshmem-doorbell,chardev=doorbell,vectors=4
        )
        ;;
    esac
  done
}
