# Sourced by `run`, `virtio` and `crash`, whose variables it uses (`barkeep`, `work`, `inside`): the backend under
# test.
# shellcheck shell=bash disable=SC2154

backend=
# Which of barkeep's commands it is.
service=${BARKEEP_LAB_SERVICE:-serve}

# What barkeep serves: a name for the socket and a device for each function.
served=(
  edu edu
  ivshmem "ivshmem,size=4M,path=$work/shared"
  edu2 edu
  ivshmem2 "ivshmem,size=4M,path=$work/shared2"
  doorbell "ivshmem,size=4M,vectors=4"
)

# start_backend [OPTION...]: one process serves every function; `work` holds sockets, the shared files and
# the logs.
start_backend() {
  local arguments=() index
  for ((index = 0; index < ${#served[@]}; index += 2)); do
    arguments+=(--socket "$work/${served[index]}.sock" --device "${served[index + 1]}")
  done
  : > "$work/backend.out"
  "${inside[@]}" "$barkeep" "$service" "$@" "${arguments[@]}" > "$work/backend.out" 2>> "$work/backend.log" &
  backend=$!
}

# backend_is_ready: waits for the line that the backend prints for each function it serves.
backend_is_ready() {
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    [ "$(wc -l < "$work/backend.out")" -ge $((${#served[@]} / 2)) ] && return
    backend_lives || return
    sleep 0.05
  done
  return 1
}

# backend_descriptors: what it has open, a line each, without the numbers that differ each time and without
# the page of nothing that a process makes once, when it first needs it.
backend_descriptors() {
  find "/proc/$backend/fd" -mindepth 1 -printf '%l\n' 2> /dev/null |
    sed -e 's/:\[[0-9]*\]$//' -e '/^\/memfd:barkeep-empty/d' | sort
}

backend_lives() {
  [ -n "$backend" ] && kill -0 "$backend" 2> /dev/null
}

# backend_said: its last words.
backend_said() {
  local words
  words=$(tail -n 1 "$work/backend.log")
  echo "${words:-it said nothing}"
}

# stop_backend: asks the backend to end, then insists. Its exit status.
stop_backend() {
  local tries
  kill -TERM "$backend" 2> /dev/null || true
  for ((tries = 0; tries < 200; tries++)); do
    backend_lives || break
    sleep 0.05
  done
  kill -KILL "$backend" 2> /dev/null || true
  local pid=$backend
  backend=
  wait "$pid"
}

# check_backend_ends: it outlived its client, and ends when told to.
check_backend_ends() {
  local status=0 name left=
  if [ "$reference" = yes ]; then
    skip backend-ends "QEMU's own devices have no backend"
    return
  elif ! backend_lives; then
    fail backend-ends "it ended before: $(backend_said)"
    stop_backend || true
    return
  fi
  stop_backend || status=$?
  for name in "${!served[@]}"; do
    [ $((name % 2)) != 0 ] || [ ! -e "$work/${served[name]}.sock" ] || left+=" ${served[name]}.sock"
  done
  if [ "$status" != 0 ]; then
    fail backend-ends "exit status $status: $(backend_said)"
  elif [ -n "$left" ]; then
    fail backend-ends "left behind:$left"
  else
    ok backend-ends
  fi
}
