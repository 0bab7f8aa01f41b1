"""The store against a plain capture; kills, damage and repair; shuffled reading; grain."""

import collections
import json
import pickle
import shutil
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.core.errors import InputError
from mi_jax.data.activations.permutation import permute_host
from mi_jax.data.activations.store import (
    ActivationStore,
    Lost,
    StoredActivations,
    StoreError,
    StoreWarning,
    read_bandwidth,
    write_activations,
    writer,
)
from tests.models.tiny import prompts, tiny

SITES = (mi.at("resid_post", layers=(0, 2)), mi.at("attn.z", layers=1))
KEY = jax.random.key(3)
OPTIONS = {"key": KEY, "contexts_per_chunk": 4, "chunks_per_shard": 3, "special_ids": (3,), "outlier_ratio": None}


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(prompts(7, 40, 6))


@pytest.fixture(scope="module")
def acts(tokens):
    """By site, `[context pos …]`."""
    _, captured = mi.jit(mi.capture(tiny(), *SITES))(jnp.asarray(tokens), output=False)
    return {"resid_post": np.moveaxis(captured["resid_post"], 0, 2), "attn.z": np.asarray(captured["attn.z"])}


@pytest.fixture(scope="module")
def written(tokens, tmp_path_factory):
    """A whole store; copy it to do it harm."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    documents = np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)
    write_activations(path, tiny(), tokens, SITES, dtype="float32", documents=documents, **OPTIONS)
    return path


@pytest.fixture
def harmed(written, tmp_path):
    return shutil.copytree(written, tmp_path / "harmed")


def rewrite(path, tokens, **changes):
    documents = np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)
    options = {"dtype": "float32", "documents": documents, "tokens": tokens, "sites": SITES, "model": tiny()}
    options |= OPTIONS | changes
    write_activations(path, **options)


def flip(path, at=100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_rows_are_the_models_with_their_origin(written, tokens, acts):
    store = ActivationStore.open(written, model="llama-like", sites=SITES)
    rows = store.rows(np.arange(len(store)))
    context, position = rows["context"], rows["position"]
    usable = (tokens != 3) & (np.arange(6) > 0)[None, :]
    assert sorted(zip(context, position, strict=True)) == sorted(map(tuple, np.argwhere(usable)))
    np.testing.assert_array_equal(rows["token"], tokens[context, position])
    np.testing.assert_array_equal(rows["document"], context * 6 + position)
    for site in store.sites:
        np.testing.assert_allclose(rows[site], acts[site][context, position], atol=1e-5)
    # whole contexts in an order of their own
    assert len(store.shards) == 4
    assert (np.diff(context) < 0).any()
    assert store.verify() == ()


def test_random_rows(written):
    store = ActivationStore.open(written)
    everything = store.rows(np.arange(len(store)))
    chosen = np.random.default_rng(0).integers(0, len(store), 50)
    some = store.rows(chosen, sites=["attn.z"])
    assert set(some) == {"attn.z", "context", "position", "token", "document"}
    np.testing.assert_array_equal(some["attn.z"], everything["attn.z"][chosen])
    np.testing.assert_array_equal(store[-1]["resid_post"], everything["resid_post"][-1])
    with pytest.raises(IndexError, match=f"row {len(store)} of a store of {len(store)} rows"):
        store[len(store)]
    with pytest.raises(InputError, match="rows 0 to 1000 of"):
        store.rows(np.array([0, 1000]))
    with pytest.raises(InputError, match=r"no site 'mlp_out'; it has .*resid_post"):
        store.rows(np.array([0]), sites=["mlp_out"])


def test_shuffled_pieces_are_all_rows_once_in_an_order_of_the_key(written):
    store = ActivationStore.open(written)
    everything = store.rows(np.arange(len(store)))
    orders = []
    for key in jax.random.split(KEY, 2):
        parts = [jax.tree.map(np.copy, piece) for piece in store.shuffled_pieces(key=key, piece_bytes=1500)]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((rows["position"], rows["context"]))
        reference = np.lexsort((everything["position"], everything["context"]))
        for name, values in everything.items():
            np.testing.assert_array_equal(rows[name][order], values[reference])
        orders.append(rows["document"].tolist())
    assert orders[0] != orders[1]


def test_shuffled_batches_serve_every_row_once_an_epoch_and_can_be_found_again(written, acts):
    store = ActivationStore.open(written)
    batches = StoredActivations(store, batch_size=8, buffer_size=64, key=KEY, piece_bytes=1500)
    assert batches.n_rows == len(store)
    n = batches.steps_per_epoch
    taken = jax.device_get(batches.take(2 * n))
    for epoch in range(2):
        part = jax.tree.map(lambda x, e=epoch: x[e * n : (e + 1) * n], taken)
        seen = collections.Counter(zip(part.context[part.valid], part.position[part.valid], strict=True))
        assert len(seen) == len(store)
        assert set(seen.values()) == {1}
    for site, values in taken.values.items():
        np.testing.assert_allclose(values, acts[site][taken.context, taken.position], atol=1e-5)
    again = StoredActivations(store, batch_size=8, buffer_size=64, key=KEY, piece_bytes=1500)
    part = jax.device_get(again.take(4, start=n - 2))
    jax.tree.map(np.testing.assert_array_equal, part, jax.tree.map(lambda x: x[n - 2 : n + 2], taken))
    with pytest.raises(InputError, match=f"{len(store)} usable activations, fewer than the buffer_size of 4096"):
        StoredActivations(store, batch_size=8, buffer_size=4096, key=KEY)
    with pytest.raises(InputError, match="no site 'mlp_out'"):
        StoredActivations(store, batch_size=8, buffer_size=64, key=KEY, sites=["mlp_out"])


def test_types_of_two_bytes_are_rounded_once(tokens, acts, tmp_path):
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        write_activations(tmp_path / dtype, tiny(), tokens, SITES[1], dtype=dtype, **OPTIONS)
        store = ActivationStore.open(tmp_path / dtype)
        rows = store.rows(np.arange(len(store)))
        assert rows["attn.z"].dtype == kind
        exact = acts["attn.z"][rows["context"], rows["position"]]
        np.testing.assert_allclose(rows["attn.z"].astype(np.float32), exact, rtol=2.0**-8, atol=1e-5)
        batch = StoredActivations(store, batch_size=8, buffer_size=64, key=KEY).at(2)
        exact = acts["attn.z"][np.asarray(batch.context), np.asarray(batch.position)]
        np.testing.assert_allclose(batch.values["attn.z"].astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-5)


def test_outliers_of_the_first_shards_median_are_dropped_and_counted(tokens, acts, tmp_path):
    ratio = 1.3
    rewrite(tmp_path / "s", tokens, outlier_ratio=ratio)
    store = ActivationStore.open(tmp_path / "s")
    usable = (tokens != 3) & (np.arange(6) > 0)[None, :]
    norms = {
        "resid_post": np.linalg.norm(acts["resid_post"], axis=-1),
        "attn.z": np.linalg.norm(acts["attn.z"].reshape(40, 6, 1, -1), axis=-1),
    }
    visited = permute_host(np.arange(40), 40, key=KEY)
    first = np.zeros((40, 1), bool)
    first[visited[:12]] = True
    keep = usable.copy()
    for values in norms.values():
        keep &= (values <= ratio * np.median(values[usable & first], axis=0)[None, None, :]).all(-1)
    rows = store.rows(np.arange(len(store)))
    assert sorted(zip(rows["context"], rows["position"], strict=True)) == sorted(map(tuple, np.argwhere(keep)))
    assert store.description["n_outliers"] == usable.sum() - keep.sum() > 0


def test_a_killed_writer_goes_on_with_the_shards_it_has(tokens, written, tmp_path, monkeypatch):
    path, done = tmp_path / "s", []

    def stop(fraction):
        done.append(fraction)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(path, tokens, progress=stop)
    with pytest.raises(StoreError, match="not finished: 2 shards are there; call write_activations again"):
        ActivationStore.open(path)
    # half a shard, as a kill leaves it
    (path / ".shard-00002.partial").mkdir()
    computed = []
    original = writer._computed
    monkeypatch.setattr(writer, "_computed", lambda *args: computed.append(1) or original(*args))
    rewrite(path, tokens)
    assert len(computed) == 2
    assert not (path / ".shard-00002.partial").exists()
    first, second = (ActivationStore.open(p) for p in (path, written))
    everything = np.arange(len(second))
    jax.tree.map(np.testing.assert_array_equal, first.rows(everything), second.rows(everything))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda shard: flip(shard / "attn.z.bin"), "attn.z.bin does not have its checksum"),
        (lambda shard: (shard / "resid_post.bin").unlink(), "resid_post.bin is missing"),
        (lambda shard: (shard / "origin.bin").write_bytes(b"1234"), "origin.bin has 4 bytes instead of"),
        (shutil.rmtree, "the shard is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_the_others_stay(harmed, tokens, written, harm, reason):
    whole = ActivationStore.open(written)
    harm(harmed / "shard-00001")
    n = whole.shards[1].n_rows
    with pytest.raises(StoreError, match=rf"lost {n} of {len(whole)} rows: shard-00001 \({n} rows: {reason}"):
        ActivationStore.open(harmed)
    with pytest.warns(StoreWarning, match=rf"lost {n} of {len(whole)} rows: shard-00001"):
        store = ActivationStore.open(harmed, missing="skip")
    assert [(lost.shard, lost.n_rows) for lost in store.lost] == [("shard-00001", n)]
    assert len(store) == len(whole) - n
    ends = np.cumsum([shard.n_rows for shard in whole.shards])
    kept = np.concatenate([np.arange(ends[0]), np.arange(ends[1], ends[3])])
    jax.tree.map(np.testing.assert_array_equal, store.rows(np.arange(len(store))), whole.rows(kept))
    batches = StoredActivations(store, batch_size=8, buffer_size=64, key=KEY, piece_bytes=1500)
    assert batches.take(batches.steps_per_epoch).valid.sum() == len(store)
    # the same call again repairs it
    rewrite(harmed, tokens)
    assert len(ActivationStore.open(harmed)) == len(whole)


def test_without_checksums_damage_is_found_by_verify(harmed):
    store = ActivationStore.open(harmed)
    flip(harmed / "shard-00002" / "origin.bin", 3)
    assert ActivationStore.open(harmed, checksums=False).verify() == (
        Lost("shard-00002", store.shards[2].n_rows, "origin.bin does not have its checksum"),
    )
    assert store.verify() == ActivationStore.open(harmed, checksums=False).verify()


def test_all_shards_lost(harmed):
    for shard in harmed.glob("shard-*"):
        shutil.rmtree(shard)
    with pytest.raises(StoreError, match="has lost"):
        ActivationStore.open(harmed, missing="skip")


def test_a_store_of_something_else_is_refused(written, tokens, tmp_path):
    for asked, message in (
        ({"model": "gpt2"}, "holds activations of llama-like, not of gpt2"),
        ({"sites": ["mlp_out"]}, "holds resid_post, attn.z, not mlp_out"),
        ({"sites": [mi.at("attn.z", layers=2)]}, "holds attn.z of layer 1, not of layer 2"),
        ({"width": 8}, "holds attn.z of width 6, not 8"),
    ):
        with pytest.raises(StoreError, match=message):
            ActivationStore.open(written, **asked)
    for change, message in (
        ({"sites": "mlp_out"}, "holds activations with sites"),
        ({"dtype": "bfloat16"}, "holds activations with columns"),
        ({"tokens": tokens[:-1], "documents": None}, "holds activations with corpus"),
        ({"model": tiny("gpt2"), "sites": SITES[0]}, "holds activations with model llama-like, these have gpt2-like"),
    ):
        with pytest.raises(StoreError, match=message):
            rewrite(written, **({"tokens": tokens} | change))
    with pytest.raises(StoreError, match="is no store of activations"):
        ActivationStore.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(StoreError, match="is not empty and holds no store"):
        rewrite(tmp_path, tokens)


def test_a_damaged_index_is_named(harmed):
    (harmed / "index.json").write_text("{")
    with pytest.raises(StoreError, match=r"index.json is not valid JSON"):
        ActivationStore.open(harmed)
    (harmed / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(StoreError, match="not of the format 'mi_jax activations 1'"):
        ActivationStore.open(harmed)


def test_bad_input_to_the_writer(tokens, tmp_path):
    broken = eqx.tree_at(lambda m: m.embed, tiny(), tiny().embed.at[12].set(jnp.inf))
    text = np.where(tokens == 12, 0, tokens)
    text[17, 3] = 12
    for change, message in (
        ({"dtype": "int8"}, "dtype='int8'; a store holds float32, float16 or bfloat16"),
        ({"outlier_ratio": 0.9}, "outlier_ratio=0.9"),
        ({"chunks_per_shard": 0}, "chunks_per_shard=0"),
        ({"special_ids": tuple(range(13))}, "no usable activation"),
        ({"documents": np.zeros((1, 6), np.int32)}, "documents have shape"),
        ({"model": broken, "tokens": text}, "context 17 .* not finite"),
    ):
        with pytest.raises(InputError, match=message):
            rewrite(tmp_path / "s", **({"tokens": tokens} | change))


def test_grain_reads_a_store(written):
    grain = pytest.importorskip("grain")
    store = ActivationStore.open(written)
    assert len(pickle.loads(pickle.dumps(store))) == len(store)
    data = grain.MapDataset.source(store).shuffle(seed=1)
    seen = [int(data[i]["document"]) for i in range(len(data))]
    assert sorted(seen) == sorted(store.rows(np.arange(len(store)))["document"].tolist())
    batch = data.batch(5)[2]
    np.testing.assert_array_equal(batch["document"], seen[10:15])
    assert batch["resid_post"].shape == (5, 2, 8)


def test_bandwidth_is_measured_over_all_bytes(written):
    store = ActivationStore.open(written)
    n_bytes, before = len(store) * store.row_bytes, time.perf_counter()
    figures = read_bandwidth(store, key=KEY, repeats=1)
    seconds = time.perf_counter() - before
    assert n_bytes / figures.store + n_bytes / figures.plain < seconds
    assert figures.fraction == pytest.approx(figures.store / figures.plain)
