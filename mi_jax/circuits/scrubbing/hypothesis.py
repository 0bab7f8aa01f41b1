"""Hypotheses about a computation: which sources compute which function of the prompt, and from what.

A hypothesis is a graph of interpretations. Each says that some sources of the model (heads, MLPs, the input) compute a
function of the prompt, given by its value on every prompt, and which other interpretations they read it from. What is
not read may be anything.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Array

from mi_jax.circuits.graph import Graph
from mi_jax.core.errors import InputError
from mi_jax.data.task import Task

READERS = ("q", "k", "v", "mlp", "logits")


@dataclasses.dataclass(frozen=True, eq=False)
class Interpretation:
    """Sources that compute a function of the prompt.

    Attributes:
      sources: such as `("a5.h1", "m4")`. They are taken from the same prompt.
      values: of every prompt of the task, `[batch]` or `[batch component]`, or a function of the task that gives them.
        Prompts of equal values may stand in for each other.
      reads: what the sources compute it from; none leaves everything that they read as it is on their prompt.
    """

    name: str
    sources: tuple[str, ...]
    values: Sequence | np.ndarray | Array | Callable[[Task], np.ndarray | Array]
    reads: tuple["Read", ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """An interpretation that is read.

    Attributes:
      by: the inputs that read it: "q", "k" and "v" of heads, "mlp", "logits". None are all.
    """

    node: Interpretation
    by: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Hypothesis:
    """What the logits are computed from."""

    reads: tuple[Read, ...]


@dataclasses.dataclass(frozen=True)
class TreeNode:
    """One path through the hypothesis, from the logits to an interpretation: the node is run once for each.

    Attributes:
      interpretation: its number; -1 for the logits.
      parent: number of the tree node that reads this one; -1 for the logits.
      sources: rows of the graph; the logits have none.
      important: edges (source, reader, tree node that gives the source's value) into this node.
      whole: nothing is said about what it reads.
    """

    interpretation: int
    parent: int
    sources: tuple[int, ...]
    important: tuple[tuple[int, int, int], ...]
    whole: bool


def readers_of(graph: Graph, source: str) -> dict[str, list[int]]:
    """Reader rows of a source by their letters; `logits` stands for what the logits read."""
    if source == "logits":
        return {"logits": [graph.n_readers - 1]}
    if source == "input":
        return {}
    rows = graph.reader_rows(source)
    return {"mlp": rows} if source[0] == "m" else {letter: [r] for letter, r in zip("qkv", rows, strict=True)}


def treeify(hypothesis: Hypothesis, graph: Graph) -> tuple[tuple[TreeNode, ...], tuple[Interpretation, ...]]:
    """The tree of the hypothesis, parents first, and its distinct interpretations.

    Raises:
      InputError: unknown sources or readers, a read that no edge of the graph carries, or an edge that two reads claim.
    """
    distinct: list[Interpretation] = []
    nodes: list[TreeNode] = []

    def visit(name: str, sources: tuple[str, ...], reads: tuple[Read, ...], number: int, parent: int) -> int:
        here = len(nodes)
        nodes.append(TreeNode(number, parent, (), (), not reads))
        important: dict[tuple[int, int], int] = {}
        for read in reads:
            edges = list(_edges(graph, name, sources, read))
            child = read.node
            known = [i for i, other in enumerate(distinct) if other is child]
            if not known:
                distinct.append(child)
            index = known[0] if known else len(distinct) - 1
            below = visit(child.name, child.sources, child.reads, index, here)
            for edge in edges:
                if edge in important:
                    s, r = edge
                    raise InputError(f"two reads of {name!r} claim the edge {graph.sources[s]}->{graph.readers[r]}")
                important[edge] = below
        rows = tuple(graph.sources.index(s) for s in sources if s != "logits")
        nodes[here] = TreeNode(number, parent, rows, tuple((*e, t) for e, t in important.items()), not reads)
        return here

    if not hypothesis.reads:
        raise InputError("the hypothesis says nothing: give at least one interpretation that the logits read")
    visit("logits", ("logits",), hypothesis.reads, -1, -1)
    return tuple(nodes), tuple(distinct)


def _edges(graph: Graph, name: str, sources: tuple[str, ...], read: Read) -> Iterator[tuple[int, int]]:
    """Edges from what is read into the sources that read it."""
    child = read.node
    unknown = [s for s in child.sources if s not in graph.sources]
    if unknown or not child.sources:
        raise InputError(
            f"interpretation {child.name!r}: no source {unknown[0]!r}; they are 'input' to {graph.sources[-1]!r}"
            if unknown
            else f"interpretation {child.name!r} names no source"
        )
    wrong = [letter for letter in read.by if letter not in READERS]
    if wrong:
        raise InputError(f"{name!r} reads {child.name!r} by {wrong[0]!r}; choose from {READERS}")
    rows = {
        row
        for source in sources
        for letter, group in readers_of(graph, source).items()
        if not read.by or letter in read.by
        for row in group
    }
    starts = [graph.sources.index(s) for s in child.sources]
    found = [(s, r) for s in starts for r in sorted(rows) if graph.edges[s, r]]
    if not found:
        by = f" by {', '.join(read.by)}" if read.by else ""
        raise InputError(f"{name!r} cannot read {child.name!r}{by}: the graph has no edge between them")
    yield from found


def agreeing_groups(interpretation: Interpretation, task: Task) -> np.ndarray:
    """A number for each prompt, equal where the values are.

    Raises:
      InputError: not one value a prompt.
    """
    values = interpretation.values
    values = np.asarray(values(task) if callable(values) else values)
    if len(values) != len(task):
        raise InputError(
            f"interpretation {interpretation.name!r} has {len(values)} values; the task has {len(task)} prompts"
        )
    _, groups = np.unique(values.reshape(len(values), -1), axis=0, return_inverse=True)
    return groups.reshape(-1)
