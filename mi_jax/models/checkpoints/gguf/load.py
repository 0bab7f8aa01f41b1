"""A native decoder from a GGUF file, through the same tables and the same loader as every other checkpoint."""

import dataclasses
import os
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mi_jax.models.checkpoints.gguf.architectures import architecture_of, read_config
from mi_jax.models.checkpoints.gguf.file import GGUF, open_gguf
from mi_jax.models.checkpoints.gguf.rope import FACTORS
from mi_jax.models.checkpoints.gguf.tensors import stored_tensors
from mi_jax.models.checkpoints.loading import assemble
from mi_jax.models.decoder import Decoder


def load_gguf(
    source: str | os.PathLike | GGUF, *, mesh: Mesh | None = None, dtype: Any = jnp.float32, allow_nan: bool = False
) -> Decoder:
    """Reads a GGUF file into a native decoder, one tensor at a time, dequantised, straight into its shards.

    Queries and keys are brought to the order in which the decoder turns halves of a head, whatever the file's; Gemma's
    norms to the weight w of 1 + w, as its other checkpoints have it.

    Args:
      source: a path or an opened file.
      mesh: the devices; None means the first one.
      dtype: of all parameters; None is float32, which is what quantised tensors are dequantised to.
      allow_nan: take weights that are NaN or infinite, which are refused otherwise.

    Raises:
      CheckpointError: see `open_gguf`; also an architecture, metadata, rotary scaling or quantisation that is not read,
        and tensors that are missing, have no place or are of a wrong shape.
    """
    file = source if isinstance(source, GGUF) else open_gguf(source)
    config = read_config(file)
    _, architecture = architecture_of(file)
    return assemble(
        _WithoutShift(file, architecture.norm_shift),
        config,
        stored_tensors(config, architecture),
        mesh=mesh,
        dtype=jnp.float32 if dtype is None else dtype,
        ignored=(re.escape(FACTORS),) if config.positions == "rotary" else (),
        allow_nan=allow_nan,
    )


@dataclasses.dataclass(frozen=True)
class _WithoutShift:
    """A file less what its converter added to the norms' weights.

    The difference is exact where the sum was: float32(1 + w) − 1 gives w back to 2^-24, and every bit of a bfloat16 w
    above 2^-16. The decoder adds 1 again, so that nothing of the file is lost, and a model that is saved for
    Hugging Face holds w, as it must.
    """

    file: GGUF
    norm_shift: float

    @property
    def path(self) -> str:
        return self.file.path

    def names(self) -> list[str]:
        return self.file.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self.file.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        values = self.file.read(name, start, stop)
        return values - np.float32(self.norm_shift) if self.norm_shift and name.endswith("norm.weight") else values
