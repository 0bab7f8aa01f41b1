"""The benchmark's arithmetic, its peers' environments, and one tiny run with a peer that is a stand-in."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

import mi_jax as mi
from experiments.bench import limit
from experiments.bench.peer import PEERS, PeerError, dependencies, environment, interpreter, run_script
from experiments.bench.setting import SMOKE, metric, setting
from experiments.bench.sweep import SCRIPTS, Bench, SweepBenchConfig, empty_taps_are_free, run_bench
from experiments.bench.timing import Disturbance, ratios

ONE_LAYER = dataclasses.replace(SMOKE, n_layers=1, d_model=3, n_heads=1, n_kv_heads=1, d_head=2, d_mlp=5)


def test_operations_of_one_token():
    # q, k, v: 3×2 each; o: 2×3; up and down: 3×5 each; a multiplication and an addition for each weight
    assert limit.linear_flops(ONE_LAYER) == 2 * (4 * 6 + 2 * 15)
    assert limit.linear_flops(ONE_LAYER, after_heads=True) == 2 * (6 + 2 * 15)
    assert limit.linear_flops(dataclasses.replace(ONE_LAYER, gated=True)) == 2 * (4 * 6 + 3 * 15)
    grouped = dataclasses.replace(ONE_LAYER, n_heads=2)
    assert limit.linear_flops(grouped) == 2 * (2 * 12 + 2 * 6 + 2 * 15)
    # scores with 4 keys and the sum of 4 values, of 2 components
    assert limit.attention_flops(ONE_LAYER, 4) == 2 * 4 * 2 + 2 * 4 * 2


def test_operations_of_the_residual_sweep():
    """Two layers, two positions, one example: what is left of the model in each of the four cells."""
    config = dataclasses.replace(ONE_LAYER, n_layers=2)
    first, second = (limit.linear_flops(config) + limit.attention_flops(config, keys) for keys in (1, 2))
    # of the last layer, keys and values (3×2 each) of a position that is not read
    unread = 2 * (2 * 6)
    unpatched = first + second + unread + second
    cells = (first + second + unread + second) + (second + second) + (unread + second) + second
    logits = 4 * 2 * (2 * 3)
    assert limit.residual_sweep_flops(config, 1, 2, logits=2) == unpatched + cells + logits
    assert limit.residual_sweep_flops(config, 7, 2, logits=2) == 7 * (unpatched + cells + logits)


def test_operations_of_the_head_sweep():
    """Three layers, two heads, two positions: a head of the first layer leaves the most of the model to compute."""
    config = dataclasses.replace(ONE_LAYER, n_layers=3, n_heads=2, n_kv_heads=2)
    first, second = (limit.linear_flops(config) + limit.attention_flops(config, keys) for keys in (1, 2))
    rest, unread = limit.linear_flops(config, after_heads=True), 2 * (2 * 12)
    last = unread + second
    cells = 2 * ((2 * rest + first + second + last) + (2 * rest + last) + rest)
    unpatched = 2 * (first + second) + last
    assert limit.head_sweep_flops(config, 1, 2, logits=2) == unpatched + cells + 6 * 2 * (2 * 3)


def test_the_rate_is_that_of_the_machine():
    """A matmul of a known size cannot take less time than its rate allows."""
    rate = limit.matmul_rate([(64, 64, 64), (256, 256, 256)], repeats=3)
    assert 1e6 < rate < 1e16


def test_ratios_alternate_which_comes_first():
    order = []
    values = ratios(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert "".join(order[2:]) == "baabba"
    assert len(values) == 3
    assert min(values) > 0


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says what other programs take")
def test_what_others_take_is_seen():
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    disturbance = Disturbance()
    try:
        with disturbance:
            time.sleep(0.5)
    finally:
        other.kill()
        other.wait()
    assert disturbance.share is not None
    # a whole processor, if the machine has one to spare; half of it otherwise
    assert disturbance.share > 0.4 / os.cpu_count()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says what other programs take")
def test_own_work_is_no_disturbance(monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    start = time.process_time()
    # a machine on which this process alone is busy
    monkeypatch.setattr(
        "experiments.bench.timing._busy_seconds", lambda: round((time.process_time() - start) * ticks) / ticks
    )
    disturbance = Disturbance()
    with disturbance:
        spin(0.3)
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert disturbance.share < 0.1


def test_a_limit_that_a_call_beats_is_said_to_be_wrong():
    out = io.StringIO()
    config = SweepBenchConfig(smoke=True, peers=False)
    bench = Bench(config, Console(file=out, width=200))
    fewest = limit.residual_sweep_flops(SMOKE, 2, 6, logits=2) / 1e9
    taken = {"sweep.warm": [2 * fewest, 4 * fewest, 4 * fewest], "heads.warm": [1.0]}
    held = bench._limits(1e9, taken)
    assert held["limit.holds"] is True
    assert held["sweep.fraction_of_limit"] == pytest.approx(0.25)
    assert not out.getvalue()
    taken["sweep.warm"][0] = 0.9 * fewest
    assert bench._limits(1e9, taken)["limit.holds"] is False
    assert "sweep: a call was faster than the limit" in out.getvalue()


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_scripts_name_what_they_need(script):
    needed = dependencies(PEERS / script)
    assert any(name.startswith("transformer-lens==") for name in needed)
    assert any(name.startswith("torch==") for name in needed)


def test_environments_differ_with_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = tmp_path / "script.py"
    folders = set()
    for needed in ('"numpy==1"', '"numpy==2"', '"numpy==2",\n#   "scipy"'):
        script.write_text(f"# /// script\n# dependencies = [{needed}]\n# ///\n")
        folders.add(environment(script))
    assert len(folders) == 3
    assert all(tmp_path in folder.parents for folder in folders)


def test_a_script_without_metadata(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print(1)\n")
    with pytest.raises(PeerError, match="no inline metadata"):
        dependencies(script)


def test_an_interpreter_that_does_not_exist():
    with pytest.raises(PeerError, match="not a Python that can be run"):
        interpreter(PEERS / SCRIPTS["transformer_lens"], "/nowhere/python")


def test_a_script_that_fails_says_why_in_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('no such model')")
    with pytest.raises(PeerError, match=r"^script.py failed: ValueError: no such model$"):
        run_script(Path(sys.executable), script)
    script.write_text("print('done')")
    with pytest.raises(PeerError, match="did not print a JSON object"):
        run_script(Path(sys.executable), script)


def test_what_the_peers_get_is_the_model(tmp_path):
    made = setting(SMOKE, 2, 6, key=jax.random.key(0))
    made.save(tmp_path / "arrays.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "arrays.safetensors")
    np.testing.assert_array_equal(arrays["blocks.attn.q"], made.model.blocks.attn.q)
    np.testing.assert_array_equal(arrays["corrupt"], made.corrupt)
    assert (arrays["clean"] != arrays["corrupt"]).all()
    assert sum(a.size for a in arrays.values()) == sum(x.size for x in jax.tree.leaves(made.model)) + 2 * 12


def test_empty_taps_are_free():
    assert empty_taps_are_free(setting(SMOKE, 2, 6, key=jax.random.key(0)))


# what stands in for the peer reads the weights that it was given and prints the values that it should find
STAND_IN = """#!{python}
import json, sys
print(json.dumps({{"versions": {{"transformer_lens": "0"}}, "seconds": {{"resid_pre": [8.0], "attn.z": [4.0]}},
                   "values": json.load(open({values!r})), "arguments": sys.argv}}))
