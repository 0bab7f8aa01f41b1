"""Stored tensors into shards: names in both directions, placement, memory, and what is checked before reading."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.core.sharding import make_mesh
from mi_jax.models import DecoderConfig, init_decoder
from mi_jax.models.checkpoints import loading, native
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.checkpoints.loading import all_finite, assemble
from mi_jax.models.checkpoints.names import Stored, axis_sizes, ours_to_stored, stored_to_ours
from mi_jax.models.checkpoints.plan import entries_by_path
from mi_jax.models.checkpoints.rows import Rows, local_rows, read_part
from mi_jax.models.checkpoints.saving import save
from tests.models.tiny import tiny

# every axis that is sharded divides by eight
_WIDE = DecoderConfig(
    name="wide", n_layers=2, d_model=16, n_heads=8, n_kv_heads=8, d_head=4, d_mlp=24, d_vocab=32, n_ctx=8, tied=False
)
_SIZES = {"head": 4, "kv_head": 2, "d_head": 6, "half": 3, "two": 2, "three": 3, "d_mlp": 5}


class Memory:
    """A checkpoint in memory that counts what is read."""

    path = "memory"

    def __init__(self, tensors):
        self.tensors, self.reads, self.rows = tensors, [], 0

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, start=0, stop=None):
        self.reads.append(name)
        rows = self.tensors[name][start:stop]
        self.rows += len(rows)
        return rows


def _memory(model) -> Memory:
    tensors = {}
    for entry in native.names(model.config):
        leaf = model
        for field in entry.path.split("."):
            leaf = getattr(leaf, field)
        for index, name in entry.each(axis_sizes(model.config)):
            tensors[name] = np.asarray(leaf)[index]
    return Memory(tensors)


def _equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    return jax.tree.all(same)


_X = np.arange(72 * 7, dtype=np.float32).reshape(72, 7)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        # one head after the other, d_model last
        (
            [Stored("q", "x", "(head d_head) d_model -> d_model head d_head")],
            [lambda x: np.stack([x[h * 18 : h * 18 + 18].T for h in range(4)], 1)],
        ),
        # GPT-NeoX: query, key and value of a head side by side
        (
            [
                Stored(p, "x", "(head three d_head) d_model -> three d_model head d_head", pick=i)
                for i, p in enumerate("qkv")
            ],
            [lambda x, i=i: np.stack([x[h * 18 + i * 6 :][:6].T for h in range(4)], 1) for i in range(3)],
        ),
        # Phi-3: all queries, then all keys, then all values
        (
            [
                Stored("q", "x", "(head d_head) d_model -> d_model head d_head", part=(0, 0, 36)),
                Stored("k", "x", "(kv_head d_head) d_model -> d_model kv_head d_head", part=(0, 36, 54)),
                Stored("v", "x", "(kv_head d_head) d_model -> d_model kv_head d_head", part=(0, 54, 72)),
            ],
            [
                lambda x, b=b, n=n: np.stack([x[b + h * 9 : b + h * 9 + 9].T for h in range(n)], 1)
                for b, n in ((0, 4), (36, 2), (54, 2))
            ],
        ),
        # GPT-2: parts of the second axis
        (
            [Stored(p, "x", "a b -> a b", part=(1, start, stop)) for p, start, stop in (("u", 0, 3), ("w", 3, 7))],
            [lambda x: x[:, :3], lambda x: x[:, 3:]],
        ),
        # llama GGUF: the pairs of a rotation side by side, the decoder's in two halves
        (
            [Stored("q", "x", "(head half two) d_model -> d_model head (two half)")],
            [
                lambda x: np.stack(
                    [
                        np.concatenate([x[h * 18 : h * 18 + 18][0::2], x[h * 18 : h * 18 + 18][1::2]]).T
                        for h in range(4)
                    ],
                    1,
                )
            ],
        ),
    ],
    ids=["plain", "neox", "phi3", "gpt2", "gguf"],
)
def test_an_entry_reads_and_writes_the_same_tensor(entries, expected):
    sizes = _SIZES | {"d_head": 18, "half": 9}
    if entries[0].pick is not None:
        sizes |= {"d_head": 6}
    if entries[0].part == (0, 0, 36):
        sizes |= {"d_head": 9}
    ours = [stored_to_ours(_X, entry, sizes) for entry in entries]
    for x, want in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(x, want(_X))
    back = ours_to_stored(list(zip(entries, ours, strict=True))[::-1], sizes)
    np.testing.assert_array_equal(back, _X)


def test_entries_that_leave_something_out_or_overlap_are_errors():
    def part(start, stop):
        return Stored("p", "x", "a b -> a b", part=(0, start, stop)), np.ones((stop - start, 2))

    whole = Stored("p", "x", "a b -> a b"), np.ones((2, 2))
    for parts in (
        [part(1, 3)],
        [part(0, 2), part(3, 4)],
        [part(0, 2), part(1, 4)],
        [whole, part(0, 1)],
        [whole, whole],
    ):
        with pytest.raises(ValueError, match="'x'"):
            ours_to_stored(parts, {})
    slices = [(Stored("p", "x", "(two b) -> two b", pick=pick), np.ones(3)) for pick in (0, 2)]
    with pytest.raises(ValueError, match=r"the slices of 'x' are \[0, 2\]"):
        ours_to_stored(slices, {"two": 2})
    with pytest.raises(ValueError, match=r"differ in \['b'\]"):
        entries_by_path([Stored("a", "x", "c -> c")], ["a", "b"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "attention-only"])
def test_a_decoder_is_assembled_bit_for_bit_with_every_tensor_read_once(name):
    model = tiny(name)
    source = _memory(model)
    again = assemble(source, model.config, native.names(model.config))
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert _equal(again, model)
    assert sorted(source.reads) == sorted(source.names())
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(again)} == {1}


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"model": 8}, {"data": 2, "fsdp": 2, "model": 2}], ids=str)
def test_every_device_holds_its_share(axes, key):
    model = init_decoder(_WIDE, key=key)
    sharded = assemble(_memory(model), _WIDE, native.names(_WIDE), mesh=make_mesh(**axes))
    assert _equal(sharded, model)
    per_device = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(sharded):
        for shard in leaf.addressable_shards:
            per_device[shard.device] += shard.data.nbytes
    norms = sum(
        leaf.nbytes for leaf in jax.tree.leaves((model.blocks.attn_norm, model.blocks.mlp_norm, model.final_norm))
    )
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - norms
    # a norm has no axis for the tensor-parallel mesh; everything else is divided by all of it
    fsdp, n = axes.get("fsdp", 1), axes.get("fsdp", 1) * axes.get("model", 1)
    assert set(per_device.values()) == {others / n + norms / fsdp}
    assert others / n + norms / fsdp < 1.1 * (others + norms) / n


def test_tensors_stored_together_are_read_once_and_split():
    config = dataclasses.replace(tiny().config, n_kv_heads=4)
    model = init_decoder(config, key=jax.random.key(3))
    source, names = _memory(model), {entry.path: entry for entry in native.names(config)}
    for i, which in enumerate("qkv"):
        pattern = "(head three d_head) d_model -> three d_model head d_head"
        names[f"blocks.attn.{which}"] = Stored(f"blocks.attn.{which}", "qkv.{layer}", pattern, pick=i)
    for layer in range(config.n_layers):
        parts = [(names[f"blocks.attn.{w}"], source.tensors.pop(f"blocks.{layer}.attn.{w}")) for w in "qkv"]
        source.tensors[f"qkv.{layer}"] = ours_to_stored(parts, axis_sizes(config))
    assert _equal(assemble(source, config, tuple(names.values())), model)
    assert sorted(source.reads) == sorted(source.names())


def test_the_number_of_programs_does_not_grow_with_the_layers(key):
    compiled = []

    def listen(event, *_, **__):
        compiled[-1] += event == "/jax/core/compile/backend_compile_duration"

    sources = []
    for n_layers in (2, 5):
        config = dataclasses.replace(_WIDE, d_model=40, d_mlp=48, n_layers=n_layers)
        sources.append((_memory(init_decoder(config, key=key)), config))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for source, config in sources:
            compiled.append(0)
            assemble(source, config, native.names(config))
        compiled.append(0)
        assemble(source, config, native.names(config))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # one makes all stacked arrays; one writes into those of a shape: norms, queries, outputs, up and down
    assert compiled == [6, 6, 0]


def test_types_are_kept_cast_or_refused(key):
    model = init_decoder(_WIDE, key=key)
    source = _memory(model)
    names = native.names(_WIDE)
    for name in list(source.tensors):
        kind = jnp.float16 if name.startswith("blocks.1") else jnp.bfloat16
        source.tensors[name] = source.tensors[name].astype(kind)
    kept = assemble(source, _WIDE, names)
    # layers of two types take the one that holds both
    assert (kept.embed.dtype, kept.blocks.attn.q.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(kept.blocks.attn.q[0], source.tensors["blocks.0.attn.q"].astype(np.float32))
    cast = assemble(source, _WIDE, names, dtype=jnp.float16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(cast.embed, source.tensors["embed"].astype(np.float16))
    with pytest.raises(CheckpointError, match="is float16, the configuration says bfloat16; say dtype="):
        assemble(source, _WIDE, names, declared=jnp.bfloat16)
    for wrong in (jnp.int8, jnp.float8_e4m3fn, "bf16"):
        with pytest.raises(InputError, match=r"cannot be of parameters; give jnp\.float32"):
            assemble(source, _WIDE, names, dtype=wrong)
    assert assemble(source, _WIDE, names, declared=jnp.bfloat16, dtype=jnp.float32).embed.dtype == jnp.float32
    source.tensors["embed"] = source.tensors["embed"].astype(np.float64)
    with pytest.raises(CheckpointError, match="would be float64, which jax has only with jax_enable_x64"):
        assemble(source, _WIDE, names)
    assert assemble(source, _WIDE, names, dtype=jnp.float32).embed.dtype == jnp.float32
    source.tensors["embed"] = source.tensors["embed"].astype(np.int8)
    with pytest.raises(CheckpointError, match="stored as int8, a quantized or integer type"):
        assemble(source, _WIDE, names, dtype=jnp.float32)


def test_names_and_shapes_are_checked_before_anything_is_read():
    model = tiny()
    names = native.names(model.config)
    for change, message in [
        (lambda t: t.pop("blocks.1.attn.q"), r"missing tensors 'blocks\.1\.attn\.q'; the configuration"),
        (lambda t: [t.pop(n) for n in list(t) if "blocks.1" in n or "mlp" in n], r", … \(\d+ in all\)"),
        (lambda t: t.update(extra=np.ones(2)), "no place for tensors 'extra'"),
        (lambda t: (t.pop("embed"), t.update(wte=np.ones(2))), "missing tensors 'embed'; no place for tensors 'wte'"),
        (lambda t: t.update(embed=t["embed"].T), r"'embed' has shape \[8, 13\], the configuration says \[13, 8\]"),
        (
            lambda t: t.update({"blocks.2.mlp.up": np.ones((8, 11))}),
            r"'blocks\.2\.mlp\.up' has shape \[8, 11\], the configuration says \[8, 10\]",
        ),
    ]:
        source = _memory(model)
        change(source.tensors)
        with pytest.raises(CheckpointError, match=message):
            assemble(source, model.config, names)
        assert source.reads == []
    source = _memory(model)
    source.tensors |= {"rotary.0.inv_freq": np.ones(2), "rotary.11.inv_freq": np.ones(2)}
    assert _equal(assemble(source, model.config, names, ignored=(r"rotary\.\d+\.inv_freq",)), model)
    with pytest.raises(CheckpointError, match=r"no place for tensors 'rotary\.11\.inv_freq'"):
        assemble(source, model.config, names, ignored=(r"rotary\.\d\.inv_freq",))


def test_more_layers_than_any_file_has_are_refused_at_once():
    model = tiny()
    config = dataclasses.replace(model.config, n_layers=10**9)
    with pytest.raises(CheckpointError, match="missing tensors"):
        assemble(_memory(model), config, native.names(config))


@pytest.mark.parametrize("kind", [np.float32, np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_is_found_wherever_it_is(kind, bad, monkeypatch):
    monkeypatch.setattr(loading, "_CHUNK", 5)
    x = np.asarray([jnp.finfo(kind).max, jnp.finfo(kind).min, 0, -0.0, *range(7)], kind)
    assert all_finite(x)
    assert all_finite(x[:0])
    for i in range(len(x)):
        y = x.copy()
        y[i] = bad
        assert not all_finite(y)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = tiny()
    for name in ("embed", "blocks.2.mlp.down"):
        source = _memory(model)
        source.tensors[name] = source.tensors[name].copy()
        source.tensors[name].flat[-1] = np.nan
        with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN or infinity.*allow_nan=True"):
            assemble(source, model.config, native.names(model.config))
        kept = assemble(source, model.config, native.names(model.config), allow_nan=True)
        assert sum(int(jnp.isnan(leaf).sum()) for leaf in jax.tree.leaves(kept)) == 1


def test_a_process_reads_only_the_rows_of_its_shards():
    x = np.arange(8 * 6 * 3.0).reshape(48, 3)
    source = Memory({"x": x})
    all_, heads = slice(None), slice(2, 6)
    entry = Stored("q", "x", "(head d_head) d_model -> d_model head d_head")
    rows = local_rows(entry, (3, 8, 6), [(all_, slice(2, 4), all_), (all_, slice(4, 6), all_)])
    assert rows == Rows("head", 1, 8, 2, 6)
    part = read_part(source, "x", entry, rows)
    assert source.rows == 4 * 6
    whole = stored_to_ours(x, entry, {"head": 8, "d_head": 6})
    ours = stored_to_ours(part, entry, rows.sizes({"head": 8, "d_head": 6}))
    np.testing.assert_array_equal(ours, whole[:, heads])
    index = (all_, slice(4, 6), all_)
    np.testing.assert_array_equal(ours[rows.within(index)], whole[index])
    # of a part, rows count from where it begins
    half = dataclasses.replace(entry, part=(0, 24, 48))
    rows = local_rows(half, (3, 4, 6), [(all_, slice(1, 2), all_)])
    np.testing.assert_array_equal(read_part(source, "x", half, rows), x[30:36])
    # all of it where the process holds everything, or where the sharded axis is not the one that rows begin with
    assert local_rows(entry, (3, 8, 6), [(all_, slice(0, 4), all_), (all_, slice(4, 8), all_)]) is None
    assert local_rows(entry, (3, 8, 6), [(slice(0, 1), all_, all_)]) is None
    assert local_rows(Stored("q", "x", "(half two) d -> d (two half)"), (3, 48), [(all_, slice(0, 4))]) is None


_MEASURE = """
import json, sys
import jax, jax.numpy as jnp
from mi_jax.models.checkpoints.huggingface import load

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

