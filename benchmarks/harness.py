"""Honest timing: ours, its rivals and a plain copy take turns in one process, and only right answers get a time.

A `Case` says what is compared; a `Session` checks every contestant against the float64 reference, races them and keeps the
results. No op is known here: the bench_<family> files declare the cases, of ops and of whatever else takes time, such as
reading files.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import gc
import importlib
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch

Call = Callable[[], Any]  # one run of a contestant; gives its result: a tensor, several, or what its `tensors` understands
Drive = Callable[[Callable[[], None], int], None]  # drive(play_round, rounds) calls play_round that often

SCHEMA = 1  # of the JSON document
TIMING_SECONDS = 2e-3  # one timing lasts at least this long; short calls are looped
CACHED_SECONDS = 5e-3  # a longer call has more data than caches hold
LARGEST_ROUNDS = 200
SLOW_SECONDS = 2.0  # a longer call is timed once beforehand
SLOW_ROUND = 10.0  # of longer rounds three are enough
STATES = {
    "out": "results land in warm memory: in the contestant's own out= where it has one, else in a heap that keeps its pages",
    "heap": "every call allocates its result, nobody uses out=, and the heap keeps its pages (on a GPU torch's allocator does)",
    "fresh": "every call allocates its result, nobody uses out=, and 128 KiB and more are mapped anew, page faults included",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    quick: bool = False
    device: str = "cpu"
    threads: tuple[int, ...] = (1, 2)
    family: str | None = None
    op: str | None = None
    match: str | None = None  # a part of a case's title
    random_shapes: bool = False
    seed: int = 0
    only_ours: bool = False
    seconds: float | None = None  # for the whole run; None: `LEISURE` per case

    LEISURE = 6.0

    @property
    def compiles(self) -> bool:
        """Whether torch.compile'd rivals take part: they need a compiler, and longer than a quick run has."""
        tool = find_spec("triton") if self.device == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
        return tool is not None and not self.quick and not self.only_ours

    def threads_of(self, case: Case) -> tuple[int, ...]:
        """A case runs with each thread count in a row, where it has a use for threads; the cost of a call has none."""
        return self.threads if case.threaded and not case.overhead else self.threads[:1]

    def choose(self, cases: Iterable[Case]) -> list[Case]:
        """The cases wanted, in the order in which they can run: "fresh" first, as no kept heap can be made fresh again."""
        wanted = [
            case
            for case in map(self._on_device, cases)
            if case is not None
            and (case.quick or not self.quick)
            and (self.op is None or case.op in self.op.split(","))
            and (self.match is None or self.match in case.title)
        ]
        return sorted(wanted, key=fresh_first)

    def _on_device(self, case: Case) -> Case | None:
        """A GPU's caching allocator keeps everything, so nothing is fresh there; how much memory is needed, it still tells."""
        if self.device != "cuda" or case.state != "fresh":
            return case
        label = case.label.removesuffix(", memory") + ", memory"
        return dataclasses.replace(case, state="heap", label=label) if case.peak else None


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """|got - reference| <= absolute + relative * |reference|, everywhere.

    of_rms: absolute counts in root mean squares of the reference, tensor by tensor: for results of different magnitudes.
    """

    absolute: float
    relative: float
    of_rms: bool = False

    def __str__(self) -> str:
        return f"{self.absolute:g}{'·rms' if self.of_rms else ''} + {self.relative:g}·|reference|"


class Absent(Exception):
    """Raised by what can't take part here, a contestant's `make` or a case's problem; its text says why and what would help."""


