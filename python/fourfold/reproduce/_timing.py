"""Seconds of calls that take turns, so that what else the machine does hits all of them.

With one thread they are the processor's, which others at work on the machine hardly change; with more, the clock's.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def medians(calls: Sequence[Call], laps: int, at_least: float = 0.0, warm_up: bool = True) -> list[float]:
    """Median seconds of each call.

    laps: how often each one is timed, in turn. at_least: seconds of a timing; shorter calls are repeated within it. warm_up:
    whether each one is called once beforehand, which at_least asks for.
    """
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    often = []
    for call in calls:
        if warm_up or at_least:
            call()
        times = 1
        if at_least:
            start = now()
            call()
            times = max(1, int(at_least / max(now() - start, 1e-7)))
        often.append(times)
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(laps):
        for call, times, seconds in zip(calls, often, took, strict=True):
            start = now()
            for _ in range(times):
                call()
            seconds.append((now() - start) / times)
    return [statistics.median(seconds) for seconds in took]
