"""Equinox models as they are, also with stacked layers under `jax.lax.scan`, `eqx.filter_checkpoint` and `jax.vmap`.

A copy of the model is made in which every module is of a subclass of its own class that reports its calls. Fields,
parameters and `isinstance` stay as they were.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax

from mi_jax.models.adapters.model import Adapter, planned
from mi_jax.models.adapters.plan import Name, Plan
from mi_jax.models.adapters.visits import Freight, Shape, current

_FREIGHT, _PATH = "mi_jax_freight", "mi_jax_path"


@functools.cache
def _reporting(cls: type[eqx.Module], methods: tuple[str, ...]) -> type[eqx.Module]:
    """The class of modules that report their calls."""

    def wrapped(method: str):
        inner = getattr(cls, method)

        @functools.wraps(inner)
        def call(self, *args, **kwargs):
            run = current()
            if run is None:
                return inner(self, *args, **kwargs)
            path = getattr(self, _PATH)
            path = path if method == "__call__" else f"{path}.{method}"
            return run.visit(path, functools.partial(inner, self), args, kwargs, _Live(self))

        return call

    members: dict[str, Any] = {m: wrapped(m) for m in methods if callable(getattr(cls, m, None))}
    members |= {
        "__annotations__": {_PATH: str, _FREIGHT: Any},
        _PATH: eqx.field(static=True, default=""),
        _FREIGHT: None,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))


@dataclasses.dataclass(frozen=True)
class _Live:
    """An Equinox module inside a call."""

    module: eqx.Module

    def arrays(self) -> list[Any]:
        return [x for x in jax.tree.leaves(self.module) if eqx.is_array(x)]

    def freight(self) -> dict[str, dict[str, jax.Array]]:
        return getattr(self.module, _FREIGHT)


def _rebuilt(node: Any, path: str, change: Callable[[eqx.Module, str, dict[str, Any]], Any]) -> Any:
    """A copy of a pytree in which `change` has made every module anew, from the module, its path and its fields."""

    def below(name: Any) -> str:
        return f"{path}/{name}" if path else str(name)

    if isinstance(node, eqx.Module):
        present = [f.name for f in dataclasses.fields(node) if f.name in vars(node)]
        return change(node, path, {n: _rebuilt(getattr(node, n), below(n), change) for n in present})
    if isinstance(node, dict):
        return {key: _rebuilt(value, below(key), change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        values = [_rebuilt(value, below(i), change) for i, value in enumerate(node)]
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    return node


def _make(cls: type, fields: Mapping[str, Any]) -> Any:
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


class EquinoxModel(Adapter):
    """An Equinox module; see `adapt_equinox`."""

    plan: Plan = eqx.field(static=True)
    call: Callable = eqx.field(static=True)
    module: Any

    @property
    def opaque(self) -> tuple[type, ...]:
        return (eqx.Module,)

    def shapes(self, path: str) -> list[Shape]:
        found: dict[str, eqx.Module] = {}
        _rebuilt(self.module, "", lambda node, at, _: found.setdefault(at, node))
        return [tuple(x.shape) for x in _Live(found[path]).arrays()]

    def run(self, freight: Freight, inputs: tuple, options: Mapping[str, Any]) -> Any:
        def loaded(node, path, fields):
            return _make(type(node), {**fields, _FREIGHT: freight[path]} if path in freight else fields)

        module = _rebuilt(self.module, "", loaded) if freight else self.module
        return self.call(module, *inputs, **options)


def _called(module: Callable, *inputs: Any, **options: Any) -> Any:
    return module(*inputs, **options)


def adapt_equinox(
    module: eqx.Module,
    *example: Any,
    call: Callable = _called,
    names: Mapping[str, Name] | None = None,
    methods: tuple[str, ...] = ("__call__",),
    **options: Any,
) -> EquinoxModel:
    """An Equinox model with sites: every floating array that a submodule takes or returns.

    The other arguments, the names of the sites and the errors are those of `adapt_linen`. Where the model maps a
    module over positions or examples with `jax.vmap`, the site has those axes too, in front.

    Args:
      call: how the model is called, from the module and the inputs. A model of one example is mapped over the batch
        here, `call=lambda net, tokens: jax.vmap(net)(tokens)`.

    Example:
      `model = adapt_equinox(net, tokens, names={"mlp_out": "blocks/{layer}/mlp"}, call=lambda m, x: jax.vmap(m)(x))`
    """

    def reporting(node, path, fields):
        return _make(_reporting(type(node), methods), {**fields, _PATH: path, _FREIGHT: None})

    copy = _rebuilt(module, "", reporting)
    return planned(lambda plan: EquinoxModel(plan, call, copy), type(module).__name__, example, options, names or {})
