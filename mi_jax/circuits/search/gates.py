"""Random gates with a trainable logit each, 1 keeping an edge and 0 removing it.

*Hard concrete* (Louizos et al. 2018): `clip(sigmoid((log u − log(1 − u) + logit) / β) · (ζ − γ) + γ, 0, 1)` with u
uniform and β = 2/3, γ = −0.1, ζ = 1.1, the constants of that paper. It is 0 or 1 with positive probability and has a
gradient in between.

*Uniform gradient sampling* (Li & Janson 2024): a gate with `p = sigmoid(logit)` is 1 with probability p, save that
with probability p(1 − p) it is drawn uniformly from [0, 1] and then alone has a gradient, which goes to the logit. Its
mean is p(1 − p) times the mean slope of the loss from 0 to 1, which is the gradient of the expected loss.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1


def hard_concrete(logits: Float[Array, "*edge"], *, key: PRNGKeyArray) -> Float[Array, "*edge"]:
    """A draw of hard-concrete gates."""
    noise = jax.random.logistic(key, logits.shape, logits.dtype)
    return jnp.clip(jax.nn.sigmoid((noise + logits) / _TEMPERATURE) * (_HIGH - _LOW) + _LOW, 0, 1)


def hard_concrete_open(logits: Float[Array, "*edge"]) -> Float[Array, "*edge"]:
    """The probability that a hard-concrete gate is not 0."""
    return jax.nn.sigmoid(logits - _TEMPERATURE * math.log(-_LOW / _HIGH))


def uniform_gradient(logits: Float[Array, "*edge"], *, key: PRNGKeyArray) -> Float[Array, "*edge"]:
    """A draw of gates with uniform gradient sampling."""
    which, value, coin = (jax.random.uniform(k, logits.shape, logits.dtype) for k in jax.random.split(key, 3))
    p = jax.nn.sigmoid(logits)
    sampled = which < p * (1 - p)
    gate = jnp.where(sampled, value, (coin < p).astype(logits.dtype))
    # the gradient with respect to the gate, as it is, becomes that of the logit
    return jax.lax.stop_gradient(gate) + jnp.where(sampled, logits - jax.lax.stop_gradient(logits), 0)
