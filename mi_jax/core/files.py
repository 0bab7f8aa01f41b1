"""Edits as files: one safetensors file, arrays and their description. Nothing is ever unpickled.

A function (`mi.transform`) has no place in such a file: it is code. Save its arrays on their own and build it again.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mi_jax.core import edits as kinds
from mi_jax.core import subspaces
from mi_jax.core.edits import Edit
from mi_jax.core.errors import InputError
from mi_jax.core.index import Each, Index, each
from mi_jax.core.values import Reading

_FORMAT = "mi_jax edits 1"
_KINDS: dict[str, type[Edit]] = {
    "patch": kinds.Patch,
    "add": kinds.Add,
    "scale": kinds.Scale,
    "noise": kinds.Noise,
    "ablate_mean": kinds.AblateMean,
    "ablate_mean_per_position": kinds.AblateMeanPerPosition,
    "ablate_resample": kinds.AblateResample,
    "project_out": subspaces.ProjectOut,
    "swap_subspace": subspaces.SwapSubspace,
}


def save_edits(path: str | os.PathLike, edits: Sequence[Edit]) -> None:
    """Writes edits, in their order, to a file that `load_edits` reads. The file appears whole or not at all.

    Raises:
      InputError: an edit that holds a function.
    """
    names = {kind: name for name, kind in _KINDS.items()}
    arrays: dict[str, np.ndarray] = {}
    described = []
    for number, edit in enumerate(edits):
        if type(edit) not in names:
            raise InputError(
                f"edit {number} of site {edit.site!r} is a {type(edit).__name__}, which holds a function and cannot be "
                f"saved; what can: {', '.join(_KINDS)}"
            )
        index, places = {}, edit.index.items()
        for name, value in places:
            index[name] = "each" if isinstance(value, Each) else f"{number}.index.{name}"
            if not isinstance(value, Each):
                arrays[f"{number}.index.{name}"] = np.asarray(value)
        operands = []
        for leaf, value in enumerate(jax.tree.leaves(edit.operand)):
            key = f"{number}.operand.{leaf}"
            is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
            operands.append({"array": key, "key": str(jax.random.key_impl(value)) if is_key else None})
            arrays[key] = np.asarray(jax.random.key_data(value) if is_key else value)
        entry = {"kind": names[type(edit)], "site": edit.site, "index": index, "operands": operands}
        entry |= {"per_example": edit.index.per_example, "paired": edit.index.paired}
        described.append(entry | {"captured": edit.reading.captured, "axes": edit.reading.axes})
    path = os.fspath(path)
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        save_file(contiguous, unfinished, metadata={"format": _FORMAT, "edits": json.dumps(described)})
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def load_edits(path: str | os.PathLike) -> list[Edit]:
    """The edits of a file that `save_edits` wrote.

    Raises:
      InputError: the file is missing, damaged, or not one of these.
    """
    path = os.fspath(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is a safetensors file but holds no edits; mi.save_edits writes such files")
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return [_edit(entry, arrays) for entry in json.loads(metadata["edits"])]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged or no file of edits: {error}") from None


def _edit(entry: dict[str, Any], arrays: dict[str, jax.Array]) -> Edit:
    kind = _KINDS[entry["kind"]]
    index = {name: each if value == "each" else arrays[value] for name, value in entry["index"].items()}
    leaves = []
    for leaf in entry["operands"]:
        array = arrays[leaf["array"]]
        leaves.append(jax.random.wrap_key_data(array, impl=leaf["key"]) if leaf["key"] else array)
    pair = kind in (kinds.Noise, subspaces.SwapSubspace)
    operand = tuple(leaves) if pair else leaves[0] if leaves else None
    index = Index(**index, per_example=entry["per_example"], paired=tuple(entry.get("paired", ())))
    axes = entry.get("axes")
    return kind(entry["site"], index, operand, Reading(entry["captured"], None if axes is None else tuple(axes)))
