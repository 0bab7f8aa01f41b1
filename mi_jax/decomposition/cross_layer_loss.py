"""The loss of cross-layer transcoders, over codes that are dense or at their places.

With places, nothing [token, layer, d_sae] outlives the choice of the places: decoders and all gradients touch as many
rows as there are codes.

Source: Ameisen et al. 2025, "Circuit Tracing", appendix on training (the tanh penalty and the term for dead latents).
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.decomposition.activations import Activation, BatchTopK, Chosen
from mi_jax.decomposition.activations.base import at_places
from mi_jax.decomposition.codes import Pairs, Placed, attach
from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.objective import Codes, Coefficients, Losses, auxk, preactivation, sparsity_penalty
from mi_jax.decomposition.selection import all_above, kth_largest, largest_of_batch

# places per token of one layer, over BatchTopK's k: a batch in which some layer has more codes is computed densely
SPREAD = 4


def bounded(transcoder: CrossLayerTranscoder) -> bool:
    """Whether a batch may have more codes in a layer than `choose` has places."""
    activation = transcoder.activation
    if isinstance(activation, BatchTopK):
        return SPREAD * activation.k < transcoder.d_sae
    return getattr(activation, "max_active", None) is not None


def choose(transcoder: CrossLayerTranscoder, x: Float[Array, "token layer d_in"]) -> Chosen | None:
    """Where a training batch has codes, layer by layer along a first axis; None where codes are dense."""
    activation = transcoder.activation
    if not isinstance(activation, BatchTopK):
        each_layer = eqx.filter_vmap(lambda a, x, w, b: a.choose(x, w, b), in_axes=(eqx.if_array(0), 1, 0, 0))
        found = each_layer(activation, x, transcoder.w_enc, transcoder.b_enc)
        return None if found is None else Chosen(found.h, found.where, found.fits.all())
    n = x.shape[0]
    h = _preactivations(transcoder, x)
    least = _least(h, activation.k)

    def of_layer(h):
        kept = (h >= least) & (h > 0)
        tokens, latents, fits = all_above(jnp.where(kept, h, -1.0), min(SPREAD * activation.k, h.shape[1]) * n)
        return Chosen(h.at[tokens, latents].get(mode="fill", fill_value=0.0), Pairs(tokens, latents, n), fits)

    found = jax.vmap(of_layer)(h)
    return Chosen(found.h, found.where, found.fits.all())


def encode(transcoder: CrossLayerTranscoder, x: Float[Array, "token layer d_in"], chosen: Chosen | None) -> list[Codes]:
    """A training batch's codes in every layer: at the chosen places, or dense."""
    if chosen is None:
        return _dense(transcoder, x)
    zero = jnp.zeros(transcoder.d_in, x.dtype)

    def of_layer(i):
        h, where = jax.tree.map(lambda a: a[i], (chosen.h, chosen.where))
        b = transcoder.b_enc[i]
        h = attach(h, where, x[:, i], zero, transcoder.w_enc[i], b)
        return Codes(_activation(transcoder, i).value(h, at_places(where), b), h, where)

    return [of_layer(i) for i in range(transcoder.n_layers)]


def decode(transcoder: CrossLayerTranscoder, codes: Sequence[Codes]) -> Float[Array, "token layer d_out"]:
    """What the codes of all layers write to each, without b_dec and skip."""
    # only a transcoder that has been trained has scales: the saving that its ties are is not needed then
    transcoder = transcoder if transcoder.scale is None else transcoder.untied()
    n, d_out = transcoder.n_layers, transcoder.d_out
    if transcoder.tying == "per_target":
        sums = [_joined(codes[: t + 1]) for t in range(n)]
        return jnp.stack([c.decode(w[:, 0]) for c, w in zip(sums, transcoder.w_dec, strict=True)], 1)
    n_tokens = codes[0].values.shape[0] if codes[0].where is None else _n_tokens(codes[0].where)
    total = jnp.zeros((n_tokens, n, d_out), transcoder.b_dec.dtype)
    for i, w in enumerate(transcoder.w_dec):
        if transcoder.tying == "none":
            part = codes[i].decode(w.reshape(w.shape[0], -1)).reshape(n_tokens, n - i, d_out)
        else:
            part = jnp.broadcast_to(codes[i].decode(w[:, 0])[:, None], (n_tokens, n - i, d_out))
        total = total.at[:, i:].add(part)
    return total


