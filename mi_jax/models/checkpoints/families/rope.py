"""Rotary positions in a config.json: the keys `rope_theta` and `rope_scaling`, or `rope_parameters` with both in it."""

import dataclasses
import math
from typing import Any, NamedTuple

from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.config import DecoderConfig, RopeScaling

_KINDS = ("default", "linear", "llama3", "yarn")


class Rope(NamedTuple):
    """The base of the frequencies, how they are scaled, and the share of a head that turns."""

    theta: float
    scaling: RopeScaling | None
    share: float

    def dim(self, d_head: int) -> int | None:
        """`DecoderConfig.rope_dim`: an odd number of components is rounded up, as the reference does."""
        turned = int(d_head * self.share)
        return None if self.share == 1.0 else turned + turned % 2


def read_rope(f: Fields, n_ctx: int, *, theta: float = 10_000.0, kinds: tuple[str, ...] = _KINDS) -> Rope:
    """Rotary positions of a family in which all of a head turns.

    Args:
      f: keys of config.json.
      n_ctx: its positions, which a scaling without the original number of them falls back on.
      theta: base where the file has none.
      kinds: of scaling that the family has.
    """
    theta = f.number("rope_theta", default=theta)
    share = f.number("partial_rotary_factor", default=1.0)
    rope = read_parameters(f, rope_fields(f), n_ctx, theta=theta, share=share, kinds=kinds)
    if rope.share != 1.0:
        raise f.refused("partial_rotary_factor", rope.share, "1.0 in this family")
    return rope


def rope_fields(f: Fields) -> Fields:
    """The object that describes the scaling: the older key counts where both are there, as in the reference."""
    new, old = f.inner("rope_parameters"), f.inner("rope_scaling")
    return old if len(old) else new


def read_parameters(
    f: Fields, r: Fields, n_ctx: int, *, theta: float, share: float = 1.0, kinds: tuple[str, ...] = _KINDS
) -> Rope:
    """Rotary positions from one object of parameters `r`; `theta` and `share` are taken where it has none."""
    kind = r.text("rope_type", "type", default="default")
    if kind not in kinds:
        raise r.refused("rope_type", kind, ", ".join(kinds))
    theta = r.number("rope_theta", default=theta)
    share = r.number("partial_rotary_factor", default=share)
    if theta <= 0 or not 0 < share <= 1:
        raise r.wrong("rope_theta, partial_rotary_factor", (theta, share), "a positive number and a share of 1")
    inside = r.integer("original_max_position_embeddings", default=n_ctx)
    n_ctx_original = f.integer("original_max_position_embeddings", default=inside)
    r.without_effect("finetuned")
    scaling = None if kind == "default" else _scaling(r, kind, n_ctx, n_ctx_original)
    # a plain rotation has no use for the numbers of a scaling, but frequency tables would change it
    r.without_effect("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    r.without_effect("mscale", "mscale_all_dim", "truncate")
    r.close()
    return Rope(theta, scaling, share)


def _scaling(r: Fields, kind: Any, n_ctx: int, n_ctx_original: int) -> RopeScaling:
    if n_ctx_original < 1:
        raise r.wrong("original_max_position_embeddings", n_ctx_original, "a positive number")
    factor = r.number("factor", default=n_ctx / n_ctx_original if kind == "yarn" else 0.0)
    if factor <= 0:
        raise r.wrong("factor", factor if r.has("factor") else None, "a positive number")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = (r.number(f"{end}_freq_factor", default=0.0) for end in ("low", "high"))
        if not 0 < low < high:
            raise r.wrong("low_freq_factor, high_freq_factor", (low, high), "a positive number and a larger one")
        return RopeScaling("llama3", factor, n_ctx_original, low_freq_factor=low, high_freq_factor=high)
    attention = r.number("attention_factor", default=0.0) or None
    mscale, mscale_all = (r.number(name, default=0.0) for name in ("mscale", "mscale_all_dim"))
    if attention is None and mscale and mscale_all:
        attention = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
    elif attention is None and factor <= 1:
        attention = 1.0
    return RopeScaling(
        "yarn",
        factor,
        n_ctx_original,
        beta_fast=r.number("beta_fast", default=32.0) or 32.0,
        beta_slow=r.number("beta_slow", default=1.0) or 1.0,
        attention_factor=attention,
        truncate=r.flag("truncate", default=True),
    )


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The object that describes one rotation."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    written = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind != "linear":
        written["original_max_position_embeddings"] = scaling.n_ctx_original
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        defaults = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
        written |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) != defaults[name]}
    return written


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The keys for rotary positions, those of older versions of `transformers` beside the new one."""
    described = parameters(config.rope_theta, config.rope_scaling)
    older = None
    if config.rope_scaling is not None:
        older = {name: value for name, value in described.items() if name != "rope_theta"}
    return {"rope_theta": config.rope_theta, "rope_scaling": older, "rope_parameters": described}
