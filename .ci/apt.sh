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
