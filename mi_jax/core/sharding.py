"""One table from logical axis names to mesh axes; parameters, dictionaries and batches are sharded through it."""

from collections.abc import Sequence
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "model")

RULES: dict[str, str | None] = {
    "batch": "data",
    "pos": None,
    "layer": None,
    "d_model": "fsdp",
    "head": "model",
    "kv_head": "model",
    "d_head": None,
    "d_mlp": "model",
    "d_vocab": "model",
    "d_sae": "model",
    "expert": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> Mesh:
    """A mesh with the project's axes over the first `data * fsdp * model` devices.

    Raises:
      ValueError: fewer devices than asked for.
    """
    n = data * fsdp * model
    devices = jax.devices()
    if n > len(devices):
        raise ValueError(f"a {data}×{fsdp}×{model} mesh needs {n} devices, there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((data, fsdp, model), MESH_AXES, axis_types=auto, devices=devices[:n])


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The partition of an array with these logical axes.

    An axis stays whole where the mesh lacks its mesh axis, or where that one does not divide it.

    Raises:
      ValueError: an axis name that is not in the table, or a rank that differs from the number of names.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} name {len(axes)} dimensions, the array has shape {tuple(shape)}")
    parts: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"no rule for axis {axis!r}; there are rules for {', '.join(RULES)}")
        mesh_axis = RULES[axis] if axis is not None else None
        fits = mesh_axis in mesh.shape and mesh_axis not in parts and size % mesh.shape[mesh_axis] == 0
        parts.append(mesh_axis if fits else None)
    return PartitionSpec(*parts)


def shardings(tree: Tree, axes: Tree, mesh: Mesh) -> Tree:
    """A tree of NamedShardings; `axes` has the structure of `tree` with a tuple of axis names for every array."""
    return jax.tree.map(lambda x, names: NamedSharding(mesh, spec(names, x.shape, mesh)), tree, axes)


def shard(tree: Tree, axes: Tree, mesh: Mesh) -> Tree:
    """Puts every array of a pytree onto the mesh, by the names of its axes."""
    return jax.device_put(tree, shardings(tree, axes, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
