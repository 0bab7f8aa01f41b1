"""The limit of a training step, what its memory is measured by, and one tiny run with a peer that is a stand-in."""

import io
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from experiments.bench import sae_step, step_limit
from experiments.bench.peer import dependencies
from experiments.bench.sae_setting import SMOKE, Shape, Training, activations, configured
from experiments.bench.sae_step import SCRIPT, Bench, SaeStepBenchConfig, run_bench
from mi_jax.decomposition import init


def training(name: str, **options) -> Training:
    batches = activations(SMOKE, 2, key=jax.random.key(0))
    return Training(name, SMOKE, batches, key=jax.random.key(1), **options)


def test_operations_and_bytes_of_a_step():
    # 5 tokens times 3 latents of 2 inputs, a multiplication and an addition each
    assert step_limit.encoder_flops(2, 3, 5) == 2 * 5 * 3 * 2
    # 4 numbers read and 3 written per parameter
    assert step_limit.optimiser_bytes(6) == 7 * 6 * 4


def test_the_limit_takes_the_faster_optimiser():
    def seconds(adam):
        return step_limit.step_seconds(2, 3, 5, matmul_rate=10.0, write_rate=100.0, adam=adam)

    traffic = 7 * (2 * 3 + 3 * 2) * 4 / 100
    assert seconds(2 * traffic) == pytest.approx(6 + traffic)
    assert seconds(0.5 * traffic) == pytest.approx(6 + 0.5 * traffic)


