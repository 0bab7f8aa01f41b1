"""The runtime of the activation pytree: one object that a model calls at every site while it is traced.

`tap(name, x)` applies the edits of that site and keeps the value if it was asked for. A model that scans over its
layers splits the taps first: operands with a leading layer axis are scanned over, everything else is closed over.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mi_jax.core.apply import Taps, apply, split
from mi_jax.core.sites import LAYER, At, SiteTable

Rows = dict[str, tuple[Any, ...]]


class Tap:
    """Edits and captures of one layer, or of the sites outside the layers.

    Attributes:
      seen: the captured values by site name, filled while the model calls the tap.
    """

    def __init__(
        self,
        table: SiteTable,
        taps: Taps,
        wanted: Sequence[str],
        rows: Rows,
        layer: Int[Array, ""] | None,
        mask: Bool[Array, "batch pos"] | None = None,
    ):
        self._table, self._taps, self._wanted, self._rows = table, taps, wanted, rows
        self._layer, self._mask = layer, mask
        self.seen: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        """Whether the site is edited or captured; a model skips the work for costly sites that are not."""
        return name in self._taps or name in self._wanted

    def __call__(self, name: str, x: Array) -> Array:
        edits = self._taps.get(name, ())
        if edits:
            site, _ = self._table.resolve(name)
            for edit, row in zip(edits, self._rows.get(name, (None,) * len(edits)), strict=True):
                operand = edit.operand if row is None else eqx.combine(row, edit.operand)
                n_layers = self._table.size(LAYER) if site.layered else None
                x = apply(edit, operand, x, site, self._layer, self._mask, n_layers)
        if name in self._wanted:
            self.seen[name] = x
        return x


def stacked_rows(taps: Taps, table: SiteTable) -> Rows:
    """What a scan over the layers scans over: by site and edit, the operand with None for leaves without that axis."""
    rows: Rows = {}
    for name, edits in taps.items():
        site, _ = table.resolve(name)
        if site.layered:
            rows[name] = tuple(split(edit, site)[0] for edit in edits)
    return rows


class Slots:
    """Where captures go: a buffer for every site that is wanted at some layers only, scan outputs for the rest.

    The buffers have one row more than the layers that were asked for; the other layers write there. So the scan's
    body is the same at every layer and the memory is that of the layers asked for.
    """

    def __init__(self, wanted: Sequence[At], table: SiteTable):
        self._some = {w.site: w.layers for w in wanted if w.layers is not None}
        layered = {w.site for w in wanted if table.resolve(w.site)[0].layered}
        self.layered = tuple(w.site for w in wanted if w.site in layered)
        self.single = tuple(w.site for w in wanted if w.site not in layered)
        self._n_layers = table.size("layer")

    @property
    def partial(self) -> bool:
        """Whether any site is wanted at some layers only."""
        return bool(self._some)

    @property
    def last_layer(self) -> int:
        """The last layer that has to run for the layered captures, or -1."""
        last = -1
        for name in self.layered:
            layers = self._some.get(name)
            chosen = range(self._n_layers) if layers is None else (layers,) if isinstance(layers, int) else layers
            last = max(last, *chosen, -1)
        return last

    def empty(self, shapes: Mapping[str, Any]) -> dict[str, Array]:
        return {
            name: jnp.zeros((len(self._rows_of(name)) + 1, *shapes[name].shape), shapes[name].dtype)
            for name in self._some
        }

    def write(
        self, buffers: dict[str, Array], seen: Mapping[str, Array], layer: Int[Array, ""]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Puts one layer's values into the buffers; returns them and what the scan should stack."""
        out = {}
        for name, buffer in buffers.items():
            rows = self._rows_of(name)
            slot = jnp.full((self._n_layers,), len(rows), jnp.int32)
            slot = slot.at[jnp.asarray(rows, jnp.int32)].set(jnp.arange(len(rows), dtype=jnp.int32))
            out[name] = jax.lax.dynamic_update_index_in_dim(buffer, seen[name], slot[layer], 0)
        return out, {name: seen[name] for name in self.layered if name not in self._some}

    def read(self, buffers: Mapping[str, Array], stacked: Mapping[str, Array]) -> dict[str, Array]:
        acts = dict(stacked)
        for name, layers in self._some.items():
            if isinstance(layers, int):
                acts[name] = buffers[name][0]
            else:
                order = [self._rows_of(name).index(layer) for layer in layers]
                acts[name] = buffers[name][jnp.asarray(order, jnp.int32)]
        return acts

    def _rows_of(self, name: str) -> list[int]:
        layers = self._some[name]
        return [layers] if isinstance(layers, int) else sorted(set(layers))
