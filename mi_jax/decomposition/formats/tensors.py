"""Named tensors of a file, checked as they are taken: present, of the shape expected, numbers and not NaN."""

import dataclasses
import os
import zipfile
from collections.abc import Callable

import numpy as np

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.safetensors import open_safetensors


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one file.

    Attributes:
      path: of the file, for messages.
      names: of its tensors.
      read: gives one as it is stored.
      shapes: gives the shape of one.
    """

    path: str
    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]
    shapes: Callable[[str], tuple[int, ...]]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def take(self, name: str, *shape: int | None, bounded: bool = True) -> np.ndarray:
        """One tensor as float32; None in `shape` stands for any size.

        Args:
          name: of the tensor.
          shape: what it must be.
          bounded: whether infinities are refused as NaN is.

        Raises:
          CheckpointError: it is missing, of another shape, or has NaN in it.
        """
        self._there(name)
        value = self.read(name)
        fits = len(value.shape) == len(shape) and all(
            n is None or n == m for n, m in zip(shape, value.shape, strict=True)
        )
        if not fits:
            expected = "×".join("any" if n is None else str(n) for n in shape) or "one number"
            raise CheckpointError(f"{self.path}: tensor {name!r} has shape {value.shape}, it was to be {expected}")
        value = np.asarray(value, np.float32)
        if np.isnan(value).any() or (bounded and np.isinf(value).any()):
            raise CheckpointError(f"{self.path}: tensor {name!r} has NaN or infinite numbers in it")
        return value

    def number(self, name: str) -> float:
        """A tensor of one number, with or without an axis."""
        return float(self.take(name, *(1 for _ in self.shape(name))).reshape(()))

    def shape(self, name: str, n_axes: int | None = None) -> tuple[int, ...]:
        """The shape of one tensor.

        Raises:
          CheckpointError: it is missing, or has another number of axes.
        """
        self._there(name)
        shape = self.shapes(name)
        if n_axes not in (None, len(shape)):
            raise CheckpointError(f"{self.path}: tensor {name!r} has shape {shape}, it was to have {n_axes} axes")
        return shape

    def _there(self, name: str) -> None:
        if name not in self.names:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r}; it has {', '.join(sorted(self.names)) or 'none'}. Is it a "
                "dictionary of another architecture or format?"
            )

    def whole_number(self, name: str) -> int:
        """A tensor of one integer."""
        value = self.number(name)
        if value != int(value):
            raise CheckpointError(f"{self.path}: tensor {name!r} is {value}, it was to be a whole number")
        return int(value)

    def under(self, prefix: str) -> "Tensors":
        """Those whose name begins with a prefix, without it."""
        names = tuple(name.removeprefix(prefix) for name in self.names if name.startswith(prefix))
        return Tensors(self.path, names, lambda name: self.read(prefix + name), lambda name: self.shapes(prefix + name))


def safetensors(path: str | os.PathLike) -> Tensors:
    """The tensors of a safetensors file."""
    file = open_safetensors(path)
    return Tensors(file.path, tuple(file.names()), file.read, file.shape)


def npz(path: str | os.PathLike) -> Tensors:
    """The arrays of a numpy archive.

    Raises:
      CheckpointError: missing, truncated, not an archive, or with arrays of Python objects, which are pickles.
    """
    path = os.fspath(path)

    def read(name: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as archive:
                value = archive[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path}: array {name!r} cannot be read ({error}); arrays of Python objects are never read, and a "
                "damaged file is to be fetched again"
            ) from error
        return value

    try:
        # np.load alone would take a plain pickle for an archive that it may not open
        with zipfile.ZipFile(path) as archive:
            names = tuple(name.removesuffix(".npy") for name in archive.namelist())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: not a numpy archive, or truncated ({error}); fetch it again") from error
    return Tensors(path, names, read, lambda name: read(name).shape)
