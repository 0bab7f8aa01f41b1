"""The loss of a training batch: reconstruction, sparsity penalty and auxiliary loss, as `Objective` combines them.

Every term is a function of codes at their places, so the same equations serve dense codes and sparse ones.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.decomposition.activations import Activation, BatchTopK, Chosen, Gated, JumpReLU, Switch
from mi_jax.decomposition.activations.base import at_places, everywhere
from mi_jax.decomposition.codes import Pairs, Placed, Where, decode, fired
from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.nested import by_prefix, by_size


class Coefficients(eqx.Module):
    """Numbers of the loss that a schedule or a controller moves.

    Attributes:
      sparsity: λ.
      p: exponent of the `lp` penalty.
    """

    sparsity: Float[Array, ""]
    p: Float[Array, ""]


class Losses(eqx.Module):
    """The parts of a loss and what the training state needs of the batch; means are over the rows that are valid.

    Attributes:
      reconstruction: the reconstruction term.
      error: mean over tokens of ‖y − ŷ‖², the whole dictionary's.
      penalty: the sparsity penalty, without λ.
      auxiliary: the auxiliary loss, without its coefficient.
      fired: on how many tokens each latent has a code.
      smallest: smallest code over 0; infinite where there is none.
    """

    reconstruction: Float[Array, ""]
    error: Float[Array, ""]
    penalty: Float[Array, ""]
    auxiliary: Float[Array, ""]
    fired: Int[Array, "*layer d_sae"]
    smallest: Float[Array, ""]


class Codes(eqx.Module):
    """Codes of a batch, at their places (`where`) or everywhere (None), with gradients."""

    values: Array
    h: Array
    where: Where | None

    def at(self, parameter: Float[Array, " d_sae"]) -> Array:
        """A parameter per latent, at the codes' places."""
        return everywhere(parameter) if self.where is None else at_places(self.where)(parameter)

    def decode(self, w_dec: Float[Array, "d_sae d_out"]) -> Float[Array, "token d_out"]:
        """Codes times dictionary."""
        return self.values @ w_dec if self.where is None else decode(self.values, self.where, w_dec)

    def of(self, valid: Bool[Array, " token"]) -> "Codes":
        """The same without the codes of tokens that are not valid."""
        real = valid[self.where.tokens] if isinstance(self.where, Pairs) else valid[:, None]
        return Codes(jnp.where(real, self.values, 0.0), jnp.where(real, self.h, -jnp.inf), self.where)

    def fired(self, d_sae: int) -> Int[Array, " d_sae"]:
        """On how many tokens each latent has a code."""
        if self.where is None:
            return (self.values != 0).sum(0, dtype=jnp.int32)
        return fired(self.values, self.where, d_sae)


def encode(
    dictionary: Dictionary,
    x: Float[Array, "token d_in"],
    chosen: Chosen | None,
    valid: Bool[Array, " token"] | None = None,
) -> Codes:
    """A training batch's codes: at the chosen places, or dense."""
    if chosen is None and valid is not None and isinstance(dictionary.activation, BatchTopK):
        # which codes a batch has depends on which of its rows are valid
        chosen = dictionary.choose(x, valid)
    if chosen is not None:
        values, h = dictionary.activation.codes(chosen, x, dictionary.centre, dictionary.encoder, dictionary.b_enc)
        return Codes(values, h, chosen.where)
    centred = x - dictionary.centre[None, :]
    h = centred @ dictionary.encoder.T + dictionary.b_enc[None, :]
    if isinstance(dictionary.activation, Switch):
        return Codes(dictionary.activation.encode(centred, dictionary.encoder, dictionary.b_enc), h, None)
    return Codes(dictionary.activation.dense(h, dictionary.b_enc, training=True), h, None)


