"""The native decoder: stacked layers under one scan, taps and captures at every site."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mi_jax.core.apply import Taps, checked
from mi_jax.core.cells import Cells
from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, Site, SiteError, SiteTable
from mi_jax.core.taps import Slots, Tap, stacked_rows
from mi_jax.models.attention import Attention
from mi_jax.models.block import Block, Layer, block
from mi_jax.models.cells import Entry, Unpatched, entry, resume_cells, unpatched
from mi_jax.models.config import DecoderConfig
from mi_jax.models.embedding import Patches, embed_patches, embed_tokens
from mi_jax.models.layout import Prompts
from mi_jax.models.mlp import MLP, Experts
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
          tokens: right-padded where the lengths differ. Images, where the model takes these.
          mask: True at real tokens; None means all are.
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
          positions: of the tokens; None counts from 0.

        Raises:
          InputError: inputs of another shape, more tokens than the context has, or token types that have no table.
        """
        c = self.config
        if self.patches is not None and c.patches is not None:
            x = embed_patches(self.patches, c.patches, tokens)
        else:
            _check_prompts(c, tokens, mask)
            x = embed_tokens(self, tokens, token_types)
        if token_types is not None and self.type_embed is None:
            raise InputError(f"{c.name} has no token types; leave token_types out")
        if self.pos_embed is not None:
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
    if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
        shape = "no mask" if mask is None else f"a mask of shape {mask.shape}"
        raise InputError(
            f"tokens and mask have shape [batch pos]; got tokens of shape {tokens.shape} and {shape}; "
            "tokens[None] makes a batch of one prompt"
        )
    if tokens.shape[1] > config.n_ctx:
        raise InputError(
            f"the prompt has {tokens.shape[1]} tokens, the context of {config.name} is {config.n_ctx}; "
            "shorten it or split it"
        )


def init_decoder(config: DecoderConfig, *, key: PRNGKeyArray, dtype=jnp.float32) -> Decoder:
    """Random weights, normal with variance 1/fan_in; those that write to the stream are scaled by 1/sqrt(2·layers)."""
    c, n, d, f, h = config, config.n_layers, config.d_model, config.d_mlp, config.d_head
    keys = iter(jax.random.split(key, 12))

    def normal(*shape, fan_in, gain=1.0):
        return gain * fan_in**-0.5 * jax.random.normal(next(keys), shape, dtype)

    def zeros(on: bool, *shape):
        return jnp.zeros(shape, dtype) if on else None

    def norm(*shape, layer: bool = c.norm == "layer"):
        weight = None if c.norm == "none" else jnp.full(shape, 1.0 - c.norm_offset, dtype)
        return Norm(weight, zeros(layer, *shape), c.norm_eps, c.norm_offset)

    def head_norm(heads: int):
        if c.qk_norm == "none":
            return None
        return norm(n, heads, h, layer=False) if c.qk_norm == "whole" else norm(n, h, layer=False)

    out = (2 * n) ** -0.5
    attn = Attention(
        q=normal(n, d, c.n_heads, h, fan_in=d),
        k=normal(n, d, c.n_kv_heads, h, fan_in=d),
        v=normal(n, d, c.n_kv_heads, h, fan_in=d),
        o=normal(n, c.n_heads, h, d, fan_in=c.n_heads * h, gain=out),
        q_bias=zeros(c.qkv_bias, n, c.n_heads, h),
        k_bias=zeros(c.qkv_bias, n, c.n_kv_heads, h),
        v_bias=zeros(c.qkv_bias, n, c.n_kv_heads, h),
        o_bias=zeros(c.o_bias, n, d),
        q_norm=head_norm(c.n_heads),
        k_norm=head_norm(c.n_kv_heads),
    )
    mlp, e = None, c.n_experts
    if e:
        mlp = Experts(
            router=normal(n, d, e, fan_in=d),
            gate=normal(n, e, d, f, fan_in=d),
            up=normal(n, e, d, f, fan_in=d),
            down=normal(n, e, f, d, fan_in=f, gain=out),
        )
    elif f:
        mlp = MLP(
            gate=normal(n, d, f, fan_in=d) if c.gated else None,
            up=normal(n, d, f, fan_in=d),
            down=normal(n, f, d, fan_in=f, gain=out),
            gate_bias=zeros(c.mlp_bias and c.gated, n, f),
            up_bias=zeros(c.mlp_bias, n, f),
            down_bias=zeros(c.mlp_bias, n, d),
        )
    before, after = c.norms in ("pre", "sandwich"), c.norms != "pre"
    blocks = Block(
        attn_norm=norm(n, d) if before else None,
        attn=attn,
        mlp_norm=norm(n, d) if before and f and not c.shared_norm else None,
        mlp=mlp,
        attn_post_norm=norm(n, d) if after else None,
        mlp_post_norm=norm(n, d) if after and f else None,
    )
    patches = None
    if c.patches is not None:
        area = (c.patches.n_channels, c.patches.patch_size, c.patches.patch_size)
        patches = Patches(normal(*area, d, fan_in=math.prod(area)), jnp.zeros(d, dtype), jnp.zeros(d, dtype))
    return Decoder(
        config=c,
        embed=None if c.patches is not None else normal(c.d_vocab, d, fan_in=d),
        pos_embed=normal(c.n_ctx, d, fan_in=d) if c.positions == "learned" else None,
        blocks=blocks,
        final_norm=None if c.norms == "post" else norm(d),
        unembed=None if c.tied or c.head == "none" else normal(c.d_vocab, d, fan_in=d),
        unembed_bias=zeros(c.unembed_bias, c.d_vocab),
        type_embed=normal(c.n_token_types, d, fan_in=d) if c.n_token_types else None,
        embed_norm=norm(d) if c.embed_norm else None,
        patches=patches,
    )


