"""A forward pass in which chosen edges carry what another example of the batch wrote.

It is resample ablation on edges, cheap enough to train through: the other run is the same run, one example further, so
one pass computes both. Training through it makes a network compute a behaviour along the remaining edges only.
"""

from jaxtyping import Array, Float, Int

from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.models.decoder import Decoder


def resampled_forward(
    model: Decoder, tokens: Int[Array, "batch pos"], edges: Float[Array, "source reader"]
) -> Float[Array, "batch pos d_vocab"]:
    """Logits of a run in which the edges with `edges[s, r] = 1` carry what the previous example's source wrote.

    Example 0 takes from the last one. Zeros give the plain run.
    """
    return masked_forward(model, tokens, edges, None, remat=False)
