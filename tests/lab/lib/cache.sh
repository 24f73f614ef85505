# Sourced: a cache of directories that are complete or absent.
# shellcheck shell=bash

BARKEEP_LAB_CACHE=$(realpath -m "${BARKEEP_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/barkeep/lab}")

# die WORD...: says why on standard error, as the last line, and ends the script.
die() {
  echo "lab: $*" >&2
  exit 1
}

# cached NAME COMMAND [ARGUMENT...]: prints the cached directory NAME. If there is none, COMMAND
# makes it: it is given a staging directory as its last argument, which is renamed when COMMAND
# succeeds, so an interrupted download leaves nothing behind that looks like a result. The lock
# makes a parallel run wait for this one's result instead of downloading its own.
cached() (
  name=$1
  shift
  mkdir -p "$BARKEEP_LAB_CACHE"
  exec 9> "$BARKEEP_LAB_CACHE/.$name.lock"
  flock 9
  if [ ! -d "$BARKEEP_LAB_CACHE/$name" ]; then
    staging=$BARKEEP_LAB_CACHE/.$name.staging
    rm -rf "$staging"
    mkdir "$staging"
    trap 'rm -rf "$staging"' EXIT
    "$@" "$staging" >&2 9>&-
    mv -T "$staging" "$BARKEEP_LAB_CACHE/$name"
  fi
  echo "$BARKEEP_LAB_CACHE/$name"
)
