"""What a step of training changes: where it lies on the devices, and its form in a checkpoint."""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from mi_jax.core import sharding
from mi_jax.core.errors import InputError

Tree = TypeVar("Tree")


class TrainState(eqx.Module):
    """Everything that a step changes; saved and restored, training goes on to the same numbers.

    Attributes:
      params: the model's floating-point arrays, None in place of everything else.
      optimizer: optax's state.
      step: updates so far.
    """

    params: PyTree
    optimizer: PyTree
    step: Int[Array, ""]


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None, axes: PyTree = None
) -> TrainState:
    """The state before the first step; it shares no buffer with `params`.

    Args:
      params: arrays.
      optimizer: the optimizer.
      mesh: where to place the state; the optimizer's moments lie as the parameters that they belong to.
      axes: tuples of axis names in the structure of `params`; None leaves every array whole on every device.
    """
    if mesh is not None:
        names = jax.tree.map(lambda x: (None,) * x.ndim, params) if axes is None else axes
        params = sharding.shard(params, names, mesh)
    params = jax.tree.map(jnp.copy, params)
    # an optimizer may give out arrays that it keeps, such as a key
    moments = jax.tree.map(jnp.copy, optimizer.init(params))
    state = TrainState(params, moments, jnp.zeros((), jnp.int32))
    return state if mesh is None else jax.device_put(state, layout(state, mesh))


def layout(state: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of every array of a state: as it lies on the mesh, or whole on every device if it does not."""

    def of(x: Array) -> NamedSharding:
        held = x.sharding
        return held if isinstance(held, NamedSharding) and held.mesh == mesh else sharding.replicated(mesh)

    return jax.tree.map(of, state)


def over_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Shards the first axis of every array over "data" and "fsdp", or over "data", or not, as they divide it."""

    def place(x: Array) -> Array:
        for mesh_axes in (("data", "fsdp"), ("data",)):
            devices = int(np.prod([mesh.shape.get(axis, 1) for axis in mesh_axes]))
            if x.ndim and x.shape[0] % devices == 0:
                present = tuple(axis for axis in mesh_axes if axis in mesh.shape)
                return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(present)))
        return x

    return jax.tree.map(place, batch)


def updated(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state after one update."""
    # optax raises its decay rates to the power of an integer count, which strict dtype promotion would refuse
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """A state as a flat mapping of names to arrays."""
    return {f"state{jax.tree_util.keystr(path)}": _stored(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def state_from_arrays(arrays: Mapping[str, np.ndarray], like: TrainState, *, name: str) -> TrainState:
    """The inverse of `state_arrays`, placed as `like` is; other entries are left alone.

    Raises:
      InputError: an array is missing, unknown, or of another shape or type; `name` says of which checkpoint.
    """
    paths = jax.tree_util.tree_leaves_with_path(like)
    expected = {f"state{jax.tree_util.keystr(path)}": _form(x) for path, x in paths}
    held = {key: _form(x) for key, x in arrays.items() if key.startswith("state.")}
    if wrong := sorted(key for key in expected | held if expected.get(key) != held.get(key)):
        key = wrong[0]
        raise InputError(
            f"checkpoint {name!r} is of another model or optimizer: {key!r} is {held.get(key, 'absent')} there, and "
            f"{expected.get(key, 'absent')} here; give the same model and optimizer to resume, or another workdir"
        )

    def filled(path: Any, x: Array) -> Array:
        key = f"state{jax.tree_util.keystr(path)}"
        if _is_key(x):
            restored = jax.random.wrap_key_data(jnp.asarray(arrays[key]), impl=jax.random.key_impl(x))
        else:
            restored = arrays[key]
        # a copy: the step reuses the state's buffers, and the checkpoint's must not be written to
        return jnp.copy(jax.device_put(restored, x.sharding))

    return jax.tree_util.tree_map_with_path(filled, like)


def _form(x: Array | np.ndarray) -> str:
    x = jax.random.key_data(x) if _is_key(x) else x
    return f"{x.dtype}{list(x.shape)}"


def _is_key(x: Array | np.ndarray) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _stored(x: Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)
