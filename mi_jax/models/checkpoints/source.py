"""What a loader needs of a checkpoint, whatever its format."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Source(Protocol):
    """Tensors under the names they have in a checkpoint, read only when asked for.

    Every method raises CheckpointError for a name that the checkpoint lacks and for data that cannot be read.

    Attributes:
      path: of the file or directory, for messages.
    """

    @property
    def path(self) -> str: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` gives; bfloat16 and float8 are those of ml_dtypes."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, as stored; all of a tensor by default."""
        ...
