"""SAELens and sparsify beside us: we read what they write now, they read what we write, to the same reconstructions.

torch and both packages are installed into an environment of their own the first time.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.peer import interpreter, run_script
from mi_jax.decomposition import formats
from tests.decomposition.formats.layouts import LAYOUTS

SCRIPT = Path(__file__).parent / "peers.py"
TOLERANCE = 1e-5


def error(model, x, y):
    return float(np.abs(np.asarray(model(jnp.asarray(x))) - y).max() / np.abs(y).max())


@pytest.mark.reference
def test_we_read_what_they_write_and_they_read_it_written_by_us(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    python = interpreter(SCRIPT)
    made = run_script(python, SCRIPT, "make", f"--out={theirs}")
    assert len(made) == 21
    apart = {}
    for name in made:
        format = name.split("/")[0]
        single_file = ".pt" if format == "openai" else ""
        model = formats.load(theirs / f"{name}{single_file}")
        with np.load(theirs / f"{name}.npz") as archive:
            apart[name] = error(model, archive["x"], archive["y"])
            formats.save(model, ours / f"{name}{single_file}", format=format)
            np.savez(ours / f"{name}.npz", **archive)
    assert not {name: found for name, found in apart.items() if not found <= TOLERANCE}

    checked = run_script(python, SCRIPT, "check", f"--dictionaries={ours}")
    assert checked.keys() == made.keys()
    assert not {name: found for name, found in checked.items() if not found <= TOLERANCE}


@pytest.mark.reference
def test_they_read_every_layout_that_we_can_write_for_them(tmp_path):
    folder, x = tmp_path / "ours", np.random.default_rng(3).normal(1.0, 3.0, (16, 6)).astype(np.float32)
    written = set()
    for format, cases in LAYOUTS.items():
        for case, make in cases.items():
            made = make(tmp_path / "layouts" / format / case)
            model = formats.load(made.path, **made.options)
            for other in ("sae_lens", "sae_lens_5", "sparsify", "dictionary_learning", "openai"):
                if formats.FORMATS[other].lacks(model) or (
                    other in ("dictionary_learning", "openai") and not simple(case)
                ):
                    continue
                name = f"{'sae_lens' if other == 'sae_lens_5' else other}/{other} {format} {case}".replace(",", "")
                path = folder / f"{name}.pt" if other == "openai" else folder / name
                formats.save(model, path, format=other)
                np.savez(folder / f"{name}.npz", x=x, y=made.equation(x.astype(np.float64)))
                written.add(name)
    assert len(written) > 60
    checked = run_script(interpreter(SCRIPT), SCRIPT, "check", f"--dictionaries={folder}")
    assert checked.keys() == written
    assert not {name: found for name, found in checked.items() if not found <= TOLERANCE}


def simple(case):
    """Whether the equation is the ReLU or TopK that the script itself has for torch files."""
    return case in ("standard", "topk", "TopK", "ReLU", "AutoEncoder", "AutoEncoderTopK")
