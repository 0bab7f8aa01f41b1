"""Many cells of a sweep at once, from the edited layer and position on.

Everything before the edit is the same in every cell and is computed once, in the unpatched run: the stream before every
layer, the keys and values, and, in one layer at a time, the edited site itself. A cell starts from these. Its edited
layer comes first, with the edited site put in as a known value, so that what leads to it is never computed; a loop runs
the layers after it. The stream holds the positions that can have changed, those of all cells on one flat axis
(`mi_jax.core.suffixes`). Where only one position of the output is read, the last layer computes that one alone, from
the keys and values of all.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.apply import Taps, apply, split
from mi_jax.core.cells import Cells
from mi_jax.core.sites import Site
from mi_jax.core.suffixes import Suffixes
from mi_jax.core.taps import Tap, stacked_rows
from mi_jax.models.block import block
from mi_jax.models.config import DecoderConfig
from mi_jax.models.layered import Layered
from mi_jax.models.layout import Prompts

_HEAD = ("final_norm", "logits")
_AFTER_ATTENTION = ("mlp_out", "resid_post")


class Unpatched(eqx.Module):
    """What cells take from the unpatched run.

    Attributes:
      stream: before every layer, and after the last one.
      logits: where the cells' whole output is wanted.
    """

    stream: Float[Array, "row batch pos d_model"]
    keys: Float[Array, "layer batch pos kv_head d_head"]
    values: Float[Array, "layer batch pos kv_head d_head"]
    logits: Float[Array, "batch pos d_vocab"] | None
    mask: Bool[Array, "batch pos"]


class Entry(eqx.Module):
    """What cells find in their first layer.

    Attributes:
      site: the edited site without the edit.
      before: a site that the edited one is computed from, where that spares attention.
    """

    site: Array
    before: dict[str, Float[Array, "batch pos d_model"]]


def unpatched(
    model: Layered,
    tokens: Int[Array, "batch pos"] | Float[Array, "batch channel height width"],
    mask: Bool[Array, "batch pos"] | None,
    taps: Taps,
    *,
    output: bool,
    **options: Any,
) -> Unpatched:
    """The run without the edit."""
    # the stream as a layer gets it, before the edits of `resid_pre`, which the layer makes itself
    after = _after_layer(model.config)
    logits, acts = model(
        tokens, mask, taps=taps, capture=("embed", "attn.k", "attn.v", after), output=output, **options
    )
    return Unpatched(
        stream=jnp.concatenate([acts["embed"][None], acts[after]]),
        keys=acts["attn.k"],
        values=acts["attn.v"],
        logits=logits,
        mask=jnp.ones(acts["embed"].shape[:2], bool) if mask is None else mask,
    )


def _after_layer(config: DecoderConfig) -> str:
    """What the next layer gets."""
    return "resid_post_normalized" if config.norms == "post" else "resid_post"


def entry(model: Layered, run: Unpatched, site: Site, taps: Taps, layer: Int[Array, ""]) -> Entry | None:
    """The unpatched value of a site in one layer, computed anew: to keep it for all layers would cost memory."""
    if site.name in _HEAD:
        return None
    if not site.layered:
        return Entry(run.stream[0], {})
    params, x, row = _at(layer, (model.blocks, run.stream, stacked_rows(taps, model.site_table)))
    before = ()
    if site.name in _AFTER_ATTENTION or site.name.startswith("mlp."):
        before = ("attn_out",) if model.config.parallel else ("resid_mid",)
    tap = Tap(model.site_table, taps, (site.name, *before), row, layer, run.mask)
    block(model.layer(layer, params), x, tap, model.config, Prompts(run.mask))
    return Entry(tap.seen[site.name], {name: tap.seen[name] for name in before})


class _CellLayout(eqx.Module):
    """The pos axis holds the pairs of all cells; attention sees a row per example and cell."""

    suffixes: Suffixes
    known_keys: Float[Array, "batch pos kv_head d_head"]
    known_values: Float[Array, "batch pos kv_head d_head"]
    prompts: Bool[Array, "batch pos"]

    @property
    def positions(self) -> Int[Array, "1 pair"]:
        return self.suffixes.pos[None]

    @property
    def asking_positions(self) -> Int[Array, "1 pair"]:
        return self.positions

    @property
    def queries(self) -> Int[Array, "1 pos"]:
        return self.keys

    @property
    def keys(self) -> Int[Array, "1 pos"]:
        return jnp.arange(self.prompts.shape[1], dtype=jnp.int32)[None]

    @property
    def mask(self) -> Bool[Array, "row key"]:
        return jnp.repeat(self.prompts, self.suffixes.pair.shape[0], axis=0)

    def asking(self, x: Array) -> Array:
        return x

    def rows(self, name: str, x: Array) -> Array:
        return _rows(self.suffixes.rows(x, {"attn.k": self.known_keys, "attn.v": self.known_values}.get(name)))

    def flat(self, x: Array) -> Array:
        return self.suffixes.flat(_by_cell(x, self.suffixes.pair.shape[0]))


class _ReadLayout(_CellLayout):
    """Only one position of every example asks, in every cell; the stream's pos axis then is the cells'."""

    read: Int[Array, " batch"]

    @property
    def asking_positions(self) -> Int[Array, "batch 1"]:
        return self.read[:, None]

    @property
    def queries(self) -> Int[Array, "row 1"]:
        return jnp.repeat(self.read, self.suffixes.pair.shape[0])[:, None]

    def asking(self, x: Array) -> Array:
        return _chosen(self.suffixes, x, self.read)

    def rows(self, name: str, x: Array) -> Array:
        return _rows(x[:, :, None]) if name == "attn.q" else super().rows(name, x)

    def flat(self, x: Array) -> Array:
        return _by_cell(x, self.suffixes.pair.shape[0])[:, :, 0]


def _read_pairs(suffixes: Suffixes, read: Int[Array, " batch"]) -> Int[Array, "batch cell"]:
    """The pair of one position of every example, or the number of pairs where the suffix does not hold it."""
    return suffixes.pair.at[:, read].get(mode="fill", fill_value=suffixes.pos.shape[0]).T


def _chosen(suffixes: Suffixes, x: Float[Array, "batch pair d_model"], read: Int[Array, " batch"]) -> Array:
    """That position as `[batch cell d_model]`; what stands there where the suffix does not hold it means nothing."""
    pair = jnp.minimum(_read_pairs(suffixes, read), x.shape[1] - 1)
    return jnp.take_along_axis(x, pair[:, :, None], axis=1)


def _rows(x: Array) -> Array:
    """`[batch cell …]` to `[row …]`."""
    return x.reshape(-1, *x.shape[2:])


def _by_cell(x: Array, n_cells: int) -> Array:
    """`[row …]` to `[batch cell …]`."""
    return x.reshape(-1, n_cells, *x.shape[1:])


class _CellTap:
    """The tap of one layer in all cells: known values at the entry, edits on rows elsewhere."""

    def __init__(
        self, model: Layered, cells: Cells, rows: dict[str, Any], layer: Array, mask: Array, known: dict[str, Array]
    ):
        self._table, self._cells, self._rows = model.site_table, cells, rows
        self._layer, self._mask, self._known = layer, mask, known
        self._swept = () if cells.at_entry else (cells.edit.site,)

    def touches(self, name: str) -> bool:
        return name in self._cells.taps or name in self._known or name in self._swept

    def __call__(self, name: str, x: Array) -> Array:
        if name in self._known:
            return self._known[name]
        if not self.touches(name):
            return x
        cells, (site, _) = self._cells, self._table.resolve(name)
        flat = _on_pairs(site)
        x = cells.suffixes.rows(x) if flat else _by_cell(x, cells.n)
        for edit, row in zip(cells.taps.get(name, ()), self._rows.get(name, ()), strict=True):
            operand = eqx.combine(row, edit.operand)

            def one(x, edit=edit, operand=operand):
                return apply(edit, operand, x, site, self._layer, self._mask)

            x = jax.vmap(one, 1, 1)(x)
        if name in self._swept:
            x = cells.edited(self._rows[_SWEPT], x, site, self._layer, self._mask)
        return cells.suffixes.flat(x) if flat else _rows(x)


# among the rows of the taps, those of the swept edit
_SWEPT = "swept"


def _on_pairs(site: Site) -> bool:
    return "pos" in site.slice_axes


def resume_cells(
    model: Layered,
    run: Unpatched,
    entry: Entry | None,
    cells: Cells,
    layer: Int[Array, ""],
    output_pos: Int[Array, " batch"] | None,
) -> Float[Array, "cell batch out_pos d_vocab"]:
    """The logits of all cells, which start at `layer`."""
    suffixes, edit = cells.suffixes, cells.edit
    site, _ = model.site_table.resolve(edit.site)
    if output_pos is not None:
        output_pos = jnp.where(output_pos < 0, output_pos + run.mask.shape[1], output_pos)
    if site.name in _HEAD:
        return _edited_head(model, run, cells, output_pos)
    rows = stacked_rows(cells.taps, model.site_table) | {_SWEPT: split(edit, site)[0]}

    n_layers = model.config.n_layers
    reads_one = output_pos is not None and cells.at_entry and not cells.taps.keys() - {"embed"}

    def step(number, x, known, read=None):
        params, row, keys, values = _at(number, (model.blocks, rows, run.keys, run.values))
        layout = _CellLayout(suffixes, keys, values, run.mask)
        if read is not None:
            layout = _ReadLayout(suffixes, keys, values, run.mask, read)
        tap = _CellTap(model, cells, row, number, run.mask, known)
        return block(model.layer(number, params), x, tap, model.config, layout)

    x = suffixes.of(_at(layer, run.stream))
    if entry is not None:
        row = _at(layer, rows[_SWEPT]) if site.layered else None
        value = cells.edited(row, entry.site[:, None], site, layer if site.layered else None, run.mask)
        value = suffixes.flat(value) if _on_pairs(site) else _rows(value)
        if site.layered:
            x = step(layer, x, {site.name: value} | {name: suffixes.of(one) for name, one in entry.before.items()})
            layer = layer + 1
        else:
            x = value
    if output_pos is None or not reads_one:
        x = jax.lax.fori_loop(layer, n_layers, lambda number, x: step(number, x, {}), x)
        return _head(model, run, cells, x, output_pos)
    x = jax.lax.fori_loop(layer, n_layers - 1, lambda number, x: step(number, x, {}), x)
    x = jax.lax.cond(
        layer < n_layers,
        lambda x: step(jnp.asarray(n_layers - 1, jnp.int32), x, {}, output_pos),
        lambda x: _chosen(suffixes, x, output_pos),
        x,
    )
    return _read_head(model, run, cells, x, output_pos)


def _at(layer: Array, tree):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), tree)


def _head(model: Layered, run: Unpatched, cells: Cells, x: Array, output_pos: Array | None) -> Array:
    """Logits from the streams of all pairs after the last layer."""
    suffixes, last = cells.suffixes, run.stream[-1]
    taps = {name: edits for name, edits in cells.taps.items() if name in _HEAD}
    if taps:
        tap = Tap(model.site_table, taps, (), {}, None, run.mask)
        return jax.vmap(lambda x: model.head(x, tap, output_pos), 1)(suffixes.rows(x, last))
    if output_pos is not None:
        return _read_head(model, run, cells, _chosen(suffixes, x, output_pos), output_pos)
    return jnp.moveaxis(suffixes.rows(model.head(x, _plain(model, run)), run.logits), 1, 0)


def _read_head(
    model: Layered, run: Unpatched, cells: Cells, x: Float[Array, "batch cell d_model"], read: Int[Array, " batch"]
) -> Float[Array, "cell batch 1 d_vocab"]:
    """Logits of the position that is read: of the unpatched run where it comes before the suffix."""
    # a position past the end is NaN in the unpatched stream
    before = jnp.take_along_axis(run.stream[-1], read[:, None, None], axis=1)
    changed = _read_pairs(cells.suffixes, read) < cells.suffixes.pos.shape[0]
    x = jnp.where(changed[:, :, None], x, before)
    return jnp.moveaxis(model.head(x, _plain(model, run)), 1, 0)[:, :, None]


def _plain(model: Layered, run: Unpatched) -> Tap:
    return Tap(model.site_table, {}, (), {}, None, run.mask)


def _edited_head(model: Layered, run: Unpatched, cells: Cells, output_pos: Array | None) -> Array:
    """The cells of an edit after the last layer: only the head is computed."""

    def one(places):
        taps = dict(cells.taps)
        taps[cells.edit.site] = (*taps.get(cells.edit.site, ()), cells.placed(places))
        return model.head(run.stream[-1], Tap(model.site_table, taps, (), {}, None, run.mask), output_pos)

    return jax.vmap(one)(cells.places)