def loss(
    dictionary: Dictionary,
    x: Float[Array, "token d_in"],
    y: Float[Array, "token d_out"],
    dead: Bool[Array, " d_sae"],
    objective: Objective,
    coefficients: Coefficients,
    chosen: Chosen | None = None,
    few: Dictionary | None = None,
    valid: Bool[Array, " token"] | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """reconstruction + λ · penalty + α · auxiliary, over a batch of activations x and targets y.

    Args:
      dictionary: differentiated.
      x: what is read.
      y: what is reconstructed; `x` itself for an autoencoder.
      dead: latents that count as dead; the first `aux_candidates` of them take part.
      objective: which terms.
      coefficients: their traced numbers.
      chosen: `dictionary.choose(x, valid)`; None computes dense codes.
      few: `dead_latents(dictionary, dead, objective)`, where its gradient is wanted apart from the dictionary's.
      valid: rows that have weight; None for all.
    """
    if few is None and reads_dead(objective):
        few = dead_latents(dictionary, dead, objective)
    parts, _ = terms(dictionary, x, y, dead, objective, coefficients, chosen, few, valid)
    total = parts.reconstruction + coefficients.sparsity * parts.penalty + objective.aux_coefficient * parts.auxiliary
    return total, jax.lax.stop_gradient(parts)


def terms(
    dictionary: Dictionary,
    x: Float[Array, "token d_in"],
    y: Float[Array, "token d_out"],
    dead: Bool[Array, " d_sae"],
    objective: Objective,
    coefficients: Coefficients,
    chosen: Chosen | None,
    few: Dictionary | None,
    valid: Bool[Array, " token"] | None = None,
) -> tuple[Losses, Float[Array, "token d_out"]]:
    """The parts of `loss` with their gradients, and y − ŷ (without gradient where the loss is `hierarchical`)."""
    codes = encode(dictionary, x, chosen, valid)
    target = y - dictionary.b_dec[None, :]
    if dictionary.w_skip is not None:
        target = target - x @ dictionary.w_skip
    reconstruction, error = _reconstruction(dictionary, codes, target, objective, valid)
    norms = dictionary.decoder_norms()
    auxiliary = _auxiliary(dictionary, few, codes, x, target, error, dead, objective, valid)
    if valid is None:
        counted, n_tokens = codes, x.shape[0]
    else:
        counted, n_tokens = codes.of(valid), jnp.maximum(valid.sum(dtype=x.dtype), 1.0)
    penalty = sparsity_penalty(dictionary.activation, counted, norms, objective, coefficients, n_tokens)
    positive = jnp.where(counted.values > 0, counted.values, jnp.inf)
    squared = mean_over((error * error).sum(-1), valid)
    parts = Losses(reconstruction, squared, penalty, auxiliary, counted.fired(dictionary.d_sae), positive.min())
    return parts, error


def mean_over(x: Float[Array, "token *rest"], valid: Bool[Array, " token"] | None) -> Float[Array, "*rest"]:
    """The mean over tokens, or over those that are valid; 0 where none is."""
    if valid is None:
        return x.mean(0)
    real = valid.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(real, x, 0.0).sum(0) / jnp.maximum(valid.sum(dtype=x.dtype), 1.0)


def _reconstruction(
    dictionary: Dictionary, codes: Codes, target: Array, objective: Objective, valid: Array | None
) -> tuple[Array, Array]:
    """The term, and the error of the whole dictionary."""
    if objective.reconstruction == "matryoshka":
        errors = target[None] - by_prefix(codes.values, codes.where, dictionary.w_dec, objective.prefixes)
        return mean_over((errors * errors).sum(-1).mean(0), valid), errors[-1]
    if objective.reconstruction == "hierarchical":
        assert isinstance(codes.where, Placed)
        nested = mean_over(by_size(codes.values, codes.where.latents, dictionary.w_dec, target), valid)
        return nested, jax.lax.stop_gradient(target - codes.decode(dictionary.w_dec))
    error = target - codes.decode(dictionary.w_dec)
    return mean_over((error * error).sum(-1), valid), error


def sparsity_penalty(
    activation: Activation,
    codes: Codes,
    norms: Float[Array, " d_sae"],
    objective: Objective,
    coefficients: Coefficients,
    n_tokens: int | Float[Array, ""],
) -> Float[Array, ""]:
    """The penalty on codes, mean over tokens, weighted by the norms of the latents' decoder rows."""
    if objective.penalty == "none":
        return jnp.zeros((), codes.values.dtype)
    if objective.penalty in ("l0", "l0_target"):
        assert isinstance(activation, JumpReLU)
        l0 = activation.active(codes.h, codes.at).sum() / n_tokens
        return l0 if objective.penalty == "l0" else (l0 / (objective.target_l0 or 1.0) - 1) ** 2
    # a gated dictionary is made sparse through its gate
    sizes = jax.nn.relu(codes.h) if isinstance(activation, Gated) else codes.values
    weighted = sizes * codes.at(norms)
    if objective.penalty == "tanh":
        weighted = jnp.tanh(objective.c * weighted)
    elif objective.penalty == "lp":
        # z^p has no derivative at 0, where there is no code
        positive = weighted > 0
        weighted = jnp.where(positive, jnp.where(positive, weighted, 1.0) ** coefficients.p, 0.0)
    return weighted.sum() / n_tokens


def _auxiliary(
    dictionary: Dictionary,
    few: Dictionary | None,
    codes: Codes,
    x: Array,
    target: Array,
    error: Array,
    dead: Array,
    objective: Objective,
    valid: Array | None,
) -> Array:
    match objective.auxiliary:
        case "gate":
            # the gate's own reconstruction, through a decoder that it cannot move
            w_dec, wanted = jax.lax.stop_gradient((dictionary.w_dec, target))
            guess = Codes(jax.nn.relu(codes.h), codes.h, codes.where).decode(w_dec)
            return mean_over(((wanted - guess) ** 2).sum(-1), valid)
        case "load_balance":
            assert isinstance(dictionary.activation, Switch)
            return dictionary.activation.load_balance(x - dictionary.centre[None, :], valid)
        case "auxk" | "preactivation":
            assert few is not None
            term = _auxk if objective.auxiliary == "auxk" else preactivation
            return term(few, x, error, dead, objective, valid)
        case _:
            return jnp.zeros((), error.dtype)


def reads_dead(objective: Objective) -> bool:
    """Whether a term of the loss is about dead latents; it is 0 where there are none."""
    return objective.auxiliary in ("auxk", "preactivation")


def without_dead(objective: Objective) -> Objective:
    """The objective of a batch that no dead latent is trained on."""
    return dataclasses.replace(objective, auxiliary="none") if reads_dead(objective) else objective


def in_turn(dead: Bool[Array, "*layer d_sae"], n: int, step: Int[Array, ""]) -> Bool[Array, "*layer d_sae"]:
    """Up to `n` of the dead latents, others at every step, so that all of them take part equally often."""
    count = dead.sum(-1, keepdims=True, dtype=jnp.int32)
    rank = jnp.cumsum(dead, -1, dtype=jnp.int32) - 1
    return dead & ((rank - step * n) % jnp.maximum(count, 1) < n)


def dead_latents(dictionary: Dictionary, dead: Bool[Array, " d_sae"], objective: Objective) -> Dictionary:
    """The dictionary of up to `aux_candidates` dead latents alone, zeros in places that are left."""
    rows = _dead_rows(dead, objective)
    few = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="fill", fill_value=0.0), _by_latent(dictionary))
    return eqx.tree_at(_by_latent, dictionary, few, is_leaf=lambda leaf: leaf is None)


