#!/usr/bin/env bash
# libjpeg.sh PREFIX: builds libjpeg-turbo as a static library that a shared one can hold, for wheels. Distributions' static
# libraries are not position-independent, and their shared ones would have to be on the user's machine. Without SIMD, which needs
# an assembler and serves pixels: entropy coding is C.
#
#   FOURFOLD_LIBJPEG_SOURCE=DIR   libjpeg-turbo's sources; unset: those of Debian or Ubuntu, where apt-get may be called
set -euo pipefail
prefix=$(realpath -m "$1")
cd "$(dirname "$0")/.."
source .ci/apt.sh
[ ! -f "$prefix/lib/libjpeg.a" ] || exit 0

venv=${VENV:-.venv}
work=build/libjpeg
rm -rf "$work"
mkdir -p "$work"
source=${FOURFOLD_LIBJPEG_SOURCE:-}
if [ -z "$source" ]; then
  may_apt || { echo "no sources of libjpeg-turbo: name them with FOURFOLD_LIBJPEG_SOURCE" >&2 && exit 1; }
  (apt_source libjpeg-turbo "$(realpath "$work")")
  source=$(ls -d "$work"/libjpeg-turbo-*/)
fi
"$venv/bin/cmake" -S "$source" -B "$work/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$(realpath "$venv/bin/ninja")" \
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_POSITION_INDEPENDENT_CODE=ON -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_INSTALL_LIBDIR="$prefix/lib" \
  -DENABLE_SHARED=OFF -DENABLE_STATIC=ON -DWITH_TURBOJPEG=OFF -DWITH_SIMD=OFF -DCMAKE_POLICY_VERSION_MINIMUM=3.5 >"$work/cmake.log" 2>&1
"$venv/bin/cmake" --build "$work/build" --target install >"$work/build.log" 2>&1
