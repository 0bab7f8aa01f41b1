"""The stream against a plain capture of the whole corpus: every activation once an epoch, batch t from t alone."""

import collections
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.core.sharding import make_mesh
from mi_jax.core.sites import SiteError
from mi_jax.data.activations.schedule import Segment
from mi_jax.data.activations.source import _check_tokens
from mi_jax.data.activations.stream import ActivationStream
from mi_jax.data.activations.usable import usable_tokens
from tests.models.tiny import prompts, tiny

N_CONTEXTS, LENGTH, SPECIAL = 37, 7, 3
SITES = (mi.at("resid_post", layers=(0, 1)), mi.at("attn.z", layers=1))
SIZES = {"batch_size": 6, "buffer_size": 60, "contexts_per_chunk": 4}


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(prompts(3, N_CONTEXTS, LENGTH))


@pytest.fixture(scope="module")
def mask():
    padding = np.ones((N_CONTEXTS, LENGTH), bool)
    padding[::5, 4:] = False
    return padding


@pytest.fixture(scope="module")
def acts(tokens, mask):
    """By site, `[context pos …]`."""
    _, captured = mi.jit(mi.capture(tiny(), *SITES))(jnp.asarray(tokens), mask=jnp.asarray(mask), output=False)
    return {"resid_post": np.moveaxis(captured["resid_post"], 0, 2), "attn.z": np.asarray(captured["attn.z"])}


@pytest.fixture(scope="module")
def stream(tokens, mask):
    key = jax.random.key(5)
    return ActivationStream(tiny(), tokens, SITES, key=key, mask=mask, special_ids=(SPECIAL,), **SIZES)


@pytest.fixture(scope="module")
def two_epochs(stream):
    return jax.device_get(stream.take(2 * stream.steps_per_epoch))


def origins(batch):
    return list(zip(batch.context[batch.valid].tolist(), batch.position[batch.valid].tolist(), strict=True))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_every_usable_activation_once_an_epoch_in_another_order(stream, two_epochs, tokens, mask):
    usable = mask & (tokens != SPECIAL) & (np.arange(LENGTH) > 0)[None, :]
    wanted = {(int(c), int(p)) for c, p in np.argwhere(usable)}
    n = stream.steps_per_epoch
    epochs = [origins(jax.tree.map(lambda x, e=e: x[e * n : (e + 1) * n], two_epochs)) for e in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(wanted) == stream.n_rows
        assert set(epoch) == wanted
    assert epochs[0] != epochs[1]
    # only the last batch of an epoch is not full
    full = two_epochs.valid.reshape(2, n, -1).all(2)
    assert full[:, :-1].all()
    assert not full[:, -1].any()


def test_values_are_those_of_the_model(two_epochs, acts):
    for site, values in two_epochs.values.items():
        np.testing.assert_allclose(values, acts[site][two_epochs.context, two_epochs.position], atol=1e-5)


def test_seeking_gives_the_same_bits(stream, two_epochs, tokens, mask):
    # the start, the middle of a window, around the end of an epoch
    for start in (1, 8, stream.steps_per_epoch - 2, stream.steps_per_epoch):
        part = list(itertools.islice(stream.batches(start), 5))
        for t, batch in enumerate(part):
            assert_same(jax.device_get(batch), jax.tree.map(lambda x, t=start + t: x[t], two_epochs))
    again = ActivationStream(tiny(), tokens, SITES, key=jax.random.key(5), mask=mask, special_ids=(SPECIAL,), **SIZES)
    assert_same(jax.device_get(again.at(17)), jax.tree.map(lambda x: x[17], two_epochs))


def test_a_seek_fills_no_more_than_one_buffer(stream, tokens, mask, monkeypatch):
    started = []
    start = stream.source.start
    monkeypatch.setattr(stream.source, "start", lambda units: started.append(len(units)) or start(units))
    stream.at(20)
    # of the first and the last chunk a part may belong to neighbouring blocks
    rows_per_context = stream.n_rows / N_CONTEXTS
    assert sum(started) * rows_per_context <= stream.buffer_size + 2 * 4 * LENGTH


def test_windows_serve_a_training_program_without_recompiling_or_host_transfers(stream, two_epochs):
    @jax.jit
    def many_steps(window, first, n):
        def body(t, total):
            batch = window(t)
            return total + jnp.where(batch.valid[:, None, None], batch.values["resid_post"], 0).sum((0, 1))

        return jax.lax.fori_loop(first, first + n, body, jnp.zeros(8))

    list(stream.batches(0, 1))
    total = 0.0
    with jax.transfer_guard("disallow"):
        for steps, window in stream.windows(0, 30):
            first, n = jax.device_put((np.int32(steps.start), np.int32(len(steps))))
            total = total + jax.device_get(many_steps(window, first, n))
    assert many_steps._cache_size() == 1
    expected = np.where(two_epochs.valid[..., None, None], two_epochs.values["resid_post"], 0)[:30].sum((0, 1, 2))
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)


def test_the_next_forward_is_dispatched_before_a_window_is_used(stream, monkeypatch):
    started = []
    start = stream.source.start
    monkeypatch.setattr(stream.source, "start", lambda units: started.append(units) or start(units))
    windows = stream.windows()
    next(windows)
    before = len(started)
    next(windows)
    needed = list(itertools.takewhile(lambda item: not isinstance(item, Segment), stream._work(0, None)))
    assert before == len(needed) + 1
    # nothing is computed twice, chunks that straddle two blocks included
    assert len({tuple(units.tolist()) for units in started}) == len(started)


