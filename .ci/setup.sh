#!/usr/bin/env bash
# setup.sh EXTRA...: make .venv hold torch, the build tools and this checkout of fourfold with the named extras.
# Does only what is not done yet, so that calling it twice costs nothing; `make` calls it before everything else.
#
#   TORCH=torch==2.13.0   the torch to install        PYTHON=python3.12   the Python a new .venv is made with
#   VENV=.venv            where                       FOURFOLD_APT=0      never call apt-get
#   FOURFOLD_CUDA=ON|OFF  with or without the CUDA library; unset: where nvcc is found and torch can use it
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/apt.sh
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1

torch=${TORCH:-torch==2.13.0}
venv=${VENV:-.venv}
state=$venv/.fourfold
build_tools=(scikit-build-core pybind11 cmake ninja numpy)
extras=("$@")

say() { printf 'fourfold: %s\n' "$*"; }
stop() {
  printf 'fourfold: %s\n' "$@" >&2
  exit 1
}

# --- the machine: Python, compiler, libjpeg-turbo ---------------------------------------------------------------------

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
has_headers() { "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; }
can_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
compiles() { echo "$1" | ${CXX:-$(command -v c++ || command -v g++ || echo clang++)} -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; }
has_compiler() { compiles '#include <cstdint>'; }
has_jpeg() { compiles $'#include <cstdio>\n#include <jpeglib.h>'; }

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || stop "PYTHON=$PYTHON must be a Python of at least 3.10, got $("$PYTHON" --version 2>&1 | head -n 1)"
    command -v "$PYTHON"
    return
  fi
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
}

# What to install, in Debian's words; $1 is the Python found, or empty.
missing_packages() {
  local python=$1 real package=python3
  if [ -z "$python" ]; then
    echo "python3 python3-venv python3-dev"
  else
    # A distribution's Python comes in pieces; any other (pyenv, conda, uv, python.org) is whole.
    real=$(readlink -f "$python")
    case $real in /usr/bin/python3.*) package=${real##*/} ;; esac
    can_venv "$python" || echo "$package-venv"
    has_headers "$python" || echo "$package-dev"
  fi
  has_compiler || echo g++
  has_jpeg || echo libjpeg-dev
}

# The exact command for people, where we may not or cannot run it.
how_to_install() {
  if command -v apt-get >/dev/null; then
    echo "sudo apt-get update && sudo apt-get install -y $*"
  elif command -v dnf >/dev/null; then
    echo "sudo dnf install -y $*" | sed -E 's/python[0-9.]*-venv ?//; s/(python[0-9.]*)-dev/\1-devel/; s/g\+\+/gcc-c++/; s/libjpeg-dev/libjpeg-turbo-devel/'
  else
    echo "your package manager's install command for (in Debian's names) $*"
  fi
}

prepare_machine() {
  local python missing
  new_enough "$venv/bin/python" && python=$venv/bin/python || python=$(find_python)
  missing=$(missing_packages "$python" | xargs)
  [ -n "$missing" ] || return 0
  if may_apt; then
    # shellcheck disable=SC2086  # a list of package names. libjpeg alone is optional: without it the rest goes on
    apt_install $missing || { [ "$missing" != libjpeg-dev ] && apt_install ${missing/libjpeg-dev/}; } || true
    [ -n "$python" ] || python=$(find_python)
    missing=$(missing_packages "$python" | xargs)
  fi
  case $missing in
    "") ;;
    libjpeg-dev) say "libjpeg-turbo's headers are missing: building without JPEG files. To have them: $(how_to_install libjpeg-dev)" ;;
    *)
      [ -n "$python" ] || say "no Python of at least 3.10 found; one in an unusual place is named with PYTHON=/path/to/python3"
      stop "this machine lacks $missing (libjpeg is optional)" "run: $(how_to_install "$missing")" "then the same make command again"
      ;;
  esac
}

# --- .venv: torch, build tools, fourfold ------------------------------------------------------------------------------

python=$venv/bin/python
pip() { "$python" -m pip "$@" --quiet </dev/null; }
is() { [ "$(cat "$state/$1" 2>/dev/null)" = "$2" ]; }

make_venv() {
  local asked=""
  [ -z "${PYTHON:-}" ] || asked=$(find_python)
  if new_enough "$python"; then
    if [ -n "$asked" ] && ! "$python" -c 'import subprocess, sys
ask = subprocess.check_output([sys.argv[1], "-c", "import sys; print(sys.version_info[:2])"], text=True)
sys.exit(ask.strip() != str(sys.version_info[:2]))' "$asked"; then
      stop "$venv was made with $("$python" --version), not with PYTHON=$PYTHON; run: rm -rf $venv"
    fi
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --default-pip >/dev/null
  else
    asked=$(find_python)
    say "making $venv with $("$asked" --version)"
    "$asked" -m venv --clear "$venv"
  fi
  mkdir -p "$state"
}

install_torch() {
  is torch "$torch" && return
  rm -f "$state"/*
  say "installing $torch and the build tools into $venv (a long download the first time)"
  case $torch in
    *==*) pip install "$torch" ;;
    *) pip install --upgrade "$torch" ;;
  esac
  # From here on nothing may replace this very build of torch.
  "$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$state/constraints"
  pip install -c "$state/constraints" "${build_tools[@]}"
  echo "$torch" >"$state/torch"
}

# All that the built package depends on: the sources, what may steer CMake, and the torch it is built against.
fingerprint() {
  {
    find csrc python triton_kernels benchmarks CMakeLists.txt pyproject.toml -type f \
      ! -path '*/__pycache__/*' ! -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    env | LC_ALL=C sort | grep -E '^(CC|CXX|CUDACXX|CFLAGS|CXXFLAGS|LDFLAGS|CMAKE_[A-Z_]+|SKBUILD_[A-Z_]+|FOURFOLD_CUDA)=' || true
    cat "$state/constraints"
    has_jpeg && echo jpeg
    command -v nvcc || true
  } | sha256sum | cut -d' ' -f1
}

# The file `installed` holds the fingerprint of what is in .venv, then the extras it came with.
install_fourfold() {
  local now have=() wanted cuda
  now=$(fingerprint)
  mapfile -t have < <(cat "$state/installed" 2>/dev/null)
  wanted=$(printf '%s\n' "${have[@]:1}" "${extras[@]}" | sort -u | xargs)
  [ "${have[*]}" != "$now${wanted:+ $wanted}" ] || return 0
  # A CPU build of torch cannot load the CUDA library, and compiling that takes longer than all the rest.
  cuda=${FOURFOLD_CUDA:-$("$python" -c 'import torch; print("AUTO" if torch.version.cuda else "OFF")')}
  say "building and installing fourfold[${wanted// /,}]"
  rm -f "$state/installed"
  pip install --no-build-isolation -c "$state/constraints" --config-settings="cmake.define.FOURFOLD_CUDA=$cuda" \
    --config-settings=cmake.define.FOURFOLD_LIBJPEG= ".[${wanted// /,}]"
  # shellcheck disable=SC2086
  printf '%s\n' "$now" $wanted >"$state/installed"
}

# Two makes at once take turns here.
exec 9>"$venv.lock"
flock -n 9 || { say "waiting for another set-up of $venv" && flock 9; }
prepare_machine
make_venv
install_torch
install_fourfold
