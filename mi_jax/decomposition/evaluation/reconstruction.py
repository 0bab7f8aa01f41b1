"""How well a dictionary reconstructs and how sparse it is: everything that needs neither labels nor the model."""

import dataclasses
import warnings
from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.coherence import Coherence, coherence
from mi_jax.decomposition.evaluation.batches import Batch, pieces, widened
from mi_jax.decomposition.evaluation.density import (
    DENSE_THRESHOLD,
    dead_fraction,
    dense_fraction,
    density_histogram,
)
from mi_jax.decomposition.evaluation.estimates import Estimate, bootstrap_ratio, jackknife
from mi_jax.decomposition.evaluation.reconstructor import Reconstructor
from mi_jax.decomposition.recovery import RecoveryLadder, recovery_ladder

# groups of blocks over which totals that are too large to keep per block are kept
_GROUPS = 20


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Scores of reconstructions ŷ of targets y; m is the mean of the training targets, e = y − ŷ.

    Attributes:
      fraction_variance_unexplained: Σ‖e‖² / Σ‖y − m‖².
      explained_variance: 1 − Σ_d Var(e_d) / Σ_d Var(y_d), variances over these tokens: a constant error costs nothing.
      mean_squared_error: per dimension, Σ‖e‖² / (n d).
      cosine: mean cosine of y − m and ŷ − m.
      l2_ratio: mean of ‖ŷ‖ / ‖y‖; tokens with y = 0 do not count.
      relative_reconstruction_bias: Σ‖ŷ‖² / Σ⟨ŷ, y⟩, below 1 where reconstructions are too short (Rajamanoharan et
        al. 2024, "Improving dictionary learning with gated sparse autoencoders", section 3).
      slope: of the regression of ŷ − m on y − m, Σ⟨ŷ − m, y − m⟩ / Σ‖y − m‖²; shrinkage makes it smaller than 1.
    """

    fraction_variance_unexplained: Estimate
    explained_variance: Estimate
    mean_squared_error: Estimate
    cosine: Estimate
    l2_ratio: Estimate
    relative_reconstruction_bias: Estimate
    slope: Estimate


@dataclasses.dataclass(frozen=True)
class Evaluation(Reconstruction):
    """Scores of a dictionary on one set of tokens: of all its outputs together, and of each site.

    Intervals of ratios and means are from resampled blocks. Those of explained variance and of dead and dense
    fractions are 1.96 standard errors by leaving out one of up to 20 groups of blocks at a time.

    Attributes:
      l0: codes per token that are not zero.
      dead_fraction: latents that fire on none of these tokens.
      dead_rate_bound: a dead latent fires in fewer than this share of blocks, with 95 % confidence, 1 − 0.05^(1/n).
      dense_fraction: latents that fire on more than a tenth of the tokens (or `dense_threshold`).
      density: per latent, the fraction of tokens on which it fires.
      density_histogram: latents per bin of log10 density, between `DENSITY_EDGES`; dead latents are in none.
      coherence: of the decoder's rows that fire on these tokens; None where there are no three such rows.
      ladder: sparsities up to which recovery is sure or likely with as many directions; compare `l0` with its rungs.
      sites: of every site of a crosscoder, in order; one for all other dictionaries.
      n_tokens: tokens evaluated.
      n_blocks: blocks that they are from.
      n_massive: tokens whose activation or target has a norm over `massive_ratio` times the median. A few of them own
        the variance: with any, FVU and its like describe them and nothing else.
    """

    l0: Estimate
    dead_fraction: Estimate
    dead_rate_bound: float
    dense_fraction: Estimate
    density: np.ndarray
    density_histogram: np.ndarray
    coherence: Coherence | None
    ladder: RecoveryLadder | None
    sites: tuple[Reconstruction, ...]
    n_tokens: int
    n_blocks: int
    n_massive: int


# per token and site: ‖e‖², ‖y − m‖², cosine, ‖ŷ‖/‖y‖, whether y ≠ 0, ‖ŷ‖², ⟨ŷ, y⟩, ⟨ŷ − m, y − m⟩
_N_TERMS = 8


def _terms(y: Array, guess: Array, mean: Array) -> Float[Array, "batch site term"]:
    def dot(a, b):
        return (a * b).sum(-1)

    centred, shifted = y - mean[None], guess - mean[None]
    norms = jnp.sqrt(dot(centred, centred) * dot(shifted, shifted))
    present = dot(y, y) > 0
    parts = (
        dot(y - guess, y - guess),
        dot(centred, centred),
        dot(centred, shifted) / jnp.maximum(norms, 1e-30),
        jnp.where(present, jnp.sqrt(dot(guess, guess) / jnp.where(present, dot(y, y), 1)), 0),
        present.astype(y.dtype),
        dot(guess, guess),
        dot(guess, y),
        dot(centred, shifted),
    )
    return jnp.stack(parts, -1)


@eqx.filter_jit
def _scores(dictionary, x, y, mean, membership, n_sites):
    """Terms of all sites together and of each, codes per token, and totals per group of blocks."""
    codes, guess = dictionary.encode(x), dictionary(x)
    terms = _terms(y[:, None], guess[:, None], mean[None])
    if n_sites > 1:
        shape = (y.shape[0], n_sites, y.shape[1] // n_sites)
        by_site = _terms(y.reshape(shape), guess.reshape(shape), mean.reshape(shape[1:]))
        terms = jnp.concatenate([terms, by_site], 1)
    fires = (codes != 0).astype(jnp.float32)
    centred = y - mean[None, :]
    finite = jnp.isfinite(x).all() & jnp.isfinite(y).all()
    norms = jnp.stack([jnp.linalg.norm(a, axis=1) for a in (x, y)], 1)
    return terms, fires.sum(-1), norms, membership @ fires, membership @ centred, membership @ (y - guess), finite


def evaluate(
    dictionary: Reconstructor,
    activations: Float[Array | np.ndarray, "n d_in"] | Iterable[Batch],
    *,
    mean: Float[Array | np.ndarray, " d_mean"],
    blocks: Int[Array | np.ndarray, " token"] | None = None,
    targets: Float[Array | np.ndarray, "target d_out"] | None = None,
    key: Array,
    batch_size: int = 2048,
    n_sites: int | None = None,
    dense_threshold: float = DENSE_THRESHOLD,
    massive_ratio: float | None = 10.0,
) -> Evaluation:
    """Scores a dictionary on held-out activations, in one pass. Score its null (`baselines`) in the same way.

    Activations in half precision are scored in float32, by the dictionary's own codes of them.

    Args:
      dictionary: anything with `encode` and a call that reconstructs.
      activations: one row per token, in memory or memory-mapped; or batches, from a store or a model.
      mean: of the *training* targets; predicting it is an FVU of 1 there.
      blocks: which sequence (or document) each token is from; the bootstrap draws these. With an array only.
      targets: what is reconstructed, for a transcoder. With an array only; None means the activations themselves.
      key: draws the bootstrap.
      batch_size: tokens at a time; [batch_size, d_sae] codes are held at once, and no more.
      n_sites: of a crosscoder, whose outputs are flattened [site, d_model]; None asks the dictionary.
      dense_threshold: the share of tokens above which a latent is dense.
      massive_ratio: tokens with a norm over this many times the median are counted, and warned of; None counts none.

    Raises:
      InputError: no tokens, blocks or targets that are not one per token, a mean of another width, or activations or
        reconstructions that are not finite.
      ValueError: all tokens are from one block, which gives no interval.
    """
    sites = getattr(dictionary, "n_sites", 1) if n_sites is None else n_sites
    dictionary, mean = widened(dictionary), jnp.asarray(mean, jnp.float32)
    if mean.shape[0] % sites:
        raise InputError(f"outputs of width {mean.shape[0]} are not those of {sites} sites")
    tokens, l0s, norms, owners, fired, centred, errors = [], [], [], [], 0.0, 0.0, 0.0
    numbers: dict[int, int] = {}
    for piece in pieces(_batches(activations, blocks, targets), batch_size):
        if piece.targets.shape[1] != mean.shape[0]:
            raise InputError(f"the targets have width {piece.targets.shape[1]}, their mean {mean.shape[0]}")
        owner = _numbered(piece.blocks, numbers)
        member = (owner[None, :] % _GROUPS == np.arange(_GROUPS)[:, None]) & piece.real[None, :]
        *scores, finite = _scores(
            dictionary, piece.inputs, piece.targets, mean, jnp.asarray(member, jnp.float32), sites
        )
        terms, l0, sizes, *totals = (np.asarray(s, np.float64) for s in scores)
        if not finite or not np.isfinite(terms).all():
            what = "reconstructions" if finite else "activations"
            raise InputError(f"{what} that are NaN or infinite, among tokens {_seen(owners)} to {_seen(owners, piece)}")
        tokens.append(terms[piece.real])
        l0s.append(l0[piece.real])
        norms.append(sizes[piece.real])
        owners.append(owner[piece.real])
        fired, centred, errors = (a + b for a, b in zip((fired, centred, errors), totals, strict=True))
    if not owners:
        raise InputError("there are no activations to evaluate on")

    owner = np.concatenate(owners)
    sizes = np.bincount(owner).astype(np.float64)
    # empty groups are no groups
    n_groups = min(len(sizes), _GROUPS)
    fired, centred, errors = (np.asarray(a)[:n_groups] for a in (fired, centred, errors))
    terms = np.concatenate(tokens)
    flat = terms.reshape(len(terms), -1)
    per_block = np.stack([np.bincount(owner, column) for column in flat.T], 1).reshape(-1, *terms.shape[1:])
    per_group = np.stack([np.bincount(owner % _GROUPS, column) for column in flat.T], 1)
    per_group = per_group.reshape(-1, *terms.shape[1:])
    counts = np.bincount(owner % _GROUPS).astype(np.float64)
    n_massive = _massive(np.concatenate(norms), massive_ratio)

    keys = iter(jax.random.split(key, 6 * terms.shape[1] + 1))
    width = mean.shape[0] // sites

    def reconstruction(row: int, columns: slice) -> Reconstruction:
        e2, y2, cosine, ratio, present, guess2, dots, shifts = per_block[:, row].T
        dimensions = len(range(*columns.indices(mean.shape[0])))
        return Reconstruction(
            fraction_variance_unexplained=bootstrap_ratio(e2, y2, key=next(keys)),
            explained_variance=_explained_variance(
                counts, per_group[:, row, 0], per_group[:, row, 1], errors[:, columns], centred[:, columns]
            ),
            mean_squared_error=bootstrap_ratio(e2, sizes * dimensions, key=next(keys)),
            cosine=bootstrap_ratio(cosine, sizes, key=next(keys)),
            l2_ratio=bootstrap_ratio(ratio, present, key=next(keys)),
            relative_reconstruction_bias=bootstrap_ratio(guess2, dots, key=next(keys)),
            slope=bootstrap_ratio(shifts, y2, key=next(keys)),
        )

    overall = reconstruction(0, slice(None))
    each = [reconstruction(1 + s, slice(s * width, (s + 1) * width)) for s in range(sites)] if sites > 1 else [overall]
    density = fired.sum(0) / counts.sum()
    likeness = _coherence(dictionary, density > 0)
    return Evaluation(
        **{field.name: getattr(overall, field.name) for field in dataclasses.fields(overall)},
        l0=bootstrap_ratio(np.bincount(owner, np.concatenate(l0s)), sizes, key=next(keys)),
        dead_fraction=jackknife(dead_fraction, fired),
        dead_rate_bound=float(1 - 0.05 ** (1 / len(sizes))),
        dense_fraction=jackknife(lambda f, c: dense_fraction(f / c, dense_threshold), fired, counts),
        density=density,
        density_histogram=density_histogram(density),
        coherence=likeness,
        ladder=None if likeness is None else recovery_ladder(len(mean), likeness.n_directions, likeness),
        sites=tuple(each),
        n_tokens=int(counts.sum()),
        n_blocks=len(sizes),
        n_massive=n_massive,
    )


def _numbered(blocks: Int[np.ndarray, " token"], numbers: dict[int, int]) -> Int[np.ndarray, " token"]:
    """Numbers of the blocks in the order in which they are first seen, whatever their ids; `numbers` is filled up."""
    ids, first, place = np.unique(blocks, return_index=True, return_inverse=True)
    for i in np.argsort(first):
        numbers.setdefault(ids[i].item(), len(numbers))
    return np.array([numbers[i] for i in ids.tolist()])[place]


def _massive(norms: Float[np.ndarray, "token side"], ratio: float | None) -> int:
    """How many tokens have an activation or a target of an outstanding norm; says so where there are any."""
    if ratio is None:
        return 0
    count = int((norms > ratio * np.median(norms, axis=0)[None, :]).any(1).sum())
    if count:
        warnings.warn(
            f"{count} of {len(norms)} tokens have a norm over {ratio:g} times the median and own the variance, so that "
            "the scores describe them; evaluate on activations[~massive(activations)], or set massive_ratio=None",
            stacklevel=3,
        )
    return count


def _batches(activations, blocks, targets) -> Iterable[Batch]:
    if isinstance(activations, jax.Array | np.ndarray):
        if blocks is None:
            raise InputError("blocks says which sequence or document each token is from; pass it with the array")
        return [Batch(activations, blocks, targets)]
    if blocks is not None or targets is not None:
        raise InputError("batches hold their own blocks and targets; leave these arguments out")
    return activations


def _seen(owners: list[np.ndarray], piece=None) -> int:
    return sum(map(len, owners)) + (0 if piece is None else int(piece.real.sum()) - 1)


def _explained_variance(counts, e2, y2, errors, centred) -> Estimate:
    def explained(n, e2, y2, e, y):
        return 1 - (e2 - (e**2).sum() / n) / (y2 - (y**2).sum() / n)

    return jackknife(explained, counts, e2, y2, errors, centred)


def _coherence(dictionary, alive: np.ndarray) -> Coherence | None:
    w_dec = getattr(dictionary, "w_dec", None)
    if not isinstance(w_dec, jax.Array) or w_dec.ndim != 2 or alive.sum() < 3:
        return None
    return coherence(w_dec, alive=alive)
