# Sourced by `run`, `virtio`, `crash`, `nested` and `wrap`, whose variables it uses (`lab`, `reference`): counts checks, a line for each.
# shellcheck shell=bash disable=SC2154

passed=0 failed=0 skipped=0
# What stands before every name, where the same checks are carried out more than once.
scope=

ok() {
  passed=$((passed + 1))
  echo "ok $scope$1"
}

# fail NAME REASON
fail() {
  failed=$((failed + 1))
  echo "FAIL $scope$1: $2"
}

# skip NAME REASON
skip() {
  skipped=$((skipped + 1))
  echo "skipped $scope$1: $2"
}

# close_report: the last line; fails if a check did.
close_report() {
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" = 0 ]
}

# listed BOOT: the names and makers ("NAME BY") of the checks of a boot, from the file `checks`.
listed() {
  awk -v boot="$1" '$1 == boot { print $3, $2 }' "$lab/checks"
}

# skip_listed BOOT REASON: none of a boot's checks can be carried out.
skip_listed() {
  local name by
  while read -r name by; do
    skip "$name" "$2"
  done < <(listed "$1")
}

# report_guest BOOT RESULTS REASON: turns a guest's lines into a report. REASON is what to say of
# a check that the guest was expected to carry out and is silent about.
report_guest() {
  local boot=$1 results=$2 reason=$3 name by line verdict detail
  while read -r name by; do
    line=$(tr -d '\r' < "$results" | awk -v name="$name" '$1 == "CHECK" && $2 == name')
    read -r _ _ verdict detail <<< "$line"
    if [ "$reference" = yes ] && [ "$by" = barkeep ]; then
      skip "$name" "QEMU's own device differs by design"
    elif [ "$verdict" = ok ] && [ "$(wc -l <<< "$line")" = 1 ]; then
      ok "$name"
    elif [ "$verdict" = skipped ] && [ "$(wc -l <<< "$line")" = 1 ]; then
      skip "$name" "$detail"
    elif [ -n "$line" ]; then
      fail "$name" "${detail:-unreadable result: $line}"
    else
      fail "$name" "$reason"
    fi
  done < <(listed "$boot")
  # A check that nobody listed would be lost silently when it stops being reported.
  while read -r name; do
    listed "$boot" | grep -q "^$name " || fail "$name" "not listed in tests/lab/checks"
  done < <(tr -d '\r' < "$results" | awk '$1 == "CHECK" { print $2 }')
}