def _dead_rows(dead: Bool[Array, " d_sae"], objective: Objective) -> Int[Array, " candidate"]:
    d_sae = dead.shape[0]
    return jnp.nonzero(dead, size=min(objective.aux_candidates, d_sae), fill_value=d_sae)[0]


def add_at(grads: Dictionary, few: Dictionary, dead: Bool[Array, " d_sae"], objective: Objective) -> Dictionary:
    """The gradient of the whole, with that of `dead_latents` added in place."""
    rows = _dead_rows(dead, objective)
    total = jax.tree.map(lambda whole, part: whole.at[rows].add(part, mode="drop"), _by_latent(grads), _by_latent(few))
    # the others, b_dec above all, are in both
    grads = eqx.tree_at(lambda d: d.b_dec, grads, grads.b_dec + few.b_dec)
    return eqx.tree_at(_by_latent, grads, total, is_leaf=lambda leaf: leaf is None)


def _by_latent(dictionary: Dictionary) -> tuple:
    """What has one entry per latent and is read by the terms of dead latents."""
    read = (dictionary.w_enc, dictionary.b_enc, dictionary.w_dec)
    return (*read, dictionary.activation.threshold) if isinstance(dictionary.activation, JumpReLU) else read


def auxk(
    dictionary: Dictionary,
    x: Float[Array, "token d_in"],
    error: Float[Array, "token d_out"],
    dead: Bool[Array, " d_sae"],
    objective: Objective,
) -> Float[Array, ""]:
    """min(n_dead / k_aux, 1) · mean ‖e − s ê‖², e = y − ŷ without gradient, ê = z_aux w_dec from dead latents alone.

    z_aux are the k_aux largest positive pre-activations of dead latents; b_dec is not in ê, for e has no share of it.
    With `aux_rescaled`, s = Σ⟨e, ê⟩ / Σ‖ê‖² over the batch (as if their cosine were 0.01 where it is less), without
    gradient: dead latents turn to what is left over and keep their size. Else s = 1, as in the source: Gao et al. 2024,
    appendix A.2.
    """
    return _auxk(dead_latents(dictionary, dead, objective), x, error, dead, objective)


