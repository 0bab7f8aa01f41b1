"""End-to-end training: the loss against whole runs of the model, its gradient, and what it buys in predictions."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.core.sites import SiteError
from mi_jax.decomposition import Dictionary, DictionaryConfig, Objective, TrainConfig, architecture, fit, init
from mi_jax.decomposition.activations import ReLU
from mi_jax.decomposition.evaluation import evaluate_spliced
from mi_jax.decomposition.objective import Coefficients
from mi_jax.decomposition.training.continuation import Continuation
from mi_jax.decomposition.training.end_to_end import InModel, fit_end_to_end
from mi_jax.decomposition.training.end_to_end_loss import EndToEnd, end_to_end_loss
from tests.models.tiny import prompts, tiny

D, D_SAE, N_POS, LAYER = 8, 16, 7, 0
SCALE, LAMBDA = 1.7, 0.3
TOKENS = prompts(3, batch=4, n_pos=N_POS)
# the last tokens of two contexts are padding
MASK = jnp.arange(N_POS)[None, :] < jnp.array([N_POS, N_POS, 5, 4])[:, None]
RELU = DictionaryConfig(D, D_SAE, "relu")
ALL_TERMS = EndToEnd(Objective(penalty="l1"), kl=1.0, downstream=0.5, local=0.1)


def in_model(model, site="resid_post", later=(), limit=np.inf, scale=SCALE):
    rest = Continuation(model, site, LAYER, later)
    scale = jnp.asarray(scale)
    return InModel(rest, TOKENS, MASK, jnp.arange(4), scale, scale, jnp.asarray(limit), site, 4, 1)


@eqx.filter_jit
def measured(dictionary, source, objective):
    """The loss and its parts on all contexts."""
    clean = source.clean(jnp.int32(0))
    coefficients = Coefficients(jnp.asarray(LAMBDA), jnp.asarray(1.0))
    dead = jnp.zeros(dictionary.d_sae, bool)
    return end_to_end_loss(dictionary, clean, source.rest, source.scale_y, dead, objective, coefficients)


def identity():
    rows = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    return Dictionary(rows, jnp.zeros(2 * D), rows, jnp.zeros(D), ReLU())


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_an_identity_costs_exactly_nothing(site):
    source = in_model(tiny(), site)
    objective = dataclasses.replace(ALL_TERMS, downstream=0.0)
    assert float(measured(identity(), source, objective)[1].kl) == 0.0
    # and one that is off does cost
    other = eqx.tree_at(lambda d: d.w_dec, identity(), 1.1 * identity().w_dec)
    assert float(measured(other, source, objective)[1].kl) > 1e-4


def test_a_decoder_goes_on_as_its_whole_run_does():
    later = (1, 2)
    value = jax.random.normal(jax.random.key(0), (4, N_POS, D))
    for site, layer in (("resid_post", LAYER), ("resid_pre", LAYER), ("resid_post", 2)):
        want, acts = mi.capture(mi.intervene(tiny(), mi.patch(site, value, layer=layer)), mi.at("resid_post", later))(
            TOKENS, MASK
        )
        wanted = later if layer == LAYER else ()
        logits, streams = Continuation(tiny(), site, layer, wanted)(value, TOKENS, MASK)
        np.testing.assert_allclose(logits[MASK], want[MASK], atol=1e-5)
        if wanted:
            np.testing.assert_allclose(streams[:, MASK], acts["resid_post"][:, MASK], atol=1e-5)


def numpy_kl(clean, spliced):
    p, q = (np.asarray(a, np.float64) for a in (clean, spliced))
    p, q = (
        a - np.log(np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True)) - a.max(-1, keepdims=True)
        for a in (p, q)
    )
    return (np.exp(p) * (p - q)).sum(-1)


def test_the_loss_is_its_equation_and_leaves_other_tokens_alone():
    dictionary = init(RELU, key=jax.random.key(1))
    model, later = tiny(), (1, 2)
    clean, acts = mi.capture(model, "resid_post")(TOKENS, MASK)
    norms = np.linalg.norm(acts["resid_post"][LAYER], axis=-1)
    # one token of the first context is massive
    limit = float(np.sort(norms[MASK])[-2:].mean())
    massive = norms > limit
    used = np.asarray(MASK) & (np.arange(N_POS) > 0)[None, :] & ~massive
    assert (massive & np.asarray(MASK)).sum() == 1
    stream = acts["resid_post"][LAYER]
    spliced_in = jnp.where(used[..., None], dictionary(stream * SCALE) / SCALE, stream)
    spliced, after = mi.capture(mi.intervene(model, mi.patch("resid_post", spliced_in, layer=LAYER)), "resid_post")(
        TOKENS, MASK
    )
    counts = np.asarray(MASK) & (np.cumsum(used, 1) > 0)
    kl = numpy_kl(clean, spliced)[counts].mean()
    unexplained = []
    for number in later:
        a, b = (np.asarray(x["resid_post"][number], np.float64)[used] for x in (acts, after))
        unexplained.append(((b - a) ** 2).sum() / ((a - a.mean(0)) ** 2).sum())
    _, parts = measured(dictionary, in_model(model, later=later, limit=limit), ALL_TERMS)
    np.testing.assert_allclose(parts.kl, kl, rtol=1e-4)
    np.testing.assert_allclose(parts.downstream, np.mean(unexplained), rtol=1e-4)
    # tokens that stay as they are have no weight
    codes = np.asarray(dictionary.encode(stream * SCALE))[used]
    penalty = (codes * np.linalg.norm(dictionary.w_dec, axis=1)).sum(1).mean()
    np.testing.assert_allclose(parts.penalty, penalty, rtol=1e-4)
    total, parts = measured(dictionary, in_model(model, later=later, limit=limit), ALL_TERMS)
    want = parts.kl + 0.5 * parts.downstream + 0.1 * parts.reconstruction + LAMBDA * parts.penalty
    np.testing.assert_allclose(total, want, rtol=1e-6)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_gradients_are_finite_differences(site):
    with jax.enable_x64(True):
        model, dictionary = (
            jax.tree.map(lambda a: a.astype(jnp.float64), m) for m in (tiny(), init(RELU, key=jax.random.key(1)))
        )
        source = in_model(model, site, later=(1, 2))
        step = jax.tree.map(
            lambda a: jnp.asarray(1e-6 * np.random.default_rng(a.size).normal(size=a.shape)), dictionary
        )

        @eqx.filter_jit
        def value_and_grad(dictionary):
            return eqx.filter_value_and_grad(lambda d: measured(d, source, ALL_TERMS)[0])(dictionary)

        _, grads = value_and_grad(dictionary)
        ahead, behind = (
            value_and_grad(jax.tree.map(lambda a, s: a + sign * s, dictionary, step))[0]  # noqa: B023
            for sign in (1, -1)
        )
        along = sum(float((g * s).sum()) for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True))
        np.testing.assert_allclose((ahead - behind) / 2, along, rtol=1e-5)


K, DEEP = 2, 1
TRAIN = TrainConfig(
    steps=300, batch_size=16, learning_rate=1e-2, warmup_steps=10, steps_per_call=50, massive_ratio=None
)
CONFIG, AUXK = architecture("topk", D, 12, k=K, objective={"k_aux": 4})
CONTEXTS = prompts(5, batch=128, n_pos=10)
HELD_OUT = prompts(6, batch=64, n_pos=10)


def subject():
    """A model whose predictions read 3 of the 8 dimensions of its last stream."""
    model = tiny("gpt2")
    return eqx.tree_at(lambda m: m.unembed, model, model.unembed.at[:, 3:].set(0.0))


@pytest.fixture(scope="module")
def trained():
    """A dictionary that was trained for reconstruction, and one that was trained end to end."""
    stream = mi.capture(subject(), mi.at("resid_post", layers=DEEP))(CONTEXTS, output=False)[1]["resid_post"]
    rows = stream[:, 1:].reshape(-1, D)
    local, _ = fit(rows, CONFIG, AUXK, dataclasses.replace(TRAIN, batch_size=16 * 9), key=jax.random.key(0))
    saved = []

    def save(state, metrics):
        saved.append((jax.tree.map(jnp.copy, state), metrics))

    where = {"site": "resid_post", "layer": DEEP, "key": jax.random.key(0)}
    ours, history = fit_end_to_end(subject(), CONTEXTS, CONFIG, EndToEnd(AUXK), TRAIN, progress=save, **where)
    return rows, local, ours, history, saved, where


def spliced_kl(dictionary):
    scores = evaluate_spliced(
        subject(), dictionary, HELD_OUT, site="resid_post", layer=DEEP, mean=jnp.zeros(D), key=jax.random.key(1)
    )
    return scores.kl_spliced.value


def test_predictions_keep_more_than_with_a_dictionary_trained_for_reconstruction(trained):
    rows, local, ours, history, _, _ = trained
    kl = [row["kl"] for row in history]
    assert kl[-1] < 0.5 * kl[0]
    assert history[-1]["l0"] <= K
    null = init(CONFIG, key=jax.random.key(9), mean=rows.mean(0))
    found = {name: spliced_kl(d) for name, d in (("ours", ours), ("local", local), ("null", null))}
    assert found["ours"] < 0.6 * found["local"] < 0.6 * found["null"]
    # and pay for it in reconstruction, at the same number of codes
    assert float(((rows - ours(rows)) ** 2).sum()) > float(((rows - local(rows)) ** 2).sum())
    assert ours.k == local.k == K


@pytest.mark.slow
def test_goes_on_from_a_dictionary_that_was_trained_for_reconstruction(trained):
    _, local, _, history, _, where = trained
    short = dataclasses.replace(TRAIN, steps=50, steps_per_call=1, learning_rate=1e-3, warmup_steps=5)
    tuned, curve = fit_end_to_end(subject(), CONTEXTS, CONFIG, EndToEnd(AUXK), short, start=local, **where)
    assert curve[0]["kl"] == pytest.approx(spliced_kl(local), rel=0.3)
    assert curve[0]["kl"] < 0.5 * history[0]["kl"]
    assert spliced_kl(tuned) < spliced_kl(local)


def test_resumes_to_the_same_numbers(trained):
    _, _, ours, history, saved, where = trained
    resumed, rest = fit_end_to_end(subject(), CONTEXTS, CONFIG, EndToEnd(AUXK), TRAIN, state=saved[-2][0], **where)
    assert rest == history[-1:]
    jax.tree.map(np.testing.assert_array_equal, resumed, ours)


@pytest.mark.slow
def test_a_transcoder_learns_what_an_mlp_writes():
    config, objective = architecture("topk", D, 32, k=6, transcoder=True, objective={"k_aux": 8})
    train = dataclasses.replace(TRAIN, steps=100)
    where = {"site": "mlp_out", "read_site": "resid_mid", "layer": 1, "key": jax.random.key(0)}
    aim = EndToEnd(objective, kl=1.0, downstream=1.0, local=0.05)
    _, history = fit_end_to_end(tiny(), CONTEXTS, config, aim, train, **where)
    assert history[-1]["kl"] < 0.5 * history[0]["kl"]
    assert history[-1]["downstream"] < 0.7 * history[0]["downstream"]
    assert history[-1]["fvu"] < history[0]["fvu"]


def test_faults_are_named():
    def fit_with(config=CONFIG, objective=None, train=TRAIN, tokens=CONTEXTS, **where):
        aim = EndToEnd(AUXK) if objective is None else objective
        places = {"site": "resid_post", "layer": LAYER, "key": jax.random.key(0)} | where
        fit_end_to_end(tiny(), tokens, config, aim, train, **places)

    with pytest.raises(InputError, match="8 contexts do not fill one batch of batch_size=16 contexts"):
        fit_with(tokens=CONTEXTS[:8])
    with pytest.raises(InputError, match=r"\(8,\) numbers per token, the config says 9"):
        fit_with(config=dataclasses.replace(CONFIG, d_in=9))
    with pytest.raises(SiteError, match="exists in every layer; say which with layer="):
        fit_with(layer=None)
    with pytest.raises(SiteError, match=r"has 3 layers \(0–2\); got layer=7"):
        fit_with(layer=7)
    with pytest.raises(SiteError, match=r"layers=\(0,\) are to come after layer=0"):
        fit_with(objective=EndToEnd(AUXK, downstream=1.0, layers=(0,)))
    with pytest.raises(InputError, match="layer 2 is the last: no later stream"):
        fit_with(layer=2, objective=EndToEnd(AUXK, downstream=1.0))
    with pytest.raises(InputError, match="a transcoder needs a read_site other than its site"):
        fit_with(read_site="resid_mid")
    with pytest.raises(InputError, match="the mask leaves no token"):
        fit_with(mask=jnp.zeros(CONTEXTS.shape, bool))
    with pytest.raises(InputError, match="start has"):
        fit_with(start=init(RELU, key=jax.random.key(0)))
    start = init(CONFIG, key=jax.random.key(0))
    with pytest.raises(InputError, match="have not norm 1; train with decoder='free'"):
        fit_with(start=eqx.tree_at(lambda d: d.w_dec, start, 2 * start.w_dec))
    with pytest.raises(InputError, match="there is one reconstruction"):
        EndToEnd(Objective("hierarchical"))
    with pytest.raises(InputError, match="of which one is over 0"):
        EndToEnd(AUXK, kl=0.0)
