"""`fit_das`: distributed alignment search over all chosen layers and positions at once, with its controls."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from mi_jax.circuits.das import controls as null
from mi_jax.circuits.das.cells import Positions, places, position_names, readable, site_of
from mi_jax.circuits.das.program import Setup, predictions, swap, train, unedited, whole_site
from mi_jax.circuits.das.result import IIA, DASResult, interval
from mi_jax.circuits.das.subspace import Boundary
from mi_jax.circuits.das.triples import Triples
from mi_jax.core.errors import InputError
from mi_jax.core.index import Each, each
from mi_jax.core.transforms import SiteModel

CONTROLS = ("arbitrary_labels", "random_model", "random_subspace", "equal_norm")


def fit_das(
    model: SiteModel,
    triples: Triples,
    *,
    site: str = "resid_post",
    layers: Each | int | Sequence[int] = each,
    positions: Positions = each,
    k: int | None = None,
    boundary: Boundary | None = None,
    held_out: float | Triples = 0.25,
    shifted: Triples | None = None,
    controls: Sequence[str] = CONTROLS,
    seeds: int = 3,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    cells_at_once: int = 8,
    key: PRNGKeyArray,
) -> DASResult:
    """Finds, in every cell, the k-dimensional subspace whose interchange changes the answer as the variable would.

    `h' = h_base + (h_source − h_base) B Bᵀ`, where B has orthonormal columns and is trained on the cross-entropy of the
    counterfactual label. All cells and seeds are trained by one program; other triples of the same number, another
    model of the same shape and another key reuse it.

    The controls, scored on the same held-out triples:
      arbitrary_labels: trained and scored on labels under a fixed mapping of each answer to another, which the model
        does not compute: what the search can force.
      random_model: trained on a random model of the same shape, one for all seeds.
      random_subspace: the interchange of a random subspace of the same dimension.
      equal_norm: a move towards the source along that random subspace, as far as the fitted edit moves.

    Args:
      site: a site with axes `[layer] batch [pos] d_model`.
      layers, positions: ints, `mi.each`, and for positions names of `triples.places`. A negative position counts from
        the end of the padded prompt: where lengths differ, −1 is padding in the shorter prompts, so name the place.
      k: dimensions, 1 if not given; with a boundary the most there can be, if not given all. The rotations of all
        cells and seeds take 3 · d_model · k numbers each.
      boundary: boundless DAS, which learns the number of dimensions.
      held_out: the share of triples to score on, which have no prompt in common with those of the training
        (`Triples.split`); or triples, none of which may have the base and source of a training triple.
      shifted: triples of another distribution, to be scored as well.
      batch_size: triples in a step.
      learning_rate: about the angle, in radians, by which a column turns in one of the first steps.
      cells_at_once: cells computed side by side, for each seed; bounds the memory, changes nothing else.

    Raises:
      SiteError: a site, layer or position that does not exist, or a site with further axes.
      InputError: settings or triples that do not fit the model, held-out triples that are trained on, or a loss that
        is not finite.

    Source: Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", arXiv 2303.02536. Boundless: Wu et al. 2023, arXiv 2305.08809.

    Example:
      `result = mi.circuits.fit_das(model, triples, layers=(4, 8), positions="subject", k=2, key=jax.random.key(0))`
      at the position `triples.places["subject"]` of every triple.
    """
    for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size), ("cells", cells_at_once)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    unknown = set(controls) - set(CONTROLS)
    if unknown:
        raise InputError(f"there is no control {sorted(unknown)}; there are {', '.join(CONTROLS)}")
    keys = jax.random.split(key, 6)
    fit_on, score_on = (triples, held_out) if isinstance(held_out, Triples) else triples.split(held_out, key=keys[0])
    fit_on, score_on, *rest = readable(model, [fit_on, score_on, *([] if shifted is None else [shifted])])
    fit_on.check_apart(score_on)

    site, chosen_layers, n_pos, d_model = site_of(model, fit_on, site, layers)
    names = position_names(positions, site, n_pos)
    k = (1 if boundary is None else d_model) if k is None else k
    if not 1 <= k <= d_model:
        raise InputError(f"k must be from 1 to {d_model}, the width of site {site!r}; got {k}")
    setup = Setup(site, chosen_layers, n_pos is not None, k, steps, batch_size, learning_rate, cells_at_once, boundary)
    at = [places(part, names, n_pos) for part in (fit_on, score_on, *rest)]
    cell_layers = (None,) if chosen_layers is None else chosen_layers
    shape = (len(cell_layers), len(names))
    k_fit, k_interval = jax.random.split(keys[1], seeds), keys[2]

    def fitted(one_model: SiteModel, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns, losses = train(one_model, fit_on, at[0], jnp.asarray(labels), k_fit, setup, d_model)
        losses = np.asarray(losses)
        if not np.isfinite(losses).all():
            _, step, cell = np.argwhere(~np.isfinite(losses))[0].tolist()
            layer, pos = divmod(cell, len(names))
            raise InputError(
                f"the loss is not finite at step {step}, layer {cell_layers[layer]}, position {names[pos]!r}; check "
                "the model's activations there, or lower learning_rate"
            )
        return np.asarray(columns), losses

    def iia(one_model, part, part_at, operands, labels=None, make=swap) -> IIA:
        answers = np.asarray(predictions(one_model, part, part_at, jax.tree.map(jnp.asarray, operands), setup, make))
        labels = np.asarray(part.label)[None] if labels is None else labels
        return interval(answers == labels[:, None, :], shape, key=k_interval)

    label = np.asarray(fit_on.label)
    true = np.broadcast_to(label, (seeds, len(label)))
    bases, losses = fitted(model, true)
    kept = np.abs(bases).max(-2) > 0
    placebo = null.random_bases(bases.shape, key=keys[3]) * kept[:, :, None, :]
    found = {}
    if "arbitrary_labels" in controls:
        held_out_label = np.asarray(score_on.label)
        tables = null.arbitrary_labels(np.concatenate([label, held_out_label]), seeds, key=keys[4])
        wrong, _ = fitted(model, tables[:, label])
        found["arbitrary_labels"] = iia(model, score_on, at[1], wrong, tables[:, held_out_label])
    if "random_model" in controls:
        other = null.random_model(model, key=keys[5])
        found["random_model"] = iia(other, score_on, at[1], fitted(other, true)[0])
    if "random_subspace" in controls:
        found["random_subspace"] = iia(model, score_on, at[1], placebo)
    if "equal_norm" in controls:
        found["equal_norm"] = iia(model, score_on, at[1], (bases, placebo), make=null.equal_norm)
    nothing = np.zeros((1, shape[0] * shape[1]), np.float32)
    as_many = slice(len(score_on))

    def by_cell(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x, 0, 1).reshape(*shape, seeds, *x.shape[2:])

    return DASResult(
        site=site,
        layers=cell_layers,
        positions=names,
        iia=iia(model, score_on, at[1], bases),
        controls=found,
        unedited=float(unedited(model, score_on, batch_size)),
        whole_site=iia(model, score_on, at[1], nothing, make=whole_site),
        train_iia=iia(model, fit_on.take(as_many), at[0][:, as_many], bases),
        shifted=iia(model, rest[0], at[2], bases) if rest else None,
        bases=by_cell(bases),
        dimensions=by_cell(kept.sum(-1, dtype=np.int32)),
        losses=by_cell(np.moveaxis(losses, 1, 2)),
    )
