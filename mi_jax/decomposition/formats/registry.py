"""The formats of dictionaries that are read and written, and the two calls that choose among them."""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mi_jax.core.errors import InputError
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    clt_training,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    openai,
    sae_lens,
    sae_lens_5,
    sparsify,
)
from mi_jax.decomposition.formats.equivalent import cast
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import open_place, write_whole
from mi_jax.models.checkpoints.errors import CheckpointError

_MODULES = (
    sae_lens,
    sae_lens_5,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    dictionary_learning,
    sparsify,
    clt_training,
    openai,
    circuit_tracer,
    circuit_tracer_clt,
)
FORMATS: Mapping[str, Format] = {module.__name__.rpartition(".")[2]: module.FORMAT for module in _MODULES}


def recognise(path: str | os.PathLike) -> str:
    """The name of the format that a folder or file is of.

    Raises:
      CheckpointError: of none; the message says what was looked for and what is there.
    """
    place = open_place(path)
    for name, each in FORMATS.items():
        if each.recognises(place):
            return name
    looked = "; ".join(f"{name}: {each.files}" for name, each in FORMATS.items())
    there = ", ".join(place.names[:20]) + (", …" if len(place.names) > 20 else "")
    what = f"the file {place.file!r}, beside {there}" if place.file else (there or "nothing")
    raise CheckpointError(f"{place.path}: a dictionary of no known format. Looked for {looked}. There is {what}")


def load(
    path: str | os.PathLike,
    *,
    format: str | None = None,
    dtype: Any = jnp.float32,
    layer: int | None = None,
    scale: float | None = None,
) -> Dictionary | CrossLayerTranscoder:
    """A dictionary from a folder or file that another project, or `save`, wrote.

    Scales and norms that belong to the weights are folded, so that it reads activations as they are. Nothing is ever
    unpickled.

    Args:
      path: a folder, or a file of one.
      format: a name of `FORMATS`; recognised if not given.
      dtype: of its parameters; thresholds of JumpReLU stay float32.
      layer: of a folder that has a dictionary for each layer.
      scale: what activations were multiplied with in training, where the folder should say it and does not.

    Raises:
      CheckpointError: missing, damaged, of an unknown format or architecture; the message names the file and the fault.
      InputError: options that do not belong to the format.

    Example:
      `sae = mi.decomposition.load("gpt2-small-res-jb/blocks.8.hook_resid_pre")`
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be one of floating-point numbers, got {dtype!r}")
    if scale is not None and not scale > 0:
        raise InputError(f"scale must be over 0, got {scale}")
    chosen = _named(recognise(path) if format is None else format)
    place = open_place(path)
    try:
        return cast(chosen.load(place, Options(layer, scale)), dtype)
    except OSError as error:
        raise CheckpointError(f"{place.path}: cannot be read as {chosen.title} ({error})") from error


def save(
    dictionary: Dictionary | CrossLayerTranscoder,
    path: str | os.PathLike,
    *,
    format: str = "sae_lens",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a dictionary as another project has it; it appears whole or not at all.

    What is written reconstructs what the dictionary does. BatchTopK, in formats without it, becomes the JumpReLU that
    it is outside training, which has no exact number of codes any more.

    Args:
      dictionary: what is to be written.
      path: a new folder, or, in the formats `openai` and `circuit_tracer`, a new file `….pt`
        or `layer_….safetensors`.
      format: a name of `FORMATS`.
      metadata: more entries of the format's configuration, such as hook_name and model_name of SAELens.

    Raises:
      InputError: the format has no place for something in the dictionary, or there is a file at `path`.
    """
    chosen = _named(format)
    missing = chosen.lacks(dictionary)
    if missing:
        able = [name for name, each in FORMATS.items() if not each.lacks(dictionary)]
        raise InputError(
            f"the format {format} has no place for {missing}; "
            + (f"these formats hold this dictionary: {', '.join(able)}" if able else "no format here has")
        )
    if not os.fspath(path).endswith(chosen.suffix):
        raise InputError(f"the format {format} is one file whose name ends with {chosen.suffix}, got {os.fspath(path)}")
    more = metadata or {}
    write_whole(path, lambda unfinished: chosen.write(unfinished, dictionary, more), single_file=bool(chosen.suffix))


def _named(format: str) -> Format:
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format]
