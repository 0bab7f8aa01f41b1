"""What the benchmarks share: their workdir and table, the cores they run on, and a limit that does not hold."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from mi_jax.report import terminal_table
from mi_jax.run import Progress, Stage, Workdir, run_stages

Measurement = Callable[[Progress], Mapping[str, Any]]


def run_measurements(
    folder: Workdir,
    measurements: Sequence[tuple[str, float, Measurement]],
    *,
    bars: Mapping[str, str] | None,
    console: Console,
) -> dict[str, Any]:
    """Makes the measurements that the workdir does not have yet, prints the table, and returns the results.

    Args:
      folder: the workdir.
      measurements: names, the seconds that each is expected to take, and functions that return figures.
      bars: for the table.
      console: where progress and table are shown.
    """

    def stage(name: str, expected: float, measure: Measurement) -> Stage:
        return Stage(name, name, lambda progress: folder.add_results(measure(progress)), expected)

    run_stages(folder, [stage(*measurement) for measurement in measurements], console=console)
    console.print(terminal_table(folder.results, bars))
    console.print(folder.path / "results.json", soft_wrap=True, markup=False)
    return folder.results


def limited(name: str, fewest: float, taken: Sequence[float], console: Console, *, holds: bool) -> dict[str, Any]:
    """The limit, the fraction of it that the median call reached, and whether it holds: no call may be faster.

    Args:
      name: of what was timed, for the figures.
      fewest: seconds that it is said to need.
      taken: seconds of every call.
      console: where a limit that does not hold is explained.
      holds: whether those before it did.
    """
    if min(taken) < fewest:
        holds = False
        console.print(
            f"{name}: a call was faster than the limit, so the machine's rates were measured too low while it was "
            "busy; its fraction of the limit means nothing. Run again on a quiet machine.",
            soft_wrap=True,
        )
    return {
        f"limit.{name}_seconds": fewest,
        f"{name}.fraction_of_limit": fewest / statistics.median(taken),
        "limit.holds": holds,
    }


def keep_to_cores(threads: int) -> None:
    """Runs this program, and those that it starts, on so many cores, where the system lets it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
