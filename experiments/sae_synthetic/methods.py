"""The architectures, how each is trained, and how its learning rate is chosen.

Nothing here sees the truth but for its mean L0: k is that number, and where a penalty decides how many codes there
are, a controller moves λ until L0 is that number. Starting points below were found by reconstruction error at that L0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.decomposition import Dictionary, DictionaryConfig, Knobs, Objective, TrainConfig, architecture, fit_many
from mi_jax.decomposition.training import fit


@dataclasses.dataclass(frozen=True)
class Method:
    """How an architecture of `mi_jax.decomposition.ARCHITECTURES` is trained.

    Attributes:
      control: gain of the controller of L0; 0 where k counts codes.
      fields: of `DictionaryConfig`. JumpReLU's thresholds and their window are in units of pre-activations, which
        random directions give a standard deviation of 1.
      objective: of `Objective`.
    """

    control: float = 0.0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "relu": Method(control=0.015, objective={"sparsity": 0.1}),
    "p_annealed": Method(control=0.015, objective={"sparsity": 0.1}),
    "gated": Method(control=0.015, objective={"sparsity": 1.0}),
    "jumprelu": Method(
        control=0.02,
        fields={"threshold": 2.0, "bandwidth": 2.0},
        # with the pre-activation loss alone, almost half of the latents stay dead
        objective={"sparsity": 1.0, "auxiliary": "auxk", "aux_coefficient": 0.2},
    ),
    "topk": Method(),
    "batchtopk": Method(),
    "matryoshka": Method(),
    "hierarchical_topk": Method(),
    "matching_pursuit": Method(),
}


class Sizes(Protocol):
    """What of a config is read here."""

    @property
    def steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Training:
    """One architecture on activations of one kind: everything but the seeds."""

    shape: DictionaryConfig
    objective: Objective
    schedule: TrainConfig
    l0: float

    @classmethod
    def of(cls, name: str, d_model: int, d_sae: int, l0: float, sizes: Sizes) -> "Training":
        """The training of an architecture at a mean L0."""
        method = METHODS[name]
        # the number itself is a knob, so that one program serves all settings
        target = {"target_l0": 1.0} if method.control else {}
        shape, objective = architecture(
            name, d_model, d_sae, objective={**method.objective, **target}, k=max(1, round(l0)), **method.fields
        )
        # a sample without features has next to no norm, so that the others would count as massive
        options = {"control": method.control, "massive_ratio": None}
        schedule = TrainConfig(steps=sizes.steps, batch_size=sizes.batch_size, **options)
        return cls(shape, objective, schedule, l0)

    def knobs(self, rates: Sequence[float] | float) -> Knobs:
        """The numbers of a run, or of several."""
        learning_rate = jnp.asarray(rates, jnp.float32)
        run = learning_rate.shape
        return Knobs(
            sparsity=jnp.full(run, self.objective.sparsity, jnp.float32),
            learning_rate=learning_rate,
            k=jnp.full(run, self.shape.k, jnp.int32),
            target_l0=jnp.full(run, self.l0, jnp.float32),
        )

    def fit(
        self, x: Float[Array, "n d_model"], keys: Sequence[Array], rates: Sequence[float] | float
    ) -> list[Dictionary]:
        """One dictionary per key."""
        return fit_many(x, self.shape, self.objective, self.schedule, keys=keys, knobs=self.knobs(rates))[0]

    def fit_random_decoder(self, x: Float[Array, "n d_model"], key: Array, rate: float) -> Dictionary:
        """The null whose directions are never trained."""
        options = {"key": key, "knobs": self.knobs(rate), "frozen_decoder": True}
        return fit(x, self.shape, self.objective, self.schedule, **options)[0]


def reconstruction(
    codes: Float[Array, "n d_sae"],
    guess: Float[Array, "n d_model"],
    x: Float[Array, "n d_model"],
    mean: Float[Array, " d_model"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """L0, and the fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    l0 = (codes != 0).sum(1).mean(dtype=x.dtype)
    error, centred = x - guess, x - mean[None, :]
    return l0, (error**2).sum() / (centred**2).sum()


def choose_rate(
    training: Training,
    x: Float[Array, "n d_model"],
    held_out: Float[Array, "n_test d_model"],
    rates: Sequence[float],
    *,
    key: Array,
    tolerance: float = 0.25,
) -> tuple[float, list[tuple[float, float]]]:
    """The rate with the best reconstruction among those whose L0 is within `tolerance` of the target.

    If none is, the one whose L0 is nearest. All trainings start from the same directions.

    Returns:
      The rate, and L0 and FVU of each.
    """
    mean, found = x.mean(0), []
    for dictionary in training.fit(x, [key] * len(rates), rates):
        l0, fvu = reconstruction(dictionary.encode(held_out), dictionary(held_out), held_out, mean)
        found.append((float(l0), float(fvu)))
    off = np.abs(np.log([max(l0, 1e-3) / training.l0 for l0, _ in found]))
    near = off <= np.log1p(tolerance)
    best = int(np.argmin(np.where(near, [fvu for _, fvu in found], np.inf) if near.any() else off))
    return rates[best], found
