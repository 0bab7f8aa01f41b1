"""Flax Linen models as they are, also with `nn.scan`, `nn.remat` and `nn.jit`.

Linen offers a way in, `nn.intercept_methods`. What has to reach a module inside a lifted transform travels in the
`params` collection at the module's own path, because a transform that splits the layers' parameters splits that too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from flax import linen as nn

from mi_jax.models.adapters.model import Adapter, planned
from mi_jax.models.adapters.plan import Name, Plan
from mi_jax.models.adapters.visits import Freight, Shape, current

_FREIGHT = "mi_jax_freight"


class LinenModel(Adapter):
    """A Flax Linen module and its variables; see `adapt_linen`."""

    plan: Plan = eqx.field(static=True)
    module: nn.Module = eqx.field(static=True)
    methods: tuple[str, ...] = eqx.field(static=True)
    variables: Any

    @property
    def opaque(self) -> tuple[type, ...]:
        return (nn.Module,)

    def shapes(self, path: str) -> list[Shape]:
        params = self.variables.get("params", {})
        for name in path.split("/") if path else ():
            params = params.get(name, {})
        return [tuple(x.shape) for x in jax.tree.leaves(params)]

    def run(self, freight: Freight, inputs: tuple, options: Mapping[str, Any]) -> Any:
        if current() is None:
            return self.module.apply(self.variables, *inputs, **options)
        params = self.variables.get("params", {})
        for path, load in freight.items():
            params = _with(params, (*path.split("/"), _FREIGHT) if path else (_FREIGHT,), load)
        variables = {**self.variables, "params": params} if freight else self.variables
        with nn.intercept_methods(self._intercept):
            return self.module.apply(variables, *inputs, **options)

    def _intercept(self, call, args, kwargs, context):
        run, module = current(), context.module
        if run is None or context.method_name not in self.methods or module.scope is None:
            return call(*args, **kwargs)
        path = "/".join(module.path)
        if context.method_name != "__call__":
            path = f"{path}.{context.method_name}"
        return run.visit(path, call, args, kwargs, _Bound(module))


def _with(tree: Mapping, path: tuple[str, ...], value: Any) -> dict:
    if len(path) == 1:
        return {**tree, path[0]: value}
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], value)}


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A Linen module inside `apply`."""

    module: nn.Module

    def arrays(self) -> list[Any]:
        return jax.tree.leaves(self.module.variables.get("params", {}))

    def freight(self) -> Mapping[str, Mapping[str, jax.Array]]:
        return self.module.get_variable("params", _FREIGHT, {})


def adapt_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *example: Any,
    names: Mapping[str, Name] | None = None,
    methods: tuple[str, ...] = ("__call__",),
    **options: Any,
) -> LinenModel:
    """A Flax Linen model with sites: every floating array that a submodule takes or returns.

    A site is called by the module's path, `encoder/mlp`; its inputs by `encoder/mlp:in` and, from the second on,
    `:in1`; one of several outputs by its place, `encoder/mlp:0`. Numbered modules with equal tensors, `layer_0/mlp`,
    `layer_1/mlp` …, and modules under `nn.scan` are one site with a leading `layer` axis, `layer/mlp`. The model's
    own output is `output`.

    Args:
      variables: as `module.apply` takes them. They stay arguments of compiled programs.
      example: inputs of the model's usual rank, the first one `[batch pos …]`; only their shapes matter.
      names: our names for tensors, such as `{"resid_post": "layer_{layer}", "resid_pre": "layer_{layer}:in"}`, each
        with axes in one layer where they are not those of the name's meaning: `("layer_{layer}/q", ("batch", …))`.
      methods: methods that are sites; others than `__call__` are called `embed.attend`.
      options: keyword arguments of the example call, such as `deterministic=True`. Later calls pass their own.

    Returns:
      A model for `mi.capture`, `mi.intervene`, `mi.sweep`, `mi.jit` and `mi.check_sites`.

    Raises:
      SiteError: names that do not fit.

    Example:
      `model = adapt_linen(net, net.init(key, tokens), tokens, names={"resid_post": "block_{layer}"})`
    """

    def adapter(plan: Plan) -> LinenModel:
        return LinenModel(plan, module, methods, dict(variables))

    return planned(adapter, type(module).__name__, example, options, names or {})
