"""The measurements of one family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mi_jax as mi
from experiments.model_parity.controls import with_layers_reversed, with_other_setting
from experiments.model_parity.golden import Golden, bfloat16_errors, compute, continuation, differences
from mi_jax.models import Decoder
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.checkpoints.saving import save

# of a saved and reloaded model: the weights are the same bits, so only the order of sums could differ
ROUNDTRIP_TOLERANCE = 1e-5
# what `transformers` has beyond a decoder: the pooling layer, which no stream depends on
LEFT_OUT = ("pooler.dense.weight", "pooler.dense.bias")


def forward(model: Decoder, golden: Golden) -> dict[str, Any]:
    """Logits and streams beside the reference, and the same for a model with one other setting."""
    found, (changed, other) = differences(compute(model, golden), golden), with_other_setting(model)
    wrong = differences(compute(other, golden), golden)
    results: dict[str, Any] = {"parameters": sum(x.size for x in jax.tree.leaves(model))}
    for name, value in found.items():
        results |= {name: value, f"{name}_null": wrong[name]}
    return results | {"null_setting": changed}


def generation(model: Decoder, golden: Golden) -> dict[str, Any]:
    """The share of generated tokens that are the reference's; the control is another prompt's continuation."""
    if not golden.greedy:
        return {}
    tokens, expected = continuation(model, golden), golden.arrays["greedy"]
    return {
        "greedy_agreement": float((tokens == expected).mean()),
        "greedy_agreement_null": float((tokens == np.roll(expected, 1, axis=0)).mean()),
    }


def bfloat16(model: Decoder, golden: Golden) -> dict[str, Any]:
    """The error of the checkpoint loaded in bfloat16, beside the reference's."""
    return bfloat16_errors(compute(load(golden.folder, dtype=jnp.bfloat16), golden), golden)


def identities(model: Decoder, golden: Golden) -> dict[str, Any]:
    """Whether the sites hold what their names say.

    Raises:
      SiteError: the equation that does not hold.
    """
    inputs, options = golden.inputs()
    return {"identities_checked": len(mi.check_sites(model, *inputs, **options)), "identities": True}


# what a failure is named by, and what measures it
PARTS: dict[str, Callable[[Decoder, Golden], dict[str, Any]]] = {
    "forward": forward,
    "generation": generation,
    "bfloat16": bfloat16,
    "identities": identities,
}


def write_back(model: Decoder, saved: Path, control: Path) -> dict[str, Any]:
    """Saves the model for `transformers`, and one with its layers reversed; whether ours comes back bit for bit."""
    save(model, saved)
    save(with_layers_reversed(model), control)
    return {"roundtrip_parameters_equal": same_bits(model, load(saved))}


def same_bits(a: Decoder, b: Decoder) -> bool:
    """Whether two decoders have the same parameters, to the bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def roundtrip(checked: dict[str, Any], control: dict[str, Any], *, parameters_equal: bool) -> dict[str, Any]:
    """What `transformers` makes of the saved model, from the objects that `check_saved.py` prints.

    Raises:
      ValueError: `transformers` could not load or run one of the two models.
    """
    for each in (checked, control):
        if "error" in each:
            raise ValueError(f"transformers cannot use the saved model: {each['error']}")
    strangers = [*checked["unexpected"], *checked["mismatched"], *(set(checked["missing"]) - set(LEFT_OUT))]
    close = checked["logits_max_abs"] <= ROUNDTRIP_TOLERANCE
    return {
        "roundtrip": parameters_equal and close and not strangers,
        "roundtrip_logits_max_abs": checked["logits_max_abs"],
        "roundtrip_logits_max_abs_null": control["logits_max_abs"],
        "roundtrip_strange_tensors": len(strangers),
    }
