"""The four runs against runs put together by hand from the transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation import evaluate_spliced, task_effect
from mi_jax.decomposition.splice import Splice
from tests.decomposition.evaluation.toy import Toy, random_toy
from tests.models.tiny import prompts, tiny

MASK = np.arange(5)[None, :] < np.array([5, 4, 5])[:, None]
SITE = {"site": "resid_post", "layer": 1}


@pytest.fixture(scope="module")
def tokens():
    return prompts(0, batch=3)


def nll(logits, tokens):
    log_p = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    return -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1)[..., 0]


def test_scores_are_those_of_the_transforms(tokens):
    model, toy, mean = tiny(), random_toy(0, 8, 16), jnp.linspace(-1.0, 1.0, 8)
    got = evaluate_spliced(model, toy, tokens, MASK, mean=mean, key=jax.random.key(0), batch_size=2, **SITE)

    # position 0 keeps its activations: an edit at the other positions only
    at = {"layer": 1, "pos": (1, 2, 3, 4)}
    runs = {
        "clean": model,
        "spliced": mi.intervene(model, mi.transform("resid_post", Splice(toy, error_term=False), **at)),
        "zero_ablated": mi.intervene(model, mi.ablate("resid_post", **at)),
        "mean_ablated": mi.intervene(model, mi.patch("resid_post", mean, **at)),
    }
    counts = MASK[:, :-1] & MASK[:, 1:]
    counts[:, 0] = False
    logits = {name: run(tokens, jnp.asarray(MASK)) for name, run in runs.items()}
    ce = {name: nll(out, tokens)[counts].sum() / counts.sum() for name, out in logits.items()}
    for name, want in ce.items():
        assert getattr(got, f"ce_{name}").value == pytest.approx(want, rel=1e-4), name
    p = np.asarray(jax.nn.softmax(logits["clean"]))[:, :-1]
    kl = {}
    for name, out in logits.items():
        q = np.asarray(jax.nn.softmax(out))[:, :-1]
        kl[name] = (p * np.log(p / q)).sum(-1)[counts].sum() / counts.sum()
    assert got.kl_spliced.value == pytest.approx(kl["spliced"], rel=1e-3)
    assert got.kl_zero_ablated.value == pytest.approx(kl["zero_ablated"], rel=1e-3)
    assert got.kl_recovered_mean is not None
    assert got.kl_recovered_mean.value == pytest.approx(1 - kl["spliced"] / kl["mean_ablated"], rel=1e-3)
    assert got.ce_increase.value == pytest.approx(ce["spliced"] - ce["clean"], abs=1e-5)
    for base in ("zero", "mean"):
        share, ablated = getattr(got, f"ce_recovered_{base}"), ce[f"{base}_ablated"]
        if ablated > ce["clean"]:
            assert share.value == pytest.approx((ablated - ce["spliced"]) / (ablated - ce["clean"]), rel=1e-3)
        else:
            assert share is None
    assert (got.n_predictions, got.n_replaced) == (counts.sum(), MASK[:, 1:].sum())


def test_a_perfect_dictionary_costs_nothing(tokens):
    eye = jnp.eye(8)
    perfect = Toy(jnp.concatenate([eye, -eye]), jnp.zeros(16), jnp.concatenate([eye, -eye]), jnp.zeros(8))
    got = evaluate_spliced(tiny(), perfect, tokens, mean=jnp.zeros(8), key=jax.random.key(0), **SITE)
    assert got.kl_spliced.value == pytest.approx(0, abs=1e-5)
    assert got.kl_recovered_zero is not None
    assert got.kl_recovered_zero.value == pytest.approx(1, abs=1e-4)
    assert got.ce_increase.value == pytest.approx(0, abs=1e-4)
    # the mean is zero here
    assert got.kl_mean_ablated.value == pytest.approx(got.kl_zero_ablated.value)


def test_a_transcoder_reads_one_site_and_replaces_another(tokens):
    model, toy = tiny(), random_toy(2, 8, 16)

    def metric(logits):
        return logits[:, -1, 0]

    places = {"site": "mlp_out", "read_site": "resid_mid", "layer": 2}
    got = task_effect(model, toy, metric, tokens, mean=jnp.zeros(8), key=jax.random.key(0), **places)
    clean, acts = mi.capture(model, "resid_mid", "mlp_out")(tokens)
    value = acts["mlp_out"].at[2, :, 1:].set(toy(acts["resid_mid"][2])[:, 1:])
    spliced = mi.intervene(model, mi.patch("mlp_out", {"mlp_out": value}, layer=2))(tokens)
    ablated = mi.intervene(model, mi.ablate("mlp_out", layer=2, pos=(1, 2, 3, 4)))(tokens)
    want = {"clean": clean, "spliced": spliced, "zero_ablated": ablated, "mean_ablated": ablated}
    means = {name: float(metric(out).mean()) for name, out in want.items()}
    for name, value in means.items():
        assert getattr(got, name).value == pytest.approx(value, rel=1e-4), name
    share = (means["spliced"] - means["zero_ablated"]) / (means["clean"] - means["zero_ablated"])
    assert got.recovered_zero is not None
    assert got.recovered_zero.value == pytest.approx(share, rel=1e-3)


def test_what_cannot_be_spliced_is_named(tokens):
    options = {"mean": jnp.zeros(8), "key": jax.random.key(0)}
    with pytest.raises(mi.SiteError, match="resid_nowhere"):
        evaluate_spliced(tiny(), random_toy(0, 8, 4), tokens, site="resid_nowhere", layer=1, **options)
    with pytest.raises(InputError, match="one shape"):
        evaluate_spliced(tiny(), random_toy(0, 8, 4), tokens, MASK[:, :4], **SITE, **options)
    with pytest.raises(InputError, match="two or more prompts"):
        evaluate_spliced(tiny(), random_toy(0, 8, 4), tokens[:1], **SITE, **options)
    with pytest.raises(InputError, match="one number per prompt"):
        task_effect(tiny(), random_toy(0, 8, 4), lambda logits: logits.mean(), tokens, **SITE, **options)