def abstract_decoder(config: DecoderConfig, dtype=jnp.float32) -> Decoder:
    """A decoder of `jax.ShapeDtypeStruct`: its parameters' shapes without their memory."""
    return jax.eval_shape(lambda key: init_decoder(config, key=key, dtype=dtype), jax.random.key(0))


_HEADS, _KV_HEADS = ("layer", "d_model", "head", "d_head"), ("layer", "d_model", "kv_head", "d_head")
_IN, _OUT = ("layer", "d_model", "d_mlp"), ("layer", "d_mlp", "d_model")
_AXES = {
    ".embed": ("d_vocab", "d_model"),
    ".unembed": ("d_vocab", "d_model"),
    ".unembed_bias": ("d_vocab",),
    ".pos_embed": ("pos", "d_model"),
    ".type_embed": (None, "d_model"),
    ".patches.weight": (None, None, None, "d_model"),
    ".attn.q": _HEADS,
    ".attn.k": _KV_HEADS,
    ".attn.v": _KV_HEADS,
    ".attn.o": ("layer", "head", "d_head", "d_model"),
    ".attn.q_bias": ("layer", "head", "d_head"),
    ".attn.k_bias": ("layer", "kv_head", "d_head"),
    ".attn.v_bias": ("layer", "kv_head", "d_head"),
    ".mlp.gate": _IN,
    ".mlp.up": _IN,
    ".mlp.down": _OUT,
    ".mlp.gate_bias": ("layer", "d_mlp"),
    ".mlp.up_bias": ("layer", "d_mlp"),
}
_EXPERT_AXES = {
    ".mlp.router": ("layer", "d_model", None),
    ".mlp.gate": ("layer", "expert", "d_model", "d_mlp"),
    ".mlp.up": ("layer", "expert", "d_model", "d_mlp"),
    ".mlp.down": ("layer", "expert", "d_mlp", "d_model"),
}
_HEAD_NORMS = {".attn.q_norm.weight": "head", ".attn.k_norm.weight": "kv_head"}


def logical_axes(model: Decoder) -> Decoder:
    """The axis names of every parameter, in the structure of the model; `mi.core.sharding.shard` takes them."""
    table = _AXES | (_EXPERT_AXES if model.config.n_experts else {})

    def names(path, x):
        key = jax.tree_util.keystr(path).removeprefix(".blocks")
        if key in _HEAD_NORMS:
            return ("layer", _HEAD_NORMS[key], "d_head")[:: 1 if x.ndim == 3 else 2]
        return table[key] if key in table else ("layer", "d_model")[-x.ndim :]

    return jax.tree_util.tree_map_with_path(names, model)
