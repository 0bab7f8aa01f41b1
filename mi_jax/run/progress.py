"""One progress display for a run of several stages: which stage, how much of the whole, elapsed, time left.

In a terminal it is one line that redraws itself. Elsewhere (a log file, a notebook, a batch job) it is plain lines: one
when a stage ends, and between these at most one every ten seconds.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
# What one run's stages say about the machine is taken as no more than this factor, so that one odd stage (a warm
# cache, a swapped-out page) does not make the estimate absurd.
_LARGEST_RESCALE = 20.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """How far a run is: `fraction` of the whole in [0, 1], and the seconds that are left."""

    fraction: float
    seconds_left: float


def estimate(
    expected: Sequence[float], taken: Sequence[float | None], current: int, fraction: float, elapsed: float
) -> Estimate:
    """Estimates how far a run is.

    The stages' expected seconds are rescaled by what the finished ones took. In the current stage that estimate gives
    way to `elapsed / fraction` as the stage gets on.

    Args:
      expected: seconds each stage takes on the machine the figures were written down for.
      taken: seconds each finished stage took here; None for one that is not finished, or was finished by an earlier
        run.
      current: index of the running stage; `len(expected)` when all are finished.
      fraction: of the current stage, in [0, 1], as it reports it.
      elapsed: seconds since the current stage began.
    """
    done = [(e, t) for e, t in zip(expected, taken, strict=True) if t is not None]
    planned, observed = sum(e for e, _ in done), sum(t for _, t in done)
    scale = observed / planned if planned > 0 else 1.0
    scale = min(max(scale, 1 / _LARGEST_RESCALE), _LARGEST_RESCALE)
    if current >= len(expected):
        return Estimate(1.0, 0.0)
    stage_seconds = expected[current] * scale
    if fraction > 0:
        # (1 - fraction) of the estimate and fraction of `elapsed / fraction`.
        seconds_left = (1 - fraction) * ((1 - fraction) * stage_seconds + elapsed)
    else:
        seconds_left = max(stage_seconds - elapsed, 0.0)
    seconds_left += scale * sum(expected[current + 1 :])
    done_share = sum(expected[:current]) + fraction * expected[current]
    return Estimate(done_share / max(sum(expected), 1e-9), seconds_left)


def format_seconds(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunProgress:
    """Shows the stages of one run; use it as a context manager.

    Args:
      titles: of the stages, in order.
      expected_seconds: of each stage.
      console: where to show; standard output if not given.
      clock: seconds since some fixed moment, never going back.
    """

    def __init__(
        self,
        titles: Sequence[str],
        expected_seconds: Sequence[float],
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._titles = list(titles)
        self._expected = list(expected_seconds)
        self._taken: list[float | None] = [None] * len(self._titles)
        self._clock = clock
        self._console = console or Console(highlight=False)
        self._current = 0
        self._fraction = 0.0
        self._note = ""
        self._run_began = self._stage_began = clock()
        self._last_line = float("-inf")
        redraws = self._console.is_terminal and not self._console.is_jupyter
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4) if redraws else None

    def __enter__(self) -> "RunProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.stop()

    def start(self, stage: int) -> None:
        """The stage with this index begins."""
        self._current, self._fraction, self._note = stage, 0.0, ""
        self._stage_began = self._clock()
        self._plain_line()

    def update(self, fraction: float, note: str = "") -> None:
        """The current stage is this far, a fraction in [0, 1]; `note` is a few words on what it is doing."""
        self._fraction = min(max(float(fraction), 0.0), 1.0)
        self._note = note
        self._plain_line()

    def finish(self) -> None:
        """The current stage has ended."""
        taken = self._clock() - self._stage_began
        self._taken[self._current] = taken
        self._say(f"{self._label()} done in {format_seconds(taken)}")
        self._current, self._fraction, self._note = self._current + 1, 0.0, ""
        self._stage_began = self._clock()

    def skip(self, stage: int) -> None:
        """An earlier run finished this stage."""
        self._current = stage
        self._say(f"{self._label()} done by an earlier run")
        self._current = stage + 1

    def _label(self) -> str:
        stage = min(self._current, len(self._titles) - 1)
        return f"{stage + 1}/{len(self._titles)} {self._titles[stage]}"

    def _estimate(self) -> Estimate:
        elapsed = self._clock() - self._stage_began
        return estimate(self._expected, self._taken, self._current, self._fraction, elapsed)

    def _times(self, now: Estimate) -> str:
        elapsed = format_seconds(self._clock() - self._run_began)
        return f"{elapsed} elapsed, about {format_seconds(now.seconds_left)} left"

    def _plain_line(self) -> None:
        if self._live or self._clock() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        now = self._estimate()
        note = f" · {self._note}" if self._note else ""
        self._say(f"{self._label()} · {now.fraction:.0%} · {self._times(now)}{note}")

    def _say(self, line: str) -> None:
        self._last_line = self._clock()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Table:
        now = self._estimate()
        # In a narrow terminal only the note gives way.
        line = Table.grid(padding=(0, 1), expand=True)
        for _ in range(4):
            line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, ratio=1)
        line.add_row(
            Text(self._label(), style="bold"),
            ProgressBar(total=1.0, completed=now.fraction, width=16),
            Text(f"{now.fraction:4.0%}"),
            Text(self._times(now)),
            Text(self._note, style="dim", overflow="ellipsis"),
        )
        return line
