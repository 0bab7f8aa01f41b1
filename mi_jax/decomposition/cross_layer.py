"""Cross-layer transcoders: latents that read one layer's stream and write to the MLP outputs of it and all later ones.

Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models", §2 (Transformer
Circuits Thread).
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import Activation

Tying = Literal["none", "per_source", "per_target"]


class CrossLayerTranscoder(eqx.Module):
    """z_i = activation(x_i w_enc[i]ᵀ + b_enc[i]);  ŷ_t = Σ_{i ≤ t} z_i W(i → t) + b_dec[t] (+ x_t w_skip[t]).

    Attributes:
      w_enc: one encoder per layer, [layer d_sae d_in].
      b_enc: added to the pre-activations of each layer.
      w_dec: with tying `none`, one array per source layer i, [d_sae, n_layers − i, d_out], for targets i, i + 1, …;
        `per_source`: per source layer, [d_sae, 1, d_out], for all its targets; `per_target`: per target layer,
        [d_sae, 1, d_out], for all its sources.
      b_dec: added to each layer's output.
      activation: its arrays have a leading layer axis.
      w_skip: linear path of each layer.
      scale: of a tied decoder, per source layer i [d_sae, n_layers − i]: factor of the codes on the way to each target.
      tying: which W(i → t) are one matrix.
    """

    w_enc: Float[Array, "layer d_sae d_in"]
    b_enc: Float[Array, "layer d_sae"]
    w_dec: tuple[Float[Array, "d_sae _ d_out"], ...]
    b_dec: Float[Array, "layer d_out"]
    activation: Activation
    w_skip: Float[Array, "layer d_in d_out"] | None = None
    scale: tuple[Float[Array, "d_sae _"], ...] | None = None
    tying: Tying = eqx.field(static=True, default="none")

    def __check_init__(self):
        n = self.n_layers
        targets = [n - i if self.tying == "none" else 1 for i in range(n)]
        if [w.shape[1] for w in self.w_dec] != targets:
            raise InputError(
                f"a cross-layer transcoder of {n} layers, tied {self.tying!r}, has decoders to {targets} targets, got "
                f"{[w.shape[1] for w in self.w_dec]}"
            )
        if self.scale is not None and (
            self.tying == "none" or [s.shape[1] for s in self.scale] != [n - i for i in range(n)]
        ):
            raise InputError("a scale belongs to tied decoders and has one column per target layer of each source")

    @property
    def n_layers(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[2]

    @property
    def d_out(self) -> int:
        return self.b_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Latents of each layer."""
        return self.w_enc.shape[1]

    def encode(self, x: Float[Array, "*batch layer d_in"]) -> Float[Array, "*batch layer d_sae"]:
        """Dense codes of every layer.

        Raises:
          InputError: the last two axes are not the layers and the width that the encoders read.
        """
        if x.shape[-2:] != (self.n_layers, self.d_in):
            raise InputError(
                f"the transcoder reads activations [..., layer={self.n_layers}, d_in={self.d_in}], got {x.shape}"
            )
        rows = x.reshape(-1, self.n_layers, self.d_in)
        each_layer = eqx.filter_vmap(
            lambda activation, x, w, b: activation.encode(x, w, b), in_axes=(eqx.if_array(0), 1, 0, 0), out_axes=1
        )
        return each_layer(self.activation, rows, self.w_enc, self.b_enc).reshape(*x.shape[:-1], self.d_sae)

    def decode(self, codes: Float[Array, "*batch layer d_sae"]) -> Float[Array, "*batch layer d_out"]:
        """Outputs of every layer from dense codes, without skip."""
        z = codes.reshape(-1, self.n_layers, self.d_sae)
        out = jnp.broadcast_to(self.b_dec[None], (z.shape[0], *self.b_dec.shape))
        for i in range(self.n_layers):
            if self.tying == "none":
                out = out.at[:, i:].add(jnp.einsum("bf,ftd->btd", z[:, i], self.w_dec[i]))
            elif self.tying == "per_source":
                for t in range(i, self.n_layers):
                    out = out.at[:, t].add(self._scaled(z[:, i], i, t) @ self.w_dec[i][:, 0])
            else:
                total = sum(self._scaled(z[:, source], source, i) for source in range(i + 1))
                out = out.at[:, i].add(total @ self.w_dec[i][:, 0])
        return out.reshape(*codes.shape[:-1], self.d_out)

    def __call__(self, x: Float[Array, "*batch layer d_in"]) -> Float[Array, "*batch layer d_out"]:
        out = self.decode(self.encode(x))
        return out if self.w_skip is None else out + jnp.einsum("...ld,ldo->...lo", x, self.w_skip)

    def weights(self, source: int, target: int) -> Float[Array, "d_sae d_out"]:
        """W(source → target), whatever the tying.

        Raises:
          InputError: no such layers, or a target before its source.
        """
        if not 0 <= source <= target < self.n_layers:
            raise InputError(
                f"no decoder from layer {source} to {target}: 0 ≤ source ≤ target < {self.n_layers} must hold"
            )
        if self.tying == "none":
            return self.w_dec[source][:, target - source]
        w = self.w_dec[source if self.tying == "per_source" else target][:, 0]
        return w if self.scale is None else w * self.scale[source][:, target - source][:, None]

    def decoder_norms(self) -> Float[Array, "layer d_sae"]:
        """Norm of each latent's decoders to all its targets together: its code's weight in a sparsity penalty."""
        squares = [sum((self.weights(i, t) ** 2).sum(1) for t in range(i, self.n_layers)) for i in range(self.n_layers)]
        return jnp.sqrt(jnp.stack(squares))

    def untied(self) -> "CrossLayerTranscoder":
        """The same function with a decoder of its own for every pair of layers."""
        if self.tying == "none":
            return self
        n = self.n_layers
        w_dec = tuple(jnp.stack([self.weights(i, t) for t in range(i, n)], 1) for i in range(n))
        return CrossLayerTranscoder(self.w_enc, self.b_enc, w_dec, self.b_dec, self.activation, self.w_skip)

    def _scaled(self, z: Array, source: int, target: int) -> Array:
        return z if self.scale is None else z * self.scale[source][:, target - source][None, :]
