"""The native decoder: stacked layers under one scan, taps and captures at every site."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.apply import Taps, checked
from mi_jax.core.cells import Cells
from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, Site, SiteError, SiteTable
from mi_jax.core.taps import Slots, Tap, stacked_rows
from mi_jax.models.block import Block, Layer, block
from mi_jax.models.cells import Entry, Unpatched, entry, resume_cells, unpatched
from mi_jax.models.config import DecoderConfig
from mi_jax.models.embedding import Patches, embed_patches, embed_tokens, places
from mi_jax.models.layout import Prompts
from mi_jax.models.norm import Norm, normed
from mi_jax.models.rotary import rotation
from mi_jax.models.scan import scan_layers
from mi_jax.models.sites import site_table


class Decoder(eqx.Module):
    """A causal language model. Call it as `model(tokens)`; see `__call__`."""

    config: DecoderConfig = eqx.field(static=True)
    embed: Float[Array, "d_vocab d_model"] | None
    pos_embed: Float[Array, "n_ctx d_model"] | None
    blocks: Block
    final_norm: Norm | None
    unembed: Float[Array, "d_vocab d_model"] | None
    unembed_bias: Float[Array, " d_vocab"] | None = None
    type_embed: Float[Array, "type d_model"] | None = None
    embed_norm: Norm | None = None
    patches: Patches | None = None

    @property
    def site_table(self) -> SiteTable:
        return site_table(self.config)

    def layer(self, number: Int[Array, ""] | int, params: Block) -> Layer:
        """One layer, of `self.blocks` the row `number`: with what its place among the layers determines."""
        windows = self.config.windows if any(self.config.windows) else None
        window = None if windows is None else jnp.asarray(windows, jnp.int32)[number]
        return Layer(params, rotation(self.config, number), window)

    def __call__(
        self,
        tokens: Int[Array, "batch pos"] | Float[Array, "batch channel height width"],
        mask: Bool[Array, "batch pos"] | None = None,
        *,
        taps: Taps | None = None,
        capture: Sequence[str | At] | None = None,
        output: bool = True,
        output_pos: Int[Array, " batch"] | None = None,
        token_types: Int[Array, "batch pos"] | None = None,
    ) -> Any:
        """Logits, and the captured activations if `capture` is given.

        Args:
          tokens: padded on the right where the lengths differ, or on the left. Images, where the model takes these.
          mask: True at real tokens; None means all are. Positions count from the first real token of a prompt.
          taps: edits by site; `mi.intervene` makes them.
          capture: sites to return.
          output: False stops after the last layer that `capture` needs; the output is then None.
          output_pos: unembed these positions only; the logits then have shape `[batch 1 d_vocab]`.
          token_types: rows of the table of token types, 0 where not given; only where the model has one.

        Returns:
          logits `[batch pos d_vocab]`, or the last stream `[batch pos d_model]` of an encoder without a head. With
          `capture`, a pair of that and `{site: array}`.

        Raises:
          InputError: a prompt longer than the context, or inputs of another shape.
          SiteError: an unknown site, or an edit that does not fit.
        """
        table = self.site_table
        taps = checked(taps or {}, table)
        slots = Slots(table.normalise(capture or ()), table)
        x, mask = self.embedded(tokens, mask, token_types)
        outer = Tap(table, taps, slots.single, {}, None, mask)
        x = outer("embed", x)
        needs_head = output or set(slots.single) - {"embed"}
        n_layers = self.config.n_layers if needs_head else slots.last_layer + 1
        x, acts, _ = scan_layers(self, x, mask, taps, slots, n_layers)
        logits = self.head(x, outer, output_pos) if needs_head else None
        if capture is None:
            return logits if output else None
        return logits if output else None, acts | outer.seen

    def embedded(
        self,
        tokens: Int[Array, "batch pos"] | Float[Array, "batch channel height width"],
        mask: Bool[Array, "batch pos"] | None = None,
        token_types: Int[Array, "batch pos"] | None = None,
        positions: Int[Array, "batch pos"] | None = None,
    ) -> tuple[Float[Array, "batch pos d_model"], Bool[Array, "batch pos"]]:
        """The stream before the first layer, and the mask.

        Args:
          positions: of the tokens; None counts from the first real one.

        Raises:
          InputError: no input at all, inputs of another shape, more tokens than the context has, or token types that
            have no table.
        """
        c = self.config
        mask = None if mask is None else jnp.asarray(mask, bool)
        if self.patches is not None and c.patches is not None:
            x = embed_patches(self.patches, c.patches, tokens)
        else:
            _check_prompts(c, tokens, mask)
            assert self.embed is not None
            x = embed_tokens(c, self.embed, tokens, self.type_embed, token_types)
        if token_types is not None and self.type_embed is None:
            raise InputError(f"{c.name} has no token types; leave token_types out")
        if self.pos_embed is not None:
            if positions is None and mask is not None and self.patches is None:
                positions = places(mask)
            rows = self.pos_embed[None, : x.shape[1]] if positions is None else self.pos_embed[positions]
            x = x + rows
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        return normed(self.embed_norm, x), mask

    def resume(
        self,
        x: Float[Array, "batch pos d_model"],
        layer: Int[Array, ""],
        mask: Bool[Array, "batch pos"] | None = None,
        *,
        taps: Taps | None = None,
        output_pos: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch out_pos d_vocab"]:
        """Logits from the stream before `layer` (which may be traced): only the layers from there on run."""
        table, taps = self.site_table, taps or {}
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        rows = stacked_rows(taps, table)

        def body(number, x):
            params, row = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), (self.blocks, rows)
            )
            tap = Tap(table, taps, (), row, number, mask)
            return block(self.layer(number, params), x, tap, self.config, Prompts(mask))

        x = jax.lax.fori_loop(layer, self.config.n_layers, body, x)
        return self.head(x, Tap(table, taps, (), {}, None, mask), output_pos)

    def unpatched(self, tokens, mask=None, *, taps: Taps, output: bool, **options) -> Unpatched:
        """What the cells of a sweep need of the run without the swept edit; see `mi_jax.core.cells`."""
        return unpatched(self, tokens, mask, taps, output=output, **options)

    def entry(self, run: Unpatched, site: Site, taps: Taps, layer: Int[Array, ""]) -> Entry | None:
        """The unpatched value of the swept site in one layer."""
        return entry(self, run, site, taps, layer)

    def resume_cells(
        self,
        run: Unpatched,
        entry: Entry | None,
        cells: Cells,
        layer: Int[Array, ""],
        output_pos: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "cell batch out_pos d_vocab"]:
        """Logits of all cells, from `layer` and from each cell's first edited position on."""
        return resume_cells(self, run, entry, cells, layer, output_pos)

    def head(self, x: Float[Array, "batch pos d_model"], tap: Tap, output_pos: Array | None = None) -> Array:
        """Final norm and unembedding, as far as the model has them."""
        if output_pos is not None:
            if tap.touches("final_norm") or tap.touches("logits"):
                raise SiteError(
                    "output_pos drops positions: it does not go with edits or captures of the last two sites"
                )
            if jnp.shape(output_pos) != x.shape[:1]:
                raise InputError(
                    f"output_pos has one position for each of {x.shape[0]} prompts; got shape {jnp.shape(output_pos)}"
                )
            x = jnp.take_along_axis(x, output_pos[:, None, None], axis=1)
        if self.final_norm is not None:
            x = tap("final_norm", self.final_norm(x))
        if self.config.head == "none":
            return x
        logits = jnp.einsum("bpd,vd->bpv", x, self.unembedding)
        if self.unembed_bias is not None:
            logits = logits + self.unembed_bias[None, None, :]
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return tap("logits", logits)

    @property
    def unembedding(self) -> Float[Array, "d_vocab d_model"]:
        """The rows that the last stream is compared with; the embedding where the two are tied."""
        rows = self.embed if self.unembed is None else self.unembed
        if rows is None:
            raise InputError(f"{self.config.name} has no unembedding: it is an encoder without a head")
        return rows


def _check_prompts(config: DecoderConfig, tokens: Array, mask: Array | None) -> None:
    if not hasattr(tokens, "shape"):
        raise InputError(f"tokens are an array [batch pos], such as jnp.asarray([[5, 9]]); got {type(tokens).__name__}")
    if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
        shape = "no mask" if mask is None else f"a mask of shape {mask.shape}"
        raise InputError(
            f"tokens and mask have shape [batch pos]; got tokens of shape {tokens.shape} and {shape}; "
            "tokens[None] makes a batch of one prompt"
        )
    if 0 in tokens.shape:
        raise InputError(f"tokens of shape {tokens.shape} hold none; give at least one prompt of at least one token")
    if tokens.shape[1] > config.n_ctx:
        raise InputError(
            f"the prompt has {tokens.shape[1]} tokens, the context of {config.name} is {config.n_ctx}; "
            "shorten it or split it"
        )
