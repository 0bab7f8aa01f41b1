"""Decoders from Hugging Face directories, hub ids and GGUF files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mi_jax.models.checkpoints import native
from mi_jax.models.checkpoints.directory import CONVERT, open_directory, read_json
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.families import FAMILIES
from mi_jax.models.checkpoints.gguf import load_gguf
from mi_jax.models.checkpoints.hub import checkpoint_directory
from mi_jax.models.checkpoints.loading import assemble
from mi_jax.models.checkpoints.source import Source
from mi_jax.models.decoder import Decoder

_DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MAX_LAYERS = 10_000
# of an embedding, compared at a time
_ROWS = 4096


def load(
    path_or_hub_id: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    revision: str | None = None,
    allow_nan: bool = False,
) -> Decoder:
    """A decoder from its checkpoint, straight into its shards.

    Args:
      path_or_hub_id: a directory with config.json and safetensors, a .gguf file, or an id of the Hugging Face hub.
      mesh: devices to shard over, by `mi_jax.core.sharding`; None means the first device.
      dtype: of all parameters; None keeps each as it is stored (float32 for GGUF files, which are dequantised).
      revision: branch, tag or commit of a hub id.
      allow_nan: take weights that are NaN or infinite, which are refused otherwise.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, of an unknown or unsupported model, or only there as
        pickles, which are never read. There is no partly loaded model.

    Example:
      `model = mi.load("HuggingFaceTB/SmolLM2-135M", dtype=jnp.bfloat16)`
    """
    path = os.fspath(path_or_hub_id)
    if path.endswith(".gguf"):
        if revision is not None:
            raise CheckpointError(f"{path}: is a file; revision={revision!r} is for ids of the hub")
        return load_gguf(path, mesh=mesh, dtype=jnp.float32 if dtype is None else dtype, allow_nan=allow_nan)
    directory = checkpoint_directory(path, revision=revision)
    where = os.path.join(directory, "config.json")
    hf = read_json(where)
    _check(hf, where)
    if directory != path and not any(name.endswith(".safetensors") for name in os.listdir(directory)):
        raise CheckpointError(
            f"hub id {path!r}: the hub has no model.safetensors of it, nor shards with an index; other forms are not "
            f"read. Convert it where you trust it: {CONVERT.format(path=path)}"
        )
    source = open_directory(directory)
    try:
        if hf["model_type"] == native.MODEL_TYPE:
            config, ignored = native.from_json(hf), ()
            stored = native.names(config)
        else:
            family = FAMILIES[hf["model_type"]]
            config, ignored = family.config(hf), family.ignored
            stored = family.names(config, source.names())
            _check_copies(source, family.copies(config, source.names()))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    declared = None if dtype is not None else _declared(hf, where)
    return assemble(
        source, config, stored, mesh=mesh, dtype=dtype, declared=declared, ignored=ignored, allow_nan=allow_nan
    )


def _check(hf: Mapping[str, Any], where: str) -> None:
    kind = hf.get("model_type")
    known = (*FAMILIES, native.MODEL_TYPE)
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{where}: model_type {kind!r} is not read; these are: {', '.join(sorted(known))}")
    quantization = hf.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"{where}: the weights are quantized (quantization_config: {method!r}), which is not read; take the "
            "checkpoint it was made from, or a GGUF file"
        )
    for each in (hf, hf.get("text_config")):
        announced = {key: each.get(key) for key in _LAYER_KEYS} if isinstance(each, Mapping) else {}
        for key, n_layers in announced.items():
            # the number is used before the tensors could contradict it
            if isinstance(n_layers, int) and n_layers > _MAX_LAYERS:
                raise CheckpointError(f"{where}: {key} is {n_layers}; a model of at most {_MAX_LAYERS} layers is read")


def _check_copies(source: Source, pairs: Sequence[tuple[str, str]]) -> None:
    """An unembedding that is stored although it is tied has to be the embedding."""
    for copy, original in pairs:
        n_rows = source.shape(original)[0]
        same = source.shape(copy) == source.shape(original) and all(
            np.array_equal(source.read(copy, i, i + _ROWS), source.read(original, i, i + _ROWS))
            for i in range(0, n_rows, _ROWS)
        )
        if not same:
            raise CheckpointError(
                f"tie_word_embeddings says that {copy!r} is {original!r}, which it is not; set it to false to load both"
            )


def _declared(hf: Mapping[str, Any], where: str) -> Any:
    """The type of the tensors that config.json says; None where it says nothing."""
    said = hf.get("dtype", hf.get("torch_dtype"))
    if said in (None, "auto"):
        return None
    name = str(said).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"{where}: dtype is {said!r}, which is none of {', '.join(_DTYPES)}; say dtype=…")
    return _DTYPES[name]
