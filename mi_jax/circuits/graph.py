"""The computational graph: sources write to the residual stream, readers read from it, edges join them.

Sources are `input`, every head `a{l}.h{h}` and every MLP `m{l}`. Readers are `a{l}.h{h}<q>` per head, `a{l}.h{h}<k>`
and `<v>` per key/value head, `m{l}` and `logits`. There is an edge where the source is written before the reader reads;
in a parallel block, where attention and MLP read the same stream, none from a layer's heads to its MLP. In a mixture
every expert `m{l}.e{i}` is a source, of what it adds, gate included; the layer has one reader `m{l}`, of the router and
all experts. Heads and experts that go through a norm before they are added write their share of it
(`mi_jax.circuits.sources`). Biases are no sources.
Names follow EAP-IG (Hanna et al. 2024); grouped key/value heads keep their own readers.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Graph:
    """The edges of a decoder of this shape; arrays over edges have shape `[source reader]`.

    Attributes:
      parallel: attention and MLP of a layer read the same stream.
      n_experts: of every layer, each a source; 0 where the MLP is one.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    parallel: bool = False
    n_experts: int = 0

    @classmethod
    def of(cls, config: DecoderConfig) -> "Graph":
        """The graph of a model of this shape.

        Raises:
          InputError: a model whose sources do not add up to the stream, or that has no tokens or no logits.
        """
        _check(config)
        heads = config.n_heads, config.n_kv_heads
        return cls(config.n_layers, *heads, config.d_mlp > 0, config.parallel, config.n_experts)

    @property
    def layer_sources(self) -> int:
        """Heads of one layer, then its MLP or its experts."""
        return self.n_heads + self.mlp_sources

    @property
    def mlp_sources(self) -> int:
        return self.n_experts or int(self.has_mlp)

    @property
    def layer_readers(self) -> int:
        """Queries, keys and values of one layer, then its MLP."""
        return self.n_heads + 2 * self.n_kv_heads + self.has_mlp

    @property
    def n_sources(self) -> int:
        return 1 + self.n_layers * self.layer_sources

    @property
    def n_readers(self) -> int:
        return self.n_layers * self.layer_readers + 1

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{h}" for h in range(self.n_heads)]
            names += [f"m{layer}.e{i}" for i in range(self.n_experts)] or [f"m{layer}"] * self.has_mlp
        return tuple(names)

    @functools.cached_property
    def readers(self) -> tuple[str, ...]:
        names: list[str] = []
        for layer in range(self.n_layers):
            for letter, n in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                names += [f"a{layer}.h{h}<{letter}>" for h in range(n)]
            names += [f"m{layer}"] * self.has_mlp
        return (*names, "logits")

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """True where an edge exists, `[source reader]`."""
        # the moment of writing or reading: 2·layer for attention, 2·layer + 1 for an MLP that reads after it
        written, later = [-1], 0 if self.parallel else 1
        read: list[int] = []
        for layer in range(self.n_layers):
            written += [2 * layer] * self.n_heads + [2 * layer + later] * self.mlp_sources
            read += [2 * layer] * (self.n_heads + 2 * self.n_kv_heads) + [2 * layer + later] * self.has_mlp
        read.append(2 * self.n_layers)
        return np.asarray(written)[:, None] < np.asarray(read)[None, :]

    @property
    def n_edges(self) -> int:
        return int(self.edges.sum())

    def index(self, edge: str) -> tuple[int, int]:
        """Indices of `source->reader`.

        Raises:
          InputError: no such edge.
        """
        source, _, reader = edge.partition("->")
        s, r = self._places[0].get(source), self._places[1].get(reader)
        if s is not None and r is not None and self.edges[s, r]:
            return s, r
        example = f"'{self.sources[-1]}->logits'"
        raise InputError(f"no edge {edge!r}; edges look like 'input->{self.readers[0]}' or {example}")

    @functools.cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        return {name: i for i, name in enumerate(self.sources)}, {name: i for i, name in enumerate(self.readers)}

    def mask(self, edges) -> np.ndarray:
        """Boolean `[source reader]` with the named edges."""
        out = np.zeros((self.n_sources, self.n_readers), bool)
        for edge in edges:
            out[self.index(edge)] = True
        return out

    def names(self, mask: np.ndarray) -> list[str]:
        """The names of the edges in a mask."""
        return [f"{self.sources[s]}->{self.readers[r]}" for s, r in np.argwhere(mask & self.edges)]

    def prune(self, mask: np.ndarray) -> np.ndarray:
        """Drops edges that no path from the input to the logits uses.

        A head is alive when its value is read from something alive; its queries and keys alone carry nothing.
        """
        mask = mask & self.edges
        while True:
            kept = mask & self._reached(mask)[:, None] & self._useful(mask)[None, :]
            if (kept == mask).all():
                return kept
            mask = kept

    def reader_rows(self, name: str) -> list[int]:
        """Readers that a source (a head, an MLP or an expert) computes from."""
        layer, _, part = name[1:].partition(".")
        base = int(layer) * self.layer_readers
        if name[0] == "m":
            return [base + self.layer_readers - 1]
        head = part.removeprefix("h")
        group = int(head) * self.n_kv_heads // self.n_heads
        k = base + self.n_heads + group
        return [base + int(head), k, k + self.n_kv_heads]

    def _reached(self, mask: np.ndarray) -> np.ndarray:
        alive = np.zeros(self.n_sources, bool)
        alive[0] = True
        for i, name in enumerate(self.sources[1:], 1):
            alive[i] = bool((mask[:, self.reader_rows(name)[-1]] & alive).any())
        return alive

    def _useful(self, mask: np.ndarray) -> np.ndarray:
        useful = np.zeros(self.n_readers, bool)
        useful[-1] = True
        for i in range(self.n_sources - 1, 0, -1):
            if (mask[i] & useful).any():
                useful[self.reader_rows(self.sources[i])] = True
        return useful

    def to_json(self, mask: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        """Nodes and edges of a circuit, for drawing: `{"nodes": [...], "edges": [...]}`.

        Scores are positive where an edge supports the metric, as `edge_scores` are. A key or value that a group of
        heads shares is drawn into every head of the group that the circuit has, what a mixture reads into every expert.
        """
        found = np.argwhere(mask & self.edges)
        present = {self.sources[s] for s, _ in found}
        edges = []
        for s, r in found:
            reader, _, letter = self.readers[r].rstrip(">").partition("<")
            kind = letter or ("logits" if reader == "logits" else "mlp")
            for target in self._drawn_into(reader, letter, present):
                edges.append({"from": self.sources[s], "to": target, "input": kind, "score": float(scores[s, r])})
        names = dict.fromkeys(["input", *(e["from"] for e in edges), *(e["to"] for e in edges), "logits"])
        return {"nodes": [self._node(name) for name in names], "edges": edges}

    def _drawn_into(self, reader: str, letter: str, present: set[str]) -> list[str]:
        """The sources that a reader is part of, those of the circuit if there are any."""
        if letter in ("k", "v"):
            layer, _, shared = reader[1:].partition(".h")
            group = self.n_heads // self.n_kv_heads
            parts = [f"a{layer}.h{int(shared) * group + i}" for i in range(group)]
        elif reader[0] == "m" and self.n_experts:
            parts = [f"{reader}.e{i}" for i in range(self.n_experts)]
        else:
            return [reader]
        return [part for part in parts if part in present] or parts[:1]

    def _node(self, name: str) -> dict[str, Any]:
        if name in ("input", "logits"):
            return {"name": name, "layer": -1 if name == "input" else self.n_layers, "kind": name}
        kind = "head" if name[0] == "a" else "expert" if ".e" in name else "mlp"
        return {"name": name, "layer": int(name[1:].partition(".")[0]), "kind": kind}


def _check(config: DecoderConfig) -> None:
    reasons = {
        "its norms stand on the stream itself (norms='post')": config.norms == "post",
        "its inputs are images, not tokens": config.patches is not None,
        "it is an encoder without a head and has no logits": config.head == "none",
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"there is no graph of edges for {config.name}: {reason}")
