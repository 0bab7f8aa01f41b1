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

from mi_jax.core.apply import Taps, check
from mi_jax.core.cells import Cells, Resumable
from mi_jax.core.edits import Edit
from mi_jax.core.index import Each, index_axis, out_of_range
from mi_jax.core.sites import LAYER, SiteError
from mi_jax.core.suffixes import pack
from mi_jax.core.transforms import Intervened, SiteModel, compiled

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
    # whether the layer was a number when the sweep was made, so that its range was checked
    known_layer: bool = eqx.field(static=True, default=False)

    def prepared(self, tokens) -> "Sweep":
        """The sweep with the positions that it need not compute left out: a power of two, so few programs do."""
        n_pos = self.model.site_table.n_pos(tokens)
        first = _first_position(self.edit, n_pos)
        if first is None or not 0 <= first < n_pos:
            return self
        return dataclasses.replace(self, suffix=2 ** math.ceil(math.log2(n_pos - first)))

    def __call__(self, tokens, *inputs, **options) -> Any:
        # compiled as a whole wherever it is called: a loop compiles its body anew at every call otherwise
        return compiled(Sweep._run, (self.prepared(tokens), tokens, *inputs), options)

    def _run(self, *inputs, output_pos=None, **options) -> Any:
        table = self.model.site_table
        site, _ = table.resolve(self.edit.site)
        n_pos = table.n_pos(inputs[0])
        sizes = {}
        for name in self.edit.each_axes():
            axis = index_axis(site, name) or ""
            sizes[name] = n_pos if axis in ("pos", "query") else table.size(axis)
        inner = {name: n for name, n in sizes.items() if name != LAYER}
        n_cells = math.prod(inner.values())

        model, taps = _unwrapped(self.model)
        # one layer at a time, known before it is computed: the unpatched value of the site is that of every cell
        layer = self.edit.index.layer
        at_entry = not site.layered or isinstance(layer, Each) or (isinstance(layer, jax.Array) and layer.ndim == 0)
        packing = pack(self._first(inner, n_pos, at_entry, taps), n_cells, n_pos, self.batch_size)
        chunks = jnp.arange(packing.n_chunks, dtype=jnp.int32)

        enter, run = self._runner(model, taps, at_entry, inputs, output_pos, options)
        if LAYER in sizes:
            layers = jnp.arange(sizes[LAYER], dtype=jnp.int32)
        else:
            start = jnp.min(layer) if isinstance(layer, jax.Array) else jnp.zeros((), jnp.int32)
            layers = start.astype(jnp.int32)[None]
        total = len(layers) * len(chunks)

        def at_layer(row):
            number, layer = row
            start = enter(layer)

            def of_chunk(chunk):
                numbers = packing.cells(chunk)
                places = _unravelled(jnp.minimum(numbers, n_cells - 1), tuple(inner.values()))
                places = jnp.stack(places, -1) if places else jnp.zeros((packing.size, 0), jnp.int32)
                cells = Cells(self.edit, taps, places, packing.suffixes(numbers), tuple(inner), at_entry)
                values = jax.vmap(self.metric)(run(start, cells, layer))
                self._check_metric(values)
                if self.progress is not None:
                    jax.debug.callback(_Ticks(self.progress, total), number * len(chunks) + chunk + 1)
                return values

            return jax.lax.map(of_chunk, chunks)

        values = jax.lax.map(at_layer, (jnp.arange(len(layers), dtype=jnp.int32), layers))
        beyond = None
        if site.layered and isinstance(layer, jax.Array):
            beyond = out_of_range(layer, table.size(LAYER), negative=False)

        def in_order(values):
            # [layer chunk row …] to the order of the cells, without the rows that hold none
            values = values.reshape(len(layers), len(chunks) * packing.size, *values.shape[3:])
            values = jnp.take(values, packing.slots(), axis=1)
            values = values.reshape(*((len(layers),) if LAYER in sizes else ()), *inner.values(), *values.shape[2:])
            if beyond is None or not jnp.issubdtype(values.dtype, jnp.inexact):
                return values
            return jnp.where(beyond, jnp.full_like(values, jnp.nan), values)

        return jax.tree.map(in_order, values)

    def _check_metric(self, values: Any) -> None:
        """Raises SiteError for a metric that cannot say that the layer is out of range, where it may be."""
        for leaf in () if self.known_layer else jax.tree.leaves(values):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise SiteError(
                    f"sweep of site {self.edit.site!r} in a traced layer: it is NaN where the model lacks that layer, "
                    f"which a metric of {leaf.dtype} cannot be: let the metric return floats, or give the layer as an "
                    "int"
                )

    def _first(self, inner: dict[str, int], n_pos: int, at_entry: bool, taps: Taps) -> Callable:
        """The first position that can change, as a function of the numbers of cells."""

        def everywhere(cells):
            return cells * 0

        if not self.model.site_table.attention.causal:
            return everywhere
        if not all(edit.pointwise for edits in taps.values() for edit in edits):
            return everywhere
        # an edit of scores or patterns may let a position see those after it
        if any("key" in self.model.site_table.resolve(name)[0].axes for name in taps):
            return everywhere
        if not (at_entry or self.edit.pointwise):
            return everywhere
        if "pos" in inner:
            return lambda cells: _unravelled(cells, tuple(inner.values()))[list(inner).index("pos")]
        first = _first_position(self.edit, n_pos)
        if first is None and self.suffix is not None:
            first = max(0, n_pos - self.suffix)
        return everywhere if first is None else lambda cells: cells * 0 + first

    def _runner(self, model, taps: Taps, at_entry: bool, inputs, output_pos, options) -> tuple[Callable, Callable]:
        """What cells that start at a layer have in common, and the outputs of the cells of one chunk."""
        if isinstance(model, Resumable):
            base = model.unpatched(*inputs, taps=taps, output=output_pos is None, **options)
            site, _ = self.model.site_table.resolve(self.edit.site)
            return (
                lambda layer: model.entry(base, site, taps, layer) if at_entry else None,
                lambda entry, cells, layer: model.resume_cells(base, entry, cells, layer, output_pos),
            )
        options = options if output_pos is None else options | {"output_pos": output_pos}
        by_layer = isinstance(self.edit.index.layer, Each)

        def whole(start, cells: Cells, layer):
            def one(places):
                edit = self.edit.placed(**dict(zip(cells.index_names, places, strict=True)))
                edit = edit.placed(layer=layer) if by_layer else edit
                merged = {**taps, edit.site: (*taps.get(edit.site, ()), edit)}
                return model(*inputs, taps=merged, **options)

            return jax.vmap(one)(cells.places)

        return lambda layer: None, whole


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


def _unravelled(numbers: Any, sizes: tuple[int, ...]) -> list[Any]:
    """The place of each cell on every swept axis, the last of which runs fastest."""
    places = []
    for n in reversed(sizes):
        places.append(numbers % n)
        numbers = numbers // n
    return places[::-1]


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
      metric: from the model's output to an array or a pytree of arrays, such as a mean logit difference.
      batch_size: cells of one layer that are computed at once; bounds the memory, changes nothing else.
      progress: called with the number of finished batches and their total; a `mi_jax.run.Bar` draws it. It is part of
        the program: use one bar for many sweeps.

    Returns:
      A function of the tokens (and the model's options). Its result has the marked axes first, in the order layer,
      pos, head, unit, then those of the metric. With the decoder's option `output_pos` the metric sees logits
      `[batch 1 d_vocab]` of those positions, and nothing else is unembedded.

    Raises:
      SiteError: nothing is marked, the edit does not fit the model, or, in the call, a metric of integers in a traced
        layer.
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
    return Sweep(
        model, edit, metric, batch_size, progress, known_layer=not isinstance(edit.index.layer, jax.core.Tracer)
    )
