"""What a fit gives: interchange intervention accuracy in every cell, its controls beside it, and the subspaces."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from mi_jax.core.edits import Edit
from mi_jax.core.errors import InputError
from mi_jax.core.index import per_example
from mi_jax.core.subspaces import swap_subspace
from mi_jax.decomposition.evaluation.estimates import generator


@dataclasses.dataclass(frozen=True)
class IIA:
    """Interchange intervention accuracy: the share of triples that get the counterfactual label under the edit.

    Attributes:
      value: `[layer pos seed]`.
      ci_low, ci_high: 95 % bootstrap interval of the mean over seeds, triples resampled, `[layer pos]`; how much the
        seeds differ is in `value`.
    """

    value: Float[np.ndarray, "layer pos seed"]
    ci_low: Float[np.ndarray, "layer pos"]
    ci_high: Float[np.ndarray, "layer pos"]

    @property
    def mean(self) -> Float[np.ndarray, "layer pos"]:
        """Mean over seeds."""
        return self.value.mean(-1)


@dataclasses.dataclass(frozen=True)
class DASResult:
    """Alignment of one variable with a subspace in every cell, layer × position; accuracies are on held-out triples.

    Attributes:
      layers, positions: of the cells; a layer is None where the site exists once, a position where it has none.
      iia: under the interchange of the fitted subspace.
      controls: the same for each control, by name; see `fit_das`.
      unedited: share of held-out triples whose label the base already gives: what an edit without effect scores.
      whole_site: the same when all dimensions are interchanged, which needs no fit; one seed.
      train_iia: of the fitted subspace on as many training triples; far above `iia`, the fit is of the triples.
      shifted: of the fitted subspace on the out-of-distribution triples; None if there are none.
      bases: `[layer pos seed d_model k]`; the first `dimensions` columns are orthonormal, any others 0.
      dimensions: dimensions of the subspace.
      losses: cross-entropy in nats at every step of the training.
    """

    site: str
    layers: tuple[int | None, ...]
    positions: tuple[int | str | None, ...]
    iia: IIA
    controls: Mapping[str, IIA]
    unedited: float
    whole_site: IIA
    train_iia: IIA
    shifted: IIA | None
    bases: Float[np.ndarray, "layer pos seed d_model k"]
    dimensions: Int[np.ndarray, "layer pos seed"]
    losses: Float[np.ndarray, "layer pos seed step"]

    @property
    def excess(self) -> Float[np.ndarray, "layer pos"]:
        """Mean IIA minus the best of the controls and of no edit at all: what the model, not the search, explains."""
        others = [np.full_like(self.iia.mean, self.unedited), *(c.mean for c in self.controls.values())]
        return self.iia.mean - np.max(others, axis=0)

    def basis(
        self, layer: int | None = None, pos: int | str | None = None, *, seed: int = 0
    ) -> Float[np.ndarray, "d_model k"]:
        """The columns of one fitted subspace.

        Raises:
          InputError: a cell or seed that was not fitted.
        """
        for name, one, fitted in (("layer", layer, self.layers), ("pos", pos, self.positions)):
            if one not in fitted:
                raise InputError(f"{name}={one!r} was not fitted; fitted were {', '.join(map(repr, fitted))}")
        if not 0 <= seed < self.bases.shape[2]:
            raise InputError(f"seed={seed} was not fitted; there are {self.bases.shape[2]} seeds (from 0)")
        place = self.layers.index(layer), self.positions.index(pos), seed
        return self.bases[place][:, : self.dimensions[place]]

    def edit(self, values, layer: int | None = None, pos: int | str | None = None, *, seed: int = 0, at=None) -> Edit:
        """The interchange of one fitted subspace, for `mi.intervene`.

        Args:
          values: captured activations of a source run.
          at: where to apply it, if not at the position it was fitted at, such as `[batch]` for a named position.

        Raises:
          InputError: a cell that was not fitted, a named position without `at`, or a subspace without dimensions.
        """
        basis = self.basis(layer, pos, seed=seed)
        if not basis.shape[1]:
            raise InputError(f"boundless DAS found no dimension at layer={layer}, pos={pos!r}, seed={seed}")
        if isinstance(pos, str) and at is None:
            raise InputError(f"position {pos!r} differs between prompts: pass at=… with one position a prompt")
        place = pos if at is None else per_example(at) if np.ndim(at) else at
        return swap_subspace(self.site, jnp.asarray(basis), values, layer=layer, pos=place)


def interval(
    correct: Bool[np.ndarray, "seed cell batch"], shape: tuple[int, int], *, key: PRNGKeyArray, resamples: int = 1000
) -> IIA:
    """Accuracy of every cell and seed, with its bootstrap interval; `shape` is (layers, positions)."""
    n_seeds, _, n = correct.shape
    counts = generator(key).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = correct.mean(0) @ counts.T / n
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    value = correct.mean(-1).T.reshape(*shape, n_seeds)
    return IIA(value, low.reshape(shape), high.reshape(shape))
