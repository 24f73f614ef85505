# Sourced by `crash`, whose variable `work` it uses: a place with little room, which nobody else sees.
# shellcheck shell=bash disable=SC2154

# The process that keeps the place's namespace, and how the place is reached from outside.
roommate=
room=

# open_room: an image of 64 MiB where there is room for 24, 8 of which are taken. Fails where that is not permitted,
# with the reason in `problem`.
open_room() {
  local kind=(--mount) ready
  mkdir "$work/room"
  unshare "${kind[@]}" true 2> /dev/null || kind=(--user --map-root-user --mount)
  mkfifo "$work/room.ready"
  unshare "${kind[@]}" sh -c '
    mount -t tmpfs -o size=24m room "$1/room" && truncate -s 64M "$1/room/image" &&
      head -c 8M /dev/zero > "$1/room/ballast" && echo ready > "$1/room.ready"
    exec sleep 3600' sh "$work" 2> "$work/room.log" &
  roommate=$!
  if ! read -r -t 10 ready <> "$work/room.ready" || [ "$ready" != ready ]; then
    problem="no small file system: $(tail -n 1 "$work/room.log")"
    return 1
  fi
  room=/proc/$roommate/root$work/room
  [ -w "$room/image" ] && return
  problem="no access to a small file system"
  return 1
}

# make_room: for what did not fit.
make_room() {
  rm "$room/ballast"
}

close_room() {
  [ -z "$roommate" ] || kill "$roommate" 2> /dev/null || true
  roommate=
}
