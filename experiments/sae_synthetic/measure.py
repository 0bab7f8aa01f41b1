"""What is measured of a dictionary whose true features are known, and of its nulls."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import stats
from threadpoolctl import threadpool_limits

from experiments.sae_synthetic.methods import reconstruction
from mi_jax.decomposition.baselines import KSparse, fit_ica, fit_nmf, fit_pca
from mi_jax.decomposition.evaluation import FiringMatch, Pursuit, match_codes, match_directions, match_firing

# the figures whose chance level is measured too, and is their `_null`
BESIDE_NULLS = ("mcc", "mmcs", "uniqueness", "f1", "code_mcc")
SHARES = (*BESIDE_NULLS, "precision", "recall", "consistency", "f1_pursuit", "fvu")
# more places than the mean L0, since some samples hold more features
PURSUIT_PLACES = 1.5
CHEAP_L0 = 8.0


@dataclasses.dataclass(frozen=True)
class Known:
    """Held-out activations, and what made them.

    Attributes:
      x, codes: activations and true codes, sample by sample.
      directions: of the features.
      mean: of the activations that dictionaries are trained on.
    """

    x: Float[np.ndarray, "n d_model"]
    codes: Float[np.ndarray, "n feature"]
    directions: Float[np.ndarray, "feature d_model"]
    mean: Float[np.ndarray, " d_model"]

    def first(self, n: int) -> "Known":
        """Fewer samples."""
        return dataclasses.replace(self, x=self.x[:n], codes=self.codes[:n])

    def for_pursuit(self, n: int) -> "Known":
        """n samples, or fewer where they have many codes, each of which a pursuit finds by solving for all so far."""
        return self.first(max(round(n * min(1.0, CHEAP_L0 / self.l0)), 32))

    @property
    def numbers(self) -> Float[np.ndarray, "n one"]:
        """The samples' numbers, which `Coded` reads in place of activations."""
        return np.arange(len(self.x), dtype=np.float32)[:, None]

    @property
    def l0(self) -> float:
        """Features that are there per sample."""
        return float((self.codes != 0).sum(1).mean())


class Coded(eqx.Module):
    """A dictionary with the codes of some samples, computed once; it reads the numbers of samples.

    So one program scores every architecture and every null.
    """

    codes: Float[Array, "n d_sae"]
    w_dec: Float[Array, "d_sae d_model"]
    b_dec: Float[Array, " d_model"]

    @classmethod
    def of(cls, dictionary: Any, x: Float[np.ndarray, "n d_model"], w_dec: Any = None, b_dec: Any = None) -> "Coded":
        """The codes that a dictionary or a baseline gives to activations, and its affine decoder."""
        rows = dictionary.w_dec if w_dec is None else w_dec
        return cls(_encoded(dictionary, jnp.asarray(x)), rows, dictionary.b_dec if b_dec is None else b_dec)

    def encode(self, x: Float[Array, "*batch one"]) -> Float[Array, "*batch d_sae"]:
        """The codes of the samples that have these numbers."""
        return self.codes[x[..., 0].astype(jnp.int32)]

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_model"]:
        """What the dictionary makes of codes."""
        return codes @ self.w_dec + jnp.broadcast_to(self.b_dec, (*codes.shape[:-1], *self.b_dec.shape))

    def __call__(self, x: Float[Array, "*batch one"]) -> Float[Array, "*batch d_model"]:
        return self.decode(self.encode(x))

    def first(self, n: int) -> "Coded":
        """Fewer samples."""
        return dataclasses.replace(self, codes=self.codes[:n])


@eqx.filter_jit
def _encoded(dictionary: Any, x: Float[Array, "n d_model"]) -> Float[Array, "n d_sae"]:
    return dictionary.encode(x)


class Scored(NamedTuple):
    """Figures of a dictionary, and for each feature its latent (−1 for none) and how well that fires, F1."""

    figures: dict[str, float]
    latents: Int[np.ndarray, " feature"]
    f1s: Float[np.ndarray, " feature"]


def scores(coded: Coded, known: Known, *, key: Array) -> Scored:
    """Directions and codes against the true ones, with what chance gives, and the reconstruction.

    A latent belongs to the feature that the matching of directions gives it. Chance is random directions for what
    compares directions, and the codes of other samples for what compares codes.
    """
    k_directions, k_firing, k_codes = jax.random.split(key, 3)
    matched = match_directions(coded.w_dec, known.directions, key=k_directions, null_draws=1)
    fires = match_firing(coded, known.numbers, known.codes, matched.latents, key=k_firing)
    alike = match_codes(coded, known.numbers, known.codes, key=k_codes)
    l0, fvu = reconstruction(coded.codes, coded.decode(coded.codes), jnp.asarray(known.x), jnp.asarray(known.mean))
    figures = {
        "mcc": matched.mcc.value,
        "mcc_null": matched.mcc_null.mean,
        "mmcs": matched.mmcs.value,
        "mmcs_null": matched.mmcs_null.mean,
        "uniqueness": matched.uniqueness,
        "uniqueness_null": matched.uniqueness_null.mean,
        "f1": fires.f1.value,
        "f1_null": fires.f1_null,
        "precision": fires.precision.value,
        "recall": fires.recall.value,
        "code_mcc": alike.mcc.value,
        "code_mcc_null": alike.mcc_null,
        "l0": float(l0),
        "fvu": float(fvu),
    }
    return Scored(figures, matched.latents, fires.f1s)


