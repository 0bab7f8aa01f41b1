"""Attribution: closed forms on a linear model, completeness of integrated gradients, certification, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import mi_jax as mi
from mi_jax.core.attribution import attribute
from mi_jax.core.certify import agreement, spearman
from mi_jax.core.effects import Effects
from mi_jax.core.errors import InputError
from tests.core.linear_model import N_LAYERS, inputs, jacobian, linear_model, mean_metric
from tests.models.tiny import prompts, tiny

TOLERANCE = 1e-5
CLEAN, CORRUPT = inputs(1), inputs(2)
SITES = ("attn_out", "mlp_out")


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


def differences(site):
    clean, corrupt = (mi.capture(linear_model(), site)(x)[1][site] for x in (CLEAN, CORRUPT))
    return np.asarray(clean - corrupt, np.float64)


@pytest.mark.parametrize("method", ["atp", "ig", "ig-activations", "exact"])
def test_on_a_linear_model_every_method_is_the_closed_form(method):
    found = mi.jit(attribute(linear_model(), mean_metric, SITES, method=method, steps=2))(CLEAN, CORRUPT)
    for site in SITES:
        change = differences(site)
        expected = [(change[i] * jacobian(linear_model(), site, i)[None]).sum((0, 2)) for i in range(N_LAYERS)]
        np.testing.assert_allclose(found[site], np.array(expected), atol=2e-5)
        assert np.abs(expected).max() > 0.1
    assert found.method == method
    assert dict(found.axes)["mlp_out"] == ("layer", "pos")


def test_grad_drop_is_the_closed_form_with_each_layer_dropped():
    found = mi.jit(attribute(linear_model(), mean_metric, SITES, method="atp*"))(CLEAN, CORRUPT)
    for site in SITES:
        change = differences(site)
        for i in range(N_LAYERS):
            per_layer = [
                np.abs((change[i] * jacobian(linear_model(), site, i, dropped)[None]).sum((0, 2)))
                for dropped in range(N_LAYERS)
            ]
            np.testing.assert_allclose(found[site][i], np.sum(per_layer, 0) / (N_LAYERS - 1), atol=2e-5)


def test_directions_swap_the_runs_and_are_named():
    denoise, noise = (
        attribute(linear_model(), mean_metric, "attn_out", direction=d)(CLEAN, CORRUPT)
        for d in ("denoising", "noising")
    )
    clean, corrupt = (mean_metric(linear_model()(x)) for x in (CLEAN, CORRUPT))
    np.testing.assert_allclose([denoise.baseline, denoise.target], [corrupt, clean], atol=TOLERANCE)
    np.testing.assert_allclose([noise.baseline, noise.target], [clean, corrupt], atol=TOLERANCE)
    assert "direction='denoising'" in repr(denoise)
    assert "of attn_out layer=3 pos=4)" in repr(noise)
    model = tiny()
    values = [
        mi.jit(attribute(model, difference, "mlp_out", direction=d, axes=("layer",)))(prompts(3), prompts(4))["mlp_out"]
        for d in ("denoising", "noising")
    ]
    assert np.abs(values[0] + values[1]).max() > 0.05  # on a model that is not linear they are not negatives


def test_jit_vmap_and_grad():
    scores = attribute(linear_model(), mean_metric, SITES)
    pairs = jnp.stack([CLEAN, inputs(5)]), jnp.stack([CORRUPT, inputs(6)])
    mapped = jax.vmap(scores)(*pairs)
    for i in range(2):
        eager, jitted = scores(pairs[0][i], pairs[1][i]), mi.jit(scores)(pairs[0][i], pairs[1][i])
        for site in SITES:
            np.testing.assert_allclose(mapped[site][i], eager[site], atol=TOLERANCE)
            np.testing.assert_allclose(jitted[site], eager[site], atol=TOLERANCE)
    embed = attribute(linear_model(), mean_metric, "embed")
    gradient = jax.grad(lambda clean: embed(clean, CORRUPT)["embed"].sum())(CLEAN)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: mean_metric(linear_model()(x)))(CLEAN), atol=TOLERANCE)


def test_new_values_use_the_same_program():
    traced = []

    def metric(output):
        traced.append(1)
        return mean_metric(output)

    scores = mi.jit(attribute(linear_model(), metric, SITES))
    scores(CLEAN, CORRUPT)
    before = len(traced)
    scores(inputs(7), inputs(8))
    assert len(traced) == before


def test_axes_sum_what_is_left_out_and_top_sorts():
    whole = attribute(linear_model(), mean_metric, SITES, axes=("pos", "layer", "unit"))(CLEAN, CORRUPT)
    by_layer = attribute(linear_model(), mean_metric, SITES, axes=("layer",))(CLEAN, CORRUPT)
    total = attribute(linear_model(), mean_metric, SITES, axes=())(CLEAN, CORRUPT)
    assert whole["mlp_out"].shape == (3, 4, 5)
    np.testing.assert_allclose(whole["mlp_out"].sum((1, 2)), by_layer["mlp_out"], atol=TOLERANCE)
    np.testing.assert_allclose(by_layer["mlp_out"].sum(), total["mlp_out"], atol=TOLERANCE)
    site, index, value = whole.top(3)[0]
    best = max(np.abs(whole[s]).max() for s in SITES)
    assert abs(value) == pytest.approx(float(best))
    assert whole[site][index["layer"], index["pos"], index["unit"]] == pytest.approx(value)


def test_integrated_gradients_are_complete():
    clean, corrupt = prompts(3), prompts(4)
    found = mi.jit(attribute(tiny(), difference, ("embed", "mlp_out"), method="ig", steps=128))(clean, corrupt)
    np.testing.assert_allclose(found["embed"].sum(), found.target - found.baseline, atol=2e-3)
    np.testing.assert_allclose(found.completeness_gap, 0.0, atol=2e-3)
    gradient = mi.jit(attribute(tiny(), difference, "embed"))(clean, corrupt)
    assert gradient.completeness_gap is None
    assert abs(gradient["embed"].sum() - (found.target - found.baseline)) > 0.1
    own = mi.jit(attribute(tiny(), difference, "attn.z", method="ig-activations", steps=128))(clean, corrupt)
    exact = mi.jit(attribute(tiny(), difference, "attn.z", method="exact", axes=("layer",)))(clean, corrupt)
    np.testing.assert_allclose(own["attn.z"].sum((1, 2)), exact["attn.z"], atol=2e-3)
    assert own["attn.z"].shape == (3, 5, 4)


def test_the_completeness_gap_is_what_the_embedding_misses():
    clean, corrupt = prompts(3), prompts(4)
    few = mi.jit(attribute(tiny(), difference, ("embed", "mlp_out"), method="ig", steps=1))(clean, corrupt)
    gap = few["embed"].sum() - (few.target - few.baseline)
    assert abs(gap) > 1e-2
    np.testing.assert_allclose(few.completeness_gap, gap, atol=TOLERANCE)
    assert f"completeness_gap={float(few.completeness_gap):.4g}, of embed" in repr(few)
    # it is known where the embedding is not asked for, which changes no score
    other = mi.jit(attribute(tiny(), difference, "mlp_out", method="ig", steps=1))(clean, corrupt)
    assert set(other.values) == {"mlp_out"}
    np.testing.assert_allclose(other.completeness_gap, gap, atol=TOLERANCE)
    np.testing.assert_allclose(other["mlp_out"], few["mlp_out"], atol=TOLERANCE)


def test_patching_is_the_derivative_along_the_difference():
    """Against central differences in float64."""
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: x.astype(jnp.float64), tiny())
        clean, corrupt = prompts(3), prompts(4)
        found = mi.jit(attribute(model, difference, "attn.z", axes=("head",)))(clean, corrupt)["attn.z"]
        acts = [mi.jit(mi.capture(model, "attn.z"))(x)[1]["attn.z"] for x in (clean, corrupt)]
        step = 1e-5

        @jax.jit
        def moved(head, t):
            edit = mi.add("attn.z", t * (acts[0] - acts[1]), head=head)
            return difference(mi.intervene(model, edit)(corrupt)).mean()

        for head in range(4):
            slope = (moved(head, step) - moved(head, -step)) / (2 * step)
            np.testing.assert_allclose(found[head], slope, rtol=1e-6)


def test_half_precision_keeps_the_scores():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny("gpt2"))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    found, expected = (
        mi.jit(attribute(m, difference, "attn.z", method="ig"))(prompts(3), prompts(4)) for m in (model, wide)
    )
    assert found["attn.z"].dtype == found.baseline.dtype == jnp.float32
    np.testing.assert_allclose(found["attn.z"], expected["attn.z"], atol=0.1 * np.abs(expected["attn.z"]).max())


def test_padding_changes_nothing():
    clean, corrupt = prompts(3), prompts(4)
    options = {"output_pos": jnp.array([4, 3], jnp.int32)}
    scores = mi.jit(attribute(tiny(), lambda out: out[:, 0, 3] - out[:, 0, 5], ("attn.z", "attn.k"), method="atp+qk"))
    plain = scores(clean, corrupt, mask=jnp.arange(5)[None, :] < jnp.array([[5], [4]]), **options)
    pad = jnp.full((2, 2), 7, jnp.int32)
    mask = jnp.arange(7)[None, :] < jnp.array([[5], [4]])
    padded = scores(jnp.concatenate([clean, pad], 1), jnp.concatenate([corrupt, pad + 1], 1), mask=mask, **options)
    for site in ("attn.z", "attn.k"):
        np.testing.assert_allclose(padded[site][:, :5], plain[site], atol=TOLERANCE)
        np.testing.assert_array_equal(padded[site][:, 5:], 0.0)


def test_the_check_patches_a_sample_exactly():
    scores = attribute(tiny(), difference, method="atp", check=30)
    found = mi.jit(scores)(prompts(3), prompts(4), key=jax.random.key(0))
    exact = mi.jit(attribute(tiny(), difference, method="exact"))(prompts(3), prompts(4))
    pairs = {s: np.stack([found[s].reshape(-1), exact[s].reshape(-1)], 1) for s in ("attn.z", "mlp_out")}
    known = np.concatenate([pairs["attn.z"], pairs["mlp_out"]])
    assert found.check.scores.shape == (30,)
    for pair in np.stack([found.check.scores, found.check.exact], 1):
        assert np.abs(known - pair[None]).max(1).min() < TOLERANCE
    ranks = found.check.rank_correlation
    assert ranks.ci_low <= ranks.value <= ranks.ci_high
    assert ranks.value > ranks.null
    assert found.check.sign_agreement is not None
    assert found.check.sign_agreement.value > 0.7
    assert "rank_correlation" in repr(found)


def test_agreement_measures_what_it_says(key):
    truth = jax.random.normal(key, (60,))
    perfect = agreement(jnp.sign(truth) * jnp.sqrt(jnp.abs(truth)), truth, key=key)
    np.testing.assert_allclose([perfect.rank_correlation.value, perfect.sign_agreement.value], 1.0, atol=1e-6)
    assert 0.1 < perfect.rank_correlation.null < 0.4
    noisy = agreement(truth + jax.random.normal(jax.random.key(5), (60,)), truth, key=key)
    width = noisy.rank_correlation.ci_high - noisy.rank_correlation.ci_low
    assert 0.05 < width < 0.6
    unrelated = agreement(jax.random.normal(jax.random.key(6), (60,)), truth, key=key)
    assert abs(unrelated.rank_correlation.value) < unrelated.rank_correlation.null
    magnitudes = agreement(jnp.abs(truth), truth, signed=False, key=key)
    assert magnitudes.sign_agreement is None
    np.testing.assert_allclose(magnitudes.rank_correlation.value, 1.0, atol=1e-6)


def test_intervals_and_nulls_against_an_independent_bootstrap(key):
    """The quantiles of numpy's resamples and permutations of the same nodes, with scipy's ranks."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=40)
    scores = truth + rng.normal(size=40)
    sides = jnp.asarray(scores, jnp.float32), jnp.asarray(truth, jnp.float32)
    # the mean over keys, which leaves an error of about 0.005 from the number of resamples
    found = jax.vmap(lambda k: agreement(*sides, key=k))(jax.random.split(key, 8))

    def rank_correlations(a, b):
        x, y = (scipy.stats.rankdata(v, axis=1) - 20.5 for v in (a, b))
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))

    def same_signs(a, b):
        return (np.sign(a) == np.sign(b)).mean(1)

    rows = rng.integers(0, 40, (20_000, 40))
    shuffled = rng.permuted(np.tile(scores, (20_000, 1)), axis=1)
    tiled = np.broadcast_to(truth, shuffled.shape)
    pairs = [(found.rank_correlation, rank_correlations), (found.sign_agreement, same_signs)]
    for figure, statistic in pairs:
        expected = np.quantile(statistic(scores[rows], truth[rows]), [0.025, 0.975])
        np.testing.assert_allclose([figure.ci_low.mean(), figure.ci_high.mean()], expected, atol=0.02)
        assert expected[1] - expected[0] > 0.2
        np.testing.assert_allclose(figure.null.mean(), np.quantile(statistic(shuffled, tiled), 0.975), atol=0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["scores", "exact"])
