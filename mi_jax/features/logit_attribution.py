"""Direct logit attribution with exact accounting: a logit as the sum of what every part wrote into the stream.

The last stream is a sum of parts, and with the final norm's scale s taken from the run the rest is linear:

    logit[t] = Σ_part part · d / s + bias · u + bias[t],   u = unembed[t],   d = weight ⊙ u

Under LayerNorm d also loses its mean, which is the same as centring every part. Norms of the embedding, and of what
attention and MLP add to the stream, are taken in the same way: d goes through each with the scale that it has in the
run. What is not in the parts is how they act through later layers, and that they change the scales.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (direct path and output contributions).
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, SiteError, at
from mi_jax.core.transforms import SiteModel
from mi_jax.core.vocabulary import at_tokens, check_tokens
from mi_jax.features.direct_parts import along, embedding_parts, layer_parts, mlp_bias_needs_run, through
from mi_jax.features.lens import in_float32, unwrap
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder

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

    Biases have parts of their own, which are 0 where the model has none. Those of a norm and of what it reads are one.

    Attributes:
      logit: of the run itself, before the soft cap where the model has one.
      embed, position, token_type: the token embedding, and the learned tables (0 where there is none).
      embed_bias: bias of a norm of the embedding.
      heads: every head's output.
      attn_bias, mlp_bias: what every attention and MLP adds whatever the tokens are.
      mlp: every MLP's output without its bias; None in an attention-only model.
      norm_bias, unembed_bias: bias of the final norm, and of the unembedding.
      edits: by site, what edits of the stream, of `attn_out` or of the last two sites put in themselves. Edits of other
        sites, such as `attn.z` or `mlp_out`, are in the part that they change.
      scale: what the final norm divided by.
      sources: each head's part by the position it was read from, where asked for. Sums over `key` to `heads`, unless
        `attn.z` or `attn.head_out` is edited.
      neurons: each MLP's part by neuron, where asked for; in a mixture by expert and neuron, and 0 for experts that
        are not chosen. Sums to `mlp` unless `mlp_out` or `mlp.expert_out` is edited.
    """

    logit: Float[Array, "batch pos"]
    embed: Float[Array, "batch pos"]
    position: Float[Array, "batch pos"]
    token_type: Float[Array, "batch pos"]
    embed_bias: Float[Array, "batch pos"]
    heads: Float[Array, "layer batch pos head"]
    attn_bias: Float[Array, "layer batch pos"]
    mlp: Float[Array, "layer batch pos"] | None
    mlp_bias: Float[Array, "layer batch pos"]
    norm_bias: Float[Array, "batch pos"]
    unembed_bias: Float[Array, "batch pos"]
    edits: dict[str, Array]
    scale: Float[Array, "batch pos"]
    sources: Float[Array, "layer batch pos head key"] | None
    neurons: Float[Array, "layer batch pos *expert d_mlp"] | None

    def total(self) -> Float[Array, "batch pos"]:
        """The sum of all parts."""
        total = self.embed + self.position + self.token_type + self.embed_bias + self.norm_bias + self.unembed_bias
        total = total + self.heads.sum((0, 3)) + self.attn_bias.sum(0) + self.mlp_bias.sum(0)
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
        answer: Int[ArrayLike, "*place"],
        distractor: Int[ArrayLike, "*other_place"] | None = None,
        output_pos: Int[Array, " batch"] | None = None,
        token_types: Int[Array, "batch pos"] | None = None,
        taps: Any = None,
    ) -> LogitParts:
        """The parts of the logit of `answer`, or of its difference to `distractor`, at every position.

        Args:
          answer, distractor: tokens, an int, `[batch]` or `[batch pos]`.
          output_pos: account for these positions only; the axis `pos` of the result then has size 1.
          token_types: as the model takes them.

        Raises:
          InputError: a token that the vocabulary lacks, or tokens of another batch or length.
          SiteError: an edit of the logits of a model that has a soft cap on them.
        """
        decoder, edits = unwrap(self.model, taps)
        _check_edits(decoder, edits)
        n_pos = tokens.shape[1] if output_pos is None else 1
        u, unembed_bias = _row(decoder, "answer", answer, tokens.shape[0], n_pos)
        if distractor is not None:
            other, other_bias = _row(decoder, "distractor", distractor, tokens.shape[0], n_pos)
            u, unembed_bias = u - other, unembed_bias - other_bias

        # the last two sites know nothing of output_pos
        late = bool({"final_norm", "logits"} & edits.keys())
        output, acts = decoder(
            tokens,
            mask,
            taps=edits,
            capture=_wanted(self, decoder, edits),
            output_pos=None if late else output_pos,
            token_types=token_types,
        )
        if output_pos is not None:
            acts = {name: _at_positions(name, x, output_pos) for name, x in acts.items()}
            output = jnp.take_along_axis(output, output_pos[:, None, None], axis=1) if late else output

        last = acts["resid_post"] if acts["resid_post"].ndim == 3 else acts["resid_post"][-1]
        assert decoder.final_norm is not None
        normed = decoder.final_norm(last)
        d, norm_bias, scale = through(decoder.final_norm, u, in_float32(last))
        if decoder.config.logit_softcap:
            # what was before the cap cannot be told from the output where the cap is reached
            logit = along(acts.get("final_norm", normed), u) + unembed_bias
        else:
            logit = _logit(output, answer, u.shape[:2])
            if distractor is not None:
                logit = logit - _logit(output, distractor, u.shape[:2])

        layers = layer_parts(decoder, acts, d, by_neuron=self.by_neuron)
        parts = LogitParts(
            logit=logit,
            **embedding_parts(decoder, tokens, mask, token_types, output_pos, d),
            heads=layers["heads"],
            attn_bias=layers["attn_bias"],
            mlp=along(acts["mlp_out"], d) - layers["mlp_bias"] if "mlp_out" in acts else None,
            mlp_bias=layers["mlp_bias"],
            norm_bias=norm_bias,
            unembed_bias=unembed_bias,
            edits={},
            scale=scale,
            sources=layers.get("sources"),
            neurons=layers.get("neurons"),
        )
        by_edit = _edit_parts(parts, acts, edits, d, u, normed)
        return eqx.tree_at(lambda p: p.edits, parts, by_edit)


