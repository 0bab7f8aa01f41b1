"""The schedule of one training run, and the numbers of it that may differ between trainings of one program."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mi_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Schedule of one training run.

    Attributes:
      steps: optimiser steps in all.
      batch_size: tokens per step.
      learning_rate: peak of the schedule, for activations of unit variance per dimension.
      warmup_steps: steps of linear rise from zero, fewer than `steps`; None for 50, or a quarter of the steps where
        that is less.
      decay_fraction: last part of the run, over which the rate falls linearly to zero, without the warm-up.
      optimiser: `adam`, `signum` (sign of the momentum) or `muon`.
      b1, b2: decay rates of the moments.
      clip: largest global norm of a gradient; None for no limit.
      decoder: `unit`, rows keep norm 1 and gradients lose their part along them; `free`.
      dead_after: tokens without firing after which a latent counts as dead.
      sparsity_warmup_steps: steps over which λ rises linearly from zero.
      k_start: places per token at the first step, falling linearly to k over `k_steps`; None for k from the start.
      k_steps: see `k_start`.
      control: gain of the controller that moves λ until L0 is the objective's `target_l0`; 0 for none.
      resample_every: steps between which dead latents are drawn anew from badly reconstructed tokens; 0 for never.
      resample_until: no resampling after this fraction of the steps.
      threshold_rate: weight of a batch in the running mean of BatchTopK's smallest code, while it trains.
      steps_per_call: optimiser steps per compiled call, at most; a call ends with its epoch.
      massive_ratio: `fit` refuses activations with a norm over this many times the median; None lets them pass.
    """

    steps: int = 1200
    batch_size: int = 1024
    learning_rate: float = 2.5e-3
    warmup_steps: int | None = None
    decay_fraction: float = 0.5
    optimiser: Literal["adam", "signum", "muon"] = "adam"
    b1: float = 0.9
    b2: float = 0.99
    clip: float | None = None
    decoder: Literal["unit", "free"] = "unit"
    dead_after: int = 20_000
    sparsity_warmup_steps: int = 0
    k_start: int | None = None
    k_steps: int = 0
    control: float = 0.0
    resample_every: int = 0
    resample_until: float = 0.7
    threshold_rate: float = 0.01
    steps_per_call: int = 50
    massive_ratio: float | None = 10.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "dead_after", "steps_per_call"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps} of steps={self.steps}: the peak of the rate would never be reached; "
                "warmup_steps is from 0 to steps − 1, or None"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise InputError(f"decay_fraction={self.decay_fraction} is a fraction of the steps, from 0 to 1")
        if self.optimiser not in ("adam", "signum", "muon"):
            raise InputError(f"optimiser must be adam, signum or muon, got {self.optimiser!r}")
        if self.decoder not in ("unit", "free"):
            raise InputError(f"decoder must be unit or free, got {self.decoder!r}")

    @property
    def warmup(self) -> int:
        """Steps of the rise."""
        return min(50, self.steps // 4) if self.warmup_steps is None else self.warmup_steps


class Knobs(eqx.Module):
    """Numbers that may differ between trainings of one program; each may have a leading axis under `vmap`.

    Attributes:
      sparsity: λ.
      learning_rate: the schedule's peak.
      k: codes per token, at most the configured k.
      target_l0: of the controller.
    """

    sparsity: Float[Array, "*run"]
    learning_rate: Float[Array, "*run"]
    k: Int[Array, "*run"]
    target_l0: Float[Array, "*run"]


def rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, a constant 1, and linear decay that is zero after the last step; times `Knobs.learning_rate`."""
    warmup = config.warmup
    decay = max(1, min(round(config.decay_fraction * config.steps), config.steps - warmup))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warmup),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, decay),
        ],
        [warmup, config.steps - decay],
    )


def direction(config: TrainConfig) -> optax.GradientTransformation:
    """The optimiser without its rate."""
    match config.optimiser:
        case "adam":
            chosen = optax.scale_by_adam(b1=config.b1, b2=config.b2)
        case "signum":
            chosen = optax.chain(optax.trace(decay=config.b1), optax.stateless_with_tree_map(lambda g, _: jnp.sign(g)))
        case _:
            # orthogonalises the updates of matrices and treats vectors as Adam does; it descends, the others do not
            muon = optax.contrib.muon(1.0, beta=config.b1, adam_b1=config.b1, adam_b2=config.b2)
            chosen = optax.chain(muon, optax.scale(-1.0))
    return chosen if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), chosen)
