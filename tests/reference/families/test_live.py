"""Every family beside `transformers`, on checkpoints made now with other weights than the stored; and back again.

torch and transformers are installed into an environment of their own the first time.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.bench.peer import dependencies, interpreter, run_script
from experiments.model_parity.family import LEFT_OUT, ROUNDTRIP_TOLERANCE
from experiments.model_parity.golden import Golden, compute, continuation, differences
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.checkpoints.saving import save

FOLDER = Path(__file__).parent
MAKE, CHECK = FOLDER / "make_golden.py", FOLDER / "check_saved.py"
TOLERANCE = 1e-4


def test_one_environment_serves_both_scripts():
    assert dependencies(MAKE) == dependencies(CHECK)


@pytest.mark.reference
def test_families_made_now(tmp_path):
    made, saved = tmp_path / "made", tmp_path / "saved"
    python = interpreter(MAKE)
    run_script(python, MAKE, f"--out={made}", "--seed=1")
    assert {folder.name for folder in made.iterdir()} == {folder.name for folder in (FOLDER / "golden").iterdir()}
    apart, other_tokens = {}, []
    for folder in sorted(made.iterdir()):
        golden, model = Golden.read(folder), load(folder)
        apart[folder.name] = differences(compute(model, golden), golden)
        if golden.greedy and (continuation(model, golden) != golden.arrays["greedy"]).any():
            other_tokens.append(folder.name)
        save(model, saved / folder.name)
    assert not {name: found for name, found in apart.items() if max(found.values()) > TOLERANCE}
    assert not other_tokens

    checked = run_script(python, CHECK, f"--models={saved}", f"--goldens={made}")
    assert checked.keys() == apart.keys()
    for name, found in checked.items():
        assert "error" not in found, (name, found)
        assert found["logits_max_abs"] <= ROUNDTRIP_TOLERANCE, (name, found)
        assert found["hidden_states_max_abs"] <= ROUNDTRIP_TOLERANCE, (name, found)
        assert not found["unexpected"] + found["mismatched"], (name, found)
        assert set(found["missing"]) == (set(LEFT_OUT) if name == "bert" else set()), (name, found)


@pytest.mark.reference
def test_the_stored_files_are_what_the_script_makes(tmp_path):
    run_script(interpreter(MAKE), MAKE, f"--out={tmp_path}")
    for stored in sorted((FOLDER / "golden").iterdir()):
        folder = tmp_path / stored.name
        assert {file.name for file in folder.iterdir()} == {file.name for file in stored.iterdir()}
        for file in stored.iterdir():
            if file.suffix == ".json":
                assert json.loads((folder / file.name).read_text()) == json.loads(file.read_text()), file
            elif file.suffix == ".safetensors":
                made, held = load_file(folder / file.name), load_file(file)
                assert made.keys() == held.keys()
                for name, tensor in held.items():
                    np.testing.assert_array_equal(made[name], tensor, err_msg=f"{file}: {name}")
        made, held = Golden.read(folder).arrays, Golden.read(stored).arrays
        assert made.keys() == held.keys()
        real = Golden.read(stored).real
        np.testing.assert_allclose(made["hidden_states"][:, real], held["hidden_states"][:, real], atol=1e-4)
        for name in {"tokens", "mask", "pixels", "greedy"} & held.keys():
            np.testing.assert_array_equal(made[name], held[name], err_msg=f"{stored}: {name}")
