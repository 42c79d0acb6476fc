# Sourced: packages from apt, where we are root on Debian or Ubuntu and nobody said FOURFOLD_APT=0.

may_apt() { command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && [ "${FOURFOLD_APT:-1}" != 0 ]; }

# apt_install PACKAGE...: prints the command, runs it quietly, and once more after `apt-get update` if it fails.
apt_install() {
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0) log
  log=$(mktemp)
  echo "fourfold: apt-get install -y --no-install-recommends $*"
  if ! "${apt[@]}" install -y --no-install-recommends "$@" >"$log" 2>&1 </dev/null; then
    echo "fourfold: apt-get update, then once more"
    "${apt[@]}" update >"$log" 2>&1 </dev/null || true
    "${apt[@]}" install -y --no-install-recommends "$@" >"$log" 2>&1 </dev/null || { tail -n 20 "$log" >&2 && false; }
  fi
}

# apt_source PACKAGE DIR: the upstream sources of a package of the distribution, unpacked in DIR. Its lists of sources are used
# from a copy, since most machines have those of binary packages only.
apt_source() {
  local package=$1 into=$2 apt=$2/apt file log=$2/apt.log
  mkdir -p "$apt/parts" "$apt/lists"
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/{debian,ubuntu}.sources; do
    [ -f "$file" ] || continue
    sed -E 's/^deb /deb-src /; s/^Types: .*/Types: deb-src/' "$file" >"$apt/parts/$(basename "$file" | sed 's/^sources.list$/main.list/')"
  done
  local from=(-qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$(realpath "$apt/parts")"
    -o Dir::State::Lists="$(realpath "$apt/lists")" -o APT::Sandbox::User=root)
  echo "fourfold: apt-get source $package"
  { apt-get "${from[@]}" update && cd "$into" && apt-get "${from[@]}" source --download-only "$package"; } >"$log" 2>&1 </dev/null ||
    { tail -n 20 "$log" >&2 && return 1; }
  tar -xf "$package"_*.orig.tar.*
}
