"""Cross-layer transcoders against their equations, with every tying of the decoders."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder

L, D, F, OUT, K = 3, 4, 7, 5, 2
TIES = ("none", "per_source", "per_target")


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def make(tying="none", activation=None, scaled=False, skip=False):
    r = draw()
    widths = [L - i if tying == "none" else 1 for i in range(L)]
    return CrossLayerTranscoder(
        w_enc=r(L, F, D),
        b_enc=r(L, F),
        w_dec=tuple(r(F, n, OUT) for n in widths),
        b_dec=r(L, OUT),
        activation=ReLU() if activation is None else activation,
        w_skip=r(L, D, OUT) if skip else None,
        scale=tuple(r(F, L - i) for i in range(L)) if scaled else None,
        tying=tying,
    )


def decoder(model, source, target):
    """W(source → target) in float64, by the definition of the tying."""
    w = [np.asarray(w, np.float64) for w in model.w_dec]
    if model.tying == "none":
        return w[source][:, target - source]
    tied = w[source if model.tying == "per_source" else target][:, 0]
    return tied if model.scale is None else tied * np.asarray(model.scale[source])[:, target - source][:, None]


def oracle(model, x, keep):
    x, w, b = np.asarray(x, np.float64), np.asarray(model.w_enc, np.float64), np.asarray(model.b_enc, np.float64)
    codes = np.stack([keep(x[..., i, :] @ w[i].T + b[i], i) for i in range(L)], -2)
    out = [
        sum(codes[..., i, :] @ decoder(model, i, t) for i in range(t + 1)) + np.asarray(model.b_dec[t])
        for t in range(L)
    ]
    if model.w_skip is not None:
        out = [y + x[..., t, :] @ np.asarray(model.w_skip[t]) for t, y in enumerate(out)]
    return codes, np.stack(out, -2)


@pytest.mark.parametrize(
    ("tying", "scaled"), [("none", False), ("per_source", False), ("per_source", True), ("per_target", True)]
)
def test_outputs_are_sums_over_the_layers_up_to_their_own(tying, scaled):
    model = make(tying, scaled=scaled, skip=True)
    x = draw(1)(2, 6, L, D)
    codes, out = oracle(model, x, lambda h, i: np.maximum(h, 0.0))
    np.testing.assert_allclose(model.encode(x), codes, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model(x), out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(eqx.filter_jit(model)(x), out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.untied()(x), out, rtol=1e-5, atol=1e-5)
    norms = [np.sqrt(sum((decoder(model, i, t) ** 2).sum(1) for t in range(i, L))) for i in range(L)]
    np.testing.assert_allclose(model.decoder_norms(), norms, rtol=1e-5)
    for source in range(L):
        for target in range(source, L):
            np.testing.assert_allclose(model.weights(source, target), decoder(model, source, target), rtol=1e-6)


def top(h, k):
    out = np.zeros_like(h)
    for row, kept in zip(h.reshape(-1, F), out.reshape(-1, F), strict=True):
        places = np.argsort(row)[::-1][:k]
        kept[places] = np.maximum(row[places], 0)
    return out


def test_activations_have_parameters_for_each_layer():
    r, x = draw(2), draw(3)(8, L, D)
    theta, r_mag, b_mag = jnp.abs(r(L, F)), r(L, F), r(L, F)
    jumps = make(activation=eqx.filter_vmap(JumpReLU)(theta))
    codes, out = oracle(jumps, x, lambda h, i: np.where(h > np.asarray(theta[i]), h, 0.0))
    np.testing.assert_allclose(jumps.encode(x), codes, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jumps(x), out, rtol=1e-5, atol=1e-5)

    gated = make(activation=eqx.filter_vmap(Gated)(r_mag, b_mag))

    def gate(h, i):
        magnitude = (h - np.asarray(gated.b_enc[i])) * np.exp(np.asarray(r_mag[i])) + np.asarray(b_mag[i])
        return np.where(h > 0, np.maximum(magnitude, 0.0), 0.0)

    np.testing.assert_allclose(gated.encode(x), oracle(gated, x, gate)[0], rtol=1e-5, atol=1e-5)

    topk = make(activation=TopK(K))
    np.testing.assert_allclose(topk.encode(x), oracle(topk, x, lambda h, i: top(h, K))[0], rtol=1e-5, atol=1e-5)

    bounds = jnp.array([0.1, 0.5, 1.0])
    batch = make(activation=eqx.filter_vmap(lambda t: BatchTopK(t, K))(bounds))
    expected = oracle(batch, x, lambda h, i: np.where(h > float(bounds[i]), np.maximum(h, 0), 0.0))[0]
    np.testing.assert_allclose(batch.encode(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tying", TIES)
def test_an_output_depends_on_no_later_layer(tying):
    model = make(tying)
    x = draw(4)(1, L, D)
    jacobian = np.abs(jax.jacobian(lambda x: model(x)[0])(x)[:, :, 0]).sum((1, 3))
    assert (jacobian[np.triu_indices(L, 1)] == 0).all()
    assert (jacobian[np.tril_indices(L)] > 0).all()


def test_shapes_that_do_not_fit_are_named():
    model = make()
    with pytest.raises(InputError, match=r"\[\.\.\., layer=3, d_in=4\], got \(2, 2, 4\)"):
        model.encode(jnp.zeros((2, 2, D)))
    with pytest.raises(InputError, match="no decoder from layer 2 to 1"):
        model.weights(2, 1)
    with pytest.raises(InputError, match=r"tied 'none', has decoders to \[3, 2, 1\] targets, got \[1, 1, 1\]"):
        CrossLayerTranscoder(model.w_enc, model.b_enc, make("per_source").w_dec, model.b_dec, ReLU())
    with pytest.raises(InputError, match="a scale belongs to tied decoders"):
        CrossLayerTranscoder(
            model.w_enc, model.b_enc, model.w_dec, model.b_dec, ReLU(), scale=make("per_source", scaled=True).scale
        )