def direct_logits(model: SiteModel, *, by_source: bool = False, by_neuron: bool = False) -> DirectLogits:
    """Direct logit attribution of a native decoder: a function of the tokens that gives `LogitParts`.

    Args:
      model: a native decoder, also under `mi.intervene`; the parts are those of the edited run.
      by_source: also split every head by the position it reads from, `pattern · (v · o)`.
      by_neuron: also split every MLP by neuron; in a mixture every expert is then computed for every token.

    Raises:
      SiteError: not a native decoder, or one of another kind: an encoder without logits, with images as inputs, or with
        norms on the stream itself. Also `by_neuron` for one without MLPs.

    Example:
      `parts = mi.jit(direct_logits(model))(tokens, mask, answer=a, distractor=b, output_pos=last)`; then
      `parts.heads.mean(1)[:, 0]` is `[layer head]`.
    """
    decoder, _ = unwrap(model)
    _check_model(decoder.config)
    if by_neuron and not decoder.config.d_mlp:
        raise SiteError(f"{decoder.config.name} has no MLPs, so there are no neurons to split; leave by_neuron out")
    return DirectLogits(model, by_source, by_neuron)


def _check_model(config: DecoderConfig) -> None:
    reasons = {
        "it is an encoder without a head and has no logits": config.head == "none",
        "its inputs are images, not tokens": config.patches is not None,
        "its norms stand on the stream itself, so later parts scale earlier ones": config.norms == "post",
    }
    for reason, applies in reasons.items():
        if applies:
            raise SiteError(f"logits of {config.name} cannot be split into parts: {reason}")


def _check_edits(decoder: Decoder, edits: dict) -> None:
    if decoder.config.logit_softcap and "logits" in edits:
        raise SiteError(
            f"the parts of {decoder.config.name} sum to the logit before its soft cap, an edit of 'logits' comes after "
            "it: leave that edit out, or edit 'final_norm'"
        )


