"""Replacement models: a decoder whose MLPs are explained by transcoders or one cross-layer transcoder.

An MLP's output is the transcoder's reconstruction plus an error, which is a constant of the prompt. So the model's
outputs do not change, and with attention patterns and norm scales held, every feature is a linear function of the
features, errors and tokens before it.

Sources: Dunefsky et al. 2024 (transcoders, arXiv 2406.11944); Ameisen et al. 2025, "Circuit Tracing" (Transformer
Circuits Thread).
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.circuits.features.frozen import READS, Additions, ReplacingTap, Streams, mlp_norm, with_frozen_norms
from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.models.block import block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts


class ReplacementModel(eqx.Module):
    """See `replacement_model`."""

    model: Decoder
    transcoders: tuple[Dictionary, ...] | CrossLayerTranscoder
    reads: str = eqx.field(static=True)
    normalized: bool = eqx.field(static=True)

    @property
    def n_layers(self) -> int:
        return self.model.config.n_layers

    @property
    def skips(self) -> Float[Array, "layer d_model d_model"] | None:
        """The linear paths beside the codes; None where no layer has one."""
        if isinstance(self.transcoders, CrossLayerTranscoder):
            return self.transcoders.w_skip
        if all(one.w_skip is None for one in self.transcoders):
            return None
        none = jnp.zeros((self.model.config.d_model,) * 2, self.transcoders[0].w_dec.dtype)
        return jnp.stack([none if one.w_skip is None else one.w_skip for one in self.transcoders])

    def d_sae(self, layer: int) -> int:
        """Latents that read a layer."""
        one = self.transcoders
        return one.d_sae if isinstance(one, CrossLayerTranscoder) else one[layer].d_sae

    def encoder(self, layer: int) -> Float[Array, "d_sae d_model"]:
        """One row per latent of the layer: the direction it reads."""
        one = self.transcoders
        return one.w_enc[layer] if isinstance(one, CrossLayerTranscoder) else one[layer].encoder

    def encoder_bias(self, layer: int) -> Float[Array, " d_sae"]:
        """What is added to `encoder @ read`."""
        one = self.transcoders
        if isinstance(one, CrossLayerTranscoder):
            return one.b_enc[layer]
        return one[layer].b_enc - one[layer].encoder @ one[layer].centre

    def pre_activations(self, layer: int, read: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """encoder @ read + bias."""
        h = read @ self.encoder(layer).T
        return h + jnp.broadcast_to(self.encoder_bias(layer), h.shape)

    def encode(self, layer: int, read: Float[Array, "pos d_model"]) -> Float[Array, "pos d_sae"]:
        """Codes of the layer's latents."""
        one = self.transcoders
        if not isinstance(one, CrossLayerTranscoder):
            return one[layer].encode(read)
        activation = jax.tree.map(lambda a: a[layer], one.activation)
        return activation.encode(read, one.w_enc[layer], one.b_enc[layer])

    def targets(self, source: int) -> range:
        """The layers whose MLP output the latents of a layer write to."""
        last = self.n_layers if isinstance(self.transcoders, CrossLayerTranscoder) else source + 1
        return range(source, last)

    def decoder(self, source: int, target: int) -> Float[Array, "d_sae d_model"]:
        """One row per latent of a layer: the direction it writes to the MLP output of a layer in `targets`."""
        one = self.transcoders
        return one.weights(source, target) if isinstance(one, CrossLayerTranscoder) else one[source].w_dec

    def written(self, codes: Sequence[Float[Array, "pos d_sae"]]) -> Float[Array, "layer pos d_model"]:
        """What the codes of all layers add to every MLP output."""
        out = []
        for target in range(self.n_layers):
            sources = [i for i in range(target + 1) if target in self.targets(i)]
            out.append(sum(codes[i] @ self.decoder(i, target) for i in sources))
        return jnp.stack(out)

    def constants(self, reads: Float[Array, "layer pos d_model"]) -> Float[Array, "layer pos d_model"]:
        """What the reconstructions hold beside the codes: decoder biases and skips."""
        one = self.transcoders
        bias = one.b_dec if isinstance(one, CrossLayerTranscoder) else jnp.stack([t.b_dec for t in one])
        out = jnp.broadcast_to(bias[:, None, :], reads.shape)
        return out if self.skips is None else out + jnp.einsum("lpd,lde->lpe", reads, self.skips)


