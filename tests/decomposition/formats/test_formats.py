"""Every format: loaded dictionaries against the projects' equations, written and read again, and the table of it all.

`MI_JAX_WRITE_FORMATS=1 pytest tests/decomposition/formats/test_formats.py -n 0` writes the table anew.
"""

import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition import formats
from mi_jax.decomposition.activations import BatchTopK, JumpReLU
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.token_norm import TokenNorm
from tests.decomposition.formats import making
from tests.decomposition.formats.layouts import LAYOUTS

TOLERANCE = 1e-5
TABLE = Path(formats.__file__).parent / "FORMATS.md"
CASES = [(format, case) for format, cases in LAYOUTS.items() for case in cases]
MEASURED: dict[tuple[str, str], dict] = {}


def inputs(model):
    shape = (model.n_layers, model.d_in) if isinstance(model, CrossLayerTranscoder) else (model.d_in,)
    return np.random.default_rng(7).normal(1.0, 3.0, (9, *shape)).astype(np.float32)


def error(model, x, expected):
    """The largest difference, relative to the largest entry."""
    return float(np.abs(np.asarray(model(jnp.asarray(x))) - expected).max() / np.abs(expected).max())


def can_write(model):
    return [name for name, each in formats.FORMATS.items() if not each.lacks(model)]


def saved(model, format, folder):
    path = folder / "model_layer_0.pt" if formats.FORMATS[format].suffix else folder
    if format == "circuit_tracer":
        path = folder / "layer_0.safetensors"
    formats.save(model, path, format=format)
    return path


@pytest.mark.parametrize(("format", "case"), CASES)
def test_a_layout_is_recognised_and_computes_its_equation(format, case, tmp_path):
    made = LAYOUTS[format][case](tmp_path / "source")
    assert formats.recognise(made.path) == format.removesuffix("_5")
    model = formats.load(made.path, **made.options)
    x = inputs(model)
    expected = made.equation(x.astype(np.float64))
    assert (np.abs(expected) > 0).all()
    apart = error(model, x, expected)
    assert apart < TOLERANCE

    written = {}
    for other in can_write(model):
        path = saved(model, other, tmp_path / other)
        again = formats.load(path, format=other)
        written[other] = error(again, x, expected)
        assert written[other] < TOLERANCE, other
        # the second time nothing is left to fold
        second = formats.load(saved(again, other, tmp_path / f"{other}_again"))
        for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(second), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7, err_msg=other)
    MEASURED[format, case] = {"error": apart, "written": written}


@pytest.mark.parametrize("seed", [1000, 2000])
def test_any_numbers_compute_their_equation(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "SEED", seed)
    for number, (format, case) in enumerate(CASES):
        made = LAYOUTS[format][case](tmp_path / str(number))
        model = formats.load(made.path, **made.options)
        x = inputs(model)
        assert error(model, x, made.equation(x.astype(np.float64))) < TOLERANCE, (format, case)


def test_bfloat16_goes_through_every_format(tmp_path):
    for format, cases in LAYOUTS.items():
        case = next(iter(cases))
        made = LAYOUTS[format][case](tmp_path / f"{format} {case}")
        model = formats.load(made.path, dtype=jnp.bfloat16, **made.options)
        if format in can_write(model):
            again = formats.load(saved(model, format, tmp_path / f"{format} {case} again"), dtype=jnp.bfloat16)
            if isinstance(model.activation, BatchTopK) and isinstance(again.activation, JumpReLU):
                continue
            for one, two in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
                assert one.dtype == two.dtype
                np.testing.assert_allclose(
                    one.astype(jnp.float32), two.astype(jnp.float32), rtol=2**-6, atol=2**-8, err_msg=f"{format} {case}"
                )


def test_a_dictionary_written_where_it_came_from_is_equal(tmp_path):
    for format, case in (("sae_lens", "gated"), ("gemma_scope", "upper-case names"), ("sparsify", "topk")):
        made = LAYOUTS[format][case](tmp_path / f"{format}_source")
        model = formats.load(made.path)
        again = formats.load(saved(model, format, tmp_path / format))
        assert jax.tree.structure(model) == jax.tree.structure(again)
        for one, two in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(one, two)


def bound(error):
    """Coarse enough to be the same on every machine."""
    return "≤ 1e-5" if error <= 1e-5 else f"{error:.0e}"


