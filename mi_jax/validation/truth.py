"""Ground truth by exhaustive ablation: every edge is corrupted on its own, and the metric tells which ones matter.

A design says how a network was meant to work; this says how it does. The truth belongs to a task: an edge that carries
the same in the clean and the corrupt prompt, such as position, has no effect there.
"""

import dataclasses

import numpy as np

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.faithfulness import faithfulness
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.transforms import jit
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

THRESHOLD = 0.05


@dataclasses.dataclass(frozen=True)
class Truth:
    """The edges that a behaviour runs through.

    Attributes:
      designed: the edges that the mechanism was laid out on, `[source reader]`.
      effects: what the metric loses when the edge alone is corrupted, as a share of the gap between the clean and the
        corrupt prompt; 1 destroys the behaviour.
      threshold: an edge matters when its absolute effect reaches this.
      faithfulness: of the designed edges, everything else corrupted.
    """

    name: str
    graph: Graph
    designed: np.ndarray
    effects: np.ndarray
    faithfulness: float
    threshold: float = THRESHOLD

    @property
    def mask(self) -> np.ndarray:
        """The edges that matter, designed or not."""
        return self.graph.edges & (np.abs(self.effects) >= self.threshold)

    @property
    def weakest_designed(self) -> float:
        return float(np.abs(self.effects[self.designed]).min())

    @property
    def strongest_other(self) -> float:
        return float(np.abs(self.effects[self.graph.edges & ~self.designed]).max())

    @property
    def idle(self) -> list[str]:
        """Designed edges that do not matter."""
        return self.graph.names(self.designed & ~self.mask)

    @property
    def stray(self) -> list[str]:
        """Edges outside the design that matter."""
        return self.graph.names(self.mask & ~self.designed)

    @property
    def as_designed(self) -> bool:
        """Whether exactly the designed edges matter."""
        return not self.idle and not self.stray


def verify(
    model: Decoder, task: Task, designed: np.ndarray, *, threshold: float = THRESHOLD, batch_size: int = 16
) -> Truth:
    """Corrupts every edge of the graph on its own and compares with the design.

    Raises:
      ValueError: the clean and the corrupt prompts give the same metric.
    """
    graph = Graph.of(model.config)
    (kept,) = faithfulness(model, task, [designed])
    effects = edge_scores(model, task, method="exact", batch_size=batch_size) / _gap(model, task)
    return Truth(task.name, graph, designed, effects, float(kept), threshold)


def _gap(model: Decoder, task: Task) -> float:
    """Clean minus corrupt metric."""
    clean, corrupt = (
        task.logit_difference(jit(model)(tokens, task.mask, output_pos=task.position)).mean()
        for tokens in (task.clean, task.corrupt)
    )
    return float(clean - corrupt)
