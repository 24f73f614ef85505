# Sourced by `virtio` and `crash`, whose variables it uses (`host`, `work`): daemons that serve disks and files over
# vhost-user, and know nothing of barkeep.
# shellcheck shell=bash disable=SC2154

# The storage daemon, and the others.
storage=
daemons=()

# make_images: what the daemons serve.
make_images() {
  "$host/bin/qemu-img" create -q -f qcow2 "$work/qcow2.img" 64M
  truncate -s 48M "$work/nbd.img"
  mkdir -p "$work/shared"
  repeated "host $nonce" 4 > "$work/shared/from-host"
  echo "goes away" > "$work/shared/to-remove"
}

# start_daemons: all of them; fails if one does not come up, with its last words in `problem`.
start_daemons() {
  "$host/bin/qemu-nbd" --format=raw --persistent --shared=4 --socket="$work/nbd-server.sock" \
    "$work/nbd.img" > "$work/nbd.log" 2>&1 &
  daemons+=($!)
  is_served nbd-server.sock nbd || return
  start_storage || return
  "$host/bin/virtiofsd" --socket-path="$work/fs-daemon.sock" --shared-dir="$work/shared" \
    --sandbox=none > "$work/virtiofsd.log" 2>&1 &
  daemons+=($!)
  is_served fs-daemon.sock virtiofsd
}

# start_storage: QEMU's storage daemon with a qcow2 image and with a client of the NBD server. What it has
# completed has to outlive it, so it writes its tables through.
start_storage() {
  "$host/bin/qemu-storage-daemon" \
    --blockdev "driver=file,node-name=file,filename=$work/qcow2.img" \
    --blockdev driver=qcow2,node-name=qcow2,file=file \
    --blockdev "driver=nbd,node-name=nbd,server.type=unix,server.path=$work/nbd-server.sock" \
    --export "$(exported qcow2),writable=on,writethrough=on,num-queues=2" \
    --export "$(exported nbd),writable=on,writethrough=on,num-queues=2" \
    >> "$work/storage.log" 2>&1 &
  storage=$!
  is_served qcow2-daemon.sock storage && is_served nbd-daemon.sock storage
}

# start_plain_storage: the same program with the disks that barkeep has otherwise.
start_plain_storage() {
  "$host/bin/qemu-storage-daemon" \
    --blockdev "driver=file,node-name=disk,filename=$work/disk,discard=unmap" \
    --blockdev "driver=file,node-name=read-only,filename=$work/read-only,read-only=on" \
    --export "$(exported disk),writable=on,num-queues=2" \
    --export "$(exported read-only),logical-block-size=4096" \
    >> "$work/storage.log" 2>&1 &
  storage=$!
  is_served disk-daemon.sock storage && is_served read-only-daemon.sock storage
}

# exported NODE: an export of it.
exported() {
  echo "type=vhost-user-blk,id=export-$1,node-name=$1,addr.type=unix,addr.path=$work/$1-daemon.sock"
}

# is_served SOCKET LOG: waits for a daemon's socket.
is_served() {
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    [ ! -S "$work/$1" ] || return 0
    sleep 0.05
  done
  problem="no $1: $(tail -n 1 "$work/$2.log")"
  return 1
}

# restart_storage: kills the storage daemon, as a crash does, and starts it again.
restart_storage() {
  [ -n "$storage" ] || return
  kill -KILL "$storage"
  wait "$storage" 2> /dev/null || true
  rm -f "$work/"{qcow2,nbd}-daemon.sock
  start_storage
}

# stop_daemons: the storage daemon closes its images.
stop_daemons() {
  local pid
  for pid in $storage "${daemons[@]}"; do
    kill "$pid" 2> /dev/null || true
    wait "$pid" 2> /dev/null || true
  done
  storage=
  daemons=()
}

# checksum_in BOOT NAME: the SHA-256 that the guest reports for something.
checksum_in() {
  tr -d '\r' < "$work/$1.results" | awk -v name="$2" '$1 == "CHECK" && $2 == name && $4 == "sha256" { print $5 }'
}

# check_same NAME BOOT FROM FILE [SIZE]: a file, or its start, is byte for byte what the guest reported with
# its check FROM.
check_same() {
  local guests ours
  guests=$(checksum_in "$2" "$3")
  ours=$(head -c "${5:-$(stat -c %s "$4")}" "$4" | sha256sum) || true
  if [ -z "$guests" ]; then
    fail "$1" "the guest reports no checksum"
  elif [ "$guests" = "${ours%% *}" ]; then
    ok "$1"
  else
    fail "$1" "the guest reads $guests, the host ${ours%% *}"
  fi
}

# check_by NAME COMMAND...: a program of the host's finds nothing wrong.
check_by() {
  local name=$1
  shift
  if "$@" > "$work/check.log" 2>&1; then
    ok "$name"
  else
    fail "$name" "$(grep . "$work/check.log" | tail -n 1)"
  fi
}

# qcow2_is_sound: clusters that nothing refers to are all that a crash may leave behind.
qcow2_is_sound() {
  local status=0
  "$host/bin/qemu-img" check -f qcow2 "$work/qcow2.img" || status=$?
  [ "$status" = 0 ] || [ "$status" = 3 ]
}
