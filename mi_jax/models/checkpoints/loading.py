"""From stored tensors straight into the shards of a decoder.

A stacked parameter is made on the devices, empty and sharded; every layer's tensor is read, cut to the shards and
written into its row by a donated update. The host never holds more than one tensor and its cut, whatever the size of
the model.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mi_jax.core.errors import InputError
from mi_jax.core.sharding import make_mesh
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.names import Stored, part_to_ours
from mi_jax.models.checkpoints.plan import Parameter, Plan, make_plan
from mi_jax.models.checkpoints.rows import Rows, local_rows, places, read_part
from mi_jax.models.checkpoints.source import Source
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder

_CHUNK = 1 << 20


def assemble(
    source: Source,
    config: DecoderConfig,
    stored: Sequence[Stored],
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    declared: Any = None,
    ignored: Sequence[str] = (),
    allow_nan: bool = False,
) -> Decoder:
    """The decoder of a checkpoint, tensor by tensor into its shards.

    Peak memory of the host is the shards on it and twice the largest stored tensor.

    Args:
      stored: where each parameter lies; one entry for every parameter of the decoder.
      mesh: the devices, with the axes of `mi_jax.core.sharding`; None means the first device.
      dtype: of all parameters; None keeps each as it is stored.
      declared: the type that the configuration says the tensors have; where `dtype` is None another is refused.
      ignored: regular expressions of tensors that may be there and are not read.
      allow_nan: take weights that are NaN or infinite, which are refused otherwise.

    Raises:
      CheckpointError: tensors are missing, have no place, are of a wrong shape or type, or hold NaN or infinity.
      InputError: a `dtype` that a decoder cannot have.
    """
    mesh = make_mesh() if mesh is None else mesh
    asked, said = (None if each is None else _floating(each) for each in (dtype, declared))
    plan = make_plan(source, config, stored, mesh=mesh, dtype=asked, declared=said, ignored=ignored)
    leaves: list[Any] = [None] * len(plan.parameters)
    # whole tensors first: the largest of them, the embedding, is then read while the memory is still empty
    for group in plan.groups():
        if not plan.parameters[group[0]].stored.counts:
            for number, value in zip(group, _read(source, plan, group, (), allow_nan), strict=True):
                leaves[number] = value
    stacked = [number for number, leaf in enumerate(leaves) if leaf is None]
    make_empty = _empty(tuple(_layout(plan.parameters[number]) for number in stacked))
    for number, empty in zip(stacked, make_empty(), strict=True):
        leaves[number] = empty
    for group in plan.groups():
        first = plan.parameters[group[0]].stored
        if first.counts:
            for index, _ in first.each(plan.sizes):
                for number, value in zip(group, _read(source, plan, group, index, allow_nan), strict=True):
                    write = _writer(plan.parameters[number].sharding)
                    leaves[number] = write(leaves[number], value, tuple(map(np.int32, index)))
                # a read that runs ahead of the copies would hold more tensors than the one that is promised
                jax.block_until_ready([leaves[number] for number in group])
    return jax.tree.unflatten(plan.structure, leaves)


def _floating(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    # a cast to integers would turn most weights into 0
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise InputError(f"dtype={dtype!r} cannot be of parameters; give jnp.float32, jnp.bfloat16 or jnp.float16")
    return found


def _read(source: Source, plan: Plan, group: Sequence[int], index: tuple[int, ...], allow_nan: bool) -> list[jax.Array]:
    """The arrays of a group of parameters that one tensor holds, sharded, for one place in the leading axes."""
    members = [plan.parameters[number] for number in group]
    name = members[0].stored.at(index)
    wanted = {local_rows(p.stored, p.slice_shape, places(p.slice_sharding, p.slice_shape)) for p in members}
    rows = wanted.pop() if len(wanted) == 1 else None
    x = read_part(source, name, members[0].stored, rows)
    if not allow_nan and not all_finite(x):
        raise CheckpointError(
            f"{source.path}: tensor {name!r} holds NaN or infinity: a damaged or diverged checkpoint; allow_nan=True "
            "loads it as it is"
        )
    return [_place(x, p, plan, rows) for p in members]


def _place(x: np.ndarray, parameter: Parameter, plan: Plan, rows: Rows | None) -> jax.Array:
    sizes = plan.sizes if rows is None else rows.sizes(plan.sizes)
    ours = np.asarray(part_to_ours(x, parameter.stored, sizes))
    whole = not parameter.stored.counts
    # stacked parameters change their type on the device, where it costs the host nothing
    dtype = parameter.dtype if whole or x.dtype == np.float64 else x.dtype
    value = jax.make_array_from_callback(
        parameter.slice_shape, parameter.slice_sharding, functools.partial(_cut, ours, rows, dtype)
    )
    return jax.block_until_ready(value) if whole else value


def _cut(x: np.ndarray, rows: Rows | None, dtype: np.dtype, index: tuple[slice, ...] | None) -> np.ndarray:
    index = index or ()
    return np.ascontiguousarray(x[index if rows is None else rows.within(index)], dtype)


def all_finite(x: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite; in pieces, so that it needs no memory to speak of."""
    flat = x.reshape(-1)
    if x.dtype in (np.float16, jnp.bfloat16):
        # of a 16-bit float without its sign, infinity is the largest pattern but NaN
        infinity = int(np.asarray(np.inf, x.dtype).view(np.uint16))
        flat = flat.view(np.uint16)
        return all(
            int((flat[i : i + _CHUNK] & np.uint16(0x7FFF)).max()) < infinity for i in range(0, len(flat), _CHUNK)
        )
    return all(bool(np.isfinite(flat[i : i + _CHUNK]).all()) for i in range(0, len(flat), _CHUNK))


def _layout(parameter: Parameter) -> tuple[tuple[int, ...], np.dtype, NamedSharding]:
    return parameter.shape, parameter.dtype, parameter.sharding


@functools.lru_cache(maxsize=8)
def _empty(layouts: tuple[tuple[tuple[int, ...], np.dtype, NamedSharding], ...]):
    """A program that makes all stacked parameters at once: one compilation instead of one for each."""

    def make():
        return [jnp.zeros(shape, dtype) for shape, dtype, _ in layouts]

    return jax.jit(make, out_shardings=[sharding for _, _, sharding in layouts])


@functools.lru_cache(maxsize=64)
def _writer(sharding: NamedSharding):
    """Writes one row of a stacked parameter in place; compiled once for every shape."""

    def write(buffer, value, index):
        row = value.astype(buffer.dtype).reshape((1,) * len(index) + value.shape)
        return jax.lax.dynamic_update_slice(buffer, row, (*index, *(np.int32(0),) * value.ndim))

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
