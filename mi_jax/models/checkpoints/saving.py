"""A decoder as a Hugging Face directory."""

import functools
import os
import shutil
import uuid

import jax
import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.core.transforms import SiteModel
from mi_jax.models.checkpoints import native
from mi_jax.models.checkpoints.families import family_of
from mi_jax.models.checkpoints.names import Stored, axis_sizes, ours_to_stored
from mi_jax.models.checkpoints.plan import entries_by_path, path_name, stored_shape
from mi_jax.models.checkpoints.writer import Described, write_json, write_weights
from mi_jax.models.decoder import Decoder
from mi_jax.models.parameters import abstract_decoder

_CONFIG = "config.json"


def save(model: SiteModel, directory: str | os.PathLike, *, max_shard_bytes: float = 5e9) -> None:
    """Writes config.json and the weights as safetensors, which `transformers` and `mi.load` read.

    The weights are written as they are, bit for bit, one tensor at a time. A directory appears whole: everything is
    written elsewhere first and renamed then, config.json last. A decoder that is of no known family, such as one
    without MLPs, is written with the model_type "mi_jax", its configuration and its parameters under their own names;
    `mi.load` reads it, `transformers` does not.

    Args:
      directory: new, or without a checkpoint in it; a tokenizer.json there is left as it is.
      max_shard_bytes: of one file; above it there are several and an index.

    Raises:
      InputError: not a decoder, a directory that holds a checkpoint already, or parameters that do not fit the
        configuration or are spread over several processes.
    """
    directory = os.path.abspath(os.fspath(directory))
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise InputError(f"{directory} is a file; give a directory")
    taken = [name for name in os.listdir(directory) if _of_checkpoint(name)] if os.path.isdir(directory) else []
    if taken:
        raise InputError(f"{directory} holds a checkpoint already ({min(taken)}); give another directory or delete it")
    if not isinstance(model, Decoder):
        raise InputError(
            f"{type(model).__name__} is not a decoder; save the model itself, and what was made around it "
            "(mi.intervene, mi.capture) apart"
        )
    leaves = _leaves(model)
    family = family_of(model.config)
    stored = native.names(model.config) if family is None else family.names(model.config)
    described = native.to_json(model.config) if family is None else family.to_hf(model.config)
    described["_name_or_path"] = model.config.name
    dtypes = {leaf.dtype for leaf in leaves.values()}
    if len(dtypes) == 1:
        # the key of today, and the one that older versions of transformers read
        described |= dict.fromkeys(("dtype", "torch_dtype"), dtypes.pop().name)
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    # inside a directory that is there: it may be a volume of its own, into which nothing can be renamed from outside
    own = f".{uuid.uuid4().hex}.tmp"
    unfinished = os.path.join(directory, own) if os.path.isdir(directory) else directory + own
    try:
        os.mkdir(unfinished)
        _write_weights(
            unfinished, leaves, entries_by_path(stored, list(leaves)), axis_sizes(model.config), max_shard_bytes
        )
        write_json(os.path.join(unfinished, _CONFIG), described)
        if unfinished == directory + own:
            os.rename(unfinished, directory)
            return
        for name in sorted(os.listdir(unfinished), key=lambda name: (name == _CONFIG, name)):
            os.replace(os.path.join(unfinished, name), os.path.join(directory, name))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _of_checkpoint(name: str) -> bool:
    return name == _CONFIG or (name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")))


def _leaves(model: Decoder) -> dict[str, jax.Array]:
    """The parameters by path, checked against the configuration."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    expected = {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_decoder(model.config))[0]
    }
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    for path in sorted(set(expected) | set(shapes)):
        if shapes.get(path) != expected.get(path):
            raise InputError(
                f"parameter {path!r} has shape {shapes.get(path)}, the model's configuration says {expected.get(path)}"
            )
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise InputError(f"parameter {path!r} is spread over several processes; gather the model on one to save it")
    return leaves


def _write_weights(
    folder: str,
    leaves: dict[str, jax.Array],
    entries: dict[str, Stored],
    sizes: dict[str, int],
    max_shard_bytes: float,
) -> None:
    tensors, origin = [], {}
    for template in dict.fromkeys(entry.name for entry in entries.values()):
        members = [entry for entry in entries.values() if entry.name == template]
        arrays = [leaves[entry.path] for entry in members]
        if len({array.dtype for array in arrays}) > 1:
            raise InputError(f"the parameters of tensor {template!r} differ in type: {[str(a.dtype) for a in arrays]}")
        n_counted = len(members[0].counts)
        shape = stored_shape(members, [array.shape[n_counted:] for array in arrays], sizes)
        for index, name in members[0].each(sizes):
            tensors.append(Described(name, np.dtype(arrays[0].dtype), shape))
            origin[name] = (members, index)

    def value(name: str) -> np.ndarray:
        members, index = origin[name]
        parts = [(entry, np.asarray(_row(leaves[entry.path], index))) for entry in members]
        return np.asarray(ours_to_stored(parts, sizes))

    write_weights(folder, sorted(tensors, key=lambda tensor: origin[tensor.name][1][:1]), value, max_shard_bytes)


def _row(x: jax.Array, index: tuple[int, ...]) -> jax.Array:
    return _dynamic_row(x, tuple(map(np.int32, index))) if index else x


@functools.partial(jax.jit)
def _dynamic_row(x, index):
    """One row of a stacked parameter; the index is an argument, so that one program serves all layers."""
    for place in index:
        x = jax.lax.dynamic_index_in_dim(x, place, keepdims=False)
    return x
