"""`sweep`: one edit at every layer, position or head that `mi.each` marks, as one program."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mi_jax.core.apply import check
from mi_jax.core.edits import Edit
from mi_jax.core.index import index_axis
from mi_jax.core.sites import LAYER, SiteError
from mi_jax.core.transforms import SiteModel


class Sweep(eqx.Module):
    """See `sweep`."""

    model: SiteModel
    edit: Edit
    metric: Callable
    batch_size: int = eqx.field(static=True)

    def __call__(self, tokens, **options) -> Array:
        table = self.model.site_table
        site, _ = table.resolve(self.edit.site)
        axes = self.edit.each_axes()
        sizes = {}
        for name in axes:
            axis = index_axis(site, name) or ""
            sizes[name] = tokens.shape[1] if axis in ("pos", "query") else table.size(axis)
        inner = [name for name in axes if name != LAYER]
        grid = (
            jnp.stack(jnp.meshgrid(*(jnp.arange(sizes[n], dtype=jnp.int32) for n in inner), indexing="ij"), -1)
            if inner
            else None
        )
        cells = jnp.zeros((1, 0), jnp.int32) if grid is None else grid.reshape(-1, len(inner))

        resume = getattr(self.model, "resume", None) if site.layered and LAYER in axes else None
        before = {name: value for name, value in options.items() if name != "output_pos"}
        # the unpatched stream up to the patched layer is the same in every cell: computed once
        stream = self.model(tokens, capture=("resid_pre",), output=False, **before)[1]["resid_pre"] if resume else None

        def cell(layer, places):
            index = dict(zip(inner, places, strict=True))
            edit = self.edit.placed(**index, **({LAYER: layer} if LAYER in axes else {}))
            taps = {edit.site: (edit,)}
            if resume is not None and stream is not None:
                return self.metric(resume(stream[layer], layer, taps=taps, **options))
            return self.metric(self.model(tokens, taps=taps, **options))

        def at_layer(layer):
            return jax.lax.map(lambda places: cell(layer, places), cells, batch_size=min(self.batch_size, len(cells)))

        if LAYER not in axes:
            values = at_layer(jnp.zeros((), jnp.int32))
        else:
            values = jax.lax.map(at_layer, jnp.arange(sizes[LAYER], dtype=jnp.int32))
        lead = (sizes[LAYER],) if LAYER in axes else ()
        return values.reshape(*lead, *(sizes[n] for n in inner), *values.shape[len(lead) + 1 :])


def sweep(model: SiteModel, edit: Edit, metric: Callable, *, batch_size: int = 16) -> Sweep:
    """The metric under an edit at every place that `mi.each` marks.

    Args:
      edit: an edit with one or more of `layer`, `pos`, `head`, `unit` equal to `mi.each`.
      metric: from the model's output to an array, such as a mean logit difference.
      batch_size: cells computed at once; bounds the memory, changes nothing else.

    Returns:
      A function of the tokens (and the model's options). Its result has the marked axes first, in the order layer,
      pos, head, unit, then those of the metric. Where the layer is marked and the model can resume, only the layers
      from the edited one on are computed.

    Raises:
      SiteError: nothing is marked, or the edit does not fit the model.
    """
    edit = check(edit, model.site_table)
    if not edit.each_axes():
        raise SiteError(f"sweep of site {edit.site!r}: mark an axis with mi.each, such as layer=mi.each")
    return Sweep(model, edit, metric, batch_size)