def _wanted(self: DirectLogits, decoder: Decoder, edits: dict) -> tuple[At, ...]:
    names = {"attn.head_out" if "attn.head_out" in edits else "attn.z"}
    names |= {"attn.z", "attn.pattern", "attn.v"} if self.by_source else set()
    names |= {"mlp_out"} if decoder.config.d_mlp else set()
    names |= {"mlp.post"} if self.by_neuron or mlp_bias_needs_run(decoder) else set()
    names |= {"mlp.gates"} if self.by_neuron and decoder.config.n_experts else set()
    parallel = decoder.config.parallel
    for name in _EDITED.keys() & edits.keys():
        needed = ("resid_post", "resid_pre", "attn_out") if name == "resid_post" and parallel else _EDITED[name]
        names |= {"embed" if name == "resid_pre" else name, *needed}
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


def _row(
    decoder: Decoder, name: str, tokens: ArrayLike, batch: int, n_pos: int
) -> tuple[Float[Array, "batch pos d_model"], Float[Array, "batch pos"]]:
    """Unembedding rows of the tokens, and their biases."""
    check_tokens(name, tokens, decoder.config.d_vocab)
    places = _places(name, tokens, (batch, n_pos))
    # a token outside the vocabulary must not become the last one unseen, nor a negative one count from the end
    places = jnp.where(places < 0, decoder.config.d_vocab, places)
    u = in_float32(decoder.unembedding.at[places].get(mode="fill", fill_value=jnp.nan))
    bias = decoder.unembed_bias
    return u, jnp.zeros(places.shape, u.dtype) if bias is None else in_float32(bias[places])


def _places(name: str, tokens: ArrayLike, shape: tuple[int, ...]) -> Int[Array, "batch pos"]:
    tokens = jnp.asarray(tokens)
    try:
        return jnp.broadcast_to(tokens[:, None] if tokens.ndim == 1 else tokens, shape)
    except ValueError:
        raise InputError(
            f"{name} of shape {tokens.shape} does not fit: pass a scalar, [batch] or [batch pos] with "
            f"batch={shape[0]}, pos={shape[1]}"
        ) from None


def _logit(
    output: Float[Array, "batch pos d_vocab"], tokens: ArrayLike, shape: tuple[int, ...]
) -> Float[Array, "batch pos"]:
    places = _places("answer", tokens, shape)
    return at_tokens(in_float32(output), places[:, :, None])[..., 0]


def _edit_parts(
    parts: LogitParts, acts: dict[str, Array], edits: dict, d: Array, u: Array, normed: Array
) -> dict[str, Array]:
    """What the edited sites hold beyond what was written into them."""
    by_site = {
        name: along(x, d) for name, x in acts.items() if name.startswith("resid") or name in ("embed", "attn_out")
    }
    out = {}
    if "embed" in edits:
        out["embed"] = by_site["embed"] - parts.embed - parts.position - parts.token_type - parts.embed_bias
    if "resid_pre" in edits:
        out["resid_pre"] = by_site["resid_pre"] - jnp.concatenate([by_site["embed"][None], by_site["resid_post"][:-1]])
    if "attn_out" in edits:
        out["attn_out"] = by_site["attn_out"] - parts.heads.sum(-1) - parts.attn_bias
    if "resid_mid" in edits:
        out["resid_mid"] = by_site["resid_mid"] - by_site["resid_pre"] - by_site["attn_out"]
    if "resid_post" in edits:
        before = by_site["resid_mid"] if "resid_mid" in by_site else by_site["resid_pre"] + by_site["attn_out"]
        out["resid_post"] = by_site["resid_post"] - before
        if parts.mlp is not None:
            out["resid_post"] = out["resid_post"] - parts.mlp - parts.mlp_bias
    if "final_norm" in edits:
        out["final_norm"] = along(acts["final_norm"], u) - along(normed, u)
    if "logits" in edits:
        out["logits"] = parts.logit - along(acts["final_norm"], u) - parts.unembed_bias
    return out
