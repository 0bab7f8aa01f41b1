"""Gradients of a metric at all of a model's sites in one backward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mi_jax.core.apply import Taps
from mi_jax.core.edits import Add, Edit
from mi_jax.core.effects import mean_metric
from mi_jax.core.index import Index
from mi_jax.core.transforms import SiteModel

Acts = dict[str, Array]


def site_gradients(
    model: SiteModel,
    metric: Callable,
    sites: tuple[str, ...],
    tokens: Shaped[Array, "batch *input"],
    options: Mapping[str, Any],
    *,
    before: Taps | None = None,
    after: Taps | None = None,
) -> tuple[Float[Array, ""], Acts, Acts]:
    """The metric, the sites' values and the metric's gradients at them.

    Zeros are added at every site and differentiated, so that one backward pass serves all of them and no gradient of
    a weight is computed.

    Args:
      before, after: edits applied at a site before, and after, the point where the gradient is taken.
    """
    before, after = before or {}, after or {}

    def run(additions):
        taps: dict[str, tuple[Edit, ...]] = {}
        for name in {**before, **additions, **after}:
            added = (Add(name, Index(), additions[name]),) if name in additions else ()
            taps[name] = (*before.get(name, ()), *added, *after.get(name, ()))
        output, acts = model(tokens, taps=taps, capture=sites, **options)
        return mean_metric(metric(output)), acts

    shapes = jax.eval_shape(lambda: model(tokens, capture=sites, **options)[1])
    zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in sites}
    (value, acts), gradients = jax.value_and_grad(run, has_aux=True)(zeros)
    return value, acts, gradients
