#!/usr/bin/env bash
# kernel_driver.sh x86_64|aarch64 OUT COMPILER FLAG...: tests/kernels_main.cpp with every *kernels.cpp, compiled once per tier
# of that processor, without torch and Python. Tiers and their flags are read from CMakeLists.txt, where they are decided.
set -euo pipefail
cd "$(dirname "$0")/.."
processor=$1 out=$2
shift 2

tiers=$(sed -n "/CMAKE_SYSTEM_PROCESSOR MATCHES .*$processor/{n;s/ *set(tiers \(.*\))/\1/p}" CMakeLists.txt)
[ -n "$tiers" ] || { echo "CMakeLists.txt names no tiers for $processor" >&2 && exit 1; }
# A tier's flags may begin with another's: set(flags_b ${flags_a} -mthis).
flags_of() {
  local word
  for word in $(sed -n "s/^set(flags_$1 \(.*\))/\1/p" CMakeLists.txt); do
    case $word in '${flags_'*) word=${word#'${flags_'} && flags_of "${word%\}}" ;; *) echo "$word" ;; esac
  done
}
# A file's own flags: set_source_files_properties(file PROPERTIES COMPILE_OPTIONS flags).
flags_of_file() { sed -n "s|^set_source_files_properties($1 PROPERTIES COMPILE_OPTIONS \(.*\))|\1|p" CMakeLists.txt; }

mkdir -p "$out"
common=(-std=c++17 -g -Icsrc -ffp-contract=fast -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized)
objects=() jobs=0 limit=$(nproc)
for tier in $tiers; do
  for source in csrc/*/*kernels.cpp; do
    object=${source#csrc/}
    object=$out/$(tr / _ <<<"${object%.cpp}")_$tier.o
    ((jobs++ < limit)) || wait -n
    # shellcheck disable=SC2046  # a tier's flags are several words
    "$@" "${common[@]}" $(flags_of "$tier") $(flags_of_file "$source") -DFOURFOLD_ISA="$tier" -c "$source" -o "$object" &
    objects+=("$object")
  done
done
for job in $(jobs -p); do wait "$job"; done
"$@" "${common[@]}" csrc/common/isa.cpp tests/kernels_main.cpp "${objects[@]}" -o "$out/kernels_main"