def cross_layer_loss(
    transcoder: CrossLayerTranscoder,
    x: Float[Array, "token layer d_in"],
    y: Float[Array, "token layer d_out"],
    dead: Bool[Array, "layer d_sae"],
    objective: Objective,
    coefficients: Coefficients,
    chosen: Chosen | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """Σ_layers ‖y − ŷ‖² + λ · penalty + α · auxiliary, mean over tokens; penalty and auxiliary are sums over layers.

    A latent's code is weighted by the norm of its decoders to all targets together. `auxk` lets the dead latents of
    each layer model what is left over in that layer and all later ones.

    Args:
      transcoder: differentiated.
      x: what each layer reads.
      y: what each layer is to write.
      dead: latents that count as dead.
      objective: which terms.
      coefficients: their traced numbers.
      chosen: `choose(transcoder, x)`; None computes dense codes.
    """
    n_tokens = x.shape[0]
    codes = encode(transcoder, x, chosen)
    error = y - transcoder.b_dec[None] - decode(transcoder, codes)
    if transcoder.w_skip is not None:
        error = error - jnp.einsum("bli,lio->blo", x, transcoder.w_skip)
    squared = (error * error).sum() / n_tokens
    penalty = jnp.zeros((), squared.dtype)
    if objective.penalty != "none":
        norms = transcoder.decoder_norms()
        for i, c in enumerate(codes):
            activation = _activation(transcoder, i)
            penalty = penalty + sparsity_penalty(activation, c, norms[i], objective, coefficients, n_tokens)
    auxiliary = jnp.zeros((), squared.dtype)
    if objective.auxiliary != "none":
        # most steps have no dead latent
        auxiliary = jax.lax.cond(
            dead.any(),
            lambda t: _auxiliary(t, x, error, dead, objective),
            lambda t: jnp.zeros((), squared.dtype),
            transcoder,
        )
    total = squared + coefficients.sparsity * penalty + objective.aux_coefficient * auxiliary
    fired = jnp.stack([c.fired(transcoder.d_sae) for c in codes])
    smallest = jnp.stack([jnp.where(c.values > 0, c.values, jnp.inf).min() for c in codes]).min()
    return total, jax.lax.stop_gradient(Losses(squared, squared, penalty, auxiliary, fired, smallest))


def _auxiliary(transcoder: CrossLayerTranscoder, x: Array, error: Array, dead: Array, objective: Objective) -> Array:
    term = auxk if objective.auxiliary == "auxk" else preactivation
    total = jnp.zeros((), error.dtype)
    for i in range(transcoder.n_layers):
        part, real = _dead_part(transcoder, i, dead[i], objective)
        total = total + term(part, x[:, i], error[:, i:].reshape(error.shape[0], -1), real, objective)
    return total


def _dead_part(transcoder: CrossLayerTranscoder, i: int, dead: Array, objective: Objective) -> tuple[Dictionary, Array]:
    """Up to `aux_candidates` dead latents of one layer as a transcoder to all its targets, and which of them are."""
    d_sae, n = transcoder.d_sae, transcoder.n_layers
    (rows,) = jnp.nonzero(dead, size=min(objective.aux_candidates, d_sae), fill_value=d_sae)
    real, rows = rows < d_sae, jnp.minimum(rows, d_sae - 1)
    w_dec = jnp.concatenate([transcoder.weights(i, t)[rows] for t in range(i, n)], 1)
    activation = jax.tree.map(lambda a: a[i] if a.ndim == 1 else a[i][rows], transcoder.activation)
    b_dec = jnp.zeros(w_dec.shape[1], w_dec.dtype)
    part = Dictionary(transcoder.w_enc[i][rows], transcoder.b_enc[i][rows], w_dec, b_dec, activation, centred=False)
    return part, real


def _preactivations(transcoder: CrossLayerTranscoder, x: Array) -> Float[Array, "layer token d_sae"]:
    return jnp.einsum("bli,lfi->lbf", x, transcoder.w_enc) + transcoder.b_enc[:, None, :]


def _least(h: Float[Array, "layer token d_sae"], k: int) -> Float[Array, ""]:
    """The smallest of the k · tokens · layers largest pre-activations, or 0."""
    return kth_largest(jax.nn.relu(jax.lax.stop_gradient(h)), k * h.shape[0] * h.shape[1])


@eqx.filter_jit
def largest_codes(transcoder: CrossLayerTranscoder, x: Float[Array, "token layer d_in"]) -> Float[Array, " code"]:
    """The largest codes of all layers, twice as many as BatchTopK keeps, in no order; 0 where fewer are positive."""
    h, activation = _preactivations(transcoder, x), transcoder.activation
    assert isinstance(activation, BatchTopK)
    return largest_of_batch(h.reshape(-1, h.shape[-1]), 2 * activation.k * h.shape[0] * h.shape[1])[0]


def _dense(transcoder: CrossLayerTranscoder, x: Array) -> list[Codes]:
    h = _preactivations(transcoder, x)
    if isinstance(transcoder.activation, BatchTopK):
        values = jnp.where(h >= _least(h, transcoder.activation.k), jax.nn.relu(h), 0.0)
        return [Codes(v, own, None) for v, own in zip(values, h, strict=True)]

    def of_layer(i):
        return Codes(_activation(transcoder, i).dense(h[i], transcoder.b_enc[i], training=True), h[i], None)

    return [of_layer(i) for i in range(transcoder.n_layers)]


def _activation(transcoder: CrossLayerTranscoder, i: int) -> Activation:
    """One layer's."""
    return jax.tree.map(lambda a: a[i], transcoder.activation)


def _joined(codes: Sequence[Codes]) -> Codes:
    """The codes of several layers as those of one, for a decoder that they share."""
    first = codes[0].where
    if first is None:
        return Codes(sum((c.values for c in codes[1:]), codes[0].values), codes[0].h, None)
    axis = 1 if isinstance(first, Placed) else 0
    where = jax.tree.map(lambda *a: jnp.concatenate(a, axis), *(c.where for c in codes))
    return Codes(jnp.concatenate([c.values for c in codes], axis), codes[0].h, where)


def _n_tokens(where: Placed | Pairs) -> int:
    return where.latents.shape[0] if isinstance(where, Placed) else where.n_tokens
