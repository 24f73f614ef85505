# Sourced by `run`, `virtio` and `crash`, whose variables it uses (`qemu`, `work`): what a guest asks of the host while
# it runs, a word a line. What it asks for beyond this is for `serve_request`, which the last two have, and answered.
# shellcheck shell=bash disable=SC2154

# The function that can be plugged in, as members of a JSON object.
pluggable=

# What was read of a line that is not complete, by file descriptor.
declare -a partial

# attend BOOT: does what the guest asks for until QEMU has ended, which it does in time. That a guest is
# not obeyed is for the guest to report; BOOT.monitor tells why.
attend() {
  local boot=$1
  partial=()
  # Opened for both directions a FIFO neither blocks nor ends.
  exec {requests}<> "$work/$boot.requests.out" {replies}<> "$work/$boot.requests.in" \
    {commands}<> "$work/$boot.commands.in" {answers}<> "$work/$boot.commands.out" {monitor}> "$work/$boot.monitor"
  # QEMU greets first.
  await '"QMP"' && tell '{"execute":"qmp_capabilities"}' || true
  while kill -0 "$qemu" 2> /dev/null; do
    next_line "$requests" 0.2 || continue
    case $line in
      plug) tell "{\"execute\":\"device_add\",\"arguments\":{\"id\":\"plugged\",\"bus\":\"root0\",$pluggable}}" ;;
      unplug) tell '{"execute":"device_del","arguments":{"id":"plugged"}}' && await '"DEVICE_DELETED".*"plugged"' ;;
      reset) tell '{"execute":"system_reset"}' ;;
      *)
        if declare -F serve_request > /dev/null; then
          serve_request "$line" && echo done >&"$replies" || echo failed >&"$replies"
        else
          echo "not a request: $line" >&"$monitor"
        fi
        ;;
    esac || true
  done
  exec {requests}>&- {replies}>&- {commands}>&- {answers}>&- {monitor}>&-
}

# tell COMMAND: gives QEMU a command and waits for its answer. Fails if QEMU refuses.
tell() {
  echo "> $1" >&"$monitor"
  echo "$1" >&"$commands"
  await '"(return|error)":' && [[ $line != *'"error":'* ]]
}

# await PATTERN: waits for a line of QEMU's that matches, which is in `line` then.
await() {
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    kill -0 "$qemu" 2> /dev/null || return
    next_line "$answers" 0.3 || continue
    echo "$line" >&"$monitor"
    [[ ! $line =~ $1 ]] || return 0
  done
  echo "gave up waiting for $1" >&"$monitor"
  return 1
}

# next_line DESCRIPTOR SECONDS: reads a line into `line`. What has come of it in that time is kept for the
# next attempt.
next_line() {
  local part=
  if IFS= read -r -t "$2" -u "$1" part; then
    line=${partial[$1]:-}$part
    partial[$1]=
    return
  fi
  partial[$1]=${partial[$1]:-}$part
  return 1
}
