"""Where the nodes of a computational graph stand: depth by layer, breadth near their neighbours, none overlapping."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_KIND_ORDER = {"input": 0, "head": 0, "mlp": 1, "logits": 2}
_SWEEPS = 6


@dataclass(frozen=True)
class Place:
    """A node's column (depth) and slot (breadth), both from 0."""

    column: int
    slot: float


@dataclass(frozen=True)
class Layout:
    """Places by node name; `columns` names the layer of each column; `slots` is the number of slots."""

    places: Mapping[str, Place]
    columns: Sequence[str]
    slots: int


def layout(nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]], *, reach: int = 1) -> Layout:
    """Places nodes in columns by layer (heads before the MLP), then in slots by the mean slot of their neighbours.

    Args:
      nodes: `name`, `layer`, `kind`. The input comes first and the logits last whatever their layer.
      edges: `from`, `to`, `score`; strong edges pull harder.
      reach: a node's label is so wide that it must not share a slot with nodes fewer than `reach` columns away.
    """
    depth = {n["name"]: _depth(n) for n in nodes}
    order = sorted(set(depth.values()))
    column = {name: order.index(d) for name, d in depth.items()}
    names = [_column_name(d) for d in order]
    members = [[name for name in column if column[name] == c] for c in range(len(order))]
    window = [sum(len(m) for m in members[max(0, c - reach + 1) : c + 1]) for c in range(len(order))]
    slots = max([*window, math.ceil(1.25 * max(window, default=1)), 1])
    middle = (slots - 1) / 2

    neighbours: dict[str, list[tuple[str, float]]] = {name: [] for name in column}
    for edge in edges:
        weight = abs(edge.get("score") or 0.0) + 1e-6
        neighbours[edge["from"]].append((edge["to"], weight))
        neighbours[edge["to"]].append((edge["from"], weight))
    slot = dict.fromkeys(column, middle)
    for m in members:
        for i, name in enumerate(m):
            slot[name] = middle + (i - (len(m) - 1) / 2)

    for sweep in range(_SWEEPS):
        wanted = {name: _mean_slot(name, slot, neighbours) for name in column}
        columns = range(len(order)) if sweep % 2 == 0 else range(len(order) - 1, -1, -1)
        placed: dict[str, float] = {}
        for c in columns:
            for name in sorted(members[c], key=lambda n: abs(wanted[n] - middle)):
                taken = {s for other, s in placed.items() if abs(column[other] - c) < reach}
                placed[name] = _nearest_free(wanted[name], taken, slots)
        slot = placed
    for name in (m[0] for m in members if len(m) == 1 and m[0] in column):
        if column[name] in (0, len(order) - 1):
            slot[name] = middle
    return Layout({name: Place(column[name], slot[name]) for name in column}, names, slots)


def _depth(node: Mapping[str, Any]) -> tuple[float, int]:
    kind = node.get("kind", "head")
    if kind == "input":
        return (-math.inf, 0)
    if kind == "logits":
        return (math.inf, 2)
    return (float(node.get("layer") or 0), _KIND_ORDER.get(kind, 0))


def _column_name(depth: tuple[float, int]) -> str:
    return {-math.inf: "in", math.inf: "out"}.get(depth[0], f"{depth[0]:.0f}")


def _mean_slot(name: str, slot: Mapping[str, float], neighbours: Mapping[str, list[tuple[str, float]]]) -> float:
    total = sum(weight for _, weight in neighbours[name])
    return sum(slot[other] * weight for other, weight in neighbours[name]) / total if total else slot[name]


def _nearest_free(wanted: float, taken: set[float], slots: int) -> float:
    free = [s for s in range(slots) if s not in taken]
    return float(min(free, key=lambda s: abs(s - wanted))) if free else wanted
