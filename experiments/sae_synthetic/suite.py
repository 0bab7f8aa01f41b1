"""One setting of synthetic superposition: every architecture and seed, the nulls, and what the theory says."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.sae_synthetic.config import SyntheticConfig
from experiments.sae_synthetic.measure import (
    Coded,
    Known,
    amortisation,
    linear_baselines,
    over_seeds,
    pursuit_on_truth,
    scores,
)
from experiments.sae_synthetic.methods import Training, choose_rate
from experiments.sae_synthetic.settings import MAIN, SETTINGS, superposition_config
from mi_jax.decomposition.evaluation import certificates, seed_consistency
from mi_jax.decomposition.recovery import recovery_ladder
from mi_jax.run import Progress
from mi_jax.validation.superposition import Sample, Superposition, superposition

# the nulls with a frozen decoder are of this architecture
NULL_ARCHITECTURE = "batchtopk"
CERTIFIED_SAMPLES = 256


def drawn(name: str, config: SyntheticConfig, *, key: Array) -> tuple[Superposition, Float[Array, "n d_model"], Known]:
    """A setting's dictionary, activations to train on, and others to score on."""
    k_truth, k_train, k_test = jax.random.split(key, 3)
    truth = superposition(superposition_config(name, config.n_features, config.d_model), key=k_truth)
    x = _sample(truth, config.train_samples, k_train).x
    test = _sample(truth, config.test_samples, k_test)
    directions = np.asarray(truth.dictionary)
    return truth, x, Known(np.asarray(test.x), np.asarray(test.codes), directions, np.asarray(x.mean(0)))


@eqx.filter_jit
def _sample(truth: Superposition, n: int, key: Array) -> Sample:
    return truth.sample(n, key=key)


def rates(config: SyntheticConfig, progress: Progress) -> dict[str, Any]:
    """The learning rate of every architecture, by reconstruction on a draw that nothing is scored on."""
    truth, x, known = drawn(MAIN, config, key=jax.random.fold_in(jax.random.key(config.seed), 1))
    names, chosen = config.chosen_architectures, {}
    for number, name in enumerate(dict.fromkeys((*names, NULL_ARCHITECTURE))):
        progress(number / len(names), name)
        training = Training.of(name, config.d_model, config.d_sae, float(truth.mean_l0), config)
        rate, tried = choose_rate(
            training, x, jnp.asarray(known.x), config.learning_rates, key=jax.random.key(config.seed)
        )
        chosen[name] = {"rate": rate, "tried": [[r, *row] for r, row in zip(config.learning_rates, tried, strict=True)]}
    return chosen


def setting(
    name: str, config: SyntheticConfig, rate_of: Mapping[str, float], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of a setting, and what the stage keeps: MCC of every seed, and F1 of every feature, per architecture."""
    k_draw, k_theory, k_rest = jax.random.split(_key(config, name), 3)
    truth, x, known = drawn(name, config, key=k_draw)
    results = {f"sae_synthetic.{name}.{key}": v for key, v in theory(truth, known, config, key=k_theory).items()}
    found, per_seed = compared(
        x,
        known,
        config.d_sae,
        config,
        {method: rate for method, rate in rate_of.items() if method not in SETTINGS[name].without},
        l0=float(truth.mean_l0),
        prefix=lambda method: f"sae_synthetic.{method}.{name}",
        progress=progress,
        key=k_rest,
    )
    return results | found, per_seed


def compared(
    x: Float[Array, "n d_model"],
    known: Known,
    d_sae: int,
    config: SyntheticConfig,
    rate_of: Mapping[str, float],
    *,
    l0: float,
    prefix: Callable[[str], str],
    progress: Progress,
    key: Array,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains and scores every architecture with a rate and every null on the same activations; returns as `setting`."""
    k_start, k_scores, k_null = jax.random.split(key, 3)
    starts, some = list(jax.random.split(k_start, config.seeds)), known.for_pursuit(config.pursuit_samples)
    names = [name for name in config.chosen_architectures if name in rate_of]
    results, per_seed = {}, {}
    for number, name in enumerate(names):
        progress(number / (len(names) + 2), name)
        training = Training.of(name, x.shape[1], d_sae, l0, config)
        dictionaries = training.fit(x, starts, rate_of[name])
        rows, f1s = [], []
        for dictionary in dictionaries:
            coded = Coded.of(dictionary, known.x)
            found = scores(coded, known, key=k_scores)
            gap = amortisation(coded.first(len(some.x)), found.latents, some, key=k_scores)
            rows.append(found.figures | gap)
            f1s.append(found.f1s.round(4).tolist())
        alike = seed_consistency([d.w_dec for d in dictionaries], key=k_scores)
        results |= over_seeds(prefix(name), rows)
        results |= {
            f"{prefix(name)}.consistency": alike.value.value,
            f"{prefix(name)}.consistency_null": alike.null.mean,
            f"{prefix(name)}.consistency_ci_low": alike.value.ci_low,
            f"{prefix(name)}.consistency_ci_high": alike.value.ci_high,
            f"{prefix(name)}.learning_rate": rate_of[name],
        }
        per_seed[name] = {"mcc": [row["mcc"] for row in rows], "f1_per_feature": f1s}
    progress(len(names) / (len(names) + 2), "the nulls")
    training = Training.of(NULL_ARCHITECTURE, x.shape[1], d_sae, l0, config)
    frozen = training.fit_random_decoder(x, k_null, rate_of[NULL_ARCHITECTURE])
    nulls = {"random_decoder": scores(Coded.of(frozen, known.x), known, key=k_scores).figures}
    nulls |= linear_baselines(x[: config.null_samples], d_sae, known, key=k_null)
    for name, row in nulls.items():
        results |= over_seeds(prefix(name), [row])
    return results, per_seed


def theory(truth: Superposition, known: Known, config: SyntheticConfig, *, key: Array) -> dict[str, Any]:
    """The true L0 beside the bounds, certificates of true supports, and a pursuit that knows the directions."""
    ladder = recovery_ladder(config.d_model, config.n_features, truth.coherence, z_ratio=truth.config.z_ratio)
    some = known.first(CERTIFIED_SAMPLES)
    most = int((some.codes != 0).sum(1).max())
    values, support = jax.lax.top_k(jnp.asarray(some.codes), most)
    certified = certificates(truth.dictionary, support, values)
    l0s = (known.codes != 0).sum(1)
    return {
        "l0": float(l0s.mean()),
        "one_step_bound": ladder.one_step,
        "wainwright_bound": ladder.wainwright,
        "share_within_one_step": float((l0s <= ladder.one_step).mean()),
        "coherence": truth.coherence.mutual,
        "rarest_frequency": float(truth.frequencies.min()),
        "erc_certified": float((np.asarray(certified.erc) < 1).mean()),
        "fuchs_certified": float((np.asarray(certified.fuchs) < 1).mean()),
        "f1_pursuit_true": pursuit_on_truth(
            known.for_pursuit(config.pursuit_samples), np.zeros(config.d_model, np.float32), key=key
        ),
    }


def _key(config: SyntheticConfig, name: str) -> Array:
    """A setting's own key, whichever others run."""
    return jax.random.fold_in(jax.random.key(config.seed), sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
