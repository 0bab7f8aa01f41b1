"""Faithfulness and completeness of feature circuits, with intervals over prompts and beside random circuits.

Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv 2403.19647), section 3; random circuits are ours.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.features.effects import difference
from mi_jax.circuits.features.sparse_feature_circuits import FeatureCircuit
from mi_jax.circuits.features.spliced import (
    NodeSplice,
    Place,
    SplicedModel,
    ablated_states,
    activations,
    check_ablation,
)
from mi_jax.core.edits import transform
from mi_jax.core.errors import InputError
from mi_jax.core.transforms import intervene
from mi_jax.data.task import Task
from mi_jax.decomposition.evaluation.estimates import Estimate, Null, bootstrap

Nodes = Int[np.ndarray, "node 3"]
_Masks = tuple[dict[Place, Bool[np.ndarray, "pos _"]], dict[Place, Bool[np.ndarray, " pos"]]]


@dataclasses.dataclass(frozen=True)
class FeatureFaithfulness:
    """The metric of every prompt in four runs, and what it says of a circuit.

    Attributes:
      runs: of the model; with all nodes ablated; with all ablated but the circuit's; with the circuit's ablated.
      random: the last two, for random circuits.
    """

    runs: Float[np.ndarray, "4 batch"]
    random: Float[np.ndarray, "null 2 batch"]

    @property
    def full(self) -> float:
        """The mean metric of the model."""
        return float(self.runs[0].mean())

    @property
    def empty(self) -> float:
        """The mean metric with all nodes ablated."""
        return float(self.runs[1].mean())

    @property
    def circuit(self) -> float:
        """The mean metric with all nodes ablated but those of the circuit."""
        return float(self.runs[2].mean())

    @property
    def complement(self) -> float:
        """The mean metric with the nodes of the circuit ablated."""
        return float(self.runs[3].mean())

    @property
    def faithfulness(self) -> float:
        """(circuit − empty) / (full − empty): 1 where the circuit alone does what the model does."""
        return (self.circuit - self.empty) / (self.full - self.empty)

    @property
    def completeness(self) -> float:
        """The faithfulness of everything but the circuit: 0 where nothing outside it does the task."""
        return (self.complement - self.empty) / (self.full - self.empty)

    @property
    def faithfulness_null(self) -> Null:
        """The faithfulness of random circuits."""
        return self._null(0)

    @property
    def completeness_null(self) -> Null:
        """The completeness of random circuits."""
        return self._null(1)

    def intervals(self, *, key: Array) -> dict[str, Estimate]:
        """`faithfulness` and `completeness` with their 95 % intervals over prompts.

        Raises:
          InputError: a task of one prompt.
        """
        if self.runs.shape[1] < 2:
            raise InputError("an interval over prompts needs two or more of them; this task has one")

        def of(run: int):
            def statistic(totals):
                # a resample may hold only prompts that the two ends do not tell apart
                with np.errstate(divide="ignore", invalid="ignore"):
                    return (totals[..., run] - totals[..., 1]) / (totals[..., 0] - totals[..., 1])

            return bootstrap(statistic, self.runs.T, key=key)

        return {"faithfulness": of(2), "completeness": of(3)}

    def _null(self, which: int) -> Null:
        if not len(self.random):
            raise InputError("no random circuits were run: ask for some with null_circuits")
        return Null.of((self.random[:, which].mean(-1) - self.empty) / (self.full - self.empty))


def feature_faithfulness(
    spliced: SplicedModel,
    task: Task,
    circuit: FeatureCircuit | Nodes,
    *,
    ablation: str = "mean-positional",
    keep_errors: bool = False,
    null_circuits: int = 10,
    seed: int = 0,
) -> FeatureFaithfulness:
    """Runs a task with only the nodes of a circuit, without them, without all, and so for random circuits.

    Args:
      circuit: a circuit, or its nodes.
      ablation: what the nodes outside hold; see `feature_effects`.
      keep_errors: errors stay in all runs, so that only features are tested.
      null_circuits: how many circuits of `random_nodes` to run.
      seed: draws them.

    Raises:
      InputError: a node that does not exist, an unknown ablation, or a metric that ablating all nodes does not change.
    """
    check_ablation(ablation)
    nodes = circuit.nodes if isinstance(circuit, FeatureCircuit) else circuit
    n_pos = task.clean.shape[1]

    def metrics(*kept: _Masks) -> Float[np.ndarray, "run batch"]:
        codes, errors = (
            jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *each) for each in zip(*kept, strict=True)
        )
        if keep_errors:
            errors = jax.tree.map(jnp.ones_like, errors)
        return np.asarray(_metrics(spliced, task, ablation, (codes, errors)), np.float64)

    def alone_and_without(nodes: Nodes) -> Float[np.ndarray, "2 batch"]:
        masks = _masks(spliced, nodes, n_pos)
        return metrics(masks, jax.tree.map(np.logical_not, masks))

    found = alone_and_without(nodes)
    none = _masks(spliced, nodes[:0], n_pos)
    ends = metrics(jax.tree.map(np.logical_not, none), none)
    full, empty = ends.mean(1).tolist()
    if abs(full - empty) <= 1e-6 * max(1.0, abs(full)):
        raise InputError(
            f"the metric is {full:.4g} with all nodes and {empty:.4g} with none, so no circuit can be told from "
            "another; ablate with other values, or at more places"
        )
    drawn = random_nodes(spliced, task, nodes, null_circuits, ablation=ablation, seed=seed) if null_circuits else []
    random = [np.zeros((0, *found.shape)), *(alone_and_without(each)[None] for each in drawn)]
    return FeatureFaithfulness(np.concatenate([ends, found]), np.concatenate(random))


def random_nodes(
    spliced: SplicedModel, task: Task, nodes: Nodes, n: int, *, ablation: str = "mean-positional", seed: int = 0
) -> list[Nodes]:
    """Random circuits: in every place as many features and errors, of one position or of all, as `nodes` has.

    They are drawn from the nodes that ablation changes on some prompt, for most features of a large dictionary do
    nothing there, nor does an error at padding; where a place has fewer of them, all are taken.
    """
    check_ablation(ablation)
    codes, errors = jax.tree.map(np.asarray, _moved(spliced, task, ablation))
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        drawn = [np.zeros((0, 3), np.int32)]
        for index, place in enumerate(spliced.places):
            at_place = nodes[nodes[:, 0] == index]
            everywhere, error = at_place[:, 1] < 0, at_place[:, 2] < 0
            latents, positions = np.flatnonzero(codes[place].any(0)), np.flatnonzero(errors[place])
            # rows of position and latent
            pools = {
                (False, False): np.argwhere(codes[place]),
                (True, False): np.stack([np.full(len(latents), -1), latents], 1),
                (False, True): np.stack([positions, np.full(len(positions), -1)], 1),
                (True, True): np.array([[-1, -1]]),
            }
            for (all_positions, is_error), pool in pools.items():
                count = int(((everywhere == all_positions) & (error == is_error)).sum())
                rows = pool[rng.permutation(len(pool))[:count]]
                drawn.append(np.c_[np.full(len(rows), index), rows].astype(np.int32))
        out.append(np.concatenate(drawn))
    return out


@eqx.filter_jit
def _moved(
    spliced: SplicedModel, task: Task, ablation: str
) -> tuple[dict[Place, Bool[Array, "pos _"]], dict[Place, Bool[Array, " pos"]]]:
    """Which latents, and where which errors, ablation changes on some prompt."""
    moved = difference(spliced, task, activations(spliced, task.clean, task.mask), ablation)
    codes = {place: (dz != 0).any(0) for place, dz in moved.codes.items()}
    return codes, {place: (error != 0).any((0, 2)) for place, error in moved.errors.items()}


def _masks(spliced: SplicedModel, nodes: Nodes, n_pos: int) -> _Masks:
    """Of the codes and of the errors that are nodes."""
    codes = {place: np.zeros((n_pos, one.d_sae), bool) for place, one in spliced.dictionaries.items()}
    errors = {place: np.zeros(n_pos, bool) for place in spliced.dictionaries}
    for index, pos, latent in np.asarray(nodes).tolist():
        if not 0 <= index < len(spliced.places):
            raise InputError(f"there are places 0–{len(spliced.places) - 1}; got a node of place {index}")
        place = spliced.places[index]
        d_sae = spliced.dictionaries[place].d_sae
        if not -1 <= pos < n_pos or not -1 <= latent < d_sae:
            raise InputError(
                f"{place[0]!r} layer {place[1]} has latents 0–{d_sae - 1} (−1: the error) and the prompts positions "
                f"0–{n_pos - 1} (−1: all); got latent {latent} at position {pos}"
            )
        at = slice(None) if pos < 0 else pos
        if latent < 0:
            errors[place][at] = True
        else:
            codes[place][at, latent] = True
    return codes, errors


@eqx.filter_jit
def _metrics(spliced: SplicedModel, task: Task, ablation: str, masks: tuple[dict, dict]) -> Float[Array, "run batch"]:
    ablated = ablated_states(spliced, task, ablation)

    def run(kept):
        codes, errors = kept
        edits = []
        for place, one in spliced.dictionaries.items():
            values = ablated.codes[place], ablated.errors[place]
            edits.append(transform(place[0], NodeSplice(one, codes[place], errors[place], *values), layer=place[1]))
        return task.metric(intervene(spliced.model, *edits)(task.clean, task.mask, output_pos=task.position))

    return jax.lax.map(run, masks)
