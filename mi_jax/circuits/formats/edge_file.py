"""What a file of edges holds, and whether it is for this model."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.core.errors import InputError
from mi_jax.models.config import DecoderConfig

Dangling = Literal["keep", "prune"]


@dataclasses.dataclass(frozen=True)
class EdgeFile:
    """Scores of edges and a circuit, on the graph of a model. What is not an edge has score 0 and is in no circuit.

    Attributes:
      scores: positive where an edge supports the metric.
      circuit: the edges that are kept.
      d_model: width of the stream.
      node_scores: NaN where a source has none.
      neurons: which coordinates of what a source writes are kept.
      neuron_scores: NaN where a coordinate has none.

    Raises:
      InputError: an array of another shape than the graph's, a score that is not finite.
    """

    graph: Graph
    scores: Float[np.ndarray, "source reader"]
    circuit: Bool[np.ndarray, "source reader"]
    d_model: int
    node_scores: Float[np.ndarray, " source"] | None = None
    neurons: Bool[np.ndarray, "source d_model"] | None = None
    neuron_scores: Float[np.ndarray, "source d_model"] | None = None

    def __post_init__(self):
        sources, readers = self.graph.n_sources, self.graph.n_readers
        shapes = {
            "scores": (sources, readers),
            "circuit": (sources, readers),
            "node_scores": (sources,),
            "neurons": (sources, self.d_model),
            "neuron_scores": (sources, self.d_model),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise InputError(f"{name} has shape {array.shape}; this graph needs {shape}")
        bad = self.graph.edges & ~np.isfinite(self.scores)
        if bad.any():
            raise InputError(f"the score of edge {self.graph.names(bad)[0]!r} is not finite; {int(bad.sum())} are not")
        object.__setattr__(self, "scores", np.where(self.graph.edges, self.scores, 0).astype(self.scores.dtype))
        object.__setattr__(self, "circuit", self.circuit & self.graph.edges)

    @property
    def nodes(self) -> Bool[np.ndarray, " source"]:
        """Sources that an edge of the circuit leaves or enters."""
        entered = [self.circuit[:, self.graph.reader_rows(name)].any() for name in self.graph.sources[1:]]
        return self.circuit.any(1) | np.array([False, *entered])

    def without_dangling(self, dangling: Dangling) -> "EdgeFile":
        """With "prune", the circuit without the edges that no path from the input to the logits uses (`Graph.prune`).

        Raises:
          InputError: neither "keep" nor "prune".
        """
        if dangling not in ("keep", "prune"):
            raise InputError(f"dangling={dangling!r}; edges that lead nowhere are kept, 'keep', or dropped, 'prune'")
        return self if dangling == "keep" else dataclasses.replace(self, circuit=self.graph.prune(self.circuit))


def check_model(path: str, found: dict[str, object], config: DecoderConfig) -> None:
    """Compares what a file says about its model with a config.

    Args:
      found: of the file, under the names below; what it does not say is not compared.

    Raises:
      InputError: it is for another model; the message names what differs.
    """
    expected = {
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "d_model": config.d_model,
        "parallel_attn_mlp": config.parallel,
        "has_mlp": config.d_mlp > 0,
        "n_experts": config.n_experts,
    }
    differs = [
        f"{name} is {found[name]} in the file and {value} in the model"
        for name, value in expected.items()
        if name in found and found[name] != value
    ]
    if differs:
        raise InputError(f"{path} holds edges of another model than {config.name}: {'; '.join(differs)}")
