"""What the checks of all families share: memory placement, comparison with float64, timing."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Allowed error, relative to the value and to the largest value: 16-bit results are float32 work rounded once.
TOLERANCE = {
    torch.float64: (0.0, 5e-14),
    torch.float32: (0.0, 8e-6),
    torch.bfloat16: (2**-8, 8e-6),
    torch.float16: (2**-11, 8e-6),
}

# Seconds of rounds after which calls without a graph are known well enough.
ENOUGH = 2.0


class Unavailable(Exception):
    """This machine cannot run the case; the text says why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of correctness. run(device) raises AssertionError where the result is wrong."""

    op: str
    name: str
    run: Callable[[torch.device], None]
    hot: bool = False


@dataclasses.dataclass(frozen=True)
class Speed:
    """One line of speed. make(device, small) gives what to measure, without measuring."""

    op: str
    name: str
    make: Callable[[torch.device, bool], "Contest"]
    hot: bool = False


@dataclasses.dataclass
class Contest:
    """Ours and its rivals, each a function of one of the inputs to a tensor or a tuple; they must agree within tolerance."""

    inputs: list[Tensor]
    moved: int | None  # bytes that must cross device memory per call; None where memory isn't what bounds it
    ours: Callable[[Tensor], Result]
    rivals: dict[str, Callable[[Tensor], Result]]
    tolerance: float
    floor: dict[str, Callable[[Tensor], Result]] = dataclasses.field(default_factory=dict)  # does less: ours can't beat it
    graph: bool = True  # False: calls wait for the device, so that no graph can hold them, and their launches count
    items: int | None = None  # how many images a call takes in, where a rate says more than a time
    memory: bool = False  # measure the peak of GPU memory, too


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


def second_gpu(device: torch.device) -> torch.device:
    needs_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Unavailable("needs two GPUs")
    return torch.device("cuda:1")


def needs_memory(device: torch.device, size: int) -> None:
    needs_gpu(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < size * 1.1:
        raise Unavailable(f"needs {size / 1e9:.0f} GB of free GPU memory, has {free / 1e9:.0f}")


def assert_close(
    result: Tensor, expected: Tensor, what: str = "", rtol: float | None = None, largest: Tensor | None = None
) -> None:
    """result against expected in float64; rtol: instead of the one of its dtype; largest: where expected is only a part."""
    assert result.shape == expected.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    usual, atol = TOLERANCE[result.dtype]
    rtol = usual if rtol is None else rtol
    error = (result.double() - expected).abs()
    bound = rtol * expected.abs() + atol * (1 + (expected.abs().max() if largest is None else largest))
    assert bool((error <= bound).all()), (
        f"{what}: off by {(error / bound).nan_to_num(math.inf).max().item():.3g} times what is allowed"
    )


def placed(values: Tensor, dtype: torch.dtype, style: str, fill: float) -> tuple[Tensor, Tensor]:
    """values in memory that `fill` surrounds, as (all of the memory, the view that holds values).

    style: "contiguous", "last" (dimension 1 innermost), "strided" (every second element) or "unaligned".
    """
    order = list(range(values.dim()))
    if style == "last":
        order = [0, *order[2:], 1]
    sizes = [values.shape[d] for d in order]
    step = 2 if style == "strided" else 1
    memory = torch.full(
        [sizes[0] + 2, *sizes[1:-1], sizes[-1] * step + (style == "unaligned")],
        fill,
        dtype=dtype,
        device=values.device,
    )
    view = memory[1:-1, ..., ::step][..., : sizes[-1]].permute([order.index(d) for d in range(values.dim())])
    view.copy_(values)
    return memory, view


def assert_only_written(memory: Tensor, view: Tensor, fill: float) -> None:
    """Nothing around view has changed. Overwrites view."""
    view.fill_(fill)
    assert bool((memory == memory.new_tensor(fill)).all()), "memory beside the result was written"


# ---- time ----


def rotation(moved: int, device: torch.device) -> int:
    """How many inputs to cycle through so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 2
    return max(3, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / moved))


def seconds_per_call(call: Callable[[Tensor], Result], inputs: list[Tensor], rounds: int = 7, *, graph: bool = True) -> float:
    """Median over rounds of one call per input. On a GPU a round replays a graph, so that launches cost nothing.

    Without a graph they do, and fewer rounds do where they take long.
    """
    device = inputs[0].device
    if device.type != "cuda" or not graph:
        call(inputs[0])
        spans = []
        for _ in range(rounds):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            results = [call(x) for x in inputs]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spans.append((time.perf_counter() - start) / len(results))
            if not graph and sum(spans) * len(results) > ENOUGH:
                break
        return statistics.median(spans)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            call(inputs[0])
    torch.cuda.current_stream(device).wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        results = [call(x) for x in inputs]  # all kept: each is written to memory of its own
    spans = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        recorded.replay()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) * 1e-3 / len(results))
    return statistics.median(spans[1:])


def peak_megabytes(call: Callable[[Tensor], Result], x: Tensor) -> float:
    """What one call needs on the GPU beyond what was there before, at its peak."""
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    call(x)
    torch.cuda.synchronize(x.device)
    return (torch.cuda.max_memory_allocated(x.device) - before) / 1e6


def copy_bandwidth(device: torch.device, small: bool) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = 4 << 20 if small else 256 << 20
    inputs = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2 if small else 4)]
    return 2 * size / seconds_per_call(torch.clone, inputs)
