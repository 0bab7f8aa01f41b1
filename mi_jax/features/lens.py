"""The logit lens: what the model would predict if it stopped after each layer.

The stream after a layer goes through the model's own final norm and unembedding, as if it were the last. Translators
(see `tuned_lens`) may change it before that.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.apply import Taps
from mi_jax.core.errors import InputError
from mi_jax.core.sites import LAYER, SiteError, at
from mi_jax.core.taps import Tap
from mi_jax.core.transforms import Captured, Intervened, SiteModel
from mi_jax.core.vocabulary import at_tokens, check_tokens
from mi_jax.models.decoder import Decoder

# From the stream `[batch pos d_model]` to logits `[batch pos d_vocab]`.
Head = Callable[[Array], Array]
_STREAM = (LAYER, "batch", "pos", "d_model")


class LensReading(eqx.Module):
    """What the lens shows after every layer. Values where `mask` is False belong to padding.

    Attributes:
      kl: KL(final ‖ lens) in nats, from the distribution that the model outputs to that of the layer.
      top: the token that the layer makes most probable.
      log_prob: of the chosen tokens, in nats.
      rank: of the chosen tokens, the number of tokens with a higher logit; 0 is the top.
      logits: None unless they were asked for.
    """

    mask: Bool[Array, "batch pos"]
    kl: Float[Array, "layer batch pos"]
    top: Int[Array, "layer batch pos"]
    log_prob: Float[Array, "layer batch pos choice"]
    rank: Int[Array, "layer batch pos choice"]
    logits: Float[Array, "layer batch pos d_vocab"] | None = None

    def mean_kl(self) -> Float[Array, " layer"]:
        """KL of every layer, averaged over the real positions."""
        real = self.mask[None, :, :]
        return jnp.where(real, self.kl, 0.0).sum((1, 2)) / self.mask.sum().astype(self.kl.dtype)


class Lens(eqx.Module):
    """See `logit_lens`."""

    model: Any
    head: Head | None
    translators: Any
    site: str = eqx.field(static=True)
    layers: tuple[int, ...] | None = eqx.field(static=True)

    def __call__(
        self,
        tokens: Int[Array, "batch pos"],
        mask: Bool[Array, "batch pos"] | None = None,
        *,
        choices: Int[Array, "*place choice"] | None = None,
        output_pos: Int[Array, " batch"] | None = None,
        keep_logits: bool = False,
        **options,
    ) -> LensReading:
        """The reading of every layer at every position.

        Args:
          choices: tokens to follow, `[choice]` for all prompts, `[batch choice]` or `[batch pos choice]`; None follows
            the model's own top token at each position.
          output_pos: read these positions only; the axis `pos` of the result then has size 1.
          keep_logits: also return `[layer batch pos d_vocab]`; the rest never holds more than one layer's logits.
          **options: passed on to the model, such as `taps`.

        Raises:
          InputError: a chosen token that the vocabulary lacks, or choices of another batch or length.
        """
        inputs = (tokens,) if mask is None else (tokens, mask)
        if output_pos is not None:
            options["output_pos"] = output_pos
        final, acts = self.model(*inputs, capture=(at(self.site, self.layers),), **options)
        head = self.head or native_head(self.model, mask, options.get("taps"))
        stream, mask = acts[self.site], jnp.ones(tokens.shape, bool) if mask is None else mask
        if output_pos is not None:
            stream = jnp.take_along_axis(stream, output_pos[None, :, None, None], axis=2)
            mask = jnp.take_along_axis(mask, output_pos[:, None], axis=1)
        translators = self.translators
        if self.layers is not None:
            translators = jax.tree.map(lambda a: a[np.array(self.layers)], translators)
        choices = _choices(choices, final)
        target = jax.nn.log_softmax(in_float32(final))

        def layer(row):
            x, translate = row
            logits = in_float32(head(x if translate is None else translate(x)))
            log_p = jax.nn.log_softmax(logits)
            chosen = at_tokens(logits, choices)
            rank = jax.lax.map(
                lambda one: (~(logits <= one[..., None])).sum(-1, dtype=jnp.int32), jnp.moveaxis(chosen, -1, 0)
            )
            log_prob = at_tokens(log_p, choices)
            top = logits.argmax(-1).astype(jnp.int32)
            return kl(target, log_p), top, log_prob, jnp.moveaxis(rank, 0, -1), logits if keep_logits else None

        return LensReading(mask, *jax.lax.map(layer, (stream, translators)))


def logit_lens(
    model: SiteModel,
    *,
    head: Head | None = None,
    translators: Any = None,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
) -> Lens:
    """The logit lens of a model: a function of the tokens (and mask) that gives a `LensReading`.

    Args:
      model: a native decoder, also under `mi.intervene`, or any model with sites.
      head: final norm and unembedding of a model that is not native; native ones have their own, in which edits of
        `final_norm` and `logits` count, so that the last layer reads what the model outputs.
      translators: a pytree with a leading layer axis whose rows are functions of the stream; None reads it as it is.
      site: the stream to read, `resid_post`, `resid_mid` or `resid_pre`.
      layers: the layers to read; None for all.

    Raises:
      SiteError: a site that is no stream, a layer that is not there, or a foreign model without a head.

    Example:
      `reading = mi.jit(logit_lens(model))(tokens, mask)`; `reading.mean_kl()` falls to 0 at the last layer.
    """
    if head is None:
        config = unwrap(model)[0].config
        if config.head == "none" or config.patches is not None:
            kind = "is an encoder without logits" if config.head == "none" else "takes images, not tokens"
            raise SiteError(f"{config.name} {kind}: a lens has nothing to read the stream as; pass head=… if it has")
    found = stream_site(model, site)
    chosen = None if layers is None else tuple(int(layer) for layer in layers)
    model.site_table.normalise((at(found, chosen),))
    return Lens(model, head, translators, found, chosen)


def stream_site(model: SiteModel, site: str) -> str:
    """The canonical name of a site that holds the stream of every layer.

    Raises:
      SiteError: no such site, or one with other axes.
    """
    found, layer = model.site_table.resolve(site)
    if found.axes != _STREAM or layer is not None:
        raise SiteError(
            f"a lens reads the stream of every layer, such as 'resid_post'; {site!r} has axes {' '.join(found.axes)}"
            + ("" if layer is None else f" and names layer {layer}: pass layers=({layer},) instead")
        )
    return found.name


def unwrap(model: Any, taps: Taps | None = None) -> tuple[Decoder, dict[str, tuple]]:
    """The native decoder inside `mi.intervene` and `mi.capture`, and all of its edits by site, in order.

    Raises:
      SiteError: the model is not a native decoder.
    """
    merged = dict(taps or {})
    while isinstance(model, Intervened | Captured):
        if isinstance(model, Intervened):
            merged = {name: (*model.edits.get(name, ()), *merged.get(name, ())) for name in (*model.edits, *merged)}
        model = model.model
    if not isinstance(model, Decoder):
        raise SiteError(
            f"{type(model).__name__} is not a native decoder, so its final norm and unembedding are not known here; "
            "for a lens, pass head=…, a function from the stream to logits"
        )
    return model, merged


def native_head(model: SiteModel, mask: Array | None = None, taps: Taps | None = None) -> Head:
    """Final norm and unembedding of a native decoder, with the edits at these two sites."""
    decoder, edits = unwrap(model, taps)
    late = {name: edits[name] for name in ("final_norm", "logits") if name in edits}
    return lambda x: decoder.head(x, Tap(decoder.site_table, late, (), {}, None, mask))


def kl(log_p: Float[Array, "*place d_vocab"], log_q: Float[Array, "*place d_vocab"]) -> Float[Array, "*place"]:
    """KL(p ‖ q) = Σ p (log p − log q), in nats."""
    p = jnp.exp(log_p)
    return jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def in_float32(x: Array) -> Array:
    """The array in at least float32; half-precision logits are too coarse for differences and logarithms."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def _choices(choices: Array | None, final: Array) -> Int[Array, "batch pos choice"]:
    batch, n_pos, d_vocab = final.shape
    if choices is None:
        return final.argmax(-1, keepdims=True).astype(jnp.int32)
    check_tokens("choices", choices, d_vocab)
    full = {1: (None, None), 2: (slice(None), None), 3: ()}.get(choices.ndim)
    try:
        if full is None:
            raise ValueError
        return jnp.broadcast_to(choices[full], (batch, n_pos, choices.shape[-1]))
    except ValueError:
        raise InputError(
            f"choices of shape {choices.shape} do not fit: pass [choice], [batch choice] or [batch pos choice] with "
            f"batch={batch}, pos={n_pos}"
        ) from None
