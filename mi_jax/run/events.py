"""Event files for TensorBoard, beside metrics.jsonl; written by tensorboardX, which is asked for only here."""

import math
import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

from etils import epath

from mi_jax.core.errors import InputError


class EventFiles:
    """A folder that `tensorboard --logdir` shows.

    A run that resumes writes a new file; what an earlier one had from the step on that it resumes at is not shown.

    Args:
      folder: created with the first number.

    Raises:
      InputError: tensorboardX is not installed.
    """

    def __init__(self, folder: epath.PathLike):
        try:
            # not its SummaryWriter, whose thread may not have written yet when the program ends or is killed
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
            from tensorboardX.summary import scalar
        except ImportError as error:
            raise InputError(
                "event files for TensorBoard are written by tensorboardX, which is not installed: "
                "pip install 'mi-jax[tensorboard]', or leave tensorboard=True out (metrics.jsonl has the same numbers)"
            ) from error
        self._open, self._event, self._scalar = EventsWriter, Event, scalar
        self._session_start = SessionLog(status=SessionLog.START)
        self._folder, self._writer = epath.Path(folder), None

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the finite numbers among these; they are on disk when this returns."""
        numbers = {name: value for name, value in scalars.items() if isinstance(value, bool | int | float)}
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # two runs of one second write two files
            self._writer = self._open(os.fspath(self._folder / "events"), filename_suffix=f".{os.getpid()}")
            weakref.finalize(self, self._writer.close)
            self._write(step, session_log=self._session_start)
        for name, value in numbers.items():
            if math.isfinite(value):
                self._write(step, summary=self._scalar(name, float(value)))
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        assert self._writer is not None
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
