"""A progress bar for one long compiled computation, such as a sweep."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Draws how much of a computation is done; call it with the finished and the total number of parts.

    It closes itself at the last part and opens again at the next call, so one bar serves many sweeps. Parts may be
    reported late and out of order, as devices do.

    Example:
      `bar = Bar("patching")`, then `mi.jit(mi.sweep(model, edit, metric, progress=bar))(corrupt)` for every prompt.
    """

    def __init__(self, title: str, *, console: Console | None = None):
        self._title, self._console = title, console
        self._progress: Progress | None = None
        self._total = 0
        self._seen: set[int] = set()

    def __call__(self, done: int, total: int) -> None:
        if self._progress is not None and (total != self._total or done in self._seen):
            # the computation before was interrupted
            self._progress.stop()
            self._progress = None
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(self._title, total=total)
            self._progress.start()
            self._total, self._seen = total, set()
        self._seen.add(done)
        self._progress.update(self._task, completed=max(self._seen))
        if len(self._seen) == total:
            self._progress.stop()
            self._progress = None
