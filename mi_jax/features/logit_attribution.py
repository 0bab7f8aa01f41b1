"""Direct logit attribution with exact accounting: a logit as the sum of what every part wrote into the stream.

The last stream is a sum of parts, and with the final norm's scale s taken from the run the rest is linear:

    logit[t] = Σ_part part · d / s + bias · u,   u = unembed[t],   d = weight ⊙ u

Under LayerNorm d also loses its mean, which is the same as centring every part. What is not in the parts is how they
act through later layers, and that they change s.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (direct path and output contributions).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, SiteError, at
from mi_jax.core.transforms import SiteModel
from mi_jax.features.lens import check_tokens, in_float32, unwrap
from mi_jax.models.decoder import Decoder
from mi_jax.models.norm import Norm

# An edit of one of these puts something into the sum that no part wrote: what has to be captured to know how much.
_EDITED = {
    "embed": (),
    "resid_pre": ("resid_pre", "resid_post"),
    "attn_out": ("attn_out",),
    "resid_mid": ("resid_mid", "resid_pre", "attn_out"),
    "resid_post": ("resid_post", "resid_mid"),
    "final_norm": ("final_norm",),
    "logits": ("final_norm",),
}


class LogitParts(eqx.Module):
    """A logit, or a logit difference, and the parts that sum to it. Values at padding belong to padding.

    Attributes:
      logit: of the run itself.
      embed, position: the token embedding, and the learned table of positions (0 where there is none).
      heads: every head's output.
      mlp: every MLP's output; None in an attention-only model.
      norm_bias: bias of the final norm, the same wherever the tokens are.
      edits: by site, what edits of the stream, of `attn_out` or of the last two sites put in themselves. Edits of other
        sites, such as `attn.z` or `mlp_out`, are in the part that they change.
      scale: what the final norm divided by.
      sources: each head's part by the position it was read from, where asked for. Sums over `key` to `heads`, unless
        `attn.z` or `attn.head_out` is edited.
      neurons: each MLP's part by neuron, where asked for. Sums to `mlp` unless `mlp_out` is edited.
    """

    logit: Float[Array, "batch pos"]
    embed: Float[Array, "batch pos"]
    position: Float[Array, "batch pos"]
    heads: Float[Array, "layer batch pos head"]
    mlp: Float[Array, "layer batch pos"] | None
    norm_bias: Float[Array, "batch pos"]
    edits: dict[str, Array]
    scale: Float[Array, "batch pos"]
    sources: Float[Array, "layer batch pos head key"] | None
    neurons: Float[Array, "layer batch pos d_mlp"] | None

    def total(self) -> Float[Array, "batch pos"]:
        """The sum of all parts."""
        total = self.embed + self.position + self.norm_bias + self.heads.sum((0, 3))
        if self.mlp is not None:
            total = total + self.mlp.sum(0)
        for part in self.edits.values():
            total = total + part.reshape(-1, *total.shape).sum(0)
        return total

    def residual(self) -> Float[Array, "batch pos"]:
        """The logit minus the sum: rounding only."""
        return self.logit - self.total()


class DirectLogits(eqx.Module):
    """See `direct_logits`."""

    model: Any
    by_source: bool = eqx.field(static=True)
    by_neuron: bool = eqx.field(static=True)

    def __call__(
        self,
        tokens: Int[Array, "batch pos"],
        mask: Bool[Array, "batch pos"] | None = None,
        *,
        answer: Int[Array, "*place"],
        distractor: Int[Array, "*other_place"] | None = None,
        output_pos: Int[Array, " batch"] | None = None,
        taps: Any = None,
    ) -> LogitParts:
        """The parts of the logit of `answer`, or of its difference to `distractor`, at every position.

        Args:
          answer, distractor: tokens, a scalar, `[batch]` or `[batch pos]`.
          output_pos: account for these positions only; the axis `pos` of the result then has size 1.

        Raises:
          InputError: a token that the vocabulary lacks, or tokens of another batch or length.
        """
        decoder, edits = unwrap(self.model, taps)
        n_pos = tokens.shape[1] if output_pos is None else 1
        u = _row(decoder, "answer", answer, tokens.shape[0], n_pos)
        if distractor is not None:
            u = u - _row(decoder, "distractor", distractor, tokens.shape[0], n_pos)

        # the last two sites know nothing of output_pos
        late = bool({"final_norm", "logits"} & edits.keys())
        early = None if late else output_pos
        output, acts = decoder(tokens, mask, taps=edits, capture=_wanted(self, decoder, edits), output_pos=early)
        if output_pos is not None:
            acts = {name: _at_positions(name, x, output_pos) for name, x in acts.items()}
            output = jnp.take_along_axis(output, output_pos[:, None, None], axis=1) if late else output

        last = acts["resid_post"] if acts["resid_post"].ndim == 3 else acts["resid_post"][-1]
        d, scale = _direction(decoder.final_norm, u, in_float32(last))
        logit = _logit(output, answer, u.shape[:2])
        if distractor is not None:
            logit = logit - _logit(output, distractor, u.shape[:2])

        token, position = _embedding(decoder, tokens, output_pos)
        bias = decoder.final_norm.bias
        heads, sources, neurons = _by_layer(decoder, acts, d)
        parts = LogitParts(
            logit=logit,
            embed=(token * d).sum(-1),
            position=jnp.zeros(logit.shape, logit.dtype) if position is None else (position * d).sum(-1),
            heads=heads,
            mlp=_along(acts["mlp_out"], d) if "mlp_out" in acts else None,
            norm_bias=jnp.zeros(logit.shape, logit.dtype) if bias is None else u @ in_float32(bias),
            edits={},
            scale=scale,
            sources=sources,
            neurons=neurons,
        )
        by_edit = _edit_parts(parts, acts, edits, d, u, decoder.final_norm(last))
        return eqx.tree_at(lambda p: p.edits, parts, by_edit)


def direct_logits(model: SiteModel, *, by_source: bool = False, by_neuron: bool = False) -> DirectLogits:
    """Direct logit attribution of a native decoder: a function of the tokens that gives `LogitParts`.

    Args:
      model: a native decoder, also under `mi.intervene`; the parts are those of the edited run.
      by_source: also split every head by the position it reads from, `pattern · (v · o)`.
      by_neuron: also split every MLP by neuron.

    Raises:
      SiteError: not a native decoder, or `by_neuron` for one without MLPs.

    Example:
      `parts = mi.jit(direct_logits(model))(tokens, mask, answer=a, distractor=b, output_pos=last)`; then
      `parts.heads.mean(1)[:, 0]` is `[layer head]`.
    """
    decoder, _ = unwrap(model)
    if by_neuron and not decoder.config.d_mlp:
        raise SiteError(f"{decoder.config.name} has no MLPs, so there are no neurons to split; leave by_neuron out")
    return DirectLogits(model, by_source, by_neuron)


def _wanted(self: DirectLogits, decoder: Decoder, edits: dict) -> tuple[At, ...]:
    names = {"attn.head_out" if "attn.head_out" in edits else "attn.z"}
    names |= {"attn.z", "attn.pattern", "attn.v"} if self.by_source else set()
    names |= {"mlp_out"} if decoder.config.d_mlp else set()
    names |= {"mlp.post"} if self.by_neuron else set()
    for name in _EDITED.keys() & edits.keys():
        names |= {"embed" if name == "resid_pre" else name, *_EDITED[name]}
    stream = None if "resid_post" in names else decoder.config.n_layers - 1
    # the output is the site `logits`
    return (at("resid_post", stream), *(at(name) for name in sorted(names - {"resid_post", "logits"})))


def _at_positions(name: str, x: Array, pos: Int[Array, " batch"]) -> Array:
    """The rows of the positions asked for; what a head reads from keeps all of them."""
    if name == "attn.v":
        return x
    batch = 0 if x.ndim == 3 else 1
    axis = 3 if name == "attn.pattern" else batch + 1
    shape = [1] * x.ndim
    shape[batch] = -1
    return jnp.take_along_axis(x, pos.reshape(shape), axis=axis)


def _row(decoder: Decoder, name: str, tokens: Array, batch: int, n_pos: int) -> Float[Array, "batch pos d_model"]:
    """Unembedding rows of the tokens."""
    check_tokens(name, tokens, decoder.config.d_vocab)
    unembed = decoder.embed if decoder.unembed is None else decoder.unembed
    # a token outside the vocabulary must not become the last one unseen
    return in_float32(unembed.at[_places(name, tokens, (batch, n_pos))].get(mode="fill", fill_value=jnp.nan))


def _places(name: str, tokens: Array, shape: tuple[int, ...]) -> Int[Array, "batch pos"]:
    try:
        return jnp.broadcast_to(tokens[:, None] if tokens.ndim == 1 else tokens, shape)
    except ValueError:
        raise InputError(
            f"{name} of shape {tokens.shape} does not fit: pass a scalar, [batch] or [batch pos] with "
            f"batch={shape[0]}, pos={shape[1]}"
        ) from None


def _logit(
    output: Float[Array, "batch pos d_vocab"], tokens: Array, shape: tuple[int, ...]
) -> Float[Array, "batch pos"]:
    places = _places("answer", tokens, shape)
    return jnp.take_along_axis(in_float32(output), places[:, :, None], axis=-1)[..., 0]


def _direction(norm: Norm, u: Array, last: Array) -> tuple[Array, Array]:
    """What the stream is multiplied with, the scale of the run included, and that scale."""
    if norm.weight is None:
        return u, jnp.ones(u.shape[:2], u.dtype)
    d = u * in_float32(norm.weight)[None, None, :]
    if norm.bias is not None:
        d, last = d - d.mean(-1, keepdims=True), last - last.mean(-1, keepdims=True)
    scale = jnp.sqrt(jnp.square(last).mean(-1) + norm.eps)
    return d / scale[..., None], scale


def _embedding(decoder: Decoder, tokens: Array, output_pos: Array | None) -> tuple[Array, Array | None]:
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    if output_pos is not None:
        tokens, places = (
            jnp.take_along_axis(x, output_pos[:, None], axis=1) for x in jnp.broadcast_arrays(tokens, places)
        )
    token = in_float32(decoder.embed[tokens])
    if decoder.pos_embed is None:
        return token, None
    return token, jnp.broadcast_to(in_float32(decoder.pos_embed[places]), token.shape)


def _along(x: Float[Array, "*layer batch pos d_model"], d: Array) -> Float[Array, "*layer batch pos"]:
    return jnp.einsum("...bpd,bpd->...bp", in_float32(x), d)


def _by_layer(decoder: Decoder, acts: dict[str, Array], d: Array) -> tuple[Array, Array | None, Array | None]:
    """Heads, heads by source and neurons, one layer at a time: no head's output is ever written out."""
    down = None if decoder.blocks.mlp is None else decoder.blocks.mlp.down
    names = ("attn.z", "attn.head_out", "attn.pattern", "attn.v", "mlp.post")
    rows = {name: acts[name] for name in names if name in acts}

    def layer(row):
        o, down, acts = row
        acts = {name: in_float32(x) for name, x in acts.items()}
        reads = jnp.einsum("bpd,nhd->bpnh", d, in_float32(o))
        if "attn.head_out" in acts:
            heads = jnp.einsum("bpnd,bpd->bpn", acts["attn.head_out"], d)
        else:
            heads = (acts["attn.z"] * reads).sum(-1)
        sources = neurons = None
        if "attn.pattern" in acts:
            v = jnp.repeat(acts["attn.v"], o.shape[0] // acts["attn.v"].shape[2], axis=2)
            sources = jnp.einsum("bnqk,bknh,bqnh->bqnk", acts["attn.pattern"], v, reads)
        if "mlp.post" in acts:
            neurons = acts["mlp.post"] * jnp.einsum("bpd,md->bpm", d, in_float32(down))
        return heads, sources, neurons

    return jax.lax.map(layer, (decoder.blocks.attn.o, down if "mlp.post" in acts else None, rows))


def _edit_parts(
    parts: LogitParts, acts: dict[str, Array], edits: dict, d: Array, u: Array, normed: Array
) -> dict[str, Array]:
    """What the edited sites hold beyond what was written into them."""
    along = {
        name: _along(x, d) for name, x in acts.items() if name.startswith("resid") or name in ("embed", "attn_out")
    }
    out = {}
    if "embed" in edits:
        out["embed"] = along["embed"] - parts.embed - parts.position
    if "resid_pre" in edits:
        out["resid_pre"] = along["resid_pre"] - jnp.concatenate([along["embed"][None], along["resid_post"][:-1]])
    if "attn_out" in edits:
        out["attn_out"] = along["attn_out"] - parts.heads.sum(-1)
    if "resid_mid" in edits:
        out["resid_mid"] = along["resid_mid"] - along["resid_pre"] - along["attn_out"]
    if "resid_post" in edits:
        out["resid_post"] = along["resid_post"] - along["resid_mid"]
        if parts.mlp is not None:
            out["resid_post"] = out["resid_post"] - parts.mlp
    if "final_norm" in edits:
        out["final_norm"] = _along(acts["final_norm"], u) - _along(normed, u)
    if "logits" in edits:
        out["logits"] = parts.logit - _along(acts["final_norm"], u)
    return out