def _auxk(
    dictionary: Dictionary, x: Array, error: Array, dead: Array, objective: Objective, valid: Array | None = None
) -> Array:
    """The same for the dictionary of dead latents alone, which come first."""
    h = (x - dictionary.centre[None, :]) @ dictionary.encoder.T + dictionary.b_enc[None, :]
    real = (jnp.arange(dictionary.d_sae) < dead.sum())[None, :]
    h = jnp.where(real, h, -jnp.inf)
    k_aux = objective.k_aux or getattr(dictionary.activation, "k", 64)
    kept = h >= jax.lax.top_k(h, min(k_aux, h.shape[1]))[0][:, -1:]
    guess = jnp.where(kept & real, jax.nn.relu(h), 0.0) @ dictionary.w_dec
    target = jax.lax.stop_gradient(error)
    if objective.aux_rescaled:
        guess = guess * jax.lax.stop_gradient(_best_scale(target, guess, valid))
    squared = mean_over(((target - guess) ** 2).sum(-1), valid)
    if objective.aux_normalised:
        spread = ((target - mean_over(target, valid)[None, :]) ** 2).sum(-1)
        squared = squared / jnp.maximum(mean_over(spread, valid), 1e-30)
    return jnp.minimum(dead.sum() / k_aux, 1.0) * squared


def _best_scale(target: Array, guess: Array, valid: Array | None) -> Array:
    """The factor of `guess` that fits best; over 0, so that a guess that points away is turned round."""
    along, size, whole = (
        mean_over((a * b).sum(-1), valid) for a, b in ((target, guess), (guess, guess), (target, target))
    )
    least = 0.01 * jnp.sqrt(whole * size)
    return jnp.maximum(along, least) / jnp.maximum(size, 1e-30)


def preactivation(
    dictionary: Dictionary,
    x: Float[Array, "token d_in"],
    error: Float[Array, "token d_out"],
    dead: Bool[Array, " d_sae"],
    objective: Objective,
    valid: Bool[Array, " token"] | None = None,
) -> Float[Array, ""]:
    """Mean over tokens of Σ max(θ − h, 0) · ‖w_dec‖ over dead latents: draws them back."""
    h = (x - dictionary.centre[None, :]) @ dictionary.encoder.T + dictionary.b_enc[None, :]
    real = jnp.arange(dictionary.d_sae) < dead.sum()
    # rows that are left over are zero, where a norm has no gradient
    filled = eqx.tree_at(lambda d: d.w_dec, dictionary, jnp.where(real[:, None], dictionary.w_dec, 1.0))
    norms = jnp.where(real, filled.decoder_norms(), 0.0)
    if isinstance(dictionary.activation, JumpReLU):
        threshold = dictionary.activation.threshold
    else:
        threshold = jnp.zeros_like(norms)
    return mean_over((jax.nn.relu(threshold[None, :] - h) * norms[None, :]).sum(-1), valid)