def needed(module: str, package: str, why: str = "") -> Any:
    """The module, or Absent with what would help."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"not installed (pip install {package}){why}") from error


@dataclasses.dataclass(frozen=True)
class Contestant:
    """`make(problem, state)` prepares what may be prepared once (weights, buffers) and gives the call that is timed.

    reference: where it computes something else than the case: a yardstick, or a rival for the same purpose, such as pixels
        where ours has coefficients.
    tensors: of what the call gives, where that is no tensors; outside the clock.
    share: of the case's work that a call does, where all of it would take too long; its times are divided by it.
    """

    name: str
    make: Callable[[Any, str], Call]
    tolerance: Tolerance | None = None  # where its precision is another than the case's
    reference: Callable[[Any], Any] | None = None
    tensors: Callable[[Any], Any] | None = None
    share: float = 1.0

    def result(self, call: Call) -> tuple[torch.Tensor, ...]:
        return _tensors(self.tensors(call()) if self.tensors else call())


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases that are judged together, by the geometric mean of their cost over their first yardstick."""

    name: str
    goal: float | None = None  # of the mean
    limit: float | None = None  # of every case


@dataclasses.dataclass(frozen=True)
class Case:
    """One op, or whatever else takes time, on one problem in one allocation state.

    yardsticks: do less than the op, which is why they are no rivals, and are right by their own references; told is what the
        op costs over them.
    held: of a case with a backward pass, the problem's tensors; told is what each contestant saves for it beyond them.
    bytes: what the op must read and write, timed beside a copy of as many; 0 where memory is not what it waits for.
    flops: of the usual algorithm, for the share of the GEMM peak.
    gemm: the type of the matmul that makes that peak.
    peak: whether told is what each contestant's call needs in memory at its height, beyond what is there before it.
    handles: so many of what a call handles; told is how many a second.
    threaded: whether threads are of use to it.
    overhead: the problem is so small that only the cost of the call is left, timed beside the yardstick, or where there is
        none beside problem.clone() alone.
    overhead_goal: the microseconds over that which it may take.
    """

    family: str
    op: str
    label: str
    problem: Callable[[torch.device], Any]
    reference: Callable[[Any], Any]  # problem -> float64 result
    ours: Contestant
    rivals: tuple[Contestant, ...]
    tolerance: Tolerance
    yardsticks: tuple[Contestant, ...] = ()
    group: Group | None = None
    held: Callable[[Any], Iterable[torch.Tensor]] | None = None
    state: str = "out"
    bytes: int = 0
    flops: int = 0
    gemm: torch.dtype = torch.float32
    peak: bool = False
    handles: tuple[int, str] | None = None
    threaded: bool = True
    source: str = ""  # where the shape comes from
    quick: bool = False
    overhead: bool = False
    overhead_goal: float | None = None

    @property
    def title(self) -> str:
        return f"{self.group.name}: {self.label}" if self.group else self.label

    @property
    def name(self) -> str:
        return f"{self.op} {self.title} [{self.state}]"


def fresh_first(case: Case) -> bool:
    """A sort key."""
    return case.state != "fresh"


def in_fresh_memory(case: Case) -> Case:
    """The same, told how much memory it needs: once, and not in quick runs."""
    label = f"{case.label}, memory"
    return dataclasses.replace(case, label=label, state="fresh", peak=True, threaded=False, quick=False)