def table():
    """What was measured, as FORMATS.md has it."""
    lines = [
        "# Formats of dictionaries",
        "",
        "Written by `tests/decomposition/formats/test_formats.py`, which compares every row with a numpy oracle.",
        "`MI_JAX_WRITE_FORMATS=1 pytest tests/decomposition/formats/test_formats.py -n 0` writes it anew.",
        "",
        "Errors are the largest difference of a reconstruction from the oracle, relative to its largest entry: after",
        "loading, and after writing to each of the formats that hold the dictionary and loading again.",
        "",
        "| format | files | dictionary | loads | round trip | oracle error | also written to |",
        "|---|---|---|---|---|---|---|",
    ]
    for (format, case), measured in sorted(MEASURED.items(), key=lambda item: CASES.index(item[0])):
        each = formats.FORMATS[format]
        own = "yes" if format in measured["written"] else "no"
        others = ", ".join(name for name in measured["written"] if name != format) or "none"
        worst = bound(max(measured["error"], *measured["written"].values()))
        lines.append(f"| {each.title} (`{format}`) | {each.files} | {case} | yes | {own} | {worst} | {others} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_formats_is_what_was_measured():
    if len(MEASURED) < len(CASES):
        pytest.skip("needs all layouts to have been tested in this process")
    if os.environ.get("MI_JAX_WRITE_FORMATS"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()


def test_what_a_format_has_no_place_for_is_named_with_the_formats_that_have(tmp_path):
    normed = formats.load(LAYOUTS["sae_lens"]["layer_norm"](tmp_path / "a").path)
    with pytest.raises(InputError, match=r"gemma_scope has no place for the token norm layer_norm.*: sae_lens"):
        formats.save(normed, tmp_path / "b", format="gemma_scope")
    layers = formats.load(LAYOUTS["circuit_tracer_clt"]["cross-layer, jumprelu, skip"](tmp_path / "c").path)
    with pytest.raises(InputError, match=r"sae_lens has no place for cross-layer transcoders; .*circuit_tracer_clt"):
        formats.save(layers, tmp_path / "d")
    single = formats.load(LAYOUTS["openai"]["ReLU"](tmp_path / "e").path)
    with pytest.raises(InputError, match="clt_training has no place for single dictionaries"):
        formats.save(single, tmp_path / "f", format="clt_training")
    below = JumpReLU(jnp.full(single.d_sae, -1.0))
    negative = type(single)(single.w_enc, single.b_enc, single.w_dec, single.b_dec, below)
    with pytest.raises(InputError, match="a threshold below 0; these formats hold this dictionary: circuit_tracer"):
        formats.save(negative, tmp_path / "g")
    with pytest.raises(InputError, match=r"openai is one file whose name ends with \.pt"):
        formats.save(single, tmp_path / "i", format="openai")
    with pytest.raises(InputError, match="no format 'saelens'; there are sae_lens"):
        formats.save(single, tmp_path / "h", format="saelens")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "e"}


def test_a_population_deviation_is_written_as_the_samples(tmp_path):
    for format, case in (("sae_lens", "layer_norm"), ("openai", "TopK")):
        model = formats.load(LAYOUTS[format][case](tmp_path / f"{format} source").path)
        x = jnp.asarray(inputs(model))
        by_population = eqx.tree_at(
            lambda d: d.token_norm, model, TokenNorm("layer_norm", ddof=0), is_leaf=lambda n: isinstance(n, TokenNorm)
        )
        again = formats.load(saved(by_population, format, tmp_path / format))
        assert again.token_norm.ddof == 1
        assert error(again, x, np.asarray(by_population(x))) < TOLERANCE
        assert error(model, x, np.asarray(by_population(x))) > 100 * TOLERANCE


def test_dtype_is_that_of_parameters_but_for_thresholds(tmp_path):
    path = LAYOUTS["gemma_scope"]["upper-case names"](tmp_path / "a").path
    model = formats.load(path, dtype=jnp.bfloat16)
    assert model.w_enc.dtype == model.b_dec.dtype == jnp.bfloat16
    assert model.activation.threshold.dtype == jnp.float32
    formats.save(model, tmp_path / "b")
    again = formats.load(tmp_path / "b", dtype=jnp.bfloat16)
    np.testing.assert_array_equal(model.w_dec.astype(jnp.float32), again.w_dec.astype(jnp.float32))
    with pytest.raises(InputError, match="floating-point"):
        formats.load(path, dtype=jnp.int32)


def test_metadata_is_written_where_there_is_a_place_for_it(tmp_path):
    model = formats.load(LAYOUTS["openai"]["ReLU"](tmp_path / "a").path)
    formats.save(model, tmp_path / "b", metadata={"hook_name": "blocks.3.hook_resid_post"})
    assert '"hook_name": "blocks.3.hook_resid_post"' in (tmp_path / "b" / "cfg.json").read_text()
    with pytest.raises(InputError, match="gemma_scope has no place for metadata"):
        formats.save(model, tmp_path / "c", format="gemma_scope", metadata={"hook_name": ""})
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten_and_nothing_left_half_written(tmp_path, monkeypatch):
    model = formats.load(LAYOUTS["openai"]["ReLU"](tmp_path / "a").path)
    (tmp_path / "empty").mkdir()
    formats.save(model, tmp_path / "empty")
    with pytest.raises(InputError, match="is there already"):
        formats.save(model, tmp_path / "empty")

    def no_room(*_):
        raise OSError("no room")

    monkeypatch.setattr("mi_jax.decomposition.formats.sae_lens.write_json", no_room)
    with pytest.raises(OSError, match="no room"):
        formats.save(model, tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "empty"}
