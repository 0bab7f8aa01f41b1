"""Every public score in bfloat16 beside float32 of the same numbers: what is rounded is the input, and nothing else."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition import evaluation
from mi_jax.decomposition.evaluation import Examples
from tests.decomposition.evaluation.toy import random_toy
from tests.models.tiny import prompts, tiny

N, D, D_SAE = 64, 8, 16
KEY = jax.random.key(0)
BLOCKS = np.arange(N) // 4


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) + 0.5


def in_dtype(tree, dtype):
    """Everything rounded to bfloat16, as bfloat16 or as float32."""

    def cast(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf, jnp.float32).astype(jnp.bfloat16).astype(dtype)

    return jax.tree.map(lambda leaf: cast(leaf) if eqx.is_array(leaf) else leaf, tree)


def mean_of(x):
    return jnp.asarray(x, jnp.float32).mean(0)


def examples(dtype, seed):
    y = np.random.default_rng(seed).integers(0, 4, N)
    x = numbers(N, D, seed=seed) + 1.5 * np.eye(D)[y % 2] + 1.5 * np.eye(D)[2 + y // 2]
    return Examples(in_dtype(jnp.asarray(x, jnp.float32), dtype), np.stack([y % 2 == 1, y // 2 == 1], 1))


def both(fn, **options):
    return lambda d, x, cast: fn(d, examples(cast, 1), examples(cast, 2), key=KEY, **options)


def of_model(fn, *args):
    def run(d, x, cast):
        return fn(tiny(), d, *args, prompts(2, batch=6, n_pos=8), site="resid_post", layer=1, mean=mean_of(x), key=KEY)

    return run


def per_prompt(logits):
    # a sum that bfloat16 would round
    return logits[:, -1].mean(-1) + logits.mean((1, 2))


TRUE = np.maximum(numbers(N, 6, seed=3), 0)
FREE = {"coherence": lambda d, x, cast: evaluation.coherence(d.w_dec)}
CASES = FREE | {
    "decoder_projection": lambda d, x, cast: evaluation.decoder_projection(d.w_dec, d.b_dec, x, 4),
    "evaluate": lambda d, x, cast: evaluation.evaluate(d, x, mean=mean_of(x), blocks=BLOCKS, key=KEY),
    "match_codes": lambda d, x, cast: evaluation.match_codes(d, x, in_dtype(jnp.asarray(TRUE), cast), key=KEY),
    "match_firing": lambda d, x, cast: evaluation.match_firing(
        d, x, in_dtype(jnp.asarray(TRUE), cast), np.arange(6), key=KEY, true_directions=d.w_dec[6:12]
    ),
    "match_directions": lambda d, x, cast: evaluation.match_directions(d.w_dec, x[:5], key=KEY),
    "mean_max_cosine": lambda d, x, cast: evaluation.mean_max_cosine(d.w_dec, x[:5]),
    "seed_consistency": lambda d, x, cast: evaluation.seed_consistency([d.w_dec, d.w_enc], key=KEY),
    "orthogonal_matching_pursuit": lambda d, x, cast: evaluation.orthogonal_matching_pursuit(d.w_dec, x, 3),
    "Pursuit": lambda d, x, cast: evaluation.evaluate(
        evaluation.Pursuit(d.w_dec, d.b_dec, 3), x, mean=mean_of(x), blocks=BLOCKS, key=KEY
    ),
    "certificates": lambda d, x, cast: evaluation.certificates(
        d.w_dec, jnp.array([[0, 1], [2, 5]]), in_dtype(jnp.ones((2, 2)), cast)
    ),
    "certified_fractions": lambda d, x, cast: evaluation.certified_fractions(
        d, x, blocks=BLOCKS, key=KEY, max_active=D_SAE
    ),
    "cross_entropy_recovered": lambda d, x, cast: evaluation.cross_entropy_recovered(
        *(x[:, i] + shift for i, shift in enumerate((0, 1, 100))), key=KEY
    ),
    "kl_recovered": lambda d, x, cast: evaluation.kl_recovered(jnp.abs(x[:, 0]), jnp.abs(x[:, 1]), key=KEY),
    "sparse_probing": both(evaluation.sparse_probing, ks=(1, 2), null_draws=1),
    "feature_absorption": both(evaluation.feature_absorption),
    "targeted_probe_perturbation": both(evaluation.targeted_probe_perturbation, n_values=(1, 2), null_draws=1),
    "spurious_correlation_removal": both(evaluation.spurious_correlation_removal, n_values=(1, 2), null_draws=1),
    "evaluate_spliced": of_model(evaluation.evaluate_spliced),
    "task_effect": of_model(evaluation.task_effect, per_prompt),
}
# values, and what scores return or take
OTHERS = ("bootstrap_mean", "bootstrap_ratio", "one_vs_rest")


def leaves(result):
    tree = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # type: ignore[arg-type]
    found = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if not isinstance(leaf, str)]
    return [leaf.astype(np.float64) for leaf in found]


def test_every_public_score_is_here():
    public = {n for n in vars(evaluation) if n[0].islower() and callable(getattr(evaluation, n))}
    assert public - set(OTHERS) == {name for name in CASES if name != "Pursuit"}


@pytest.mark.parametrize("name", CASES)
def test_a_score_in_half_precision_is_that_of_the_same_numbers_in_float32(name):
    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        dictionary = in_dtype(random_toy(1, D, D_SAE), dtype)
        found.append(leaves(CASES[name](dictionary, in_dtype(jnp.asarray(numbers(N, D)), dtype), dtype)))
    for half, full in zip(*found, strict=True):
        np.testing.assert_allclose(half, full, rtol=1e-4, atol=1e-4)


def test_a_model_in_half_precision_takes_any_dictionary():
    tokens, found = prompts(2, batch=6, n_pos=8), []
    for dtype in (jnp.bfloat16, jnp.float32):
        scores = evaluation.evaluate_spliced(
            in_dtype(tiny(), dtype),
            random_toy(1, D, D_SAE),
            tokens,
            site="resid_post",
            layer=1,
            mean=jnp.zeros(D),
            key=KEY,
        )
        found.append([scores.ce_clean.value, scores.ce_zero_ablated.value])
    # the model itself rounds
    np.testing.assert_allclose(*found, rtol=0.05)
