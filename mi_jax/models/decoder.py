"""The native decoder: stacked layers under one scan, taps and captures at every site."""

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
from mi_jax.models.block import MLP, Attention, Block, Norm, Prompts, block
from mi_jax.models.cells import Entry, Unpatched, entry, resume_cells, unpatched
from mi_jax.models.config import DecoderConfig

_STREAM = ("layer", "batch", "pos", "d_model")


def site_table(config: DecoderConfig) -> SiteTable:
    """The sites of a decoder of this shape."""
    heads, kv = ("layer", "batch", "pos", "head"), ("layer", "batch", "pos", "kv_head")
    weights = ("layer", "batch", "head", "query", "key")
    axes: dict[str, tuple[str, ...]] = {
        "embed": ("batch", "pos", "d_model"),
        "resid_pre": _STREAM,
        "attn.q_in": (*heads, "d_model"),
        "attn.k_in": (*kv, "d_model"),
        "attn.v_in": (*kv, "d_model"),
        "attn.q": (*heads, "d_head"),
        "attn.k": (*kv, "d_head"),
        "attn.v": (*kv, "d_head"),
        "attn.scores": weights,
        "attn.pattern": weights,
        "attn.z": (*heads, "d_head"),
        "attn.head_out": (*heads, "d_model"),
        "attn_out": _STREAM,
        "resid_mid": _STREAM,
    }
    if config.d_mlp:
        axes |= {"mlp.in": _STREAM, "mlp.pre": (*_STREAM[:3], "d_mlp"), "mlp.post": (*_STREAM[:3], "d_mlp")}
        axes |= {"mlp_out": _STREAM}
    axes |= {"resid_post": _STREAM, "final_norm": ("batch", "pos", "d_model"), "logits": ("batch", "pos", "d_vocab")}
    sizes = {
        "layer": config.n_layers,
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "d_mlp": config.d_mlp,
        "d_vocab": config.d_vocab,
    }
    # the TransformerLens name means the token embedding alone, which a learned table of positions is added to
    aliases = () if config.positions == "learned" else (("hook_embed", "embed"),)
    return SiteTable(config.name, tuple(Site(n, a) for n, a in axes.items()), tuple(sizes.items()), aliases)


class Decoder(eqx.Module):
    """A causal language model. Call it as `model(tokens)`; see `__call__`."""

    config: DecoderConfig = eqx.field(static=True)
    embed: Float[Array, "d_vocab d_model"]
    pos_embed: Float[Array, "n_ctx d_model"] | None
    blocks: Block
    final_norm: Norm
    unembed: Float[Array, "d_vocab d_model"] | None

    @property
    def site_table(self) -> SiteTable:
        return site_table(self.config)

    def __call__(
        self,
        tokens: Int[Array, "batch pos"],
        mask: Bool[Array, "batch pos"] | None = None,
        *,
        taps: Taps | None = None,
        capture: Sequence[str | At] | None = None,
        output: bool = True,
        output_pos: Int[Array, " batch"] | None = None,
    ) -> Any:
        """Logits, and the captured activations if `capture` is given.

        Args:
          tokens: right-padded where the lengths differ.
          mask: True at real tokens; None means all are.
          taps: edits by site; `mi.intervene` makes them.
          capture: sites to return.
          output: False stops after the last layer that `capture` needs; the output is then None.
          output_pos: unembed these positions only; the logits then have shape `[batch 1 d_vocab]`.

        Returns:
          logits `[batch pos d_vocab]`, or `(logits, {site: array})` when `capture` is not None.

        Raises:
          InputError: a prompt longer than the context.
          SiteError: an unknown site, or an edit that does not fit.
        """
        if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
            shape = "no mask" if mask is None else f"a mask of shape {mask.shape}"
            raise InputError(
                f"tokens and mask have shape [batch pos]; got tokens of shape {tokens.shape} and {shape}; "
                "tokens[None] makes a batch of one prompt"
            )
        if tokens.shape[1] > self.config.n_ctx:
            raise InputError(
                f"the prompt has {tokens.shape[1]} tokens, the context of {self.config.name} is {self.config.n_ctx}; "
                "shorten it or split it"
            )
        table = self.site_table
        taps = checked(taps or {}, table)
        slots = Slots(table.normalise(capture or ()), table)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        outer = Tap(table, taps, slots.single, {}, None, mask)
        # a token that is not in the vocabulary has no embedding, rather than that of the last one
        x = self.embed.at[tokens].get(mode="fill", fill_value=jnp.nan)
        if self.pos_embed is not None:
            x = x + self.pos_embed[None, : tokens.shape[1]]
        x = outer("embed", x)
        needs_head = output or set(slots.single) - {"embed"}
        n_layers = self.config.n_layers if needs_head else slots.last_layer + 1
        x, acts = self._scan(x, mask, taps, slots, n_layers)
        logits = self.head(x, outer, output_pos) if needs_head else None
        if capture is None:
            return logits if output else None
        return logits if output else None, acts | outer.seen

    def _scan(self, x: Array, mask: Array, taps: Taps, slots: Slots, n_layers: int) -> tuple[Array, dict[str, Array]]:
        table = self.site_table
        if n_layers == 0:
            return x, {}

        def layer_step(x, layer, params, rows):
            tap = Tap(table, taps, slots.layered, rows, layer, mask)
            return block(params, x, tap, self.config, Prompts(mask)), tap.seen

        layers = jnp.arange(self.config.n_layers, dtype=jnp.int32)
        xs = jax.tree.map(lambda a: a[:n_layers], (layers, self.blocks, stacked_rows(taps, table)))
        first = jax.tree.map(lambda a: a[0], xs)
        _, shapes = jax.eval_shape(layer_step, x, *first)

        def body(carry, row):
            x, buffers = carry
            x, seen = layer_step(x, *row)
            buffers, stacked = slots.write(buffers, seen, row[0])
            return (x, buffers), stacked

        (x, buffers), stacked = jax.lax.scan(body, (x, slots.empty(shapes)), xs)
        return x, slots.read(buffers, stacked)

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

        def body(layer, x):
            params, row = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), (self.blocks, rows)
            )
            return block(params, x, Tap(table, taps, (), row, layer, mask), self.config, Prompts(mask))

        x = jax.lax.fori_loop(layer, self.config.n_layers, body, x)
        return self.head(x, Tap(table, taps, (), {}, None, mask), output_pos)

    def unpatched(self, tokens, mask=None, *, taps: Taps, output: bool) -> Unpatched:
        """What the cells of a sweep need of the run without the swept edit; see `mi_jax.core.cells`."""
        return unpatched(self, tokens, mask, taps, output=output)

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
        """Final norm and unembedding."""
        if output_pos is not None:
            if tap.touches("final_norm") or tap.touches("logits"):
                raise SiteError(
                    "output_pos drops positions: it does not go with edits or captures of the last two sites"
                )
            x = jnp.take_along_axis(x, output_pos[:, None, None], axis=1)
        x = tap("final_norm", self.final_norm(x))
        unembed = self.embed if self.unembed is None else self.unembed
        return tap("logits", jnp.einsum("bpd,vd->bpv", x, unembed))


