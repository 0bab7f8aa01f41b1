"""The tensors of a foreign model: found by an abstract run, and told apart by what reports once per layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mi_jax.models.adapters.freight import Stack, report, stack_of, whole, with_slots
from mi_jax.models.adapters.plan import Tensor
from mi_jax.models.adapters.visits import Foreign, Module, Shape, Where, running


@dataclasses.dataclass
class _Search:
    """Visitor that notes the tensors of a model."""

    shapes: Callable[[str], list[Shape]]
    found: dict[Where, Tensor] = dataclasses.field(default_factory=dict)
    stacks: dict[str, Stack | None] = dataclasses.field(default_factory=dict)
    unknown: set[str] = dataclasses.field(default_factory=set)

    def enter(self, path: str, module: Module, nested: bool) -> None:
        inside = [tuple(a.shape) for a in module.arrays()]
        if nested and inside:
            try:
                self.stacks[path] = stack_of(self.shapes(path), inside)
            except ValueError:
                self.unknown.add(path)

    def tensor(self, where: Where, x: Array, module: Module) -> Array:
        if where.path in self.unknown:
            return x
        # a module without parameters is stacked as the one around it
        around = [path for path in self.stacks if not path or f"{where.path}/".startswith(f"{path}/")]
        stack = self.stacks[max(around, key=len)] if where.nested and around else None

        def note(shape: Shape) -> bool:
            self.found[where] = Tensor(where, shape, str(x.dtype), stack)
            return False

        if where.nested:
            # every shape on the way out of the model's own `vmap`s is noted; the last one has all axes
            return whole(lambda x, _: x, x, None, note)
        note(x.shape)
        return x


def search(model: Foreign, inputs: tuple, options: Mapping[str, Any]) -> dict[Where, Tensor]:
    """The tensors of one call, without computing them."""
    visitor = _Search(model.shapes)

    def call():
        # a key of its own: what an earlier trace has cached would visit nothing
        with running(visitor, object(), model.opaque):
            model.run({}, inputs, options)

    jax.eval_shape(call)
    return visitor.found


@dataclasses.dataclass
class _Count:
    """Visitor that reports a 1 from every nested tensor."""

    tensors: Mapping[Where, Tensor]

    def enter(self, path: str, module: Module, nested: bool) -> None:
        pass

    def tensor(self, where: Where, x: Array, module: Module) -> Array:
        tensor = self.tensors.get(where)
        if tensor is None:
            return x
        stack, rank = tensor.stack, len(tensor.shape)

        def count(x, slot):
            return report(x, jnp.ones((), jnp.float32), slot if stack is None else stack.take(slot))

        return whole(count, x, module.freight()[where.label]["0"], lambda shape: len(shape) == rank)


@dataclasses.dataclass
class _Mapped:
    """Visitor that notes the modules that the model maps over."""

    tensors: Mapping[Where, Tensor]
    paths: set[str] = dataclasses.field(default_factory=set)

    def enter(self, path: str, module: Module, nested: bool) -> None:
        pass

    def tensor(self, where: Where, x: Array, module: Module) -> Array:
        if where in self.tensors:
            # the slot alone tells: x may be the same for all copies of the module
            slot = module.freight()[where.label]["0"]
            whole(lambda one, _: one, jnp.zeros(()), slot, lambda _: False, lambda: self.paths.add(where.path))
        return x


def told_apart(
    model: Foreign, tensors: Mapping[Where, Tensor], inputs: tuple, options: Mapping[str, Any]
) -> set[Where]:
    """The nested tensors that report exactly once per layer."""
    slots = {}
    for where, tensor in tensors.items():
        stack = tensor.stack
        slots[where] = jnp.zeros(()) if stack is None else stack.put_layers(jnp.zeros(stack.n))

    def run(model, visitor, slots):
        freight: dict[str, dict[str, dict[str, Array]]] = {}
        for where, slot in slots.items():
            freight.setdefault(where.path, {})[where.label] = {"0": slot}
        with running(visitor, object(), model.opaque):
            return model.run(freight, inputs, options)

    mapped = _Mapped(tensors)
    eqx.filter_eval_shape(run, model, mapped, slots)
    slots = {where: slot for where, slot in slots.items() if where.path not in mapped.paths}
    if not slots:
        return set()
    visitor = _Count({where: tensors[where] for where in slots})
    # compiled for the sake of the arrays that nobody reads: the values of the model are not computed
    counts = eqx.filter_jit(lambda m: with_slots(lambda s: (run(m, visitor, s), {}), slots)[1])(model)
    return {where for where, count in counts.items() if bool((count == 1).all())}
