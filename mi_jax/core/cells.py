"""The cells of a sweep: the places at which one edit is tried, each a run of its own."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Int

from mi_jax.core.apply import Taps, apply
from mi_jax.core.edits import Edit
from mi_jax.core.sites import Site
from mi_jax.core.suffixes import Suffixes


class Cells(eqx.Module):
    """A chunk of cells.

    Attributes:
      taps: edits that hold in every cell.
      places: where each cell applies the edit: the values of `index_names`, which are not the layer.
      suffixes: the positions that can change in each cell.
      at_entry: the edit applies in one layer, the first that the cells compute, or before the layers. The edited site
        then has its unpatched value there in every cell.
    """

    edit: Edit
    taps: Taps
    places: Int[Array, "cell index"]
    suffixes: Suffixes
    index_names: tuple[str, ...] = eqx.field(static=True)
    at_entry: bool = eqx.field(static=True)

    @property
    def n(self) -> int:
        return self.places.shape[0]

    def placed(self, places: Int[Array, " index"]) -> Edit:
        """The edit of one cell."""
        edit = self.edit.placed(**dict(zip(self.index_names, places, strict=True)))
        return edit.placed(layer=None) if self.at_entry else edit

    def edited(
        self,
        row: Any,
        x: Array,
        site: Site,
        layer: Int[Array, ""] | None = None,
        mask: Bool[Array, "batch pos"] | None = None,
    ) -> Array:
        """The site after the edit, `[batch cell …]`.

        Args:
          row: the operand's leaves that differ between layers, in this one.
          x: the site in one layer, `[batch cell …]`, or `[batch 1 …]` where all cells have the same.
        """
        operand = eqx.combine(row, self.edit.operand)

        def one(places, x):
            return apply(self.placed(places), operand, x, site, layer, mask)

        if x.shape[1] == 1:
            return jax.vmap(one, (0, None), 1)(self.places, x[:, 0])
        return jax.vmap(one, (0, 1), 1)(self.places, x)


@runtime_checkable
class Resumable(Protocol):
    """A model that can run many cells from the edited layer and position on."""

    def unpatched(self, tokens, mask=None, *, taps: Taps, output: bool) -> Any:
        """What cells need of the run without the edit; `output` says whether that includes its whole output."""
        ...

    def entry(self, unpatched: Any, site: Site, taps: Taps, layer: Array) -> Any:
        """What all cells that start at one layer have in common: the unpatched value of the edited site there."""
        ...

    def resume_cells(
        self, unpatched: Any, entry: Any, cells: Cells, layer: Array, output_pos: Array | None = None
    ) -> Array:
        """The outputs of all cells, `[cell batch …]`, from `layer` on; `entry` is None where there is no such value."""
        ...
