"""The end-to-end loss: what a model's predictions lose when a dictionary's reconstruction takes an activation's place.

Source: Braun et al. 2024, "Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning"
(arXiv 2405.12241), section 2.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import Chosen
from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.evaluation.recovered import kl_divergence
from mi_jax.decomposition.objective import Coefficients, Losses, dead_latents, reads_dead, terms
from mi_jax.decomposition.training.continuation import Continuation


@dataclasses.dataclass(frozen=True)
class EndToEnd:
    """What a dictionary inside a model is trained for.

    The loss is kl · KL + downstream · D + local · R + λ · penalty + α · auxiliary.

    Attributes:
      codes: penalty and auxiliary loss, and which reconstruction loss R is.
      kl: weight of KL(clean ‖ spliced) of the next-token distribution, in nats, mean over predictions.
      downstream: weight of D, the fraction of variance unexplained of the streams after later layers, mean over layers
        (the source's in→orig).
      local: weight of R, at the site itself (out→orig).
      layers: the later layers of D; None for all.
    """

    codes: Objective
    kl: float = 1.0
    downstream: float = 0.0
    local: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.codes.reconstruction == "hierarchical":
            raise InputError(
                "end to end there is one reconstruction; reconstruction='hierarchical' has one for every k"
            )
        if min(self.kl, self.downstream, self.local) < 0 or self.kl + self.downstream + self.local == 0:
            raise InputError("kl, downstream and local are weights of 0 or more, of which one is over 0")


class EndToEndLosses(Losses):
    """The parts of the loss; `reconstruction` and `error` are of the site itself, in normalised units.

    Attributes:
      kl: KL(clean ‖ spliced), mean over predictions at or after the first replaced token.
      downstream: fraction of variance unexplained of later streams.
    """

    kl: Float[Array, ""]
    downstream: Float[Array, ""]


class Clean(eqx.Module):
    """A batch of contexts in the model's own run.

    Attributes:
      tokens, mask: the contexts.
      value: the activation that is replaced.
      used: the tokens at which it is.
      x, y: what the dictionary reads and is to write, normalised: a row per token after the first positions.
      valid: rows of tokens that are replaced; the others have no weight.
      logits, later: what the model makes of `value`.
    """

    tokens: Int[Array, "context pos"]
    mask: Bool[Array, "context pos"]
    value: Float[Array, "context pos d_out"]
    used: Bool[Array, "context pos"]
    x: Float[Array, "token d_in"]
    y: Float[Array, "token d_out"]
    valid: Bool[Array, " token"]
    logits: Float[Array, "context pos d_vocab"]
    later: Float[Array, "later context pos d_stream"] | None


def end_to_end_loss(
    dictionary: Dictionary,
    clean: Clean,
    rest: Continuation,
    scale: Float[Array, ""],
    dead: Bool[Array, " d_sae"],
    objective: EndToEnd,
    coefficients: Coefficients,
    chosen: Chosen | None = None,
    few: Dictionary | None = None,
) -> tuple[Float[Array, ""], EndToEndLosses]:
    """The loss of `EndToEnd` on a batch of contexts.

    Args:
      dictionary: differentiated; in normalised units.
      clean: the model's own run.
      rest: runs the model on from a replaced activation.
      scale: factor of the normalisation of `clean.y`.
      dead: latents that count as dead.
      objective: which terms.
      coefficients: their traced numbers.
      chosen: `dictionary.choose(clean.x, clean.valid)`; None computes dense codes.
      few: as for `objective.loss`.
    """
    if few is None and reads_dead(objective.codes):
        few = dead_latents(dictionary, dead, objective.codes)
    parts, error = terms(dictionary, clean.x, clean.y, dead, objective.codes, coefficients, chosen, few, clean.valid)
    zero = jnp.zeros((), error.dtype)
    kl = downstream = zero
    if objective.kl or objective.downstream:
        n_context, n_pos = clean.tokens.shape
        error = (error / scale).reshape(n_context, -1, error.shape[-1])
        # the first positions have no row: they stay as they are
        error = jnp.pad(error, ((0, 0), (n_pos - error.shape[1], 0), (0, 0)))
        value = clean.value - jnp.where(clean.used[..., None], error.astype(clean.value.dtype), 0.0)
        logits, later = rest(value, clean.tokens, clean.mask)
        counts = clean.mask & (jnp.cumsum(clean.used, 1) > 0)
        each = kl_divergence(clean.logits.astype(error.dtype), logits.astype(error.dtype))
        kl = jnp.where(counts, each, 0.0).sum() / jnp.maximum(counts.sum(dtype=error.dtype), 1.0)
        if later is not None and clean.later is not None:
            downstream = _unexplained(clean.later, later, clean.used)
    total = objective.kl * kl + objective.downstream * downstream + objective.local * parts.reconstruction
    total = total + coefficients.sparsity * parts.penalty + objective.codes.aux_coefficient * parts.auxiliary
    found = {field.name: getattr(parts, field.name) for field in dataclasses.fields(Losses)}
    return total, jax.lax.stop_gradient(EndToEndLosses(**found, kl=kl, downstream=downstream))


def _unexplained(clean: Array, spliced: Array, used: Array) -> Float[Array, ""]:
    """Fraction of variance unexplained over the replaced tokens, mean over layers."""
    weight = used[None, :, :, None].astype(clean.dtype)
    mean = (clean * weight).sum((1, 2), keepdims=True) / jnp.maximum(weight.sum(), 1.0)
    wrong, spread = (((a * weight) ** 2).sum((1, 2, 3)) for a in (spliced - clean, clean - mean))
    return (wrong / jnp.maximum(spread, 1e-30)).mean()