def init_decoder(config: DecoderConfig, *, key: PRNGKeyArray, dtype=jnp.float32) -> Decoder:
    """Random weights, normal with variance 1/fan_in; those that write to the stream are scaled by 1/sqrt(2·layers)."""
    n, d, f, h = config.n_layers, config.d_model, config.d_mlp, config.d_head
    keys = iter(jax.random.split(key, 10))

    def normal(*shape, fan_in, gain=1.0):
        return gain * fan_in**-0.5 * jax.random.normal(next(keys), shape, dtype)

    def norm(*lead):
        weight = None if config.norm == "none" else jnp.ones((*lead, d), dtype)
        return Norm(weight, jnp.zeros((*lead, d), dtype) if config.norm == "layer" else None, config.norm_eps)

    out = (2 * n) ** -0.5
    attn = Attention(
        q=normal(n, d, config.n_heads, h, fan_in=d),
        k=normal(n, d, config.n_kv_heads, h, fan_in=d),
        v=normal(n, d, config.n_kv_heads, h, fan_in=d),
        o=normal(n, config.n_heads, h, d, fan_in=config.n_heads * h, gain=out),
    )
    mlp = None
    if f:
        gate = normal(n, d, f, fan_in=d) if config.gated else None
        mlp = MLP(gate, normal(n, d, f, fan_in=d), normal(n, f, d, fan_in=f, gain=out))
    return Decoder(
        config=config,
        embed=normal(config.d_vocab, d, fan_in=d),
        pos_embed=normal(config.n_ctx, d, fan_in=d) if config.positions == "learned" else None,
        blocks=Block(norm(n), attn, norm(n) if f else None, mlp),
        final_norm=norm(),
        unembed=None if config.tied else normal(config.d_vocab, d, fan_in=d),
    )


_AXES = {
    ".embed": ("d_vocab", "d_model"),
    ".unembed": ("d_vocab", "d_model"),
    ".pos_embed": ("pos", "d_model"),
    ".attn.q": ("layer", "d_model", "head", "d_head"),
    ".attn.k": ("layer", "d_model", "kv_head", "d_head"),
    ".attn.v": ("layer", "d_model", "kv_head", "d_head"),
    ".attn.o": ("layer", "head", "d_head", "d_model"),
    ".mlp.gate": ("layer", "d_model", "d_mlp"),
    ".mlp.up": ("layer", "d_model", "d_mlp"),
    ".mlp.down": ("layer", "d_mlp", "d_model"),
}


def logical_axes(model: Decoder) -> Decoder:
    """The axis names of every parameter, in the structure of the model; `mi.core.sharding.shard` takes them."""

    def names(path, x):
        key = jax.tree_util.keystr(path).removeprefix(".blocks")
        return _AXES[key] if key in _AXES else ("layer", "d_model")[-x.ndim :]

    return jax.tree_util.tree_map_with_path(names, model)