def with_backward(forward: Call, leaves: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> Call:
    """forward's results, and with `grads` as theirs the gradients of `leaves`."""

    def call() -> tuple[torch.Tensor, ...]:
        results = _tensors(forward())
        return *results, *torch.autograd.grad(results, leaves, grads)

    return call


# --- statistics -----------------------------------------------------------------------------------------------------------


def spread(series: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, q1, median, q3, high = (float(v) for v in numpy.percentile(series, (0, 25, 50, 75, 100)))
    return {"median": median, "q1": q1, "q3": q3, "min": low, "max": high}


def ratios(rival: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Spread of rival / ours *within* each round: what slows a whole round down slows both and cancels."""
    return spread([r / o for r, o in zip(rival, ours, strict=True)])


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """Everybody starts in turn; each second lap runs backwards, so that nobody always follows the same one."""
    start = turn % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn // len(names) % 2 else order


# --- checking -------------------------------------------------------------------------------------------------------------


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def deviation(got: Any, reference: Any, tolerance: Tolerance) -> tuple[float, str | None]:
    """Largest |got - reference|, and what is wrong with it (None: nothing). NaN is an error of infinity."""
    got, reference = _tensors(got), _tensors(reference)
    if [g.shape for g in got] != [r.shape for r in reference]:
        return math.inf, f"shape {[tuple(g.shape) for g in got]} instead of {[tuple(r.shape) for r in reference]}"
    worst, outside = 0.0, False
    for g, r in zip(got, reference, strict=True):
        absolute = tolerance.absolute * (r.square().mean().sqrt().item() if tolerance.of_rms else 1)
        rows = zip(*(torch.atleast_1d(t.detach()).split(1) for t in (g, r)), strict=True)
        for part, expected in rows:  # by parts: float64 copies of all of it are large
            error = (part.double() - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            worst = max(worst, error.max().item()) if error.numel() else worst
            outside |= bool((error > absolute + tolerance.relative * expected.abs()).any())
    return worst, f"largest error {worst:.3g}, tolerance {tolerance}" if outside else None


# --- memory ---------------------------------------------------------------------------------------------------------------


def saved_for_backward(call: Call, held: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes that autograd keeps during the call, and how many of them neither `held` nor the results keep alive anyway."""
    kept: list[torch.Tensor] = []  # alive until the end, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = _tensors(call())
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    anyway = {t.untyped_storage().data_ptr() for t in (*held, *results)}
    return {"bytes": sum(sizes.values()), "anew": sum(size for place, size in sizes.items() if place not in anyway)}


def _settled_memory() -> int:
    """Resident bytes once the heap has given back what is free in it; from here on the kernel notes the largest anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that a call needs at its height, beyond those that live before it, its result included.

    On the CPU what is resident: the holes of a kept heap count, so that only the state "fresh" tells what lives.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _settled_memory()
    call()
    return max(0, _resident("VmHWM") - before)


# --- the machine ----------------------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # <malloc.h>


_kept_heaps: list[str] = []


def set_allocation_state(state: str) -> None:
    """Tell glibc's malloc, which serves torch's CPU tensors, to keep the heap or to map large results anew."""
    # Without a call, glibc moves its threshold by what was freed before: the result would depend on the cases that ran earlier.
    keep = state != "fresh"
    if keep:
        _kept_heaps.append(state)
    elif _kept_heaps:
        raise RuntimeError(
            "the allocation state 'fresh' must come first: what a kept heap has free is served without new pages"
        )
    wishes = {_M_MMAP_MAX: 0 if keep else 65536, _M_MMAP_THRESHOLD: 128 * 1024, _M_TRIM_THRESHOLD: -1 if keep else 128 * 1024}
    libc = ctypes.CDLL(None)
    for parameter, value in wishes.items():
        if not libc.mallopt(parameter, value):
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused; the allocation state {state!r} cannot be set")


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu_ticks() -> tuple[int, int, int] | None:
    """(busy, stolen, all) ticks of all cores since boot, or None where the kernel does not tell."""
    try:
        user, nice, system, idle, wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + irq + soft
    return busy, steal, busy + steal + idle + wait


def _calibration() -> float:
    """Seconds of a fixed piece of work inside one core; the best of a few, so that only a lasting change shows."""

    def work() -> float:
        start = time.perf_counter()
        sum(i * i for i in range(20_000))
        return time.perf_counter() - start

    return min(work() for _ in range(7))


class LoadWatch:
    """Says at the end what else the machine was doing meanwhile."""

    def __init__(self) -> None:
        self.calibration, self.ticks, self.own = _calibration(), _cpu_ticks(), sum(os.times()[:4])

    def warnings(self) -> list[str]:
        found = []
        drift = _calibration() / self.calibration - 1
        if abs(drift) > 0.10:
            found.append(
                f"a fixed loop ran {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} after the case than before it"
            )
        now = _cpu_ticks()
        if self.ticks and now and now[2] > self.ticks[2]:
            busy, steal, total = (n - t for n, t in zip(now, self.ticks, strict=True))
            own = (sum(os.times()[:4]) - self.own) * os.sysconf("SC_CLK_TCK")
            if (others := (busy - own) / total) > 0.05:
                found.append(f"other processes took {others:.0%} of the machine")
            if steal / total > 0.01:
                found.append(f"{steal / total:.0%} of the machine's time was stolen by its host")
        return found


def machine_facts(device: str) -> dict[str, Any]:
    """What a reader needs to place the numbers; nothing that names the machine."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    family = "family {cpu family} model {model}".format(**fields) if "cpu family" in fields else ""
    facts = {
        "cpu": " ".join(filter(None, [fields.get("model name", platform.machine()), family])),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


SOURCES = ("csrc", "python", "triton_kernels", "benchmarks", "CMakeLists.txt", "pyproject.toml")
INSTALLED = (("python/fourfold", "."), ("triton_kernels", "triton_kernels"), ("benchmarks", "benchmarks"))


def commit(package: Path) -> str | None:
    """The commit of the checkout we are in, and whether what runs is something else; None outside a checkout of fourfold.

    package: the installed one, whose Python files are compared with the checkout's.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or not (Path(top) / "python" / "fourfold" / "__init__.py").is_file():
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    same = git("-C", top, "status", "--porcelain", "--", *SOURCES) == ""
    for folder, place in INSTALLED:
        for file in (Path(top) / folder).rglob("*.py"):
            twin = package / place / file.relative_to(Path(top) / folder)
            same = same and twin.is_file() and twin.read_bytes() == file.read_bytes()
    return head if same else f"{head} with changes"


def _time_cpu(call: Call, loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def _time_cuda(call: Call, loops: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / loops


# --- the race -------------------------------------------------------------------------------------------------------------


class Race:
    """Calls that take turns; `times[name]` holds seconds per call over the call's share, one entry a round."""

    def __init__(
        self, calls: dict[str, Call], clock: Callable[[Call, int], float], shares: dict[str, float] | None = None
    ) -> None:
        self.calls, self.clock, self.shares = calls, clock, shares or {}
        self.times: dict[str, list[float]] = {name: [] for name in calls}
        self.rounds = 0
        once = {name: self._once(call) for name, call in calls.items()}
        self.loops = {name: max(1, math.ceil(TIMING_SECONDS / seconds)) for name, seconds in once.items()}
        # Before its timing a short call runs as often untimed: it shall find its own data in the caches, not its predecessor's.
        self.leads = {name: self.loops[name] if seconds < CACHED_SECONDS else 0 for name, seconds in once.items()}
        self.round_seconds = sum((self.leads[name] + self.loops[name]) * seconds for name, seconds in once.items())

    def _once(self, call: Call) -> float:
        call()  # the first call pays for plans, caches and pages
        once = self.clock(call, 1)
        return once if once > SLOW_SECONDS else min(once, self.clock(call, 1))

    def play_round(self) -> None:
        for name in turn_order(list(self.calls), self.rounds):
            for _ in range(self.leads[name]):
                self.calls[name]()
            self.times[name].append(self.clock(self.calls[name], self.loops[name]) / self.shares.get(name, 1.0))
        self.rounds += 1

    def rounds_within(self, seconds: float, fewest: int) -> int:
        return min(LARGEST_ROUNDS, max(fewest, int(seconds / self.round_seconds)))


def play(play_round: Callable[[], None], rounds: int) -> None:
    """The plain drive, for where pytest-benchmark is missing."""
    for _ in range(rounds):
        play_round()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Session:
    """One run over many cases; `document()` is what the JSON file holds."""

    def __init__(self, settings: Settings, fourfold: Any, runs: int) -> None:
        # On a GPU the default lets convolutions round to TF32; every contestant computes in float32 here.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.settings, self.device = settings, torch.device(settings.device)
        self.started = time.perf_counter()
        self.runs = self.runs_left = runs
        self.results: list[dict[str, Any]] = []
        self.raised = 0  # cases that failed with an error, and so have no result
        self.peaks: dict[str, float] = {}
        self.clock = _time_cuda if self.device.type == "cuda" else _time_cpu
        self._problem: tuple[Case, Any, dict[Any, Any]] | None = None
        cores = len(os.sched_getaffinity(0))
        load = os.getloadavg()[0]
        self.warnings = [f"load average {load:.1f} on {cores} cores before the first case"] if load > 0.5 * cores else []
        self.facts = {
            "machine": machine_facts(settings.device),
            "torch": torch.__version__,
            "fourfold": fourfold.__version__,
            "commit": commit(Path(fourfold.__file__).parent),
            "build": fourfold.build_info(),
            "capability": fourfold.cpu_capability(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "settings": dataclasses.asdict(settings),
            "states": STATES,
        }

    def document(self) -> dict[str, Any]:
        facts = self.facts | {"asked": self.runs, "gemm_peak_flops": self.peaks, "warnings": self.warnings}
        if self.raised:
            facts["raised"] = self.raised
        return {"fourfold_benchmarks": SCHEMA} | facts | {"results": self.results}

    def _seconds_for_one(self) -> float:
        if self.settings.seconds is None:
            return self.settings.LEISURE
        left = self.settings.seconds - (time.perf_counter() - self.started)
        return max(0.0, left / max(1, self.runs_left))

    def _given(self, case: Case) -> tuple[Any, dict[Any, Any]]:
        """Problem and results of references; kept for the next run, which is mostly the same case with other threads."""
        if self._problem is None or self._problem[0] is not case:
            self._problem = None  # frees the old one first
            self._problem = (case, case.problem(self.device), {})
        return self._problem[1:]

    def _gemm_peak(self, threads: int, dtype: torch.dtype) -> float:
        """flop/s of a large square matmul, the best of ten."""
        key = str(threads) + (f" {_name_of(dtype)}" if dtype != torch.float32 else "")
        if key not in self.peaks:
            n = 8192 if self.device.type == "cuda" else 1024
            a, b, c = (torch.ones(n, n, device=self.device, dtype=dtype) for _ in range(3))
            multiply = functools.partial(torch.mm, a, b, out=c)
            multiply()
            self.peaks[key] = 2 * n**3 / min(self.clock(multiply, 1) for _ in range(10))
        return self.peaks[key]

    def _copy(self, case: Case) -> Call:
        """copy_ into a warm tensor that moves as many bytes as the op must: half of them read, half written."""
        source, target = (torch.ones(max(1, case.bytes // 8), device=self.device) for _ in range(2))
        return lambda: target.copy_(source)

    def _entrants(self, case: Case) -> tuple[dict[str, Call], dict[str, float], dict[str, str], dict[str, str]]:
        """Whose answers are right, everybody's errors, whose are wrong, and who is absent."""
        calls: dict[str, Call] = {}
        errors: dict[str, float] = {}
        wrong: dict[str, str] = {}
        absent: dict[str, str] = {}
        others = () if self.settings.only_ours else (*case.rivals, *case.yardsticks)
        for contestant in (case.ours, *(case.yardsticks if case.overhead else others)):
            try:
                problem, references = self._given(case)
                call = contestant.make(problem, case.state)
            except Absent as reason:
                absent[contestant.name] = str(reason)
                if contestant is case.ours:
                    break
                continue
            reference = contestant.reference or case.reference
            if reference not in references:
                references[reference] = reference(problem)
            tolerance = contestant.tolerance or case.tolerance
            error, complaint = deviation(contestant.result(call), references[reference], tolerance)
            errors[contestant.name] = error
            if complaint:
                wrong[contestant.name] = complaint
            else:
                calls[contestant.name] = call
        return calls, errors, wrong, absent

    def run(self, case: Case, threads: int, drive: Drive = play) -> dict[str, Any]:
        """Check, race, keep and give the result. Whose answer is wrong stands under "wrong" and gets no time.

        Who can't take part stands under "absent"; where that is ours, there is no race.
        """
        try:
            result = self._run(case, threads, drive)
        except Exception:
            self.raised += 1
            raise
        self.results.append(result)
        return result

    def _run(self, case: Case, threads: int, drive: Drive) -> dict[str, Any]:
        began = time.perf_counter()
        seconds = self._seconds_for_one()
        self.runs_left -= 1
        torch.set_num_threads(threads)
        set_allocation_state(case.state)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # compiled code has the thread count baked in
        calls, errors, wrong, absent = self._entrants(case)
        result = {
            "family": case.family,
            "op": case.op,
            "group": case.group and dataclasses.asdict(case.group),
            "label": case.label,
            "state": case.state,
            "threads": threads,
            "bytes": case.bytes,
            "flops": case.flops,
            "source": case.source,
            "ours": case.ours.name,
            "tolerance": str(case.tolerance),
            "errors": {name: (error if math.isfinite(error) else str(error)) for name, error in errors.items()},
            "wrong": wrong,
            "absent": absent,
            "warnings": [],
        }
        if case.ours.name in calls and not (case.overhead and wrong):
            problem, _ = self._given(case)
            if case.held is not None:
                result["saved"] = {name: saved_for_backward(call, case.held(problem)) for name, call in calls.items()}
            if case.peak:
                result["peak"] = {name: peak_memory(call, self.device) for name, call in calls.items()}
            if case.overhead and not case.yardsticks:
                calls["clone"] = problem.clone
            elif case.bytes and not case.overhead:
                calls["copy_"] = self._copy(case)
            # The cost of a call is the processor's, whatever the device does meanwhile.
            shares = {contestant.name: contestant.share for contestant in (*case.rivals, *case.yardsticks)}
            race, watch = Race(calls, _time_cpu if case.overhead else self.clock, shares), LoadWatch()
            if self.settings.seconds is not None:
                seconds -= time.perf_counter() - began  # preparing counts, where time is short
            few = self.settings.quick or race.round_seconds > SLOW_ROUND
            rounds = race.rounds_within(seconds, fewest=3 if few else 7)
            collecting = gc.isenabled()
            gc.disable()
            faults = page_faults()
            try:
                drive(race.play_round, rounds)
            finally:
                if collecting:
                    gc.enable()
            pages = (page_faults() - faults) / rounds
            warnings = watch.warnings()
            if case.state != "fresh" and pages > 0.1 * case.bytes / os.sysconf("SC_PAGE_SIZE") + 10:
                warnings.append(f"{pages:.0f} page faults a round, where the heap should have kept its pages")
            result |= self._summary(case, race, threads) | {"page_faults_per_round": pages, "warnings": warnings}
        return result

    def _summary(self, case: Case, race: Race, threads: int) -> dict[str, Any]:
        ours = race.times[case.ours.name]
        rivals = [r.name for r in case.rivals if r.name in race.times]
        yardsticks = [y.name for y in case.yardsticks if y.name in race.times]
        times = {name: spread([t * 1e3 for t in series]) for name, series in race.times.items()}
        against = {name: ratios(race.times[name], ours) for name in rivals}
        summary: dict[str, Any] = {
            "rounds": len(ours),
            "loops": race.loops,
            "ms": times,
            "ratio": against,
            "cost": {name: ratios(ours, race.times[name]) for name in yardsticks},
            "best_rival": min(against, key=lambda name: against[name]["median"]) if against else None,
        }
        if case.overhead:
            base = next(name for name in race.times if name != case.ours.name)
            summary["overhead_us"] = spread([(o - b) * 1e6 for o, b in zip(ours, race.times[base], strict=True)])
            summary["overhead_over"] = base
            summary["overhead_goal_us"] = case.overhead_goal
            return summary
        if case.bytes:
            summary["copy_share"] = ratios(race.times["copy_"], ours)
            summary["gb_per_s"] = case.bytes / statistics.median(ours) * 1e-9
        if case.flops:
            summary["gemm_share"] = case.flops / statistics.median(ours) / self._gemm_peak(threads, case.gemm)
            summary["gemm"] = _name_of(case.gemm)
        if case.handles:
            count, what = case.handles
            summary["rate"] = {"of": what, "per_second": spread([count / t for t in ours])}
        return summary
