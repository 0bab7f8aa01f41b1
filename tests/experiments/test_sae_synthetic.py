"""The measures on dictionaries that are the truth, the choice of rates, and a run of a few steps."""

import dataclasses
import io
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.sae_synthetic.config import SyntheticConfig
from experiments.sae_synthetic.measure import Coded, Known, amortisation, over_seeds, pursuit, pursuit_on_truth, scores
from experiments.sae_synthetic.methods import METHODS, Training, choose_rate, reconstruction
from experiments.sae_synthetic.run import best_of, run_synthetic
from experiments.sae_synthetic.settings import SETTINGS, superposition_config
from experiments.sae_synthetic.tables import NULLS, ranking
from mi_jax.core.errors import InputError
from mi_jax.decomposition import ARCHITECTURES, Dictionary
from mi_jax.decomposition.activations import JumpReLU
from mi_jax.decomposition.recovery import wainwright_sparsity
from mi_jax.validation.superposition import SuperpositionConfig, superposition

N_FEATURES, D_MODEL = 24, 64
TINY = SyntheticConfig(
    settings="independent",
    architectures="topk",
    seeds=2,
    n_features=24,
    d_model=16,
    d_sae=24,
    train_samples=256,
    test_samples=128,
    steps=4,
    batch_size=64,
    rates="0.005,0.01",
    null_samples=128,
    pursuit_samples=32,
    transformer=False,
    transformer_steps=2,
    transformer_sequences=256,
    transformer_d_sae=32,
)


@pytest.fixture(scope="module")
def known():
    config = SuperpositionConfig(N_FEATURES, D_MODEL, 2.0, 0.0, amplitude_spread=0.1)
    truth = superposition(config, key=jax.random.key(0))
    sample = truth.sample(512, key=jax.random.key(1))
    return Known(*(np.asarray(a) for a in (sample.x, sample.codes, truth.dictionary, sample.x.mean(0))))


@pytest.fixture(scope="module")
def true_dictionary(known):
    """The truth as a dictionary: its encoder solves for the codes, since there are fewer features than dimensions."""
    rows = jnp.asarray(known.directions)
    return Dictionary(
        w_enc=jnp.linalg.pinv(rows).T,
        b_enc=jnp.zeros(N_FEATURES),
        w_dec=rows,
        b_dec=jnp.zeros(D_MODEL),
        activation=JumpReLU(jnp.full(N_FEATURES, 0.5)),
    )


