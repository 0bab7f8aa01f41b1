"""`sweep`: one edit at every layer, position or head that `mi.each` marks, as one program."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mi_jax.core.apply import Taps, check
from mi_jax.core.cells import Cells, Resumable
from mi_jax.core.edits import Edit
from mi_jax.core.index import Each, index_axis
from mi_jax.core.sites import LAYER, SiteError
from mi_jax.core.suffixes import pack
from mi_jax.core.transforms import Intervened, SiteModel

Progress = Callable[[int, int], None]


class Sweep(eqx.Module):
    """See `sweep`."""

    model: SiteModel
    edit: Edit
    metric: Callable
    batch_size: int = eqx.field(static=True)
    progress: Progress | None = eqx.field(static=True, default=None)
    # how many positions, counted from the last, the edit's own positions can change; None where they are not known
    suffix: int | None = eqx.field(static=True, default=None)

    def prepared(self, *inputs) -> "Sweep":
        """The sweep with the positions that it need not compute left out: a power of two, so few programs do."""
        first = _first_position(self.edit, inputs[0].shape[1])
        if first is None:
            return self
        return dataclasses.replace(self, suffix=2 ** math.ceil(math.log2(inputs[0].shape[1] - first)))

    def __call__(self, *inputs, output_pos=None, **options) -> Array:
        table = self.model.site_table
        site, _ = table.resolve(self.edit.site)
        n_pos = inputs[0].shape[1]
        sizes = {}
        for name in self.edit.each_axes():
            axis = index_axis(site, name) or ""
            sizes[name] = n_pos if axis in ("pos", "query") else table.size(axis)
        inner = {name: n for name, n in sizes.items() if name != LAYER}
        grid = np.array(list(np.ndindex(*inner.values())), int).reshape(math.prod(inner.values()), len(inner))

        model, taps = _unwrapped(self.model)
        # one layer at a time, known before it is computed: the unpatched value of the site is that of every cell
        layer = self.edit.index.layer
        at_entry = not site.layered or isinstance(layer, Each) or (isinstance(layer, jax.Array) and layer.ndim == 0)
        starts = self._starts(grid, tuple(inner), n_pos, at_entry, taps)
        packed, places = pack(starts, n_pos, self.batch_size)
        chunks = (packed, jnp.asarray(grid[np.minimum(places, len(grid) - 1)], jnp.int32))

        run = self._runner(model, taps, at_entry, inputs, output_pos, options)
        if LAYER in sizes:
            layers = jnp.arange(sizes[LAYER], dtype=jnp.int32)
        else:
            start = jnp.min(layer) if isinstance(layer, jax.Array) else jnp.zeros((), jnp.int32)
            layers = start.astype(jnp.int32)[None]
        total = len(layers) * len(places)

        def at_layer(row):
            number, layer = row

            def chunk(row):
                place, suffixes, cells = row
                values = jax.vmap(self.metric)(
                    run(Cells(self.edit, taps, cells, suffixes, tuple(inner), at_entry), layer)
                )
                if self.progress is not None:
                    jax.debug.callback(_Ticks(self.progress, total), number * len(places) + place + 1)
                return values

            return jax.lax.map(chunk, (jnp.arange(len(places), dtype=jnp.int32), *chunks))

        values = jax.lax.map(at_layer, (jnp.arange(len(layers), dtype=jnp.int32), layers))
        # [layer chunk place …] to the order of the grid, without the places that hold no cell
        values = values.reshape(len(layers), places.size, *values.shape[3:])
        values = values[:, np.argsort(places.reshape(-1), kind="stable")[: len(grid)]]
        return values.reshape(*((len(layers),) if LAYER in sizes else ()), *inner.values(), *values.shape[2:])

    def _starts(self, grid: np.ndarray, names: tuple[str, ...], n_pos: int, at_entry: bool, taps: Taps) -> np.ndarray:
        """The first position that can change, for every cell."""
        everywhere = np.zeros(len(grid), int)
        if not all(edit.pointwise for edits in taps.values() for edit in edits):
            return everywhere
        if not (at_entry or self.edit.pointwise):
            return everywhere
        if "pos" in names:
            return grid[:, names.index("pos")]
        first = _first_position(self.edit, n_pos)
        if first is None and self.suffix is not None:
            first = max(0, n_pos - self.suffix)
        return everywhere if first is None else np.full(len(grid), first)

    def _runner(self, model, taps: Taps, at_entry: bool, inputs, output_pos, options) -> Callable[[Cells, Array], Any]:
        """The outputs of the cells of one chunk, at one layer."""
        if isinstance(model, Resumable):
            start = model.unpatched(
                *inputs, taps=taps, edit=self.edit, at_entry=at_entry, output=output_pos is None, **options
            )
            return lambda cells, layer: model.resume_cells(start, cells, layer, output_pos)
        options = options if output_pos is None else options | {"output_pos": output_pos}
        by_layer = isinstance(self.edit.index.layer, Each)

        def whole(cells: Cells, layer):
            def one(places):
                edit = self.edit.placed(**dict(zip(cells.index_names, places, strict=True)))
                edit = edit.placed(layer=layer) if by_layer else edit
                merged = {**taps, edit.site: (*taps.get(edit.site, ()), edit)}
                return model(*inputs, taps=merged, **options)

            return jax.vmap(one)(cells.places)

        return whole


@dataclasses.dataclass(frozen=True)
class _Ticks:
    """Reports progress; equal for equal arguments, so that it does not recompile."""

    progress: Progress
    total: int

    def __call__(self, done) -> None:
        self.progress(int(done), self.total)


def _unwrapped(model) -> tuple[Any, dict[str, tuple[Edit, ...]]]:
    """A model without its edits, and the edits."""
    taps: dict[str, tuple[Edit, ...]] = {}
    while isinstance(model, Intervened):
        for name, edits in model.edits.items():
            taps[name] = (*edits, *taps.get(name, ()))
        model = model.model
    return model, taps


def _first_position(edit: Edit, n_pos: int) -> int | None:
    """The first position that an edit's own index names, None where that is not known."""
    pos = edit.index.pos
    if not isinstance(pos, jax.Array) or isinstance(pos, jax.core.Tracer):
        return None
    places = np.asarray(pos)
    return int(np.where(places < 0, places + n_pos, places).min())


