"""Flax NNX models as they are, also with `nnx.scan`, `nnx.remat` and `nnx.jit`.

A copy of the model is taken in which every module's class is a subclass of its own that reports its calls. Attributes,
parameters and `isinstance` stay as they were.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from flax import nnx

from mi_jax.models.adapters.model import Adapter, planned
from mi_jax.models.adapters.plan import Name, Plan
from mi_jax.models.adapters.visits import Freight, Shape, current

_FREIGHT, _PATH = "mi_jax_freight", "mi_jax_path"


class FreightParam(nnx.Param):
    """What an adapter sends to a module: a parameter, so that transforms split it as they split those."""


@functools.cache
def _reporting(cls: type, methods: tuple[str, ...]) -> type:
    """The class of modules that report their calls."""

    def wrapped(method: str):
        inner = getattr(cls, method)

        @functools.wraps(inner)
        def call(self, *args, **kwargs):
            run = current()
            path = getattr(self, _PATH, None)
            if run is None or path is None:
                return inner(self, *args, **kwargs)
            path = path if method == "__call__" else f"{path}.{method}"
            return run.visit(path, functools.partial(inner, self), args, kwargs, _Live(self))

        return call

    members = {method: wrapped(method) for method in methods if callable(getattr(cls, method, None))}
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))


@dataclasses.dataclass(frozen=True)
class _Live:
    """An NNX module inside a call."""

    module: nnx.Module

    def arrays(self) -> list[Any]:
        return jax.tree.leaves(nnx.state(self.module, nnx.Param))

    def freight(self) -> dict[str, dict[str, jax.Array]]:
        out: dict[str, dict[str, jax.Array]] = {}
        for name, variable in vars(self.module).items():
            if isinstance(variable, FreightParam):
                _, label, leaf = name.split(" ")
                out.setdefault(label, {})[leaf] = variable[...]
        return out


class NNXModel(Adapter):
    """A Flax NNX module; see `adapt_nnx`."""

    plan: Plan = eqx.field(static=True)
    graph: Any = eqx.field(static=True)
    state: Any

    @property
    def opaque(self) -> tuple[type, ...]:
        return (nnx.Module,)

    def shapes(self, path: str) -> list[Shape]:
        module = _modules(nnx.merge(self.graph, self.state, copy=True))[path]
        return [tuple(x.shape) for x in _Live(module).arrays()]

    def run(self, freight: Freight, inputs: tuple, options: Mapping[str, Any]) -> Any:
        model = nnx.merge(self.graph, self.state, copy=True)
        modules = _modules(model) if freight else {}
        for path, loads in freight.items():
            for label, leaves in loads.items():
                for leaf, x in leaves.items():
                    setattr(modules[path], f"{_FREIGHT} {label} {leaf}", FreightParam(x))
        return model(*inputs, **options)


def _modules(model: nnx.Module) -> dict[str, nnx.Module]:
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def adapt_nnx(
    module: nnx.Module,
    *example: Any,
    names: Mapping[str, Name] | None = None,
    methods: tuple[str, ...] = ("__call__",),
    **options: Any,
) -> NNXModel:
    """A Flax NNX model with sites: every floating array that a submodule takes or returns.

    The arguments, the names of the sites and the errors are those of `adapt_linen`. Set the module's mode before, as
    with `module.eval()`; what a call changes in the module's state is dropped.

    Example:
      `model = adapt_nnx(net, tokens, names={"resid_post": "blocks/{layer}", "resid_pre": "blocks/{layer}:in"})`
    """
    copy = nnx.clone(module)
    for path, part in list(nnx.iter_modules(copy)):
        if any(callable(getattr(type(part), method, None)) for method in methods):
            object.__setattr__(part, "__class__", _reporting(type(part), methods))
            setattr(part, _PATH, "/".join(map(str, path)))
    graph, state = nnx.split(copy)
    return planned(lambda plan: NNXModel(plan, graph, state), type(module).__name__, example, options, names or {})
