"""Seconds of calls: warm, cold, and one against another in turns; and whether other programs disturbed them."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_STAT = Path("/proc/stat")


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, its arrays computed."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def cold_seconds(call: Callable[[], Any]) -> float:
    """Of one call with tracing and compilation, as in a program that has just started."""
    jax.clear_caches()
    return seconds(call)


def ratios(call: Callable[[], Any], baseline: Callable[[], Any], pairs: int) -> list[float]:
    """Time of `call` over time of `baseline`, for every pair; the first of a pair is now the one, now the other.

    Two calls of a pair meet the same state of the machine, so a slow moment hits both or spoils one pair of many.
    """
    seconds(call)
    seconds(baseline)
    out = []
    for i in range(pairs):
        if i % 2:
            ours = seconds(call)
            theirs = seconds(baseline)
        else:
            theirs = seconds(baseline)
            ours = seconds(call)
        out.append(ours / theirs)
    return out


def median_ratio(call: Callable[[], Any], baseline: Callable[[], Any], pairs: int) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(call, baseline, pairs))


class Disturbance:
    """The share of the machine's processor time that others took while it was entered: the largest of all times.

    Others are programs that this one did not start, and a host that gave the time to another machine. `share` is None
    where the system does not say (it does on Linux).
    """

    def __init__(self):
        self.share: float | None = None

    def __enter__(self) -> "Disturbance":
        self._start = (time.perf_counter(), _busy_seconds(), _own_seconds())
        return self

    def __exit__(self, *exception: Any) -> None:
        wall, busy, own = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return
        others = (now - busy) - (_own_seconds() - own)
        share = max(0.0, others) / ((time.perf_counter() - wall) * (os.cpu_count() or 1))
        self.share = max(self.share or 0.0, share)


def _busy_seconds() -> float | None:
    """Of all processors since the machine started: neither idle nor waiting for a disk, or taken by the host."""
    if not _STAT.exists():
        return None
    user, nice, system, _, _, *rest = (int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor time of this process and of those that it started and saw end."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
