"""Which latents matter to the model: what the loss would gain if one were removed, to first order."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.core.edits import Patch
from mi_jax.core.index import Index
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.models.decoder import Decoder


def next_token_nll(
    logits: Float[Array, "batch pos d_vocab"], tokens: Int[Array, "batch pos"]
) -> Float[Array, "batch pos_minus_1"]:
    """−log p of every token after the first, in nats."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


@eqx.filter_jit
def removal_effects(
    model: Decoder,
    sae: Dictionary,
    stream: Float[Array, "batch pos d_model"],
    tokens: Int[Array, "batch pos"],
    layer: Int[Array, ""],
) -> Float[Array, " d_sae"]:
    """Estimated rise of the mean next-token loss (nats per token) when a latent's contribution is taken out.

    `effect_j = −Σ_tokens z_j · (∂loss/∂x · w_dec[j])`: attribution patching with baseline zero (Nanda 2023), one
    backward pass for all latents. `stream` is what enters `layer`; position 0 does not count.
    """

    def loss(x):
        # the dynamic loop of `resume` has no reverse derivative; a tap on the full forward has
        taps = {"resid_pre": (Patch("resid_pre", Index(layer=layer), x),)}
        nll = next_token_nll(model(tokens, taps=taps), tokens)
        return nll[:, 1:].mean()

    gradient = jax.grad(loss)(stream)[:, 1:]
    values, indices = sae.encode_sparse(stream[:, 1:])
    # k dot products a token instead of d_sae
    along = jnp.einsum("bpd,bpkd->bpk", gradient, sae.w_dec[indices])
    return jnp.zeros(sae.w_dec.shape[0], stream.dtype).at[indices].add(-values * along)
