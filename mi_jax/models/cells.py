"""Many cells of a sweep at once, from the edited layer and position on.

Everything before the edit is the same in every cell and is computed once, in the unpatched run: the stream before every
layer, the keys and values, and, in one layer at a time, the edited site itself. A cell starts from these. Its edited
layer comes first, with the edited site put in as a known value, so that what leads to it is never computed; a loop runs
the layers after it. The stream holds the positions that can have changed, those of all cells on one flat axis
(`mi_jax.core.suffixes`).
"""

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.apply import Taps, apply, split
from mi_jax.core.cells import Cells
from mi_jax.core.sites import Site
from mi_jax.core.suffixes import Suffixes
from mi_jax.core.taps import Tap, stacked_rows
from mi_jax.models.block import Prompts, block

if TYPE_CHECKING:
    from mi_jax.models.decoder import Decoder

_HEAD = ("final_norm", "logits")
_AFTER_ATTENTION = ("mlp.in", "mlp.pre", "mlp.post", "mlp_out", "resid_post")


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
      mid: the stream between attention and MLP, where the edited site comes after it.
    """

    site: Array
    mid: Float[Array, "batch pos d_model"] | None


def unpatched(
    model: "Decoder",
    tokens: Int[Array, "batch pos"],
    mask: Bool[Array, "batch pos"] | None,
    taps: Taps,
    *,
    output: bool,
) -> Unpatched:
    """The run without the edit."""
    # the stream as a layer gets it, before the edits of `resid_pre`, which the layer makes itself
    logits, acts = model(tokens, mask, taps=taps, capture=("embed", "attn.k", "attn.v", "resid_post"), output=output)
    return Unpatched(
        stream=jnp.concatenate([acts["embed"][None], acts["resid_post"]]),
        keys=acts["attn.k"],
        values=acts["attn.v"],
        logits=logits,
        mask=jnp.ones(tokens.shape, bool) if mask is None else mask,
    )


def entry(model: "Decoder", run: Unpatched, site: Site, taps: Taps, layer: Int[Array, ""]) -> Entry | None:
    """The unpatched value of a site in one layer, computed anew: to keep it for all layers would cost memory."""
    if site.name in _HEAD:
        return None
    if not site.layered:
        return Entry(run.stream[0], None)
    params, x, row = _at(layer, (model.blocks, run.stream, stacked_rows(taps, model.site_table)))
    wanted = (site.name, "resid_mid") if site.name in _AFTER_ATTENTION else (site.name,)
    tap = Tap(model.site_table, taps, wanted, row, layer, run.mask)
    block(params, x, tap, model.config, Prompts(run.mask))
    return Entry(tap.seen[site.name], tap.seen.get("resid_mid") if len(wanted) > 1 else None)


class _CellLayout(eqx.Module):
    """The pos axis holds the pairs of all cells; attention sees a row per example and cell."""

    suffixes: Suffixes
    keys: Float[Array, "batch pos kv_head d_head"]
    values: Float[Array, "batch pos kv_head d_head"]
    prompts: Bool[Array, "batch pos"]

    @property
    def positions(self) -> Int[Array, " pair"]:
        return self.suffixes.pos

    @property
    def mask(self) -> Bool[Array, "row pos"]:
        return jnp.repeat(self.prompts, self.suffixes.pair.shape[0], axis=0)

    def rows(self, name: str, x: Array) -> Array:
        return _rows(self.suffixes.rows(x, {"attn.k": self.keys, "attn.v": self.values}.get(name)))

    def flat(self, x: Array) -> Array:
        return self.suffixes.flat(_by_cell(x, self.suffixes.pair.shape[0]))


def _rows(x: Array) -> Array:
    """`[batch cell …]` to `[row …]`."""
    return x.reshape(-1, *x.shape[2:])


def _by_cell(x: Array, n_cells: int) -> Array:
    """`[row …]` to `[batch cell …]`."""
    return x.reshape(-1, n_cells, *x.shape[1:])


class _CellTap:
    """The tap of one layer in all cells: known values at the entry, edits on rows elsewhere."""

    def __init__(
        self, model: "Decoder", cells: Cells, rows: dict[str, Any], layer: Array, mask: Array, known: dict[str, Array]
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
    model: "Decoder",
    run: Unpatched,
    entry: Entry | None,
    cells: Cells,
    layer: Int[Array, ""],
    output_pos: Int[Array, " batch"] | None,
) -> Float[Array, "cell batch out_pos d_vocab"]:
    """The logits of all cells, which start at `layer`."""
    suffixes, edit = cells.suffixes, cells.edit
    site, _ = model.site_table.resolve(edit.site)
    if site.name in _HEAD:
        return _edited_head(model, run, cells, output_pos)
    rows = stacked_rows(cells.taps, model.site_table) | {_SWEPT: split(edit, site)[0]}

    def step(layer, x, known):
        params, row, keys, values = _at(layer, (model.blocks, rows, run.keys, run.values))
        layout = _CellLayout(suffixes, keys, values, run.mask)
        return block(params, x, _CellTap(model, cells, row, layer, run.mask, known), model.config, layout)

    x = suffixes.of(_at(layer, run.stream))
    if entry is not None:
        row = _at(layer, rows[_SWEPT]) if site.layered else None
        value = cells.edited(row, entry.site[:, None], site, layer if site.layered else None, run.mask)
        value = suffixes.flat(value) if _on_pairs(site) else _rows(value)
        if site.layered:
            x = step(
                layer, x, {site.name: value} | ({} if entry.mid is None else {"resid_mid": suffixes.of(entry.mid)})
            )
            layer = layer + 1
        else:
            x = value
    x = jax.lax.fori_loop(layer, model.config.n_layers, lambda layer, x: step(layer, x, {}), x)
    return _head(model, run, cells, x, output_pos)


def _at(layer: Array, tree):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), tree)


def _head(model: "Decoder", run: Unpatched, cells: Cells, x: Array, output_pos: Array | None) -> Array:
    """Logits from the streams of all pairs after the last layer."""
    suffixes, last = cells.suffixes, run.stream[-1]
    plain = Tap(model.site_table, {}, (), {}, None, run.mask)
    taps = {name: edits for name, edits in cells.taps.items() if name in _HEAD}
    if taps:
        tap = Tap(model.site_table, taps, (), {}, None, run.mask)
        return jax.vmap(lambda x: model.head(x, tap, output_pos), 1)(suffixes.rows(x, last))
    if output_pos is not None:
        # [cell batch]; a position past the end is in no suffix, and NaN in the unpatched stream
        pair = suffixes.pair.at[:, output_pos].get(mode="fill", fill_value=x.shape[1])
        chosen = jnp.take_along_axis(x, jnp.minimum(pair, x.shape[1] - 1).T[:, :, None], axis=1)
        before = jnp.take_along_axis(last, output_pos[:, None, None], axis=1)
        chosen = jnp.where((pair < x.shape[1]).T[:, :, None], chosen, before)  # [batch cell d_model]
        return jnp.moveaxis(model.head(chosen, plain), 1, 0)[:, :, None]
    return jnp.moveaxis(suffixes.rows(model.head(x, plain), run.logits), 1, 0)


def _edited_head(model: "Decoder", run: Unpatched, cells: Cells, output_pos: Array | None) -> Array:
    """The cells of an edit after the last layer: only the head is computed."""

    def one(places):
        taps = dict(cells.taps)
        taps[cells.edit.site] = (*taps.get(cells.edit.site, ()), cells.placed(places))
        return model.head(run.stream[-1], Tap(model.site_table, taps, (), {}, None, run.mask), output_pos)

    return jax.vmap(one)(cells.places)
