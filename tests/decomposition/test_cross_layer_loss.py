"""The loss of cross-layer transcoders against its equations in numpy, its gradients against dense autodiff."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition import Objective
from mi_jax.decomposition.cross_layer_config import CrossLayerConfig, check_cross_layer, init_cross_layer
from mi_jax.decomposition.cross_layer_loss import SPREAD, bounded, choose, cross_layer_loss
from mi_jax.decomposition.objective import Coefficients
from tests.decomposition import oracle

TOLERANCE = 1e-10
LAYERS, D_IN, D_OUT, D_SAE, K, TOKENS, LAMBDA = 3, 5, 4, 32, 2, 6, 0.3
DEAD = np.arange(LAYERS * D_SAE).reshape(LAYERS, D_SAE) % 5 == 0
AUX = {"aux_coefficient": 0.5, "k_aux": 2, "aux_candidates": 4}
TYINGS = ("none", "per_source", "per_target")


def setting(activation, tying="none", *, scaled=False, **fields):
    """Every number drawn, in double precision; and what goes in and is to come out."""
    config = CrossLayerConfig(D_IN, D_SAE, LAYERS, activation, k=K, d_out=D_OUT, tying=tying, **fields)
    rng = np.random.default_rng(0)

    def noisy(leaf):
        return jnp.asarray(np.asarray(leaf, np.float64) + 0.3 * rng.normal(size=leaf.shape))

    transcoder = jax.tree.map(noisy, init_cross_layer(config, key=jax.random.key(0)))
    if activation == "jumprelu":
        thresholds = jnp.asarray(0.4 + 0.3 * rng.uniform(size=(LAYERS, D_SAE)))
        transcoder = eqx.tree_at(lambda t: t.activation.threshold, transcoder, thresholds)
    if scaled:
        scale = tuple(jnp.asarray(rng.uniform(0.5, 2, (D_SAE, LAYERS - i))) for i in range(LAYERS))
        transcoder = eqx.tree_at(lambda t: t.scale, transcoder, scale, is_leaf=lambda leaf: leaf is None)
    x, y = (jnp.asarray(rng.normal(size=(TOKENS, LAYERS, d))) for d in (D_IN, D_OUT))
    return config, transcoder, x, y


def writes(p, i, t):
    """W(i → t) from the parameters by name."""
    if p["tying"] == "none":
        return p["w_dec"][i][:, t - i]
    w = p["w_dec"][i if p["tying"] == "per_source" else t][:, 0]
    return w if p["scale"] is None else w * p["scale"][i][:, t - i, None]


def expected(activation, transcoder, x, y, objective):
    """The loss, and where there are codes, with loops over layers and no function of the package."""
    p = {name: jax.tree.map(np.asarray, getattr(transcoder, name)) for name in ("w_dec", "scale", "b_dec", "w_skip")}
    p["tying"] = transcoder.tying
    x, y, layers = np.asarray(x), np.asarray(y), range(LAYERS)
    threshold = np.asarray(getattr(transcoder.activation, "threshold", np.zeros(LAYERS)))
    h = [x[:, i] @ np.asarray(transcoder.w_enc[i]).T + np.asarray(transcoder.b_enc[i]) for i in layers]
    if activation == "batchtopk":
        z = list(oracle.keep_largest_of_batch(np.stack(h), K * TOKENS * LAYERS))
    else:
        own = {"relu": oracle.relu, "topk": lambda a: oracle.relu(oracle.keep_largest(a, K))}
        own |= {"jumprelu": lambda a: a}
        z = [own[activation](a) for a in h]
        if activation == "jumprelu":
            z = [np.where(a > t, a, 0.0) for a, t in zip(h, threshold, strict=True)]
    skip = [0.0 if p["w_skip"] is None else x[:, t] @ p["w_skip"][t] for t in layers]
    made = [sum(z[i] @ writes(p, i, t) for i in range(t + 1)) + p["b_dec"][t] + skip[t] for t in layers]
    error = y - np.stack(made, 1)
    total = (error**2).sum((1, 2)).mean()
    norms = [np.sqrt(sum((writes(p, i, t) ** 2).sum(1) for t in range(i, LAYERS))) for i in layers]
    for i in layers:
        weighted = z[i] * norms[i]
        penalty = {"none": 0 * weighted, "l1": weighted, "tanh": np.tanh(objective.c * weighted)}
        penalty["l0"] = 1.0 * (h[i] > threshold[i])
        total += LAMBDA * penalty[objective.penalty].sum(1).mean()
        part = DEAD[i] & (np.cumsum(DEAD[i]) <= AUX["aux_candidates"])
        if objective.auxiliary == "preactivation":
            total += AUX["aux_coefficient"] * (oracle.relu(threshold[i] - h[i]) * norms[i])[:, part].sum(1).mean()
        if objective.auxiliary == "auxk":
            guess = oracle.relu(oracle.keep_largest(np.where(part, h[i], -1e9), AUX["k_aux"]))
            written = np.stack([guess @ writes(p, i, t) for t in range(i, LAYERS)], 1)
            later = error[:, i:] - oracle.best_scale(error[:, i:], written) * written
            total += AUX["aux_coefficient"] * (later**2).sum((1, 2)).mean()
    return np.stack(z), total


@eqx.filter_jit
def value_and_grad(transcoder, x, y, objective, chosen):
    def of(transcoder):
        coefficients = Coefficients(jnp.asarray(LAMBDA), jnp.asarray(1.0))
        return cross_layer_loss(transcoder, x, y, jnp.asarray(DEAD), objective, coefficients, chosen)

    return eqx.filter_value_and_grad(of, has_aux=True)(transcoder)


places = eqx.filter_jit(choose)


def equal(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE * (1 + float(jnp.abs(other).max())))


CASES = [
    ("relu", "none", {}, "tanh", "preactivation"),
    ("relu", "per_source", {"max_active": 24, "scaled": True}, "l1", "auxk"),
    ("jumprelu", "none", {"max_active": 24}, "tanh", "preactivation"),
    ("jumprelu", "per_target", {"skip": True}, "l0", "preactivation"),
    ("topk", "none", {"skip": True}, "none", "auxk"),
    ("topk", "per_source", {}, "l1", "none"),
    ("topk", "per_target", {"scaled": True}, "none", "auxk"),
    ("batchtopk", "none", {}, "none", "auxk"),
    ("batchtopk", "per_source", {"scaled": True}, "l1", "none"),
    ("batchtopk", "per_target", {}, "none", "none"),
]


@pytest.mark.parametrize(("activation", "tying", "fields", "penalty", "auxiliary"), CASES)
def test_the_loss_is_its_equation_and_sparse_gradients_are_dense_autodiff(
    activation, tying, fields, penalty, auxiliary
):
    with jax.enable_x64(True):
        objective = Objective(penalty=penalty, auxiliary=auxiliary, **AUX)
        config, transcoder, x, y = setting(activation, tying, **fields)
        check_cross_layer(config, objective)
        z, want = expected(activation, transcoder, x, y, objective)
        (total, parts), dense = value_and_grad(transcoder, x, y, objective, None)
        np.testing.assert_allclose(total, want, rtol=TOLERANCE)
        np.testing.assert_array_equal(parts.fired, (z != 0).sum(1))
        np.testing.assert_allclose(parts.smallest, z[z > 0].min(), rtol=TOLERANCE)
        chosen = places(transcoder, x)
        if "max_active" not in fields and activation in ("relu", "jumprelu"):
            assert chosen is None
            return
        assert chosen is not None
        assert bool(chosen.fits)
        (same, found), sparse = value_and_grad(transcoder, x, y, objective, chosen)
        np.testing.assert_allclose(same, total, rtol=TOLERANCE)
        np.testing.assert_array_equal(found.fired, parts.fired)
        equal(sparse, dense)


@pytest.mark.parametrize("tying", TYINGS)
def test_dense_gradients_are_finite_differences(tying):
    with jax.enable_x64(True):
        objective = Objective(penalty="tanh", auxiliary="preactivation", **AUX)
        _, transcoder, x, y = setting("relu", tying, skip=True)
        rng = np.random.default_rng(5)
        step = jax.tree.map(lambda leaf: jnp.asarray(1e-6 * rng.normal(size=leaf.shape)), transcoder)
        _, grads = value_and_grad(transcoder, x, y, objective, None)
        ahead, behind = (
            value_and_grad(jax.tree.map(lambda a, s: a + sign * s, transcoder, step), x, y, objective, None)[0][0]  # noqa: B023
            for sign in (1, -1)
        )
        along = sum(float((g * s).sum()) for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True))
        np.testing.assert_allclose((ahead - behind) / 2, along, rtol=1e-5)


@pytest.mark.slow
def test_a_tied_transcoder_is_its_untied_one():
    with jax.enable_x64(True):
        objective = Objective(penalty="l1", auxiliary="auxk", **AUX)
        for tying in TYINGS[1:]:
            _, transcoder, x, y = setting("topk", tying, scaled=True)
            untied = transcoder.untied()
            one, other = (value_and_grad(t, x, y, objective, places(t, x)) for t in (transcoder, untied))
            np.testing.assert_allclose(one[0][0], other[0][0], rtol=TOLERANCE)
            equal(one[1].w_enc, other[1].w_enc)
            # the gradient of a shared matrix is the sum over the pairs of layers that share it
            pairs = [
                (i, t) for i in range(LAYERS) for t in range(i, LAYERS) if (i if tying == "per_source" else t) == 1
            ]
            shared = sum(other[1].w_dec[i][:, t - i] * transcoder.scale[i][:, t - i, None] for i, t in pairs)
            equal(one[1].w_dec[1][:, 0], shared)


def test_places_that_run_out_are_noticed():
    with jax.enable_x64(True):
        x = setting("batchtopk")[2]
        n_layers = SPREAD + 1
        crowded = init_cross_layer(CrossLayerConfig(D_IN, D_SAE, n_layers, "batchtopk", k=K), key=jax.random.key(0))
        x = jnp.concatenate([x, x], 1)[:, :n_layers]
        assert bounded(crowded)
        assert bool(places(crowded, x).fits)
        # all codes of the batch in one layer
        crowded = eqx.tree_at(lambda t: t.b_enc, crowded, crowded.b_enc.at[1].set(100.0))
        assert not bool(places(crowded, x).fits)
        _, one, x, _ = setting("relu", max_active=1)
        assert not bool(places(one, x).fits)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_no_array_of_tokens_and_latents_waits_for_the_backward_pass(activation):
    with jax.enable_x64(True):
        _, transcoder, x, y = setting(activation)
        chosen = places(transcoder, x)

        def kept(chosen):
            """Whether the backward pass gets an array with an axis of tokens and one of latents."""

            def of(transcoder):
                numbers = Coefficients(jnp.asarray(LAMBDA), jnp.asarray(1.0))
                return cross_layer_loss(transcoder, x, y, jnp.asarray(DEAD), Objective(), numbers, chosen)[0]

            back = jax.eval_shape(lambda t: jax.vjp(of, t)[1], transcoder)
            return any({TOKENS, D_SAE} <= set(leaf.shape) for leaf in jax.tree.leaves(back))

        assert not kept(chosen)
        assert kept(None)


def test_what_does_not_combine_is_refused():
    def check(activation="topk", **objective):
        check_cross_layer(CrossLayerConfig(D_IN, D_SAE, LAYERS, activation, k=K), Objective(k_aux=2, **objective))

    with pytest.raises(InputError, match="topk does not combine with penalty='tanh'; it does with none, l1"):
        check(penalty="tanh")
    with pytest.raises(InputError, match="does not combine with penalty='lp'"):
        check("relu", penalty="lp")
    with pytest.raises(InputError, match="does not combine with reconstruction='hierarchical'"):
        check(reconstruction="hierarchical")
    with pytest.raises(InputError, match="trained with relu, jumprelu, topk, batchtopk, not 'gated'"):
        check("gated")
    with pytest.raises(InputError, match="k=64 must be at most d_sae=32"):
        CrossLayerConfig(D_IN, D_SAE, LAYERS, k=64)
    with pytest.raises(InputError, match="n_layers must be at least 1"):
        CrossLayerConfig(D_IN, D_SAE, 0)
