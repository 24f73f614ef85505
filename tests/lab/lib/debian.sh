# Sourced after cache.sh: Debian packages, downloaded and unpacked beside the system.
# shellcheck shell=bash disable=SC2016 # formats with a dollar sign are apt's and dpkg's
#
# A private apt root has its own sources, lists and an empty dpkg status: the machine's package
# database and lists stay as they are, nothing is installed and no privilege is needed.
#
# What is trusted: apt checks the mirror's InRelease against Debian's archive keyring, the package
# index against InRelease, and a downloaded package against the index. debian_unpack compares
# each package with the index once more, at the moment it is unpacked, and records the sums.

# debian_root DIR SUITE...: makes a private apt root in DIR for SUITEs of the configured mirror and
# points apt at it (APT_CONFIG).
debian_root() {
  local dir=$1 keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror suite tool
  shift
  for tool in apt-get apt-cache apt-config dpkg-deb; do
    command -v "$tool" > /dev/null || die "not a Debian machine: no $tool"
  done
  [ "$(uname -m)" = x86_64 ] || die "the lab's machines are x86-64, this one is $(uname -m)"
  [ -r "$keyring" ] || die "no Debian archive keyring: $keyring"

  # apt itself knows what is configured, in whichever of its two formats.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 2> /dev/null |
    awk '/^https?:.*\/debian\/?$/ { print; exit }')
  [ -n "$mirror" ] || die "apt has no http or https Debian mirror configured"

  mkdir -p "$dir"/etc/{apt.conf.d,preferences.d,sources.list.d,trusted.gpg.d} \
    "$dir"/lists/partial "$dir"/cache/archives/partial
  : > "$dir/status"
  for suite; do
    echo "deb [arch=amd64 signed-by=$keyring] $mirror $suite main"
  done > "$dir/etc/sources.list"
  {
    # Proxies and timeouts are how this machine reaches its mirror.
    apt-config dump | grep -E '^Acquire::https?::' || true
    cat << END
Dir::Etc "$dir/etc/";
Dir::State "$dir";
Dir::State::lists "$dir/lists/";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache/";
Dir::Log "$dir";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
# A mirror that stands still is fine for a lab; what it once signed is still checked.
Acquire::Check-Valid-Until "false";
Acquire::Retries "2";
END
  } > "$dir/apt.conf"
  export APT_CONFIG=$dir/apt.conf
  apt-get -qq update || die "the package lists of $mirror ($*) can't be had"
}

# debian_unpack TREE DEB...: verifies the packages and unpacks them into TREE.
debian_unpack() {
  local tree=$1 deb specs=()
  shift
  mkdir -p "$tree"
  for deb; do
    specs+=("$(dpkg-deb --show --showformat '${Package}=${Version}' "$deb")")
  done
  # Both lists are in the order of the packages' names and versions, so that they can be joined.
  join -o 2.2,1.2 \
    <(paste -d ' ' <(printf '%s\n' "${specs[@]}") <(printf '%s\n' "$@") | sort -k 1b,1) \
    <(apt-cache show "${specs[@]}" | awk '
        /^Package: / { name = $2 }
        /^Version: / { version = $2 }
        /^SHA256: / { print name "=" version, $2 }' | sort -u -k 1b,1) |
    sed 's/ /  /' > "$tree/SHA256SUMS"
  [ "$(wc -l < "$tree/SHA256SUMS")" = $# ] || die "a package has no SHA256 in the package lists"
  sha256sum --check --strict --quiet "$tree/SHA256SUMS" || die "a package is not what its list says"
  sed -i 's|  .*/|  |' "$tree/SHA256SUMS"
  for deb; do
    dpkg-deb --extract "$deb" "$tree"
  done
  rm -rf "$tree"/usr/share/{bug,doc,doc-base,info,lintian,locale,man}
}

# run_by_own_loader DIR PROGRAM...: makes DIR/bin/PROGRAM, which runs the one unpacked into DIR/root. Such programs were
# built against other libraries than this machine may have, so each runs through its own loader.
run_by_own_loader() {
  local dir=$1 program
  shift
  mkdir "$dir/bin"
  for program; do
    cat > "$dir/bin/$program" << 'END'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/../root
name=$(basename "$0")
for folder in bin sbin libexec; do
  [ ! -x "$root/usr/$folder/$name" ] || break
done
case $name in
  qemu-system-*) set -- -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@" ;;
esac
for loader in "$root"/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$root"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2; do
  [ ! -x "$loader" ] || break
done
exec "$loader" --library-path "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu" \
  "$root/usr/$folder/$name" "$@"
END
    chmod +x "$dir/bin/$program"
  done
}
