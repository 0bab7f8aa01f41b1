"""Where a dictionary lies: a folder, or one file of it, with what a loader asks of them; and how one is written."""

import dataclasses
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.decomposition.formats.tensors import Tensors, npz, safetensors
from mi_jax.decomposition.formats.torch_file import Plain, open_torch
from mi_jax.models.checkpoints.directory import read_json
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import Described, write_safetensors


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder and, if a file was given, its name.

    Attributes:
      folder: its path.
      file: name of the file that was given; None for a folder.
      names: of everything in the folder.
    """

    folder: str
    file: str | None
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        """What was given."""
        return self.join(self.file) if self.file else self.folder

    def join(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def has(self, *names: str) -> bool:
        """Whether all these files are in the folder, and the file given, if any, is one of them."""
        return all(name in self.names for name in names) and (self.file is None or self.file in names)

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.join(name))

    def tensors(self, name: str) -> Tensors:
        """Of a .safetensors or .npz file."""
        return npz(self.join(name)) if name.endswith(".npz") else safetensors(self.join(name))

    def torch(self, name: str) -> tuple[Tensors, dict[str, Plain]]:
        return open_torch(self.join(name))

    def numbered(self, pattern: str) -> dict[int, str]:
        """Names by the number that the pattern's group finds in them, in order of the numbers."""
        found = ((re.fullmatch(pattern, name), name) for name in self.names)
        return dict(sorted((int(match[1]), name) for match, name in found if match))


def open_place(path: str | os.PathLike) -> Place:
    """A folder or a file.

    Raises:
      CheckpointError: there is neither.
    """
    path = os.path.abspath(os.fspath(path))
    try:
        if os.path.isdir(path):
            return Place(path, None, tuple(sorted(os.listdir(path))))
        folder, file = os.path.split(path)
        if os.path.isfile(path):
            return Place(folder, file, tuple(sorted(os.listdir(folder))))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    raise CheckpointError(f"{path}: no such file or folder")


def field(config: Mapping[str, Any], name: str, kind: type, where: str, default: Any = ...) -> Any:
    """One entry of a configuration.

    Raises:
      CheckpointError: it is missing and has no default, or is of another type.
    """
    value = config.get(name)
    if value is None:
        if default is ...:
            raise CheckpointError(f"{where}: no entry {name!r}; it has {', '.join(config) or 'none'}")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where}: entry {name!r} is {value!r}, it was to be of type {kind.__name__}")
    return value


def counted(k: int, d_sae: int, where: str) -> int:
    """A number of codes per token.

    Raises:
      CheckpointError: there are not so many latents, or it is below 1.
    """
    if not 1 <= k <= d_sae:
        raise CheckpointError(f"{where}: k is {k}, it must be from 1 to the {d_sae} latents")
    return k


def consecutive(numbered: Mapping[int, str], what: str, where: str) -> list[str]:
    """The names, by layer from 0 on.

    Raises:
      CheckpointError: one is missing.
    """
    missing = sorted(set(range(max(numbered, default=0) + 1)) - set(numbered))
    if missing:
        raise CheckpointError(
            f"{where}: no {what} of layer {', '.join(map(str, missing))}; there are those of layers "
            f"{', '.join(map(str, numbered))}"
        )
    return [numbered[i] for i in range(len(numbered))]


def write_tensors(path: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, not atomically."""
    described = [Described(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_safetensors(path, described, arrays.__getitem__, metadata or {"format": "pt"})


def write_whole(path: str | os.PathLike, write: Callable[[str], None], *, single_file: bool) -> None:
    """Lets `write` fill a file or folder under another name, and renames it once it is whole.

    Raises:
      InputError: there is something at `path` already.
    """
    path = os.path.abspath(os.fspath(path))
    if os.path.isdir(path) and not single_file and not os.listdir(path):
        os.rmdir(path)
    if os.path.exists(path):
        raise InputError(f"{path} is there already; give another path or delete it")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        if not single_file:
            os.mkdir(unfinished)
        write(unfinished)
        os.rename(unfinished, path)
    finally:
        if os.path.isdir(unfinished):
            shutil.rmtree(unfinished, ignore_errors=True)
        elif os.path.exists(unfinished):
            os.remove(unfinished)
