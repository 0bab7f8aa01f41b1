"""Typed access to the metadata of one architecture."""

import math
from typing import Any

import numpy as np

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf.file import GGUF

_REQUIRED: Any = object()


class Metadata:
    """The metadata under an architecture's prefix. It remembers what was asked for, so that nothing goes unnoticed."""

    def __init__(self, file: GGUF, architecture: str):
        self.file, self.architecture = file, architecture
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.fields

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """A value of any type. Raises CheckpointError if there is none and no default."""
        name = f"{self.architecture}.{key}"
        self._asked.add(name)
        if default is not _REQUIRED and name not in self.file.fields:
            return default
        return self.file.field(name)

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        """A number that counts something; a list, one entry a layer, must hold the same number throughout."""
        value = self.value(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 0:
            raise self.wrong(key, value, "a whole number, the same in all layers")
        return value

    def real(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        if abs(value) < 1e38 and np.float32(value) == value:
            # 9.999999974752427e-07 is how 1e-06 comes back from float32
            return float(str(np.float32(value)))
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}…"
        return CheckpointError(
            f"{self.file.path}: metadata '{self.architecture}.{key}' is {shown}, expected {expected}"
        )

    def unread(self) -> list[str]:
        """The metadata of the architecture that nobody asked for."""
        prefix = f"{self.architecture}."
        return [name for name in self.file.fields if name.startswith(prefix) and name not in self._asked]
