"""Gradients of a metric at all of a model's sites in one backward pass."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mi_jax.core.apply import Taps
from mi_jax.core.edits import Add, Edit
from mi_jax.core.effects import mean_metric
from mi_jax.core.index import Index
from mi_jax.core.precision import widened
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
    """The metric, the sites' values and the metric's gradients at them, `widened`.

    Zeros are added at every site and differentiated, so that one backward pass serves all of them and no gradient of
    a weight is computed.

    Args:
      before, after: edits applied at a site before, and after, the point where the gradient is taken.
    """
    before, after, factor = before or {}, after or {}, gradient_factor(tokens)

    def run(additions):
        taps: dict[str, tuple[Edit, ...]] = {}
        for name in {**before, **additions, **after}:
            added = (Add(name, Index(), additions[name]),) if name in additions else ()
            taps[name] = (*before.get(name, ()), *added, *after.get(name, ()))
        output, acts = model(tokens, taps=taps, capture=sites, **options)
        value = mean_metric(metric(output))
        return value * factor, (value, acts)

    shapes = jax.eval_shape(lambda: model(tokens, capture=sites, **options)[1])
    zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in sites}
    gradients, (value, acts) = jax.grad(run, has_aux=True)(zeros)
    return value, acts, {name: widened(x) / factor for name, x in gradients.items()}


def gradient_factor(tokens: Shaped[Array, "batch *input"]) -> float:
    """What a mean over prompts is multiplied by while it is differentiated, a power of two.

    The gradient of a mean gets smaller with every prompt, until float16 has no numbers for it.
    """
    return 2.0 ** math.ceil(math.log2(max(1, tokens.shape[0])))
