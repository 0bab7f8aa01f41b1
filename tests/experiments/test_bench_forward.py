"""The limits of decoding, the measure of loading, and one tiny run with a peer that is a stand-in."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.bench import forward, limit, load
from experiments.bench.forward import SCRIPT, SMOKE, ForwardBenchConfig, run_bench, subject
from experiments.bench.peer import PeerError, dependencies
from mi_jax.models.checkpoints.saving import save

# per layer and token: q and o 2·6, k and v 2·3, gate, up and down 3·5 weights for each of 3 inputs
SHAPE = dataclasses.replace(SMOKE, n_layers=2, d_model=3, n_heads=2, n_kv_heads=1, d_head=2, d_mlp=5, d_vocab=7)
WEIGHTS = 3 * (2 * 4 + 2 * 2 + 3 * 5)


def attended(keys: int) -> int:
    """Scores and weighted sums of 2 heads of 2 components, a multiplication and an addition for each."""
    return 2 * (2 * 2 * keys) * 2


def test_operations_of_a_whole_forward():
    tokens = sum(2 * WEIGHTS + attended(keys) for keys in (1, 2, 3))
    assert limit.whole_forward_flops(SHAPE, 5, 3) == 5 * (2 * tokens + 3 * 2 * 3 * 7)


def test_operations_and_bytes_of_a_step():
    assert limit.decode_step_flops(SHAPE, 5, 4) == 5 * (2 * (2 * WEIGHTS + attended(4)) + 2 * 3 * 7)
    # of 3 tokens before this one, keys and values of one head of 2 components in 2 layers
    assert limit.decode_step_bytes(SHAPE, 5, 4) == 4 * (2 * WEIGHTS + 3 * 7 + 5 * 2 * 3 * 2 * 2)


def test_the_limit_of_decoding_is_the_larger_of_both_in_every_step():
    flops = [5 * (2 * sum(2 * WEIGHTS + attended(k) for k in (1, 2, 3)) + 2 * 3 * 7)]
    flops += [limit.decode_step_flops(SHAPE, 5, keys) for keys in (4, 5)]
    read = [limit.decode_step_bytes(SHAPE, 5, keys) for keys in (1, 4, 5)]

    def seconds(matmul_rate, read_rate):
        return limit.decode_seconds(SHAPE, 5, 3, 3, matmul_rate=matmul_rate, read_rate=read_rate)

    assert seconds(10.0, 1e9) == pytest.approx(sum(flops) / 10)
    assert seconds(1e9, 10.0) == pytest.approx(sum(read) / 10)
    # rates at which the prompt is bound by operations, and the steps by reading
    balanced = flops[0] / (1.01 * read[0])
    assert flops[1] / balanced < read[1]
    assert seconds(balanced, 1.0) == pytest.approx(1.01 * read[0] + read[1] + read[2])


def test_the_rate_of_reads_is_that_of_the_machine():
    assert 1e8 < limit.read_rate(2**22, repeats=3) < 1e14


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory is resident")
def test_the_peak_is_what_was_held_at_once():
    size, before = 2**26, load.reset_peak()
    for _ in range(2):
        held = np.ones(size, np.uint8)
        del held
    grown = load.peak() - before
    assert 0.9 * size < grown < 1.5 * size
    assert load.reset_peak() < before + 0.5 * size


def test_loading_is_measured_in_a_process_of_its_own(tmp_path):
    made = subject(ForwardBenchConfig(smoke=True))
    save(made.model, tmp_path / "model")
    measured = forward._load(str(tmp_path / "model"), f"--cache={tmp_path / 'cache'}")
    assert 0 < measured["load_seconds"] < measured["first_logits_seconds"]
    assert measured["weight_bytes"] == 4 * (2 * 16 * (2 * 16 + 2 * 8 + 3 * 24) + 31 * 16 + 5 * 16)
    with pytest.raises(PeerError, match=r"load\.py failed: .*nowhere"):
        forward._load(str(tmp_path / "nowhere"))


def test_the_script_names_what_it_needs():
    assert {name.split("==")[0] for name in dependencies(SCRIPT)} >= {"torch", "transformers"}


# what stands in for the peer writes the logits and prints the tokens that it should find
STAND_IN = """#!{python}
import json, shutil, sys
arguments = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--"))
if "logits" in arguments:
    shutil.copy({logits!r}, arguments["logits"])
print(json.dumps({{"versions": {{"transformers": "0"}}, "tokens": json.load(open({tokens!r})),
                   "seconds": {{"forward": [8.0] * 3, "decode": [4.0] * 3, "load": [2.0]}}}}))
"""


def greedy(model, tokens, n_new):
    """Token by token, with a forward over everything for each."""
    for _ in range(n_new):
        tokens = jnp.concatenate([tokens, model(tokens)[:, -1:].argmax(-1).astype(jnp.int32)], 1)
    return np.array(tokens[:, -n_new:])


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_tiny_run(tmp_path, monkeypatch):
    made = subject(ForwardBenchConfig(smoke=True))
    logits = np.array(made.model(jnp.asarray(made.whole)))
    logits[1, 5, 3] += 0.5
    forward.safetensors.numpy.save_file({"logits": logits}, tmp_path / "logits")
    tokens = greedy(made.model, jnp.asarray(made.start), made.n_new)
    tokens[1, 2] += 1
    (tmp_path / "tokens").write_text(json.dumps(tokens.tolist()))
    python = tmp_path / "python"
    values = {"python": sys.executable, "logits": str(tmp_path / "logits"), "tokens": str(tmp_path / "tokens")}
    python.write_text(STAND_IN.format(**values))
    python.chmod(0o755)

    def fake_load(path, *options):
        assert (Path(path) / "model.safetensors").exists()
        cached = bool(options)
        seconds = {"load_seconds": 1.0 + cached, "first_logits_seconds": 4.0 - cached}
        return seconds | {"rss_bytes": 110 + 10 * cached, "weight_bytes": 100}

    monkeypatch.setattr(forward, "_load", fake_load)
    config = ForwardBenchConfig(smoke=True, peer_python=str(python), rounds=1)
    results = run_bench(config, str(tmp_path / "run"), console=Console(file=io.StringIO(), width=200))
    assert results["forward.difference_transformers"] == pytest.approx(0.5, abs=1e-4)
    assert results["decode.same_tokens"] == pytest.approx(7 / 8)
    for name, theirs, count in (("forward", 8.0, 16), ("decode", 4.0, 8)):
        taken = results[f"{name}.seconds"]
        assert results[f"{name}.tokens_per_second"] == pytest.approx(count / taken)
        assert results[f"{name}.transformers_tokens_per_second"] == pytest.approx(count / theirs)
        assert results[f"{name}.vs_transformers"] == pytest.approx(theirs / taken)
        assert results[f"{name}.fraction_of_limit"] == pytest.approx(results[f"limit.{name}_seconds"] / taken)
    assert results["load.seconds"] == 2.0
    assert results["load.first_logits_seconds"] == 3.0
    assert results["load.first_logits_seconds_without_cache"] == 4.0
    assert results["load.peak_rss_over_weights"] == pytest.approx(1.2)
    assert results["load.transformers_seconds"] == 2.0


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_peer_that_fails_is_left_out(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    out = io.StringIO()
    bench = forward.Bench(
        ForwardBenchConfig(smoke=True, peer_python=str(broken), rounds=1), Console(file=out, width=200)
    )
    results = bench.speed(lambda fraction, note="": None)
    assert "without transformers: transformers_forward.py failed: out of memory\n" in out.getvalue()
    assert results["forward.tokens_per_second"] > 0
    assert not any("transformers" in name for name in results)
