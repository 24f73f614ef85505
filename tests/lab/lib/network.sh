# Sourced by `virtio` and `crash`, whose variables it uses (`host`, `guest`, `work`): a network that only the guest
# and the host's end of it are in, so that nothing of the machine's own changes.
# shellcheck shell=bash disable=SC2154

# The process that keeps the network's namespace, and the host's end of a transfer.
network=
net_peer=
# How a command gets into it.
in_network=()

# open_network: makes the namespace; fails where that is not permitted, with the reason in `problem`.
open_network() {
  local kind=(--net) ready
  if [ ! -r /dev/net/tun ] || [ ! -w /dev/net/tun ]; then
    problem="no access to /dev/net/tun"
    return 1
  fi
  unshare "${kind[@]}" true 2> /dev/null || kind=(--user --map-root-user --net)
  mkfifo "$work/network.ready"
  # It says so as soon as it is in the namespace, and then waits for its end.
  unshare "${kind[@]}" sh -c 'echo ready > "$1"; exec sleep 3600' sh "$work/network.ready" \
    2> "$work/network.log" &
  network=$!
  if ! read -r -t 10 ready <> "$work/network.ready" || [ "$ready" != ready ]; then
    problem="no network namespace: $(tail -n 1 "$work/network.log")"
    return 1
  fi
  in_network=(nsenter --target "$network" --net)
  [ ${#kind[@]} = 1 ] || in_network+=(--user --preserve-credentials)
  make_tap && "${in_network[@]}" "$host/bin/ip" link delete lab0 && return
  problem="no tap: $(tail -n 1 "$work/network.log")"
  return 1
}

# make_tap: a fresh one, with as many pairs of queues as `pairs` says.
make_tap() {
  local kind=()
  # A tap is of one kind or the other, and whoever opens it has to know.
  [ "$pairs" = 1 ] || kind=(multi_queue)
  "${in_network[@]}" sh -c '
    ip=$1
    shift
    "$ip" link delete lab0 2> /dev/null
    "$ip" tuntap add dev lab0 mode tap "$@" &&
      "$ip" address add 192.0.2.1/24 dev lab0 && "$ip" link set lab0 up' \
    sh "$host/bin/ip" "${kind[@]}" 2>> "$work/network.log"
}

# start_net_peer: what the guest's transfers are with.
start_net_peer() {
  "${in_network[@]}" "$guest" net-peer 192.0.2.1 2> "$work/net-peer.log" &
  net_peer=$!
}

stop_net_peer() {
  [ -z "$net_peer" ] || kill "$net_peer" 2> /dev/null || true
  net_peer=
}

close_network() {
  stop_net_peer
  [ -z "$network" ] || kill "$network" 2> /dev/null || true
  network=
}

# check_segments: what went over the tap was longer than what fits a packet of 1500 bytes, so it was
# segmented by neither kernel.
check_segments() {
  local from_guest to_guest
  read -r from_guest to_guest < <("${in_network[@]}" cat /proc/net/dev | tr ':' ' ' |
    awk '$1 == "lab0" && $3 && $11 { print int($2 / $3), int($10 / $11) }') || true
  if [ -z "${to_guest:-}" ]; then
    fail net-segments "nothing went over the tap"
  elif [ "$from_guest" -gt 1514 ] && [ "$to_guest" -gt 1514 ]; then
    ok net-segments
  else
    fail net-segments "a packet has $from_guest bytes from the guest and $to_guest to it"
  fi
}