def test_rows_mix_over_the_whole_buffer():
    """A row's step is spread over one buffer around its place in the visit, as evenly as the design says."""
    tokens = np.tile(np.arange(9, dtype=np.int32)[None, :], (400, 1))
    stream = ActivationStream(
        tiny(), tokens, mi.at("resid_post", layers=0), batch_size=8, buffer_size=512, key=jax.random.key(0)
    )
    epoch = jax.tree.map(lambda *x: np.stack(x), *stream.batches(0, stream.steps_per_epoch))
    order = stream._visit(0).order
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    visited = place[epoch.context] * 8 + epoch.position - 1
    served = np.arange(epoch.valid.size).reshape(epoch.valid.shape)
    moved = (served - visited)[epoch.valid]
    half = stream.buffer_size // 2
    assert np.abs(moved).max() < stream.buffer_size
    # the second of the two permutations alone moves by 256 · 6^-1/2 in root mean square
    assert np.sqrt((moved**2.0).mean()) > half / 6**0.5
    # a batch comes from many contexts: 8 rows of 512 activations in 64 contexts
    different = np.mean([len(set(batch.tolist())) for batch in epoch.context])
    assert different > 7.2


def test_bfloat16_buffer_and_a_mesh(tokens, acts, two_epochs, mask):
    stream = ActivationStream(
        tiny(),
        tokens,
        SITES,
        key=jax.random.key(5),
        mask=mask,
        special_ids=(SPECIAL,),
        dtype=jnp.bfloat16,
        mesh=make_mesh(data=2),
        **SIZES,
    )
    for t, batch in enumerate(stream.batches(3, 15)):
        assert batch.values["attn.z"].dtype == jnp.bfloat16
        assert batch.values["attn.z"].sharding.spec[0] == "data"
        context, position = np.asarray(batch.context), np.asarray(batch.position)
        assert_same(context, two_epochs.context[3 + t])
        for site, values in jax.device_get(batch.values).items():
            np.testing.assert_allclose(values.astype(np.float32), acts[site][context, position], rtol=2**-7, atol=1e-5)


def test_outliers_have_no_weight(tokens):
    _, captured = mi.jit(mi.capture(tiny(), SITES[0]))(jnp.asarray(tokens), output=False)
    norms = np.linalg.norm(np.moveaxis(captured["resid_post"], 0, 2), axis=-1)[:, 1:]
    ratio = 1.2
    stream = ActivationStream(tiny(), tokens, SITES[0], outlier_ratio=ratio, key=jax.random.key(5), **SIZES)
    epoch = jax.tree.map(lambda *x: np.concatenate(x), *stream.batches(0, stream.steps_per_epoch))
    valid = collections.Counter(origins(epoch))
    assert 0 < len(valid) < stream.n_rows
    assert set(valid.values()) == {1}
    # the median is that of the chunk, in the order of the visit
    order = stream._visit(0).order
    for chunk in (0, 5, 8):
        contexts = order[4 * chunk : 4 * chunk + 4]
        of_chunk = norms[contexts]
        kept = (of_chunk <= ratio * np.median(of_chunk, axis=(0, 1), keepdims=True)).all(2)
        expected = {(int(c), p + 1) for c, row in zip(contexts, kept, strict=True) for p in np.flatnonzero(row)}
        assert {origin for origin in valid if origin[0] in contexts} == expected


def test_activations_that_are_not_finite_name_their_context(tokens):
    model = eqx.tree_at(lambda m: m.embed, tiny(), tiny().embed.at[12].set(jnp.nan))
    text = np.where(tokens == 12, 0, tokens)
    text[23, 2] = 12
    stream = ActivationStream(model, text, SITES[0], key=jax.random.key(0), **SIZES)
    with pytest.raises(InputError, match=r"context 23 \(resid_post of llama-like\) are not finite"):
        list(stream.batches(0, stream.steps_per_epoch))
    # an activation that is not used may be anything
    stream = ActivationStream(model, text, "embed", key=jax.random.key(0), special_ids=(12,), **SIZES)
    batches = list(stream.batches(0, stream.steps_per_epoch))
    assert all(jnp.isfinite(batch.values["embed"]).all() for batch in batches)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": np.zeros((0, 7), np.int32)}, InputError, "the corpus is empty"),
        (
            {"tokens": np.full((9, 7), 13)},
            InputError,
            r"context 0 has a token outside the vocabulary of llama-like \(0–12",
        ),
        ({"special_ids": range(13)}, InputError, "no usable activation"),
        ({"buffer_size": 1000}, InputError, "usable activations, fewer than the buffer_size of 1000"),
        ({"sites": "attn.pattern"}, SiteError, "no value per token"),
        ({"sites": "resid_pots"}, SiteError, "no site 'resid_pots'"),
        ({"sites": ()}, SiteError, "name at least one site"),
        ({"skip_positions": -1}, InputError, "skip_positions=-1"),
        ({"outlier_ratio": 0.5}, InputError, "outlier_ratio=0.5"),
        ({"contexts_per_chunk": 0}, InputError, "contexts_per_chunk=0"),
    ],
)
def test_bad_input(tokens, change, error, message):
    given = {"tokens": tokens, "sites": SITES} | SIZES | change
    with pytest.raises(error, match=message):
        ActivationStream(tiny(), given.pop("tokens"), given.pop("sites"), key=jax.random.key(0), **given)


def test_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"integers \[context pos\]; got int32 of shape \(7,\)"):
        _check_tokens(tiny().site_table, np.zeros(7, np.int32), 4, None)
    with pytest.raises(InputError, match=r"the mask has shape \(2, 7\), the tokens \(3, 7\)"):
        usable_tokens(np.zeros((3, 7), np.int32), mask=np.ones((2, 7), bool))


def test_steps_before_the_first_are_refused(stream):
    with pytest.raises(InputError, match="start=-1"):
        stream.windows(-1)
    with pytest.raises(InputError, match="n=0"):
        stream.take(0)
