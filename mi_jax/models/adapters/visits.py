"""Visits: what happens each time a foreign model calls one of its modules while an adapter is active.

In the trace that the adapter itself runs in, an edit is applied and a value kept in place. Tensors of inner traces
(`scan`, `checkpoint`, `jit`, `vmap`) are called nested; `freight.py` has how those are reached.
"""

import abc
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array

Shape = tuple[int, ...]
# by path of a module, by name of a tensor there, by leaf: arrays that travel beside the parameters of the module
Freight = Mapping[str, Mapping[str, Mapping[str, Array]]]


@runtime_checkable
class Module(Protocol):
    """The side of a foreign module that a visit needs."""

    def arrays(self) -> list[Any]:
        """Its parameters as the current trace sees them: a scan has taken the layer axis off."""
        ...

    def freight(self) -> Mapping[str, Mapping[str, Array]]:
        """What the adapter sent to this module, by tensor; empty if nothing."""
        ...


class Where(NamedTuple):
    """One tensor of a foreign model.

    Attributes:
      path: of the module.
      call: how often the module has been called before.
      port: which input (`in`, `in1` …) or output (empty if there is one) of the call.
      nested: whether the call is traced inside the trace of the model's own call.
    """

    path: str
    call: int
    port: str
    nested: bool

    @property
    def label(self) -> str:
        """What the tensor is called within its module's freight."""
        return f"{self.call}:{self.port}"


@runtime_checkable
class Visitor(Protocol):
    """What is done in each call."""

    def enter(self, path: str, module: Module, nested: bool) -> None: ...
    def tensor(self, where: Where, x: Array, module: Module) -> Array: ...


@dataclasses.dataclass
class Run:
    """One run of a foreign model under an adapter.

    Attributes:
      opaque: types whose instances are not looked into.
    """

    visitor: Visitor
    opaque: tuple[type, ...]
    top: Any = dataclasses.field(default_factory=get_opaque_trace_state)
    calls: list[tuple[Any, dict[str, int]]] = dataclasses.field(default_factory=list)

    def visit(self, path: str, call: Callable, args: tuple, kwargs: dict, module: Module) -> Any:
        """Calls the module between the visits of its inputs and of its outputs."""
        state = get_opaque_trace_state()
        nested = not state == self.top  # noqa: SIM201, the type defines == only
        call_number = self._count(state, path)
        self.visitor.enter(path, module, nested)
        args = self._tensors(Where(path, call_number, "in", nested), args, module)
        return self._tensors(Where(path, call_number, "", nested), call(*args, **kwargs), module)

    def _count(self, state: Any, path: str) -> int:
        """How often the current trace has called the module before: a trace that runs twice starts again."""
        counts = next((c for s, c in self.calls if s == state), None)
        if counts is None:
            counts = {}
            self.calls.append((state, counts))
        counts[path] = counts.get(path, -1) + 1
        return counts[path]

    def _tensors(self, where: Where, tree: Any, module: Module) -> Any:
        leaves, treedef = jax.tree.flatten_with_path(tree, is_leaf=lambda node: isinstance(node, self.opaque))
        new, changed = [], False
        for keys, x in leaves:
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
                port = jax.tree_util.keystr(keys, simple=True, separator=".")
                # the first argument of a call is simply its input
                port = where.port + (port.removeprefix("0") if where.port else port)
                y = self.visitor.tensor(where._replace(port=port), x, module)
                changed = changed or y is not x
                x = y
            new.append(x)
        return jax.tree.unflatten(treedef, new) if changed else tree


_RUN: contextvars.ContextVar[Run | None] = contextvars.ContextVar("mi_jax_adapter_run", default=None)
# Part of the key of every trace cache: what a run edits and captures. So a function that the foreign model has jitted
# is traced again for another set of sites, and is not for other values.
_SITES = jax.make_user_context(None)


def current() -> Run | None:
    """The run in progress, None while the foreign model runs by itself."""
    return _RUN.get()


@contextmanager
def running(visitor: Visitor, sites: Any, opaque: tuple[type, ...]) -> Iterator[None]:
    """Makes the foreign model's modules report to a visitor; `sites` is hashable and says what this changes."""
    token = _RUN.set(Run(visitor, opaque))
    try:
        with _SITES(sites):
            yield
    finally:
        _RUN.reset(token)


class Foreign(eqx.Module):
    """A foreign model as its framework's adapter presents it."""

    @abc.abstractmethod
    def run(self, freight: Freight, inputs: tuple, options: Mapping[str, Any]) -> Any:
        """Calls the model, its modules reporting to the current run, with arrays sent along to them."""

    @abc.abstractmethod
    def shapes(self, path: str) -> list[Shape]:
        """The shapes of the parameters of a module, all layers together."""

    @property
    @abc.abstractmethod
    def opaque(self) -> tuple[type, ...]:
        """Types that are not looked into where the model passes them on."""
