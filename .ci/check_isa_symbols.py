"""No kernel object defines a symbol that another ISA tier could share.

The linker keeps one copy of a weak symbol. Were it the one from an AVX-512 object, the baseline path would run AVX-512
code. So every symbol that a kernel object defines must carry its tier's namespace: ``fourfold::avx2::…``.

    check_isa_symbols.py build/cp311-cp311-linux_x86_64
"""

import re
import subprocess
import sys
from pathlib import Path


def defined_symbols(path: Path) -> list[str]:
    """The demangled names of the external symbols, weak or not, that the object defines."""
    listing = subprocess.run(
        ["nm", "--extern-only", "--defined-only", "--demangle", "--format=posix", path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # "name type value size", and a demangled name may hold spaces.
    return [re.sub(r" [A-Za-z] [0-9a-f]+( [0-9a-f]+)?$", "", line) for line in listing.splitlines()]


def main(build: Path) -> int:
    """Check every kernel object under the CMake build folder; the exit status is 1 where one leaks."""
    objects = sorted(build.glob("CMakeFiles/kernels_*.dir/**/*.o"))
    if not objects:
        print(f"no kernel objects (CMakeFiles/kernels_<tier>.dir) under {build}: build first")
        return 1
    leaks = 0
    for path in objects:
        tier = re.search(r"kernels_(\w+)\.dir", str(path))[1]
        symbols = defined_symbols(path)
        foreign = [name for name in symbols if f"::{tier}::" not in name]
        print(f"{path.relative_to(build)}: {len(symbols)} symbols, {len(foreign)} foreign to {tier}")
        for name in foreign:
            print(f"  {name}")
        if not symbols:
            print("  it defines nothing: its table is missing")
        leaks += len(foreign) + (not symbols)
    return int(leaks > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
