# Sourced by `run`, whose variables it uses (`barkeep`, `work`): the backend under test.
# shellcheck shell=bash disable=SC2154

backend=

# start_backend: serves both functions; `work` holds sockets, the shared file and the logs.
start_backend() {
  "$barkeep" serve \
    --socket "$work/edu.sock" --device edu \
    --socket "$work/ivshmem.sock" --device "ivshmem,size=4M,path=$work/shared" \
    > "$work/backend.out" 2> "$work/backend.log" &
  backend=$!
}

# backend_is_ready: waits for the line that the backend prints for each function it serves.
backend_is_ready() {
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    [ "$(wc -l < "$work/backend.out")" -ge 2 ] && return
    backend_lives || return
    sleep 0.05
  done
  return 1
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