def sweep(
    model: SiteModel, edit: Edit, metric: Callable, *, batch_size: int = 16, progress: Progress | None = None
) -> Sweep:
    """The metric under an edit at every place that `mi.each` marks.

    Where the model can resume, as the native decoder can, a cell computes only what its edit can change: the layers
    from the edited one on and, by causality, the positions from the edited one on. Such a sweep has derivatives in
    forward mode only (`jax.jvp`); `jax.vmap` over `mi.intervene` has both.

    Args:
      edit: an edit with one or more of `layer`, `pos`, `head`, `unit` equal to `mi.each`.
      metric: from the model's output to an array, such as a mean logit difference.
      batch_size: cells of one layer that are computed at once; bounds the memory, changes nothing else.
      progress: called with the number of finished batches and their total; `mi_jax.run.Bar` draws it.

    Returns:
      A function of the tokens (and the model's options). Its result has the marked axes first, in the order layer,
      pos, head, unit, then those of the metric. With the decoder's option `output_pos` the metric sees logits
      `[batch 1 d_vocab]` of those positions, and nothing else is unembedded.

    Raises:
      SiteError: nothing is marked, or the edit does not fit the model.
    """
    edit = check(edit, model.site_table)
    if not edit.each_axes():
        raise SiteError(f"sweep of site {edit.site!r}: mark an axis with mi.each, such as layer=mi.each")
    site, _ = model.site_table.resolve(edit.site)
    for name in edit.each_axes():
        axis = index_axis(site, name)
        if axis not in ("pos", "query") and axis not in dict(model.site_table.sizes):
            raise SiteError(
                f"sweep of site {edit.site!r}: {model.site_table.model} does not say how many places its axis {axis!r} "
                f"has, so {name}=mi.each has no end; sweep other axes, or use jax.vmap over an array of places"
            )
    if batch_size < 1:
        raise SiteError(f"batch_size is the number of cells computed at once, at least 1; got {batch_size}")
    return Sweep(model, edit, metric, batch_size, progress)
