"""Sequences whose next token follows from attributes of earlier ones, by a rule that is known.

A token is a bundle of binary attributes. Attribute a of the next token is likely if exactly one of two things holds:
the current token has attribute `now[a]`, or the token two before it has attribute `before[a]`:

    p(next = w) ∝ exp(Σ_a attributes[w, a] (strength · evidence_a − cost)),    evidence = current XOR two back

A model that predicts well has to carry attributes, not tokens: there are many more tokens. One that sees two tokens
per layer has to carry those of the token before as well, in the stream between its layers, since what lies two tokens
back must pass through the position between.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.validation.superposition import SuperpositionConfig, superposition


@dataclasses.dataclass(frozen=True)
class AttributeTaskConfig:
    """The tokens and the rule.

    Attributes:
      mean_attributes: of a token.
      zipf_exponent, max_frequency, n_roots, branching: of the attributes, as in `SuperpositionConfig`.
      strength: of the evidence, nats.
      cost: of every attribute, nats; it keeps attributes from becoming ever more frequent along a sequence.
    """

    n_tokens: int = 512
    n_attributes: int = 32
    mean_attributes: float = 2.5
    zipf_exponent: float = 0.5
    max_frequency: float = 0.25
    n_roots: int | None = 24
    branching: int = 2
    n_pos: int = 16
    strength: float = 3.0
    cost: float = 0.7

    def __post_init__(self):
        if self.n_tokens < 2 or self.n_attributes < 3 or self.n_pos < 4:
            raise InputError(
                "the rule needs 2 tokens, 3 attributes and 4 positions or more; got "
                f"{self.n_tokens}, {self.n_attributes} and {self.n_pos}"
            )
        try:
            _ = self.bundles
        except InputError as error:
            raise InputError(f"attributes of tokens, with mean_attributes as their mean_l0: {error}") from error

    @property
    def bundles(self) -> SuperpositionConfig:
        """How attributes are dealt to tokens."""
        return SuperpositionConfig(
            n_features=self.n_attributes,
            d_model=1,
            mean_l0=self.mean_attributes,
            zipf_exponent=self.zipf_exponent,
            max_frequency=self.max_frequency,
            n_roots=self.n_roots,
            branching=self.branching,
        )


class AttributeTask(eqx.Module):
    """Tokens, their attributes, and the rule; make one with `attribute_task`.

    Attributes:
      attributes: 1 where a token has an attribute.
      now, before: for every attribute, the one of the current token, and of the token two back, that speak for it.
    """

    config: AttributeTaskConfig = eqx.field(static=True)
    attributes: Float[Array, "d_vocab attribute"]
    now: Int[Array, " attribute"]
    before: Int[Array, " attribute"]

    def evidence(
        self, current: Float[Array, "*batch attribute"], two_back: Float[Array, "*batch attribute"]
    ) -> Float[Array, "*batch attribute"]:
        """1 for the attributes that the next token is likely to have, from those of the tokens before it."""
        a, b = current[..., self.now], two_back[..., self.before]
        return a + b - 2 * a * b

    def logits(
        self, current: Float[Array, "*batch attribute"], two_back: Float[Array, "*batch attribute"]
    ) -> Float[Array, "*batch d_vocab"]:
        """Of the next token, up to a constant; attributes of a token that is not there are 0."""
        score = self.config.strength * self.evidence(current, two_back) - self.config.cost
        return score @ self.attributes.T

    def sequences(self, n: int, *, key: PRNGKeyArray) -> Int[Array, "batch pos"]:
        """n sequences, drawn from the rule."""

        def step(seen: tuple[Array, Array, Array], key: PRNGKeyArray) -> tuple[tuple[Array, Array, Array], Array]:
            current, one_back, two_back = seen
            p = jax.nn.softmax(self.logits(current, two_back), axis=-1)
            # the inverse of the distribution function: one random number a token, not one a token of the vocabulary
            drawn = (jnp.cumsum(p, axis=-1) < jax.random.uniform(key, (n, 1))).sum(-1, dtype=jnp.int32)
            token = jnp.minimum(drawn, self.config.n_tokens - 1)
            return (self.attributes[token], current, one_back), token

        none = jnp.zeros((n, self.config.n_attributes))
        return jax.lax.scan(step, (none, none, none), jax.random.split(key, self.config.n_pos))[1].T

    def log_probabilities(self, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos d_vocab"]:
        """Of the token after every position: what the best model gives."""
        current = self.attributes[tokens]
        return jax.nn.log_softmax(self.logits(current, _later(current, 2)), axis=-1)

    def features(self, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos feature"]:
        """The features that the stream between the layers has to carry: attributes of this token, then of the last."""
        current = self.attributes[tokens]
        return jnp.concatenate([current, _later(current, 1)], axis=-1)

    @property
    def n_features(self) -> int:
        """Those of the current token and those of the one before."""
        return 2 * self.config.n_attributes


def attribute_task(config: AttributeTaskConfig, *, key: PRNGKeyArray) -> AttributeTask:
    """Deals attributes to tokens, and draws which attribute speaks for which.

    Raises:
      InputError: an attribute that no token has, or a child that is as frequent as its parent.
    """
    k_bundles, k_first, k_second = jax.random.split(key, 3)
    fires = superposition(config.bundles, key=k_first).fires(config.n_tokens, key=k_bundles)
    counts = np.asarray(fires.sum(0))
    if not counts.all():
        raise InputError(
            f"of {config.n_tokens} tokens none has attribute {int(np.argmin(counts))}; "
            "more tokens or a smaller zipf_exponent make the rare attributes more frequent"
        )
    now, before = (jax.random.permutation(k, config.n_attributes) for k in jax.random.split(k_second))
    return AttributeTask(config, fires.astype(jnp.float32), now.astype(jnp.int32), before.astype(jnp.int32))


def _later(x: Float[Array, "batch pos attribute"], n: int) -> Float[Array, "batch pos attribute"]:
    """Every position gets the value n positions before it, and 0 where there is none."""
    return jnp.pad(x, ((0, 0), (n, 0), (0, 0)))[:, : x.shape[1]]