def test_agreement_with_what_is_not_a_number_is_not_a_number(key, side, value):
    sides = {"scores": jnp.arange(1.0, 41.0), "exact": jnp.arange(1.0, 41.0)}
    found = agreement(**sides | {side: sides[side].at[3].set(value)}, key=key)
    assert found.sign_agreement is not None
    assert np.isnan(jax.tree.leaves((found.rank_correlation, found.sign_agreement))).all()


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_against_scipy_with_ties(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, (2, 30)).astype(np.float32)
    expected = scipy.stats.spearmanr(a, b)[0]
    np.testing.assert_allclose(spearman(jnp.asarray(a), jnp.asarray(b)), expected, atol=1e-6)
    assert spearman(jnp.asarray(a), jnp.zeros(30)) == 0.0


def test_bad_input_is_named():
    model = linear_model()
    with pytest.raises(mi.SiteError, match=r"linear has no site 'attn.z'"):
        attribute(model, mean_metric)
    with pytest.raises(InputError, match=r"method must be one of atp, atp\+qk"):
        attribute(model, mean_metric, SITES, method="eap")
    with pytest.raises(InputError, match=r"direction must be 'denoising' or 'noising', got 'both'"):
        attribute(model, mean_metric, SITES, direction="both")
    with pytest.raises(mi.SiteError, match=r"axes are among layer, pos, head, unit; got 'batch'"):
        attribute(model, mean_metric, SITES, axes=("batch",))
    with pytest.raises(mi.SiteError, match=r"'blocks.1.hook_mlp_out' names its layer"):
        attribute(model, mean_metric, "blocks.1.hook_mlp_out")
    with pytest.raises(InputError, match=r"steps must be at least 1"):
        attribute(model, mean_metric, SITES, steps=0)
    with pytest.raises(InputError, match=r"batch_size is the number of nodes .* at least 1; got 0"):
        attribute(model, mean_metric, SITES, method="exact", batch_size=0)
    with pytest.raises(mi.SiteError, match=r"leave 'unit' out of axes"):
        attribute(tiny(), difference, "attn.q", method="atp*", axes=("unit",))
    with pytest.raises(InputError, match=r"align token by token"):
        attribute(model, mean_metric, SITES)(CLEAN, CORRUPT[:, :2])
    with pytest.raises(InputError, match=r"pass key=jax.random.key"):
        attribute(model, mean_metric, SITES, check=9)(CLEAN, CORRUPT)
    with pytest.raises(InputError, match=r"these effects are of attn_out"):
        _ = Effects({"attn_out": jnp.zeros(1)}, jnp.zeros(()), jnp.zeros(()), "noising", "exact", ())["mlp_out"]
