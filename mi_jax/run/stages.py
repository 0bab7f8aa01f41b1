"""Runs the stages of an experiment in order, skips what an earlier run finished, and measures time and memory."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath
from rich.console import Console

from mi_jax.run import files
from mi_jax.run.progress import RunProgress
from mi_jax.run.workdir import Workdir

_SECONDS_BETWEEN_SAVES = 5.0


@runtime_checkable
class Progress(Protocol):
    """How a stage says how far it is: `progress(0.4, "step 400 of 1000")`."""

    def __call__(self, fraction: float, note: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of an experiment.

    Attributes:
      name: names the stage's file in the workdir and its results.
      title: what the progress display shows.
      function: does the work. It gets a `Progress` and returns what later stages need, as JSON, or None. Arrays go to
        `Workdir.save_arrays`, figures for the report to `Workdir.add_results`.
      expected_seconds: on the machine that the experiment's docstring names; shares out the progress bar.
    """

    name: str
    title: str
    function: Callable[[Progress], Mapping[str, Any] | None]
    expected_seconds: float


def run_stages(workdir: Workdir, stages: Sequence[Stage], *, console: Console | None = None) -> dict[str, dict]:
    """Runs `stages` in order; those that the workdir has are not run again.

    Adds to the results, after every stage: `run.stage_seconds.NAME` and `run.seconds`, their sum, over the runs that it
    took, an interrupted stage's time included, and `run.peak_rss_gb` (10⁹ bytes), the largest of any of these runs.

    Args:
      workdir: where the stages are kept.
      stages: with unique names.
      console: where progress is shown; standard output if not given.

    Returns:
      What each stage returned, by the stage's name.

    Raises:
      SystemExit: with code 130, on an interrupt (Ctrl-C), after one line that says what is kept and how to go on.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise ValueError(f"stage names must be unique, got {names}")
    console = console or Console(highlight=False)
    costs = _Costs(workdir)
    try:
        with RunProgress([s.title for s in stages], [s.expected_seconds for s in stages], console=console) as display:
            for i, stage in enumerate(stages):
                if workdir.stage_done(stage.name):
                    display.skip(i)
                else:
                    display.start(i)
                    _run_stage(workdir, stage, display, costs)
                    display.finish()
    except KeyboardInterrupt:
        kept = [name for name in names if workdir.stage_done(name)]
        console.print(
            f"Stopped. {workdir.path} keeps {len(kept)} of {len(stages)} stages ({', '.join(kept) or 'none yet'}); "
            "run the same command again to go on from there.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(130) from None
    return {name: workdir.load_stage(name) for name in names}


def _run_stage(workdir: Workdir, stage: Stage, display: RunProgress, costs: "_Costs") -> None:
    def progress(fraction: float, note: str = "") -> None:
        display.update(fraction, note)
        costs.save_now_and_then()

    try:
        with costs.measure(stage.name):
            data = stage.function(progress)
    except Exception as error:
        error.add_note(f"In stage {stage.name!r}. {workdir.path} keeps the stages before it: run again to go on there.")
        raise
    workdir.add_results(costs.results())
    workdir.save_stage(stage.name, data or {})


def peak_rss_gb() -> float:
    """The most memory that this process has had resident, in GB (10⁹ bytes)."""
    status = epath.Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's figure, this one is not inherited from the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e9


class _Costs:
    """Seconds and memory of a run, kept in costs.json so that a resumed run adds to them."""

    def __init__(self, workdir: Workdir):
        self._file = workdir.path / "costs.json"
        held = files.read_json(self._file) if self._file.exists() else {}
        self._seconds: dict[str, float] = dict(held.get("seconds", {}))
        self._peak: float = held.get("peak_rss_gb", 0.0)
        self._stage = ""
        self._counted_to = time.monotonic()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Counts the time inside as this stage's, also if it ends with an error."""
        self._stage, self._counted_to = stage, time.monotonic()
        try:
            yield
        finally:
            self._save()

    def save_now_and_then(self) -> None:
        """So that a run that is killed outright loses little of its count."""
        if time.monotonic() - self._counted_to > _SECONDS_BETWEEN_SAVES:
            self._save()

    def results(self) -> dict[str, float]:
        seconds = {f"run.stage_seconds.{name}": round(value, 3) for name, value in self._seconds.items()}
        total = round(sum(self._seconds.values()), 3)
        return seconds | {"run.seconds": total, "run.peak_rss_gb": round(self._peak, 3)}

    def _save(self) -> None:
        now = time.monotonic()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._counted_to
        self._counted_to = now
        self._peak = max(self._peak, peak_rss_gb())
        files.write_json(self._file, {"seconds": self._seconds, "peak_rss_gb": self._peak})
