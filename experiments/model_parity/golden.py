"""A checkpoint of `transformers` with what it computes, and how far a decoder is from that.

Only real tokens count: what a model computes at padding is its own affair.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

import mi_jax as mi
from mi_jax.models import Decoder
from mi_jax.models.generate import generate


@dataclasses.dataclass(frozen=True)
class Golden:
    """What `tests/reference/families/make_golden.py` wrote for one family; its docstring says what the arrays are."""

    folder: Path
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> "Golden":
        with np.load(folder / "golden.npz", allow_pickle=False) as file:
            return cls(folder, dict(file))

    @property
    def real(self) -> np.ndarray:
        """Where there are real tokens `[batch pos]`; of images, all of them `[batch]`."""
        return self.arrays["mask"] if "mask" in self.arrays else np.ones(len(self.arrays["pixels"]), bool)

    @property
    def output(self) -> str:
        """The name of the reference's output: an encoder's is its last stream."""
        return "logits" if "logits" in self.arrays else "output"

    @property
    def greedy(self) -> bool:
        """Whether there is a continuation to compare with."""
        return "greedy" in self.arrays

    def inputs(self, dtype: Any = jnp.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a decoder; `dtype` is that of images."""
        arrays = self.arrays
        if "pixels" in arrays:
            return (jnp.asarray(arrays["pixels"], dtype),), {}
        options = {"token_types": jnp.asarray(arrays["token_types"])} if "token_types" in arrays else {}
        return (jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["mask"])), options


@dataclasses.dataclass(frozen=True)
class Computed:
    """What a decoder computes from a golden's inputs, under the golden's names and as float32."""

    logits: Float[np.ndarray, "batch *pos d_vocab"]
    hidden_states: Float[np.ndarray, "stream batch pos d_model"]
    final_stream: Float[np.ndarray, "batch pos d_model"]
    router: Float[np.ndarray, "layer batch pos expert"] | None


def compute(model: Decoder, golden: Golden) -> Computed:
    """One forward with the sites that are the reference's hidden states.

    What enters a block is `resid_pre`. The last hidden state is what leaves the final norm, except where there is none
    (norms on the stream itself) and in a model of images, whose reference takes it before that norm.
    """
    config = model.config
    last = "resid_post_normalized" if config.norms == "post" else "resid_post"
    sites = ["resid_pre", last]
    sites += [] if config.norms == "post" else ["final_norm"]
    sites += ["mlp.router"] if config.n_experts else []
    inputs, options = golden.inputs(model.blocks.attn.q.dtype)
    logits, acts = mi.jit(mi.capture(model, *sites))(*inputs, **options)
    values = {name: np.asarray(x, np.float32) for name, x in acts.items()}
    final = values[last][-1]
    closing = final if config.patches is not None or config.norms == "post" else values["final_norm"]
    logits = np.asarray(logits, np.float32)
    return Computed(
        # a classifier of images reads the first position alone
        logits=logits[:, 0] if config.patches is not None else logits,
        hidden_states=np.concatenate([values["resid_pre"], closing[None]]),
        final_stream=final,
        router=values.get("mlp.router"),
    )


def differences(found: Computed, golden: Golden) -> dict[str, float]:
    """The largest differences from the reference: of logits, of all streams between layers, of a mixture's router."""
    arrays, real = golden.arrays, golden.real
    streams = [_largest(a - b, real) for a, b in zip(found.hidden_states, arrays["hidden_states"], strict=True)]
    if "final_stream" in arrays:
        streams.append(_largest(found.final_stream - arrays["final_stream"], real))
    result = {
        "logits_max_abs": _largest(found.logits - arrays[golden.output], real),
        "hidden_max_abs": max(streams),
    }
    if found.router is not None:
        routers = zip(found.router, arrays["router"], strict=True)
        result["router_max_abs"] = max(_largest(a - b, real) for a, b in routers)
    return result


def bfloat16_errors(found: Computed, golden: Golden) -> dict[str, float]:
    """Root mean square errors of logits in bfloat16 from the reference's in float32: of the decoder, of the reference.

    Two programs round at different places, so neither is the other's truth, and the ratio of their errors varies by
    about a tenth from model to model. One that rounds where the reference does not has the larger error on average.
    """
    exact, low, real = golden.arrays[golden.output], golden.arrays[f"{golden.output}_bfloat16"], golden.real
    ours, theirs = _root_mean_square(found.logits - exact, real), _root_mean_square(low - exact, real)
    return {
        "bfloat16_rms": ours,
        "bfloat16_rms_reference": theirs,
        "bfloat16_rms_between": _root_mean_square(found.logits - low, real),
        "bfloat16_vs_reference": ours / theirs,
    }


def continuation(model: Decoder, golden: Golden) -> Int[np.ndarray, "batch new"]:
    """The most likely tokens after the golden's prompts, all prompts in one padded batch."""
    n_new = golden.arrays["greedy"].shape[1]
    return np.asarray(generate(model, *golden.inputs()[0], max_new_tokens=n_new).tokens)


def _largest(difference: np.ndarray, real: np.ndarray) -> float:
    return float(np.abs(difference[real]).max())


def _root_mean_square(difference: np.ndarray, real: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference[real], dtype=np.float64))))