def amortisation(coded: Coded, latents: Int[np.ndarray, " feature"], known: Known, *, key: Array) -> dict[str, float]:
    """F1 of orthogonal matching pursuit on the dictionary's directions, and how much better it is than the encoder's.

    Both have the same L0 and the same latent for every feature.
    """
    k_encoder, k_pursuit = jax.random.split(key)
    encoder = match_firing(coded, known.numbers, known.codes, latents, key=k_encoder)
    pursued = pursuit(coded.w_dec, coded.b_dec, known, float((coded.codes != 0).sum(1).mean(dtype=jnp.float32)))
    found = match_firing(pursued, known.numbers, known.codes, latents, key=k_pursuit)
    f1 = _mean_f1(found, known)
    return {"f1_pursuit": f1, "amortisation_gap": f1 - _mean_f1(encoder, known)}


def pursuit_on_truth(known: Known, offset: Float[np.ndarray, " d_model"], *, key: Array) -> float:
    """F1 of orthogonal matching pursuit that knows the true directions and the true L0."""
    pursued = pursuit(jnp.asarray(known.directions), jnp.asarray(offset), known, known.l0)
    latents = np.arange(len(known.directions))
    return _mean_f1(match_firing(pursued, known.numbers, known.codes, latents, key=key), known)


def _mean_f1(found: FiringMatch, known: Known) -> float:
    """Over the features that are there at all: few samples may lack a rare one."""
    return float(found.f1s[(known.codes != 0).any(0)].mean())


def pursuit(w_dec: Float[Array, "d_sae d_model"], b_dec: Float[Array, " d_model"], known: Known, l0: float) -> Coded:
    """Orthogonal matching pursuit whose largest codes, `l0` per sample on average, are kept."""
    # by the true L0, so that one program serves all dictionaries
    places = min(round(PURSUIT_PLACES * known.l0) + 3, *w_dec.shape)
    codes = Coded.of(Pursuit(w_dec, b_dec, k=places, nonnegative=True), known.x).codes
    kept = min(max(round(l0 * len(known.x)), 1), len(known.x) * places)
    threshold = np.partition(np.asarray(codes).ravel(), -kept - 1)[-kept - 1]
    return Coded(jnp.where(codes > max(float(threshold), 0.0), codes, 0.0), w_dec, b_dec)


def linear_baselines(
    x: Float[Array, "n d_model"], d_sae: int, known: Known, *, key: Array
) -> dict[str, dict[str, float]]:
    """PCA, independent components and non-negative factors, with as many codes per sample as there are features.

    The first two have no more components than dimensions; the factors are as many as a dictionary's latents.
    """
    k_ica, k_nmf, k_scores = jax.random.split(key, 3)
    pca = fit_pca(x, x.shape[1])
    # matrices this small are slower on several threads, and very slow on a busy machine
    with threadpool_limits(1):
        ica = fit_ica(x, x.shape[1], key=k_ica, max_iter=50, tolerance=1e-3)
        nmf = fit_nmf(x, d_sae, key=k_nmf, batch_size=1024, max_iter=5, steps=50)
    candidates = {
        "pca": (pca, pca.basis, pca.mean),
        "ica": (ica, ica.w_dec, ica.mean),
        "nmf": (nmf, nmf.w_dec, nmf.offset),
    }
    k = max(1, round(known.l0))
    return {
        name: scores(Coded.of(KSparse(baseline, k), known.x, w_dec, b_dec), known, key=k_scores).figures
        for name, (baseline, w_dec, b_dec) in candidates.items()
    }


def over_seeds(prefix: str, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over seeds with their 95 % interval by Student's t, and the means of their nulls."""
    results = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        results[f"{prefix}.{name}"] = float(values.mean())
        if name.endswith("_null") or len(values) < 2:
            continue
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
        low, high = values.mean() - half, values.mean() + half
        if name in SHARES:
            low, high = max(low, 0.0), high if name == "fvu" else min(high, 1.0)
        results |= {f"{prefix}.{name}_ci_low": float(low), f"{prefix}.{name}_ci_high": float(high)}
    return results
