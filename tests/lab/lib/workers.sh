# Sourced by `crash`, whose variables it uses (`backend`, `served`, `work`, `barkeep`, `unharmed`): what happens to the
# workers of `barkeep run`, and to itself.
# shellcheck shell=bash disable=SC2154

# The process that kills, and what it has killed: a name and a process id a line.
killer=
killed=$work/killed
# What were workers when the supervisor was killed.
orphans=()

# workers: the process ids of all.
workers() {
  cat "/proc/$backend/task/"*/children 2> /dev/null | tr ' ' '\n' | grep . || true
}

# worker_of NAME: the process id of the worker that serves it; nothing if there is none at the moment.
worker_of() {
  local index pid
  for ((index = 0; index < ${#served[@]}; index += 2)); do
    [ "${served[index]}" != "$1" ] || break
  done
  for pid in $(workers); do
    # Those that have ended have no arguments any more.
    tr '\0' '\n' 2> /dev/null < "/proc/$pid/cmdline" |
      awk -v wanted=$((index / 2)) '
        asked { found = ("," $0 ",") ~ ("," wanted ","); exit }
        $0 == "--functions" { asked = 1 }
        END { exit !found }' && echo "$pid" && return
  done
  return 0
}

# await_worker NAME [NOT]: its worker's process id, once it has one (that is another).
await_worker() {
  local tries pid
  for ((tries = 0; tries < 500; tries++)); do
    pid=$(worker_of "$1")
    if [ -n "$pid" ] && [ "$pid" != "${2:-}" ]; then
      echo "$pid"
      return
    fi
    sleep 0.02
  done
  return 1
}

# start_killer COUNT NAME...: kills a worker of one of these functions every `period` seconds, or at random moments
# if that is not set.
start_killer() {
  local count=$1
  shift
  [ "$unharmed" = no ] || count=1
  (
    for ((; count > 0; count--)); do
      sleep "${period:-0.$((RANDOM % 9 + 1))}"
      name=${*:RANDOM % $# + 1:1}
      if [ "$unharmed" = no ]; then
        pid=$(await_worker "$name") || exit
        kill -KILL "$pid" && echo "$name $pid" >> "$killed"
      fi
    done
  ) &
  killer=$!
}

killer_has_ended() {
  [ -n "$killer" ] && ! kill -0 "$killer" 2> /dev/null
}

end_killer() {
  [ -z "$killer" ] || kill "$killer" 2> /dev/null || true
  [ -z "$killer" ] || wait "$killer" 2> /dev/null || true
  killer=
}

# check_kills COUNT: that many were killed, and the functions that lost them have others.
check_kills() {
  local count name pid without=
  if [ "$unharmed" = yes ]; then
    skip kills "nobody was killed"
    return
  fi
  count=$(wc -l < "$killed")
  for name in $(cut -d ' ' -f 1 "$killed" | sort -u); do
    pid=$(await_worker "$name") && ! grep -q " $pid\$" "$killed" || without+=" $name"
  done
  if [ -n "$without" ]; then
    fail kills "without a worker after $count kills:$without"
  elif [ "$count" -lt "$1" ]; then
    fail kills "$count workers were killed, not $1"
  else
    ok kills
  fi
}

# kill_supervisor: its workers are orphans then.
kill_supervisor() {
  [ "$unharmed" = no ] || return 0
  mapfile -t orphans < <(workers)
  [ ${#orphans[@]} -gt 0 ] || return
  kill -KILL "$backend"
  wait "$backend" 2> /dev/null || true
}

# check_orphans: they end when they have no client any more, but not before.
check_orphans() {
  local tries pid left
  for ((tries = 0; tries < 500; tries++)); do
    left=
    for pid in "${orphans[@]}"; do
      ! kill -0 "$pid" 2> /dev/null || left+=" $pid"
    done
    [ -n "$left" ] || break
    sleep 0.02
  done
  if [ ${#orphans[@]} = 0 ]; then
    fail orphans-end "there were none"
  elif [ -n "$left" ]; then
    # shellcheck disable=SC2086
    kill -KILL $left
    fail orphans-end "still there:$left"
  else
    ok orphans-end
  fi
  # Their numbers may be others' soon.
  orphans=()
}

# stop_workers NAME...: stops them as a debugger does; whoever watches them has to replace them.
stop_workers() {
  local name pid stopped=()
  [ "$unharmed" = no ] || return 0
  for name; do
    pid=$(await_worker "$name") || return
    kill -STOP "$pid" || return
    stopped+=("$pid")
  done
  for name; do
    await_worker "$name" "${stopped[0]}" > /dev/null || {
      kill -CONT "${stopped[@]}"
      return 1
    }
    echo "$name ${stopped[0]}" >> "$killed"
    stopped=("${stopped[@]:1}")
  done
}

# upgrade: replaces the program and has it go on as the new one.
upgrade() {
  local tries new before
  [ "$unharmed" = no ] || return 0
  before=$(workers | sort)
  cp "$barkeep" "$barkeep.new"
  mv "$barkeep.new" "$barkeep"
  new=$(stat -c %i "$barkeep")
  if [ $((upgrades++ % 2)) = 0 ]; then
    kill -USR2 "$backend"
  else
    "$barkeep" upgrade --pid "$backend" 2>> "$work/backend.log" || return
  fi
  for ((tries = 0; tries < 500; tries++)); do
    backend_lives || return
    # Every worker is a new one, and so is the supervisor's program.
    if [ "$(stat -L -c %i "/proc/$backend/exe")" = "$new" ] &&
      [ "$(workers | wc -l)" = "$(wc -l <<< "$before")" ] &&
      [ -z "$(comm -12 <(workers | sort) <(echo "$before"))" ]; then
      upgraded=$((upgraded + 1))
      return
    fi
    sleep 0.02
  done
  return 1
}
upgrades=0 upgraded=0
