"""The causal audit of a probe: is what it reads what the model uses?

A probe may read a correlate. The audit moves the activations along the probe's pattern until its score is that of
benign text, and measures what the model then does: the behaviour should go, benign behaviour should stay, and a step of
equal length from one activation towards another, drawn at random, should do neither. Isotropic directions are no such
control: most of them lie where activations do not vary, so that almost any other direction beats them. The edit is
also made at parts of its length, because one that is long enough breaks whatever it meets.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mi_jax.applications.probe import Probe
from mi_jax.core.edits import transform
from mi_jax.core.errors import InputError
from mi_jax.core.sites import at
from mi_jax.core.transforms import SiteModel, capture, intervene, jit


class SetScore(eqx.Module):
    """x ↦ x − dose · (score(x) − target) · direction where score(x) > limit; the other tokens are left alone.

    Along the probe's pattern a dose of 1 sets its score to `target`.
    """

    probe: Probe
    target: Float[Array, ""]
    limit: Float[Array, ""]
    direction: Float[Array, " d_model"]
    dose: Float[Array, ""]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        score = self.probe(x)
        excess = jnp.where(score > self.limit, score - self.target, 0.0) * self.dose
        return x - (excess[..., None] * jnp.broadcast_to(self.direction, x.shape)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one direction does.

    Attributes:
      effect: mean fall of the event's logit (relative to the mean logit) where it is predicted, before it appears.
      ci_low, ci_high: 95 % bootstrap interval over sequences.
      benign_kl: mean KL from the model's own predictions to the edited ones on benign sequences, nats per token.
      probability: of the event where it is predicted, before and after.
    """

    effect: float
    ci_low: float
    ci_high: float
    benign_kl: float
    probability: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Dose:
    """What a share of the whole step does.

    Attributes:
      dose: the share; 1 takes the probe's score to its target.
      probe: along the probe's pattern.
      random: along differences of two random activations, as long as the pattern.
    """

    dose: float
    probe: Effect
    random: tuple[Effect, ...]

    @property
    def random_effect(self) -> float:
        return float(np.mean([r.effect for r in self.random]))

    @property
    def random_highest(self) -> float:
        return float(np.max([r.effect for r in self.random]))

    @property
    def random_benign_kl(self) -> float:
        return float(np.mean([r.benign_kl for r in self.random]))

    @property
    def p_value(self) -> float:
        """Of the random directions and the probe's, the share that do at least as much as the probe's."""
        return (1 + sum(r.effect >= self.probe.effect for r in self.random)) / (1 + len(self.random))


@dataclasses.dataclass(frozen=True)
class Audit:
    """The probe's direction beside random ones of equal length, the whole step last."""

    doses: tuple[Dose, ...]

    @property
    def whole(self) -> Dose:
        return self.doses[-1]

    @property
    def saturation(self) -> float:
        """The effect of the largest dose up to a half, over that of the whole step: its share where effects are linear.

        Near 1 the step is longer than it need be, and says little about its direction: judge by the smaller doses.

        Raises:
          InputError: no dose up to a half, or no effect.
        """
        half = [d for d in self.doses if d.dose <= 0.5]
        if not half or not self.whole.probe.effect:
            raise InputError("saturation compares the whole step with a dose up to a half; there is none, or no effect")
        return half[-1].probe.effect / self.whole.probe.effect


def audit(
    model: SiteModel,
    probe: Probe,
    *,
    site: str,
    layer: int,
    triggered: Int[Array, "batch pos"],
    predicted_at: Int[Array, " batch"],
    event: int,
    benign: Int[Array, "benign_batch pos"],
    target: float,
    limit: float = -np.inf,
    key: PRNGKeyArray,
    n_random: int = 16,
    doses: Sequence[float] = (0.25, 0.5, 1.0),
) -> Audit:
    """Sets the probe's score to `target` wherever it is over `limit`, and compares with random displacements.

    With the monitor's threshold as the limit this is the edit that a monitor with a remedy would make; without a limit
    it is made at every token, which tells how much else the direction carries.

    Args:
      triggered: sequences that lead to the event.
      predicted_at: position whose logits predict the event; the model is causal, so nothing later can matter.
      event: the token.
      benign: sequences that do not.
      target: the score of benign text, such as its mean over tokens.
      n_random: differences of two activations, each of any position of these sequences.
      doses: parts of the step that are made, ascending; the last is 1.

    Raises:
      InputError: doses of another kind.
    """
    if not doses or doses[-1] != 1 or any(b <= a for a, b in itertools.pairwise((0.0, *doses))):
        raise InputError(f"doses are ascending shares of the step, above 0, and the last is 1; got {tuple(doses)}")
    clean, clean_benign = jit(model)(triggered), jit(model)(benign)

    def measure(direction: Array, dose: float, seed: int) -> Effect:
        score, over, share = (jnp.asarray(value, jnp.float32) for value in (target, limit, dose))
        edit = SetScore(probe, score, over, direction, share)
        edited = jit(intervene(model, transform(site, edit, layer=layer)))
        logits, logits_benign = edited(triggered), edited(benign)
        fall = np.asarray(_relative_logit(clean, predicted_at, event) - _relative_logit(logits, predicted_at, event))
        draws = np.random.default_rng(seed).choice(fall, (2000, len(fall))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        before, after = (float(_probability(each, predicted_at, event).mean()) for each in (clean, logits))
        kl = float(_kl(clean_benign, logits_benign).mean())
        return Effect(float(fall.mean()), float(low), float(high), kl, (before, after))

    read = jit(capture(model, at(site, layers=layer)))
    rows = [read(tokens, output=False)[1][site] for tokens in (triggered, benign)]
    size = float(jnp.linalg.norm(probe.pattern))
    activations = np.concatenate([np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in rows])
    random = _differences(activations, n_random, key)
    return Audit(
        tuple(
            Dose(
                dose,
                measure(probe.pattern, dose, 0),
                tuple(measure(size * direction, dose, i + 1) for i, direction in enumerate(random)),
            )
            for dose in doses
        )
    )


def _differences(x: Float[np.ndarray, "n d_model"], n: int, key: PRNGKeyArray) -> Float[Array, "direction d_model"]:
    """Directions of unit length from one activation to another, of pairs that differ."""
    first, second = np.asarray(jax.random.randint(key, (2, 8 * n), 0, len(x)))
    difference = x[first] - x[second]
    length = np.linalg.norm(difference, axis=1)
    apart = np.flatnonzero(length > 1e-6 * np.abs(x).max())[:n]
    if len(apart) < n:
        raise InputError(f"{n} random pairs of activations that differ are needed, and there are {len(apart)}")
    return jnp.asarray(difference[apart] / length[apart, None])


def _at(values: Array, position: Array) -> Array:
    return jnp.take_along_axis(values, position[:, None, None], axis=1)[:, 0]


def _relative_logit(logits: Array, position: Array, token: int) -> Array:
    at = _at(logits, position)
    return at[:, token] - at.mean(-1)


def _probability(logits: Array, position: Array, token: int) -> Array:
    return jax.nn.softmax(_at(logits, position))[:, token]


def _kl(reference: Array, other: Array) -> Array:
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(other)
    return (jnp.exp(p) * (p - q)).sum(-1)
