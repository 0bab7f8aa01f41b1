"""One run of a foreign model with edits and captures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mi_jax.core.apply import Taps, split
from mi_jax.core.sites import SiteError, SiteTable
from mi_jax.core.taps import Tap, stacked_rows
from mi_jax.models.adapters.freight import Stack, report, whole, with_slots
from mi_jax.models.adapters.plan import Place, Plan, Tensor
from mi_jax.models.adapters.search import search
from mi_jax.models.adapters.visits import Foreign, Module, Where, running


@dataclasses.dataclass(frozen=True, eq=False)
class _Sites:
    """What a run does inside inner traces, hashed once: it becomes part of the key of every trace cache."""

    content: Any
    hashed: int

    def __hash__(self) -> int:
        return self.hashed

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Sites) and self.content == other.content)


@dataclasses.dataclass
class _Load:
    """What one nested tensor's module receives: the arrays, and what makes edits and slots of them again."""

    arrays: dict[str, Array]
    treedef: Any
    static: Any

    @classmethod
    def of(cls, tree: Any) -> "_Load":
        arrays, static = eqx.partition(tree, eqx.is_array)
        leaves, treedef = jax.tree.flatten(arrays)
        rest = jax.tree.flatten(static)
        return cls({str(i): leaf for i, leaf in enumerate(leaves)}, treedef, (rest[1], tuple(rest[0])))

    def unpack(self, arrays: Mapping[str, Array], stack: Stack | None) -> Any:
        leaves = [arrays[str(i)] for i in range(len(arrays))]
        leaves = leaves if stack is None else [stack.take(leaf) for leaf in leaves]
        return eqx.combine(jax.tree.unflatten(self.treedef, leaves), jax.tree.unflatten(self.static[0], self.static[1]))


@dataclasses.dataclass
class _Apply:
    """Visitor that applies edits and keeps or reports values."""

    table: SiteTable
    places: Mapping[Where, Place]
    taps: Taps
    wanted: frozenset[Where]
    loads: Mapping[Where, _Load]
    seen: dict[Where, Array] = dataclasses.field(default_factory=dict)
    visited: set[Where] = dataclasses.field(default_factory=set)

    def enter(self, path: str, module: Module, nested: bool) -> None:
        pass

    def tensor(self, where: Where, x: Array, module: Module) -> Array:
        place = self.places.get(where)
        if place is None:
            return x
        self.visited.add(where)
        if not where.nested:
            edits, rows, layer = _of_layer(self.taps.get(place.site, ()), place, self.table)
            x = _edited(self.table, place.site, edits, rows, layer, x)
            if where in self.wanted:
                self.seen[where] = x
            return x
        load, stack = self.loads[where], place.tensor.stack

        def change(x, arrays):
            edits, rows, layer, slot = load.unpack(arrays, stack)
            x = _edited(self.table, place.site, edits, rows, layer, x)
            return x if slot is None else report(x, x, slot)

        rank = len(place.tensor.shape)
        return whole(change, x, dict(module.freight()[where.label]), lambda shape: len(shape) == rank)


def _edited(table: SiteTable, site: str, edits: tuple, rows: tuple, layer: Array | None, x: Array) -> Array:
    return Tap(table, {site: edits} if edits else {}, (), {site: rows}, layer)(site, x)


def _of_layer(edits: tuple, place: Place, table: SiteTable) -> tuple[tuple, tuple, Array | None]:
    """Edits, the part of their operands that belongs to a place, and its layer."""
    rows = stacked_rows({place.site: edits}, table).get(place.site, (None,) * len(edits))
    if place.layer is None:
        return edits, rows, None
    return edits, jax.tree.map(lambda a: a[place.layer], rows), jnp.asarray(place.layer, jnp.int32)


def _load(edits: tuple, place: Place, table: SiteTable, slot: Array | None) -> _Load:
    stack = place.tensor.stack
    if stack is None:
        edits, rows, layer = _of_layer(edits, place, table)
        return _Load.of((edits, rows, layer, slot))
    site, _ = table.resolve(place.site)
    rows = jax.tree.map(stack.put_layers, tuple(split(edit, site)[0] for edit in edits))
    rest = tuple(dataclasses.replace(edit, operand=split(edit, site)[1]) for edit in edits)
    rest = jax.tree.map(lambda leaf: stack.put(leaf) if eqx.is_array(leaf) else leaf, rest)
    layer = stack.put_layers(jnp.arange(stack.n, dtype=jnp.int32))
    return _Load.of((rest, rows, layer, slot))


def tapped(
    model: Foreign, plan: Plan, taps: Taps, wanted: Mapping[str, Any], inputs: tuple, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Array]]:
    """One run with edits and captures: the output, and the captured activations."""
    table = plan.table
    kept = [p for p in plan.places if p.site in wanted and _is_wanted(p.layer, wanted[p.site])]
    places = {p.tensor.where: p for p in plan.places if p.site in taps} | {p.tensor.where: p for p in kept}
    found = search(model, inputs, options) if any(where.nested for where in places) else {}
    slots = {p.tensor.where: _slot(p, found) for p in kept if p.tensor.where.nested and p.tensor.where in found}

    def call(slots):
        loads = {
            where: _load(taps.get(p.site, ()), p, table, slots.get(where))
            for where, p in places.items()
            if where.nested
        }
        freight: dict[str, dict[str, dict[str, Array]]] = {}
        for where, load in loads.items():
            freight.setdefault(where.path, {})[where.label] = load.arrays
        content = (table, tuple((w, places[w].site, load.treedef, load.static) for w, load in loads.items()))
        sites = _Sites(content, hash(content)) if loads else None
        visitor = _Apply(table, places, taps, frozenset(p.tensor.where for p in kept), loads)
        with running(visitor, sites, model.opaque):
            out = model.run(freight, inputs, options)
        for where, place in places.items():
            if where not in visitor.visited and where not in found:
                raise SiteError(f"site {place.site!r} of {table.model} is not computed by this call")
        return out, visitor.seen

    if not slots:
        out, seen = call({})
    else:
        out, seen = with_slots(call, slots)
    layers = {p.site: {} for p in kept}
    for place in kept:
        layers[place.site][place.layer] = (seen[place.tensor.where], place.tensor)
    return out, {site: _joined(layers[site], wanted[site]) for site in wanted}


def _is_wanted(layer: int | None, layers: int | tuple[int, ...] | None) -> bool:
    return layer is None or layers is None or layer in (layers if isinstance(layers, tuple) else (layers,))


def _slot(place: Place, found: Mapping[Where, Tensor]) -> Array:
    tensor, stack = found[place.tensor.where], place.tensor.stack
    if stack is None:
        return jnp.zeros(tensor.shape, tensor.dtype)
    return stack.put_layers(jnp.zeros((stack.n, *tensor.shape), tensor.dtype))


def _joined(values: Mapping[int | None, tuple[Array, Tensor]], layers: int | tuple[int, ...] | None) -> Array:
    """A site from the tensors of its layers, or from the one tensor of all layers."""
    if None in values:
        x, tensor = values[None]
        if tensor.stack is None:
            return x
        x = tensor.stack.get_layers(x)
        return x if layers is None else x[layers] if isinstance(layers, int) else x[jnp.asarray(layers, jnp.int32)]
    if isinstance(layers, int):
        return values[layers][0]
    return jnp.stack([values[layer][0] for layer in layers or sorted(k for k in values if k is not None)])