"""


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started by its first line")
def test_a_tiny_run(tmp_path):
    made = setting(SMOKE, 2, 6, key=jax.random.key(0))
    values = {}
    for site, axes, n in (("resid_pre", ("layer", "pos"), 6), ("attn.z", ("layer", "head"), 2)):
        edits = [[mi.patch(site, made.activations, **{axes[0]: i, axes[1]: j}) for j in range(n)] for i in range(2)]
        cells = [[metric(mi.intervene(made.model, edit)(made.corrupt)) for edit in row] for row in edits]
        values[site] = np.array(cells, float).tolist()
    values["attn.z"][1][1] += 0.5
    (tmp_path / "values.json").write_text(json.dumps(values))
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, values=str(tmp_path / "values.json")))
    python.chmod(0o755)

    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    config = SweepBenchConfig(smoke=True, peer_python=str(python), hooked_python=str(broken), rounds=1, pairs=1)
    out = io.StringIO()
    results = run_bench(config, str(tmp_path / "run"), console=Console(file=out, width=200))
    assert "without hooked_transformer: hooked_transformer_sweep.py failed: out of memory\n" in out.getvalue()
    assert not any("hooked_transformer" in name for name in results)
    assert results["sweep.cells"] == 12
    assert results["heads.cells"] == 4
    for name, seconds in (("sweep", 8.0), ("heads", 4.0)):
        warm, cold = results[f"{name}.warm_seconds"], results[f"{name}.cold_seconds"]
        assert cold > warm
        assert results[f"{name}.compile_seconds"] == pytest.approx(cold - warm)
        assert results[f"{name}.transformer_lens_seconds"] == seconds
        assert results[f"{name}.warm_vs_transformer_lens"] == pytest.approx(seconds / warm)
        assert results[f"{name}.fraction_of_limit"] == pytest.approx(results[f"limit.{name}_seconds"] / warm)
        assert results[f"{name}.difference_loop"] < 1e-4
        assert results[f"{name}.warm_seconds_low"] <= warm <= results[f"{name}.warm_seconds_high"]
    assert results["sweep.difference_transformer_lens"] < 1e-4
    assert results["heads.difference_transformer_lens"] == pytest.approx(0.5, abs=1e-4)
    assert results["capture.empty_taps_equal_program"] is True
    assert results["capture.overhead"] > -1
    assert results["attribution.forward_ratio"] > 0
