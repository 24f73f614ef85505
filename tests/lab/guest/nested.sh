# Sourced by the programs of the nested lab's guest: what they report, and what they wait for.
# shellcheck shell=sh disable=SC2154

# What the host reads, on a serial port of its own. A line of numbers is for whoever compares kernels.
open_report() {
  stty -F /dev/ttyS1 raw
  exec 3> /dev/ttyS1
}
ok() { echo "CHECK $1 ok ${2:-}" >&3; }
fail() { echo "CHECK $1 fail $2" >&3; }
skip() { echo "CHECK $1 skipped $2" >&3; }
numbers() { echo "NUMBERS $*" >&3; }

# take_function: finds the edu function, as `edu`, and gives it to vfio-pci. Prints what is missing.
take_function() {
  edu=$(edu_address)
  if [ ! -c /dev/kvm ]; then
    echo "no /dev/kvm: the kernel has no KVM for AMD processors"
  elif [ -z "$edu" ]; then
    echo "no function 1234:11e8"
  elif [ ! -e "/sys/bus/pci/devices/$edu/iommu_group" ]; then
    echo "$edu has no IOMMU: the kernel has no Intel IOMMU"
  elif [ ! -d /sys/bus/pci/drivers/vfio-pci ]; then
    echo "the kernel has no vfio-pci"
  else
    echo vfio-pci > "/sys/bus/pci/devices/$edu/driver_override"
    echo "$edu" > /sys/bus/pci/drivers_probe
    [ -e "/sys/bus/pci/drivers/vfio-pci/$edu" ] || echo "vfio-pci does not take $edu"
  fi
}

edu_address() {
  for function in /sys/bus/pci/devices/*; do
    if [ "$(cat "$function/vendor" "$function/device" | tr '\n' ' ')" = "0x1234 0x11e8 " ]; then
      basename "$function"
    fi
  done
}

# within SECONDS COMMAND...: waits until COMMAND succeeds.
within() {
  local end
  end=$(($(cut -d . -f 1 /proc/uptime) + $1))
  shift
  until "$@"; do
    [ "$(cut -d . -f 1 /proc/uptime)" -lt "$end" ] || return 1
    sleep 0.1
  done
}

uptime_now() { cut -d ' ' -f 1 /proc/uptime; }
seconds_from() { awk -v from="$1" -v to="$2" 'BEGIN { printf "%.2f", to - from }'; }

# last_words NAME: the last line of a program's output, of its standard error if there is any.
last_words() {
  cat "/tmp/$1.out" "/tmp/$1.err" 2> /dev/null | grep . | tail -n 1 | cut -c 1-300
}

# show_logs: to the console, which is kept when something failed.
show_logs() {
  for log in /tmp/*.out /tmp/*.err; do
    echo "== $log"
    tail -n 30 "$log" | cut -c 1-2000
  done
}
