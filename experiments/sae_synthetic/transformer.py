"""A two-layer transformer trained on a rule over known attributes: its first layer's stream, taken apart.

What is true of its stream is measured before any dictionary is compared with it: directions of the attributes by least
squares, how much of the stream they explain, and whether adding one changes the prediction as the attribute would.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from experiments.estimates import mean
from experiments.sae_synthetic.config import SyntheticConfig
from experiments.sae_synthetic.measure import Known, pursuit_on_truth
from experiments.sae_synthetic.suite import compared
from mi_jax.run import Progress, Workdir
from mi_jax.validation.attribute_model import AttributeModel, AttributeModelConfig, learned, train_attribute_model
from mi_jax.validation.attribute_truth import FeatureDirections, causal_effect, true_directions

EFFECT_SEQUENCES = 200
# of a stage's progress, before the dictionaries
TRAINING_SHARE = 0.4


def transformer(
    config: SyntheticConfig, rate_of: Mapping[str, float], workdir: Workdir, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results on the transformer, and MCC of every seed and F1 of every feature, per architecture."""
    k_model, k_train, k_test, k_null, k_rest = jax.random.split(jax.random.key(config.seed), 5)

    def part(fraction: float, note: str = "") -> None:
        progress(TRAINING_SHARE * fraction, note or "training the transformer")

    model_config = AttributeModelConfig(steps=config.transformer_steps)
    trained = train_attribute_model(model_config, key=k_model, progress=part, workdir=workdir)
    n = config.transformer_sequences
    train, test = (trained.task.sequences(m, key=k) for m, k in ((n, k_train), (max(n // 2, 64), k_test)))
    truth = true_directions(trained, train, key=k_null)
    x, known = _activations(trained, train, test, truth)
    l0 = float(truth.frequencies.sum())
    results = _truth(trained, truth, test, known, config, key=k_rest)

    def rest(fraction: float, note: str = "") -> None:
        progress(TRAINING_SHARE + (1 - TRAINING_SHARE) * fraction, note)

    found, per_seed = compared(
        x,
        known,
        config.transformer_d_sae,
        config,
        rate_of,
        l0=l0,
        prefix=lambda method: f"transformer.{method}",
        progress=rest,
        key=k_rest,
    )
    return results | found, per_seed


def _activations(trained: AttributeModel, train: Array, test: Array, truth: FeatureDirections) -> tuple[Array, Known]:
    """Activations to train on, and those of other sequences with their attributes."""
    x = trained.activations(train)[0]
    x = x.reshape(-1, x.shape[-1])
    held_out, features = (np.asarray(a).reshape(-1, a.shape[-1]) for a in trained.activations(test))
    return x, Known(held_out, features, truth.directions, np.asarray(x.mean(0)))


def _truth(
    trained: AttributeModel, truth: FeatureDirections, test: Array, known: Known, config: SyntheticConfig, *, key: Array
) -> dict[str, Any]:
    """How well the model has learnt the rule, and how true and how linear the directions are."""
    task = learned(trained, test)
    effect = causal_effect(trained, truth.directions, test[:EFFECT_SEQUENCES])
    results = {
        "features": len(truth.directions),
        "l0": known.l0,
        "task_share_learnt": task.share,
        "task_loss": task.loss,
        "task_loss_best": task.best,
        "task_loss_null": task.unigram,
        "linear_r2": truth.explained,
        "linear_r2_null": truth.explained_null,
        "readout_r2_null": float(truth.readout_null.mean()),
        "causal_slope_null": float(np.median(effect.slope_null)),
        "causal_correlation": effect.correlation,
        "causal_correlation_null": effect.correlation_null,
        "mean_difference_cosine": float(truth.mean_difference_cosine.mean()),
        "f1_pursuit_true": pursuit_on_truth(known.for_pursuit(config.pursuit_samples), truth.offset, key=key),
    }
    results |= mean("readout_r2", truth.readout) | {"causal_slope": float(np.median(effect.slope))}
    return {f"transformer.{name}": value for name, value in results.items()}