def test_the_truth_scores_one_and_its_nulls_do_not(known, true_dictionary, key):
    # another order and other signs of nothing: the matching has to find the partners
    order = np.random.default_rng(0).permutation(N_FEATURES)
    shuffled = jax.tree.map(lambda leaf: leaf[order] if leaf.shape[:1] == (N_FEATURES,) else leaf, true_dictionary)
    row, latents, f1s = scores(Coded.of(shuffled, known.x), known, key=key)
    np.testing.assert_array_equal(order[latents], np.arange(N_FEATURES))
    np.testing.assert_allclose(f1s, 1)
    for name in ("mcc", "mmcs", "uniqueness", "f1", "precision", "recall", "code_mcc"):
        np.testing.assert_allclose(row[name], 1, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(row["l0"], known.l0, rtol=1e-6)
    assert row["fvu"] < 1e-6
    for name in ("mcc", "mmcs", "uniqueness", "f1", "code_mcc"):
        assert row[f"{name}_null"] < 0.8, name
    # half of the features seen by nobody
    half = eqx.tree_at(lambda d: d.w_enc, true_dictionary, true_dictionary.w_enc.at[: N_FEATURES // 2].set(0.0))
    row, _, f1s = scores(Coded.of(half, known.x), known, key=key)
    np.testing.assert_allclose(f1s, np.arange(N_FEATURES) >= N_FEATURES // 2)
    np.testing.assert_allclose(row["mcc"], 1, atol=1e-4)
    np.testing.assert_allclose((row["f1"], row["recall"]), 0.5, atol=1e-4)


def test_pursuit_on_the_truth_finds_all_and_is_the_gap_of_a_bad_encoder(known, true_dictionary, key):
    some = known.first(128)
    assert pursuit_on_truth(some, np.zeros(D_MODEL, np.float32), key=key) > 0.97
    pursued = pursuit(true_dictionary.w_dec, true_dictionary.b_dec, some, 1.5)
    np.testing.assert_allclose((np.asarray(pursued.codes) != 0).sum(1).mean(), 1.5, atol=1 / 128)
    latents = np.arange(N_FEATURES)
    good = amortisation(Coded.of(true_dictionary, some.x), latents, some, key=key)
    assert abs(good["amortisation_gap"]) < 0.03
    # an encoder that reads each feature where another one is
    bad = eqx.tree_at(lambda d: d.w_enc, true_dictionary, jnp.roll(true_dictionary.w_enc, 1, axis=0))
    wrong = amortisation(Coded.of(bad, some.x), latents, some, key=key)
    np.testing.assert_allclose(wrong["f1_pursuit"], good["f1_pursuit"], atol=0.03)
    assert wrong["amortisation_gap"] > 0.7


def test_intervals_over_seeds_are_students(key):
    rows = [{"mcc": v, "mcc_null": 0.2, "l0": 10 * v} for v in (0.7, 0.8, 0.9)]
    found = over_seeds("a.b", rows)
    # t of 0.975 with 2 degrees of freedom is 4.302653
    half = 4.302653 * 0.1 / np.sqrt(3)
    np.testing.assert_allclose((found["a.b.l0"], found["a.b.l0_ci_low"]), (8, 8 - 10 * half), rtol=1e-6)
    np.testing.assert_allclose(
        (found["a.b.mcc"], found["a.b.mcc_ci_low"], found["a.b.mcc_ci_high"]), (0.8, 0.8 - half, 1)
    )
    assert found["a.b.mcc_null"] == pytest.approx(0.2)
    assert not any(name.startswith("a.b.mcc_null_") for name in found)


def test_a_rate_is_chosen_by_reconstruction_among_those_with_the_right_l0(known, true_dictionary, key):
    x = jnp.asarray(known.x)
    noisy = eqx.tree_at(lambda d: d.b_dec, true_dictionary, jnp.full(D_MODEL, 0.05))
    # reconstructs perfectly too, with far more codes
    dense = eqx.tree_at(
        lambda d: (d.w_enc, d.w_dec, d.activation),
        true_dictionary,
        (jnp.eye(N_FEATURES, D_MODEL), jnp.eye(N_FEATURES, D_MODEL), JumpReLU(jnp.full(N_FEATURES, -9.0))),
    )

    class Prepared(Training):
        def fit(self, x, keys, rates):
            return [{0.1: noisy, 0.2: true_dictionary, 0.3: dense}[rate] for rate in np.atleast_1d(rates).tolist()]

    training = Prepared(**vars(Training.of("topk", D_MODEL, N_FEATURES, known.l0, TINY)))

    def chosen(*rates: float) -> float:
        rate, tried = choose_rate(training, x, x, rates, key=key)
        expected = [reconstruction(d.encode(x), d(x), x, x.mean(0)) for d in training.fit(x, [], rates)]
        np.testing.assert_allclose(tried, expected, rtol=1e-6)
        return rate

    assert chosen(0.1, 0.2, 0.3) == 0.2
    assert chosen(0.1, 0.3) == 0.1
    assert chosen(0.3) == 0.3


def test_settings_stand_where_they_say_in_units_of_the_bounds():
    configs = {name: superposition_config(name, 256, 128) for name in SETTINGS}
    for name in ("independent", "zipf"):
        assert configs[name].mean_l0 == 0.5 * configs[name].one_step_sparsity == 2
    assert configs["dense"].mean_l0 == 4 * wainwright_sparsity(128, 256)
    assert configs["hierarchy"].roots == 64
    assert set(METHODS) <= set(ARCHITECTURES)
    for config in configs.values():
        truth = superposition(config, key=jax.random.key(0))
        np.testing.assert_allclose(truth.mean_l0, config.mean_l0, rtol=1e-4)


def test_a_training_hits_its_l0_by_k_or_by_the_controller():
    for name in METHODS:
        training = Training.of(name, 16, 32, 3.0, TINY)
        assert training.shape.k == 3
        assert training.knobs(0.01).target_l0 == 3.0
        assert bool(training.schedule.control) == (training.objective.penalty != "none")


def test_the_best_architecture_is_chosen_where_its_figure_is_not_taken():
    config = dataclasses.replace(SyntheticConfig(), architectures="relu,topk", transformer=False)
    results = {"sae_synthetic.independent.l0": 2.0, "sae_synthetic.independent.one_step_bound": 4}
    for name in SETTINGS:
        for method, value in {"relu": 0.8, "topk": 0.7}.items():
            # the lucky one of the main setting is not the best elsewhere
            value = {"relu": 0.93, "topk": 0.99}[method] if name == "independent" else value
            results |= {f"sae_synthetic.{method}.{name}.{figure}": value for figure in ("mcc", "mcc_null", "f1")}
        results |= {f"sae_synthetic.{null}.{name}.mcc": 0.1 for null in NULLS}
    found = best_of(results, config)
    assert found["sae_synthetic.best_architecture"] == "relu"
    assert found["sae_synthetic.best_mcc"] == 0.93
    assert found["sae_synthetic.best_s_over_bound"] == 0.5
    assert found["sae_synthetic.failure_mcc"] == found["sae_synthetic.failure_mcc_highest"] == 0.8
    ranked = ranking(results, ("topk", "relu"), tuple(SETTINGS))
    assert [name for name, _ in ranked.rows] == ["relu", "topk", *NULLS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": "zipf,moon"}, r"config\.settings: there is no moon; there are independent"),
        ({"architectures": "sae"}, r"config\.architectures: there is no sae; there are relu"),
        ({"rates": "fast"}, r"config\.rates='fast': give learning rates over 0"),
        ({"seeds": 1}, r"config\.seeds=1"),
        ({"d_sae": 100}, r"d_sae=100 latents cannot hold config\.n_features=256"),
        ({"train_samples": 10}, r"train_samples=10 do not fill a batch"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run_synthetic(dataclasses.replace(SyntheticConfig(), **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def check_figures(results: dict, *names: str) -> None:
    for name in names:
        for figure in ("mcc", "mmcs", "uniqueness", "f1", "code_mcc", "consistency"):
            value, null, low, high = (results[f"{name}.{figure}{s}"] for s in ("", "_null", "_ci_low", "_ci_high"))
            assert 0 <= null <= 1
            assert low <= value <= high
        for null in NULLS:
            assert f"{name.replace('topk', null)}.mcc" in results


def test_a_run_of_a_few_steps_writes_figures_with_nulls_and_resumes(tmp_path):
    out = io.StringIO()
    results = run_synthetic(TINY, str(tmp_path), console=Console(file=out, width=160))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    check_figures(results, "sae_synthetic.topk.independent")
    assert results["sae_synthetic.best_architecture"] == "topk"
    assert results["sae_synthetic.best_mcc_null"] == results["sae_synthetic.topk.independent.mcc_null"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table") == 7
    assert page.count("<figure>") == 1
    for place in (page, out.getvalue()):
        assert f"{results['sae_synthetic.topk.independent.mcc']:.3f}" in place
    # nothing is done twice
    costs = (tmp_path / "costs.json").read_bytes()
    assert run_synthetic(TINY, str(tmp_path), console=Console(file=io.StringIO())) == results
    assert (tmp_path / "costs.json").read_bytes() == costs


@pytest.mark.slow
def test_a_run_with_the_transformer_says_how_linear_it_is(tmp_path):
    results = run_synthetic(
        dataclasses.replace(TINY, transformer=True), str(tmp_path), console=Console(file=io.StringIO())
    )
    check_figures(results, "transformer.topk")
    linear = {f"transformer.{name}_null" for name in ("linear_r2", "readout_r2", "causal_slope", "causal_correlation")}
    assert linear | {"transformer.best_mcc_null", "transformer.f1_pursuit_true"} <= set(results)
    assert (tmp_path / "report.html").read_text().count("<figure>") == 2
