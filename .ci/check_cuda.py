"""Compile every csrc/*/*.cu for sm_80, sm_90 and sm_100; a register spill or a stack frame in any kernel fails.

check_cuda.py [NVCC]   (in the environment that holds torch)
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 90, 100)
ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-O3", "-std=c++17", "-Xptxas=-v", "-Xcompiler=-Wno-psabi", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
REPORT = re.compile(
    r"Function properties for (?P<name>\S+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"(ptxas info\s*: Used (?P<registers>\d+) registers)?"  # a device function that was not inlined has none of its own
)


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    source: Path
    arch: int
    name: str
    registers: int
    stack: int
    spilled: int


def kernels_of(nvcc: str, source: Path, arch: int) -> Iterator[Kernel]:
    torch_include = Path(importlib.util.find_spec("torch").origin).parent / "include"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        run = subprocess.run(
            [nvcc, "-cubin", f"-arch=sm_{arch}", *FLAGS, "-isystem", torch_include, "-o", cubin.name, source],
            check=False,
            capture_output=True,
            text=True,
        )
    if run.returncode:
        sys.exit(f"{source.relative_to(ROOT)} does not compile for sm_{arch}:\n{run.stderr}")
    for found in REPORT.finditer(run.stderr):
        yield Kernel(
            source,
            arch,
            found["name"],
            int(found["registers"] or 0),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    return subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()


def main(nvcc: str) -> int:
    """Print one line a source and architecture, and every offending kernel; the exit status is 1 where one spills."""
    jobs = list(product(sorted(ROOT.glob("csrc/*/*.cu")), ARCHITECTURES))
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda job: list(kernels_of(nvcc, *job)), jobs))
    failed = not jobs
    for (source, arch), kernels in zip(jobs, compiled, strict=True):
        bad = [k for k in kernels if k.stack or k.spilled]
        most = max((k.registers for k in kernels), default=0)
        counts = f"{len(kernels)} kernels, {most} registers at most, {len(bad)} with spills or a stack frame"
        print(f"{source.relative_to(ROOT)} sm_{arch}: {counts}")
        for kernel, name in zip(bad, demangled([k.name for k in bad]) if bad else [], strict=True):
            print(f"  {name}: {kernel.registers} registers, {kernel.stack} bytes of stack, {kernel.spilled} bytes spilled")
        failed = failed or bool(bad) or not kernels
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "nvcc"))