load(sys.argv[1])  # compiles, and touches what every run touches
before = status("VmRSS")
model = jax.block_until_ready(load(sys.argv[2]))
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
print(json.dumps({"peak": status("VmHWM") - before, "weights": weights}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from /proc")
def test_the_peak_of_memory_is_the_weights_and_about_a_tensor(tmp_path, key):
    config = dataclasses.replace(_WIDE, n_layers=12, d_model=512, n_heads=8, d_head=64, d_mlp=2048, d_vocab=12_000)
    save(tiny(), tmp_path / "tiny")
    save(init_decoder(config, key=key), tmp_path / "wide")
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "tiny"), str(tmp_path / "wide")]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=os.getcwd()).stdout
    figures = json.loads(out)
    # 250 MB of weights, of which the largest tensor is a tenth; the compiler takes some 30 MB
    assert figures["peak"] <= 1.3 * figures["weights"], figures


def test_a_sharded_checkpoint_is_loaded_onto_a_mesh(tmp_path, key):
    model = init_decoder(_WIDE, key=key)
    save(model, tmp_path / "wide", max_shard_bytes=20_000)
    assert len(list((tmp_path / "wide").glob("model-*.safetensors"))) > 1
    sharded = load(tmp_path / "wide", mesh=make_mesh(fsdp=2, model=4))
    assert _equal(sharded, model)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(sharded)} == {8}
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(sharded, tokens), model(tokens), atol=1e-5)
