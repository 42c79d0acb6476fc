"""``python -m fourfold``: what works on this machine, and what to do about what doesn't."""

import math
import os
import platform
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

import fourfold as ff
from fourfold import _C, _load
from fourfold._pages import see

#: What fourfold does without, and what of it needs each.
OPTIONAL = {
    "tqdm": "progress bars",
    "matplotlib": "plot methods",
    "pandas": "Comparison.to_pandas",
    "torchmetrics": "metrics.CCAMetric",
}
WRAP = textwrap.TextWrapper(110, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor, or "max", in so many


def cores() -> int:
    """Those that this process may run on, or as many as it may keep busy."""
    allowed = len(os.sched_getaffinity(0))
    try:
        busy, period = QUOTA.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if busy == "max" else min(allowed, max(1, math.ceil(int(busy) / int(period))))


def huge_pages() -> str:
    """When Linux gives them: "always", "madvise" (to who asks) or "never"; "unknown" where it does not say."""
    try:
        return HUGE_PAGES.read_text().partition("[")[2].partition("]")[0] or "unknown"
    except OSError:
        return "unknown"


def lacking() -> list[str]:
    """Optional packages that are not installed."""
    return [name for name in OPTIONAL if find_spec(name) is None]


def facts() -> Iterator[tuple[str, str]]:
    """Rows of a name and what is so."""
    info, tier = ff.build_info(), ff.cpu_capability()
    lowered = "" if tier == _C.machine_capability() else f" (this machine has {_C.machine_capability()})"
    yield "fourfold", f"{ff.__version__}, built by {info['compiler']} against torch {info['torch']}"
    yield "python, torch", f"{platform.python_version()}, {torch.__version__}"
    yield "threads", f"{torch.get_num_threads()} for {cores()} cores"
    yield "CPU kernels", f"{tier}{lowered}; built for {', '.join(info['isa_tiers'])}"
    asked = "asks" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "does not ask"
    yield "huge pages", f"{huge_pages()}; torch {asked} for them"
    yield "CUDA library", f"built for {', '.join(info['cuda_archs'])}" if info["cuda_archs"] else "not built"
    yield "GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    if torch.cuda.is_available():
        for tool in ("cuda", "triton"):
            yield f"GPU ops in {tool}", "the slow reference" if tool in _load.missing else "native"
    yield "JPEG files", info["libjpeg"] or "no"
    yield "optional", ", ".join(name for name in OPTIONAL if name not in lacking()) or "none"


def advice() -> Iterator[str]:
    """What to do, most important first; nothing where all is well."""
    threads, tier = torch.get_num_threads(), ff.cpu_capability()
    if torch.cuda.is_available():
        yield from (_load.missing[tool] for tool in ("cuda", "triton") if tool in _load.missing)
    if "jpeg" in _load.missing:
        yield _load.missing["jpeg"] + see("jpeg.md#without-libjpeg")
    if tier != _C.machine_capability():
        yield f"FOURFOLD_CPU_CAPABILITY holds the CPU kernels at {tier}; without it they would be {_C.machine_capability()}"
    if threads > cores():
        yield f"torch has more threads than there are cores; OMP_NUM_THREADS={cores()}{see('performance.md#threads')}"
    elif threads < cores() and "OMP_NUM_THREADS" in os.environ:
        yield (
            f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} holds torch at {threads} of {cores()} cores"
            f"{see('performance.md#threads')}"
        )
    if huge_pages() in {"madvise", "always"} and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        yield (
            "large results are faster in memory that is there: THP_MEM_ALLOC_ENABLE=1 in the environment, or out="
            f"{see('performance.md#where-the-result-is-written')}"
        )
    elif huge_pages() == "never":
        yield f"large results are faster in memory that is there: out={see('performance.md#where-the-result-is-written')}"
    if lacking():
        yield f"for {', '.join(OPTIONAL[name] for name in lacking())}: pip install {' '.join(lacking())}"


def main() -> None:
    """Prints the facts, and the advice."""
    for name, fact in facts():
        print(f"{name:<18}{fact}")
    if not torch.cuda.is_available() and not ff.build_info()["cuda_archs"]:
        print("\nFor a GPU: a CUDA build of torch, nvcc, and a reinstall with FOURFOLD_CUDA=ON.")
    print("\nAdvice:" if any(advice()) else "\nNothing to advise.")
    for each in advice():
        print(WRAP.fill(each))


if __name__ == "__main__":
    main()