def replacement_model(
    model: Decoder,
    transcoders: Sequence[Dictionary] | CrossLayerTranscoder,
    *,
    reads: str = "mlp.in",
    normalized: bool = False,
) -> ReplacementModel:
    """A decoder and the dictionaries that explain its MLPs.

    Args:
      model: any decoder with MLPs and logits.
      transcoders: one for every layer, with or without skip, or a cross-layer transcoder. They predict `mlp_out`.
      reads: the site they read: "mlp.in", "resid_mid" or "resid_pre".
      normalized: they read that site through the norm of the MLP, as the MLP does.

    Raises:
      InputError: a model without MLPs or logits, dictionaries of another number of layers or another width, or ones
        whose pre-activations are not linear in what they read.

    Example:
      >>> import jax, mi_jax as mi
      >>> from mi_jax.circuits.features import attribution_graph, replacement_model
      >>> from mi_jax.decomposition import CrossLayerConfig, init_cross_layer
      >>> from mi_jax.models import DecoderConfig, init_decoder
      >>> config = DecoderConfig(2, 8, 2, 2, 4, 16, 11, 6)
      >>> model = init_decoder(config, key=jax.random.key(0))
      >>> transcoder = init_cross_layer(CrossLayerConfig(8, 16, 2, k=3), key=jax.random.key(1))
      >>> graph = attribution_graph(replacement_model(model, transcoder), jax.numpy.arange(4))
      >>> graph.n_features, len(graph.tokens)
      (24, 4)
    """
    config = model.config
    if not config.d_mlp or config.head != "logits" or config.patches is not None:
        raise InputError(f"{config.name} needs MLPs, tokens and logits for a replacement model")
    sites = [site for site in READS if site in model.site_table.names]
    if reads not in sites:
        raise InputError(f"dictionaries of the MLPs of {config.name} read one of {', '.join(sites)}; got {reads!r}")
    if isinstance(transcoders, CrossLayerTranscoder):
        n, layers, widths = transcoders.n_layers, [transcoders], {(transcoders.d_in, transcoders.d_out)}
    else:
        transcoders = tuple(transcoders)
        n, layers, widths = len(transcoders), transcoders, {(one.d_in, one.d_out) for one in transcoders}
    if n != config.n_layers:
        raise InputError(f"{config.name} has {config.n_layers} layers, the transcoders have {n}: one for every layer")
    if widths != {(config.d_model, config.d_model)}:
        raise InputError(
            f"{config.name} has d_model={config.d_model}; the transcoders read and write widths {sorted(widths)}: they "
            "are of another model or another site"
        )
    for one in layers:
        _check_linear(one.activation, getattr(one, "token_norm", None) is not None)
    return ReplacementModel(model, transcoders, reads, normalized)


def streams(r: ReplacementModel, tokens: Int[Array, " pos"], additions: Additions) -> tuple[Streams, Additions]:
    """A run of one prompt that is linear in the additions, as far as gradients go.

    Returns:
      What the dictionaries read, and the values that the additions were added to: the embedding and the MLP outputs.
      Only the first has gradients.
    """
    model = with_frozen_norms(r.model)
    embed, mask = model.embedded(tokens[None])
    embed = jax.lax.stop_gradient(embed)

    def body(x, row):
        number, params, added, skip = row
        plain = []

        def write(read, out):
            out = jax.lax.stop_gradient(out)
            plain.append(out[0])
            out = out + added[None]
            if skip is None:
                return out
            through = read @ skip
            return out + through - jax.lax.stop_gradient(through)

        norm = mlp_norm(params, model.config) if r.normalized else None
        tap = ReplacingTap(r.reads, norm, write)
        x = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
        assert tap.read is not None
        return x, (tap.read[0], plain[0])

    numbers = jnp.arange(r.n_layers, dtype=jnp.int32)
    x, (reads, outs) = jax.lax.scan(
        body, embed + additions.embed[None], (numbers, model.blocks, additions.mlp_out, r.skips)
    )
    final = x if model.final_norm is None else model.final_norm(x)
    return Streams(reads, final[0]), Additions(embed[0], outs)


def no_additions(r: ReplacementModel, n_pos: int) -> Additions:
    """Zeros in the dtype of the stream."""
    config, dtype = r.model.config, r.model.unembedding.dtype
    return Additions(
        jnp.zeros((n_pos, config.d_model), dtype), jnp.zeros((config.n_layers, n_pos, config.d_model), dtype)
    )


def check_prompt(r: ReplacementModel, tokens: Array) -> None:
    """Raises InputError for what is not one prompt of the model's tokens."""
    config = r.model.config
    if tokens.ndim != 1 or not 0 < tokens.shape[0] <= config.n_ctx:
        raise InputError(
            f"an attribution graph is of one prompt, [pos] with at most {config.n_ctx} tokens; got {tokens.shape}"
        )


def _check_linear(activation: Activation, token_norm: bool) -> None:
    kinds = (ReLU, JumpReLU, TopK, BatchTopK, Gated)
    if token_norm or not isinstance(activation, kinds):
        what = "a token norm" if token_norm else type(activation).__name__
        raise InputError(
            f"the pre-activations of a dictionary with {what} are not linear in what it reads; attribution graphs are "
            "of ReLU, JumpReLU, TopK, AbsTopK, BatchTopK or Gated without one"
        )
