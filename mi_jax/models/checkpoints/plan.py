"""What is to be read for a decoder: every parameter, where it lies and what it becomes, checked before it is read."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mi_jax.core.sharding import spec
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.names import Stored, axis_sizes, ours_to_stored
from mi_jax.models.checkpoints.source import Source
from mi_jax.models.config import DecoderConfig
from mi_jax.models.parameters import abstract_decoder, logical_axes

_LISTED = 6


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the decoder: what it will be, and where it lies in the checkpoint."""

    stored: Stored
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Without the axes that the names of its tensors count."""
        return self.shape[len(self.stored.counts) :]

    @property
    def slice_sharding(self) -> NamedSharding:
        parts = tuple(self.sharding.spec) + (None,) * (len(self.shape) - len(self.sharding.spec))
        return NamedSharding(self.sharding.mesh, PartitionSpec(*parts[len(self.stored.counts) :]))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parameters in the order of the decoder's leaves, and its structure."""

    parameters: tuple[Parameter, ...]
    structure: Any
    sizes: Mapping[str, int]

    def groups(self) -> Iterator[list[int]]:
        """Numbers of the parameters that come from the same tensors, so that each tensor is read once."""
        by_place: dict[tuple, list[int]] = {}
        for number, parameter in enumerate(self.parameters):
            by_place.setdefault((parameter.stored.name, parameter.stored.part), []).append(number)
        yield from by_place.values()


def make_plan(
    source: Source,
    config: DecoderConfig,
    stored: Sequence[Stored],
    *,
    mesh: Mesh,
    dtype: np.dtype | None,
    declared: np.dtype | None,
    ignored: Sequence[str],
) -> Plan:
    """Checks that the checkpoint holds the decoder, whole and nothing else.

    Raises:
      CheckpointError: tensors that are missing or have no place, or of another shape or type than they should be.
    """
    abstract = abstract_decoder(config)
    sizes = axis_sizes(config)
    check_names(source, stored, sizes, ignored)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    axes = jax.tree.leaves(logical_axes(abstract), is_leaf=lambda x: isinstance(x, tuple))
    entries = entries_by_path(stored, [path_name(path) for path, _ in leaves])
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    _check_shapes(source, entries, shapes, sizes)
    parameters = []
    for (path, leaf), names in zip(leaves, axes, strict=True):
        entry = entries[path_name(path)]
        kind = _dtype(source, entry, sizes, dtype, declared)
        sharding = NamedSharding(mesh, spec(names, leaf.shape, mesh))
        parameters.append(Parameter(entry, leaf.shape, kind, sharding))
    return Plan(tuple(parameters), structure, sizes)


def path_name(path: tuple) -> str:
    """A path of a pytree as it is written in names: "blocks.attn.q"."""
    return jax.tree_util.keystr(path).removeprefix(".")


def entries_by_path(stored: Sequence[Stored], paths: Sequence[str]) -> dict[str, Stored]:
    """The entries of all parameters.

    Raises:
      ValueError: the table of names and the decoder differ, which is an error of the family.
    """
    entries = {entry.path: entry for entry in stored}
    if wrong := set(entries) ^ set(paths):
        raise ValueError(f"the names of a family and the parameters of its decoder differ in {sorted(wrong)}")
    return entries


def check_names(source: Source, stored: Sequence[Stored], sizes: Mapping[str, int], ignored: Sequence[str]) -> None:
    """Checks that every tensor has a place and that none is missing.

    Args:
      ignored: regular expressions of tensors that may be there and are not read.

    Raises:
      CheckpointError: lists both kinds.
    """
    there, wanted, missing = set(source.names()), set(), []
    for template in dict.fromkeys(entry.name for entry in stored):
        entry = next(entry for entry in stored if entry.name == template)
        for _, name in entry.each(sizes):
            wanted.add(name)
            if name not in there:
                missing.append(name)
                # a damaged configuration may announce more layers than could be listed
                if len(missing) > len(there) + _LISTED:
                    break
    unexpected = [name for name in there - wanted if not any(re.fullmatch(each, name) for each in ignored)]
    faults = []
    if missing:
        faults.append(f"missing tensors {listed(missing)}")
    if unexpected:
        faults.append(f"no place for tensors {listed(sorted(unexpected))}")
    if faults:
        raise CheckpointError(f"{source.path}: {'; '.join(faults)}; the configuration is of another model")


def listed(names: Sequence[str]) -> str:
    """The first few names and how many there are."""
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def _check_shapes(
    source: Source, entries: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> None:
    for template in dict.fromkeys(entry.name for entry in entries.values()):
        members = [entry for entry in entries.values() if entry.name == template]
        expected = stored_shape(members, [shapes[entry.path][len(entry.counts) :] for entry in members], sizes)
        for _, name in members[0].each(sizes):
            if source.shape(name) != expected:
                raise CheckpointError(
                    f"{source.path}: tensor {name!r} has shape {list(source.shape(name))}, the configuration says "
                    f"{list(expected)}"
                )


def stored_shape(
    members: Sequence[Stored], shapes: Sequence[tuple[int, ...]], sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """The shape of the tensor that holds these parameters, each without the axes that its name counts."""
    return jax.eval_shape(
        lambda *parts: ours_to_stored(list(zip(members, parts, strict=True)), sizes),
        *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes),
    ).shape


def _dtype(
    source: Source, entry: Stored, sizes: Mapping[str, int], asked: np.dtype | None, declared: np.dtype | None
) -> np.dtype:
    """The type that a parameter will have: as asked, or as stored; of several types the one that holds them all."""
    kinds = {source.dtype(name) for _, name in entry.each(sizes)}
    for kind in kinds:
        if not jax.numpy.issubdtype(kind, np.floating) or kind.itemsize < 2:
            raise CheckpointError(
                f"{source.path}: tensor {entry.name!r} is stored as {kind}, a quantized or integer type, whose scale "
                "is not read; use a checkpoint in float32, float16 or bfloat16"
            )
        if asked is None and declared not in (None, kind):
            raise CheckpointError(
                f"{source.path}: tensor {entry.name!r} is {kind}, the configuration says {declared}; say dtype=… to "
                "choose one"
            )
    with jax.numpy_dtype_promotion("standard"):
        dtype = functools.reduce(jax.numpy.promote_types, kinds) if asked is None else asked
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{source.path}: tensor {entry.name!r} would be {dtype}, which jax has only with jax_enable_x64; say "
            "dtype=jnp.float32 to round it"
        )
    return np.dtype(dtype)
