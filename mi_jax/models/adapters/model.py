"""The adapter itself: a foreign model behind the interface of `SiteModel`, whatever its framework."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax

from mi_jax.core.apply import Taps
from mi_jax.core.errors import lacks
from mi_jax.core.sites import At, SiteError, SiteTable
from mi_jax.models.adapters.plan import Name, Plan, make_plan
from mi_jax.models.adapters.search import search, told_apart
from mi_jax.models.adapters.tapped import tapped
from mi_jax.models.adapters.visits import Foreign


class Adapter(Foreign):
    """A foreign model with the interface of `SiteModel`; `adapt_linen`, `adapt_nnx` and `adapt_equinox` make them."""

    plan: eqx.AbstractVar[Plan]
    if not TYPE_CHECKING:
        __getattr__ = lacks

    @property
    def site_table(self) -> SiteTable:
        return self.plan.table

    def __call__(
        self,
        *inputs: Any,
        taps: Taps | None = None,
        capture: Sequence[str | At] | None = None,
        output: bool = True,
        **options: Any,
    ) -> Any:
        """The foreign model's output, and the captured activations if `capture` is given.

        Args:
          taps: edits by site; `mi.intervene` makes them.
          capture: sites to return.
          output: False returns None in the output's place.
          options: passed on to the foreign model.

        Raises:
          SiteError: an unknown site, an edit that does not fit, inputs of another rank than the example's, or a site
            that this call does not compute.
        """
        table, taps = self.site_table, {name: edits for name, edits in (taps or {}).items() if edits}
        wanted = {spec.site: spec.layers for spec in table.normalise(capture or ())}
        if not taps and not wanted:
            out, acts = self.run({}, inputs, options), {}
        else:
            if _ranks(inputs) != self.plan.ranks:
                raise SiteError(
                    f"the example of {table.model} had inputs of rank {self.plan.ranks}, this call has "
                    f"{_ranks(inputs)}; adapt it with an example of this rank"
                )
            out, acts = tapped(self, self.plan, taps, wanted, inputs, options)
        out = out if output else None
        return out if capture is None else (out, acts)


def planned(
    adapter: Callable[[Plan], Adapter],
    name: str,
    inputs: tuple,
    options: Mapping[str, Any],
    names: Mapping[str, Name],
) -> Any:
    """An adapter with the sites that one example call computes.

    A nested tensor becomes a site if its module reports exactly once per layer: not from a loop in which the layers
    share their parameters, where one call cannot be told from another.

    Raises:
      SiteError: names that do not fit.
    """
    unplanned = adapter(Plan(SiteTable(name, (), ()), ()))
    tensors = search(unplanned, inputs, options)
    nested = {where: tensor for where, tensor in tensors.items() if where.nested}
    once = told_apart(unplanned, nested, inputs, options)
    sites = [tensor for where, tensor in tensors.items() if where in once or not where.nested]
    leading = next((x.shape[:2] for x in jax.tree.leaves(inputs) if getattr(x, "ndim", 0) > 1), ())
    plan = make_plan(name, sites, leading, names)
    return adapter(dataclasses.replace(plan, ranks=_ranks(inputs)))


def _ranks(inputs: tuple) -> tuple[int, ...]:
    return tuple(getattr(x, "ndim", 0) for x in jax.tree.leaves(inputs))
