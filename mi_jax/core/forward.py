"""Forward mode: the first-order effect of one edit on every downstream site at once.

Attribution asks which nodes move one metric; this asks what one node moves. With an edit e and its interpolation
x ↦ x + t·(e(x) − x), the result is the derivative of the output, and of any captured site, in t at t = 0: one forward
and one tangent forward, whatever number of sites is asked for.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from mi_jax.core.apply import check
from mi_jax.core.edits import Add, Edit
from mi_jax.core.index import Index
from mi_jax.core.nodes import edited
from mi_jax.core.sites import At, SiteError
from mi_jax.core.transforms import SiteModel


class ForwardEffects(eqx.Module):
    """See `forward_effects`."""

    model: SiteModel
    edit: Edit
    wanted: tuple[At, ...] = eqx.field(static=True)

    def __call__(self, tokens: Shaped[Array, "batch *input"], **options) -> tuple[Any, dict[str, Array]]:
        name = self.edit.site
        _, acts = self.model(tokens, capture=(name,), **options)
        # At t = 0 no layer has been changed yet, so the edit's direction is that on the unedited run at every layer.
        direction = edited(self.edit, acts[name], self.model.site_table, options.get("mask")) - acts[name]

        def run(addition):
            return self.model(tokens, taps={name: (Add(name, Index(), addition),)}, capture=self.wanted, **options)

        _, (output, effects) = jax.jvp(run, (jnp.zeros_like(direction),), (direction,))
        return output, effects


def forward_effects(model: SiteModel, edit: Edit, *sites: str | At) -> ForwardEffects:
    """The first-order effect of one edit on the output and on sites.

    Args:
      edit: any edit; its indices may be traced, so `jax.vmap` gives the effects of many edits.
      sites: what to return the effects on, besides the output.

    Returns:
      A function of the tokens (and the model's options) with the result `(output tangent, {site: tangent})`, in the
      shapes of `capture`. It is linear in `e(x) − x`; exact where everything downstream is linear.

    Raises:
      SiteError: an unknown site, an index out of range, or an index marked with `mi.each`.

    Example:
      `_, moved = mi.forward_effects(model, mi.patch("attn.z", acts, layer=4, head=11), "attn.q")(corrupt)`
    """
    edit = check(edit, model.site_table)
    if edit.each_axes():
        raise SiteError(f"forward_effects takes one place of {edit.site!r}; use jax.vmap over indices, not mi.each")
    return ForwardEffects(model, edit, model.site_table.normalise(sites))
