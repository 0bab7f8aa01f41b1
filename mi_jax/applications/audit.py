"""The causal audit of a probe: is what it reads what the model uses?

A probe may read a correlate. The audit moves the activations along the probe's pattern until its score is that of
benign text, and measures what the model then does: the behaviour should go, benign behaviour should stay, and a
displacement of equal size in a random direction should do neither.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mi_jax.applications.probe import Probe
from mi_jax.core.edits import transform
from mi_jax.core.transforms import SiteModel, intervene, jit


class SetScore(eqx.Module):
    """x ↦ x − (score(x) − target) · direction where score(x) > limit; the other tokens are left alone.

    Along the probe's pattern this sets its score to `target`.
    """

    probe: Probe
    target: Float[Array, ""]
    limit: Float[Array, ""]
    direction: Float[Array, " d_model"]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        score = self.probe(x)
        excess = jnp.where(score > self.limit, score - self.target, 0.0)
        return x - excess[..., None] * jnp.broadcast_to(self.direction, x.shape)


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
class Audit:
    """The probe's direction beside random ones of equal norm."""

    probe: Effect
    random: tuple[Effect, ...]

    @property
    def random_effect(self) -> float:
        return float(np.mean([r.effect for r in self.random]))

    @property
    def random_benign_kl(self) -> float:
        return float(np.mean([r.benign_kl for r in self.random]))


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
    """
    clean, clean_benign = jit(model)(triggered), jit(model)(benign)

    def measure(direction: Array, seed: int) -> Effect:
        edit = SetScore(probe, jnp.asarray(target, jnp.float32), jnp.asarray(limit, jnp.float32), direction)
        edited = jit(intervene(model, transform(site, edit, layer=layer)))
        logits, logits_benign = edited(triggered), edited(benign)
        fall = np.asarray(_relative_logit(clean, predicted_at, event) - _relative_logit(logits, predicted_at, event))
        draws = np.random.default_rng(seed).choice(fall, (2000, len(fall))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        before, after = (float(_probability(each, predicted_at, event).mean()) for each in (clean, logits))
        kl = float(_kl(clean_benign, logits_benign).mean())
        return Effect(float(fall.mean()), float(low), float(high), kl, (before, after))

    size = jnp.linalg.norm(probe.pattern)
    random = jax.random.normal(key, (n_random, *probe.pattern.shape))
    random = size * random / jnp.linalg.norm(random, axis=1, keepdims=True)
    return Audit(measure(probe.pattern, 0), tuple(measure(direction, i + 1) for i, direction in enumerate(random)))


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