def test_the_update_that_is_timed_is_adam():
    params, first, second, grads = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    second = second**2
    moved = step_limit.adam(*(jnp.array(a) for a in (params, first, second, grads)))
    first = 0.9 * first + 0.1 * grads
    second = 0.999 * second + 0.001 * grads**2
    expected = (params - 3e-4 * first / (np.sqrt(second) + 1e-8), first, second)
    for ours, theirs in zip(moved, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_rates_are_those_of_the_machine():
    assert 1e7 < step_limit.write_rate(64, 512, repeats=3) < 1e14
    assert 1e-7 < step_limit.adam_seconds(64, 512, repeats=3) < 1


@pytest.mark.parametrize(("name", "kept"), [("topk", False), ("batchtopk", False), ("jumprelu", False), ("relu", True)])
def test_dense_arrays_that_are_kept_are_seen(name, kept):
    assert (training(name).dense_arrays_kept() > 0) == kept


def test_jumprelu_starts_with_k_codes():
    shape = Shape(d_in=32, d_sae=512, k=8, batch=2048)
    dictionary = init(configured("jumprelu", shape)[0], key=jax.random.key(0))
    x = activations(shape, 1, key=jax.random.key(1))[0]
    l0 = (np.asarray(dictionary.encode(x)) > 0).sum(1).mean()
    assert l0 == pytest.approx(shape.k, rel=0.1)


def test_the_auxiliary_loss_is_computed_where_all_are_dead():
    made = training("topk", all_dead=True)
    for _ in range(2):
        made.step()
        assert made.metrics["dead_fraction"] == 1
        assert made.metrics["auxiliary"] > 0


def test_the_script_names_what_it_needs():
    assert {name.split("==")[0] for name in dependencies(SCRIPT)} >= {"torch", "sae-lens"}


def reconstructed(weights, x):
    """Codes and reconstructions of a TopK dictionary, in float64."""
    h = (x - weights["b_dec"]) @ weights["w_enc"].T + weights["b_enc"]
    z = np.where(h >= np.sort(h, axis=1)[:, [-SMOKE.k]], np.maximum(h, 0), 0)
    return z, z @ weights["w_dec"] + weights["b_dec"]


def error(weights, x):
    return ((reconstructed(weights, x)[1] - x) ** 2).sum(1).mean()


def stepped(weights, x):
    """The weights after the first step of Adam, at rate 3e-4, on gradients clipped to norm 1."""
    z, guess = reconstructed(weights, x)
    pull = 2 * (guess - x) / len(x)
    back = (pull @ weights["w_dec"].T) * (z > 0)
    grads = {
        "w_enc": back.T @ (x - weights["b_dec"]),
        "b_enc": back.sum(0),
        "w_dec": z.T @ pull,
        "b_dec": pull.sum(0) - back.sum(0) @ weights["w_enc"],
    }
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > 1
    clipped = {name: g / norm for name, g in grads.items()}
    return {name: w - 3e-4 * clipped[name] / (np.abs(clipped[name]) + 1e-8) for name, w in weights.items()}


# what stands in for the peer looks at what it was given and prints what it should find
STAND_IN = """#!{python}
import json, sys
arguments = dict((a[2:] + "=").split("=", 1) for a in sys.argv if a.startswith("--"))
assert arguments["k"] == "2=" and open(arguments["arrays"][:-1], "rb").read() == open({arrays!r}, "rb").read()
print(json.dumps({{"versions": {{"sae_lens": "0"}}, "seconds": [4.0 if "sparse" in arguments else 8.0] * 2,
                   **json.load(open({found!r}))}}))
"""


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_tiny_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sae_step, "ARCHITECTURES", ("topk", "jumprelu"))
    Bench(SaeStepBenchConfig(smoke=True), Console()).training("topk").save(tmp_path / "arrays")
    weights = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(tmp_path / "arrays").items()}
    first, second = weights.pop("batches")
    # the peer's second error is said to be smaller than it is
    found = {"loss": [error(weights, first)], "error": [0.0, 0.8 * error(stepped(weights, first), second)]}
    (tmp_path / "found").write_text(json.dumps(found))
    python = tmp_path / "python"
    values = {"python": sys.executable, "arrays": str(tmp_path / "arrays"), "found": str(tmp_path / "found")}
    python.write_text(STAND_IN.format(**values))
    python.chmod(0o755)

    config = SaeStepBenchConfig(smoke=True, peer_python=str(python), rounds=1, pairs=2)
    results = run_bench(config, str(tmp_path / "run"), console=Console(file=io.StringIO(), width=200))
    taken = results["sae_step.seconds"]
    assert results["sae_step.seconds_high"] >= taken
    call = results["sae_step.call_seconds"]
    assert results["sae_step.cold_seconds"] > results["sae_step.call_seconds_high"] >= call
    assert results["sae_step.tokens_per_second"] == pytest.approx(SMOKE.batch / taken)
    assert results["sae_step.fraction_of_limit"] == pytest.approx(results["limit.sae_step_seconds"] / taken)
    assert results["sae_step.sae_lens_seconds"] == 8
    assert results["sae_step.vs_saelens"] == pytest.approx(8 / taken)
    assert results["sae_step.vs_saelens_sparse"] == pytest.approx(4 / taken)
    assert results["sae_step.call_vs_saelens"] == pytest.approx(8 / call)
    assert results["sae_step.loss_difference"] < 1e-5
    assert results["sae_step.error_difference_after_step"] == pytest.approx(1 / 0.8 - 1, abs=1e-4)
    assert results["memory.dense_arrays_kept"] == 0
    assert results["memory.dense_codes_mb"] == pytest.approx(4 * 96 * 512 / 1e6)
    assert results["memory.topk_temporary_mb"] > 0
    assert results["sae_step.jumprelu_overflow"] == 0
    assert results["sae_step.vmapped8_vs_8"] == results["many.in_turn_vs_8"]
    for name in ("jumprelu", "dead", "as_sae_lens"):
        low, middle, high = (results[f"sae_step.{name}_vs_topk{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= middle <= high


class Still:
    """In place of a training: its steps cost nothing."""

    def __init__(self, *arguments, **options):
        pass

    def step(self):
        return jnp.zeros(())

    def save(self, path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_peer_that_fails_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sae_step, "Training", Still)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    out = io.StringIO()
    config = SaeStepBenchConfig(smoke=True, peer_python=str(broken), rounds=2)
    results = Bench(config, Console(file=out, width=200)).step(lambda fraction, note="": None)
    assert out.getvalue().count("without SAELens: sae_lens_step.py failed: out of memory\n") == 1
    assert results["sae_step.tokens_per_second"] > 0
    assert not any("lens" in name for name in results)
