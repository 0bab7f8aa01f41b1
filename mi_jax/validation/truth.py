"""Ground truth by exhaustive ablation: every edge is corrupted on its own, and the metric tells which ones matter.

A design says how a network was meant to work; this says how it does. The truth belongs to a task: an edge that carries
the same in the clean and the corrupt prompt, such as position, has no effect there.

Which effects count is not decided by a share that was fixed before: the edges are split where the effects have their
widest gap, by ratio. Where that gap is narrow there is no clear truth, and the edges next to it are named as undecided.
"""

import dataclasses
import functools

import numpy as np

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.faithfulness import faithfulness
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.errors import InputError
from mi_jax.core.transforms import jit
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder

# shares of the behaviour below this are not told apart: that the least ones differ by some factor means nothing
SMALLEST = 0.05
# an effect this near to the threshold, by ratio, is too close to call
TOO_CLOSE = 1.5


@dataclasses.dataclass(frozen=True)
class Truth:
    """The edges that a behaviour runs through.

    Attributes:
      designed: the edges that the mechanism was laid out on, `[source reader]`.
      effects: what the metric loses when the edge alone is corrupted, as a share of the gap between the clean and the
        corrupt prompt; 1 destroys the behaviour.
      faithfulness: of the designed edges, everything else corrupted.
      fixed_threshold: an absolute effect that counts; None puts it into the widest gap.
    """

    name: str
    graph: Graph
    designed: np.ndarray
    effects: np.ndarray
    faithfulness: float
    fixed_threshold: float | None = None

    @functools.cached_property
    def _gap(self) -> tuple[float, float]:
        """The effects on both sides of the widest gap, the larger one first."""
        effects = np.sort(np.abs(self.effects[self.graph.edges]))[::-1]
        steps = np.maximum(effects, SMALLEST)
        i = int(np.argmax(steps[:-1] / steps[1:]))
        return float(steps[i]), float(steps[i + 1])

    @property
    def threshold(self) -> float:
        """An edge matters when its absolute effect reaches this: the geometric mean of both sides of the gap."""
        above, below = self._gap
        return (above * below) ** 0.5 if self.fixed_threshold is None else self.fixed_threshold

    @property
    def margin(self) -> float:
        """The weakest effect that counts over the strongest that does not (or `SMALLEST`); 1 where all are alike."""
        above, below = self._gap
        return above / below

    @property
    def mask(self) -> np.ndarray:
        """The edges that matter, designed or not."""
        return self.graph.edges & (np.abs(self.effects) >= self.threshold)

    @property
    def undecided(self) -> list[str]:
        """Edges whose effect is within a factor of `TOO_CLOSE` of the threshold."""
        size = np.abs(self.effects)
        close = (size > self.threshold / TOO_CLOSE) & (size < self.threshold * TOO_CLOSE)
        return self.graph.names(close & self.graph.edges)

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
    model: Decoder, task: Task, designed: np.ndarray, *, threshold: float | None = None, batch_size: int = 16
) -> Truth:
    """Corrupts every edge of the graph on its own and compares with the design.

    Args:
      threshold: an absolute effect that counts, as a share of the gap between the prompts; None finds it.

    Raises:
      InputError: the clean and the corrupt prompts give the same metric.
    """
    graph = Graph.of(model.config)
    (kept,) = faithfulness(model, task, [designed])
    effects = edge_scores(model, task, method="exact", batch_size=batch_size) / _clean_minus_corrupt(model, task)
    return Truth(task.name, graph, designed, effects, float(kept), threshold)


def _clean_minus_corrupt(model: Decoder, task: Task) -> float:
    """By the metric that the effects are measured in, whatever the task's measure is."""
    clean, corrupt = (
        np.asarray(task.metric(jit(model)(tokens, task.mask, output_pos=task.position)), np.float64).mean()
        for tokens in (task.clean, task.corrupt)
    )
    if clean == corrupt:
        raise InputError(f"task {task.name!r}: clean and corrupt prompts give the same metric, {clean:.6g}")
    return float(clean - corrupt)
