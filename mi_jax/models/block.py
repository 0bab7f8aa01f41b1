"""One layer of the decoder as a function of its parameters and a tap.

The stream is `x [batch pos d_model]`. A tap is called at every site, `x = tap("resid_pre", x)`. Sites that cost memory
(a copy of the stream per reader, the output per head) exist only where the tap touches them.
"""

import equinox as eqx
from jaxtyping import Array, Float, Int

from mi_jax.models.attention import Attention, SiteTap, attention
from mi_jax.models.config import DecoderConfig
from mi_jax.models.layout import Layout
from mi_jax.models.mlp import MLP, Experts, mlp
from mi_jax.models.norm import Norm, normed
from mi_jax.models.rotary import Rotation


class Block(eqx.Module):
    """Parameters of one layer, or of all of them with a leading `layer` axis.

    Attributes:
      attn_norm, mlp_norm: through which attention and MLP read the stream.
      attn_post_norm, mlp_post_norm: of what they add to it; with `norms="post"`, of the stream after the addition.
    """

    attn_norm: Norm | None
    attn: Attention
    mlp_norm: Norm | None
    mlp: MLP | Experts | None
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None


class Layer(eqx.Module):
    """A layer's parameters, and what else can differ between layers but is not trained."""

    params: Block
    turn: Rotation | None
    window: Int[Array, ""] | None


def block(
    layer: Layer, x: Float[Array, "batch pos d_model"], tap: SiteTap, config: DecoderConfig, layout: Layout
) -> Float[Array, "batch query d_model"]:
    """One layer: the stream after it, at the tokens that ask."""
    p, post = layer.params, config.norms == "post"
    x = tap("resid_pre", x)
    kept = layout.asking(x)
    written = attention(p.attn, p.attn_norm, x, tap, config, layout, layer.turn, layer.window)
    x = _added(tap, "attn_out", written, None if post else p.attn_post_norm)
    if config.parallel:
        assert p.mlp is not None
        norm = p.attn_norm if config.shared_norm else p.mlp_norm
        second = _added(tap, "mlp_out", mlp(p.mlp, norm, kept, tap, config), p.mlp_post_norm)
        return tap("resid_post", kept + x + second)
    x = tap("resid_mid", kept + x)
    if post:
        x = tap("resid_mid_normalized", normed(p.attn_post_norm, x))
    if p.mlp is not None:
        x = x + _added(tap, "mlp_out", mlp(p.mlp, p.mlp_norm, x, tap, config), None if post else p.mlp_post_norm)
    x = tap("resid_post", x)
    return tap("resid_post_normalized", normed(p.mlp_post_norm, x)) if post else x


def _added(tap: SiteTap, name: str, x: Array, norm: Norm | None) -> Array:
    """What a sublayer adds to the stream."""
    return tap(name, normed(norm, x))
