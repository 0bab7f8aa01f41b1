"""Sites: the named activations of a model, their axes, and what to capture of them.

A site name is a checked identity, not a label: `tests/` and every adapter verify the equations of the site table.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mi_jax.core.errors import InputError

LAYER = "layer"

# TransformerLens names for the tensors that are the same here. `hook_q`/`hook_k` are left out on purpose: there they
# hold the values before the rotation, here `attn.q` and `attn.k` are what enters the scores.
_ALIASES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "hook_mlp_in": "mlp.in",
    "hook_q_input": "attn.q_in",
    "hook_k_input": "attn.k_in",
    "hook_v_input": "attn.v_in",
    "attn.hook_rot_q": "attn.q",
    "attn.hook_rot_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.z",
    "attn.hook_result": "attn.head_out",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.post",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def canonical(name: str) -> str:
    """The site that a TransformerLens name of any layer means; other names as they are."""
    match = _BLOCK.fullmatch(name)
    return _ALIASES.get(match[2], name) if match else name


class SiteError(InputError):
    """A site, an index or a value that does not fit the model; the message says what exists."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One named activation. `axes` starts with `layer` where the model has one per layer."""

    name: str
    axes: tuple[str, ...]

    @property
    def layered(self) -> bool:
        return self.axes[0] == LAYER

    @property
    def slice_axes(self) -> tuple[str, ...]:
        """Axes of the activation in one layer."""
        return self.axes[1:] if self.layered else self.axes


@dataclasses.dataclass(frozen=True)
class At:
    """What to capture of a site: all layers, some (a tuple, kept as leading axis) or one (an int, axis dropped)."""

    site: str
    layers: int | tuple[int, ...] | None = None


def at(site: str, layers: int | np.integer | np.ndarray | Sequence[int] | None = None) -> At:
    """Asks for a site at some layers only; memory is proportional to what is asked.

    Example: `mi.capture(model, mi.at("resid_post", layers=(4, 8)))` gives `acts["resid_post"]` of shape
    `[2 batch pos d_model]`, and `layers=4` one of shape `[batch pos d_model]`.
    """
    if layers is None:
        return At(site)
    chosen = np.asarray(layers).tolist()
    return At(site, tuple(chosen) if isinstance(chosen, list) else chosen)


@dataclasses.dataclass(frozen=True)
class AttentionRule:
    """How a model's attention computes, as far as the equations between its sites depend on it.

    Attributes:
      scale: of query · key; None means d_head^-1/2.
      softcap: scores are softcap · tanh(scaled / softcap); 0 for none.
      causal: False where a position sees those after it.
      windows: for every layer how many positions back a query sees, itself included, 0 for all; empty means all.
      written: what `attn_out` is of the heads' outputs: their sum, with one vector added everywhere, or a norm of that.
    """

    scale: float | None = None
    softcap: float = 0.0
    causal: bool = True
    windows: tuple[int, ...] = ()
    written: Literal["sum", "sum + bias", "normed"] = "sum"


@dataclasses.dataclass(frozen=True)
class SiteTable:
    """The sites of one model.

    Attributes:
      sizes: axis names such as `layer` and `head`, with their sizes.
      aliases: further names of sites, of this model only.
      attention: how its attention computes.
    """

    model: str
    sites: tuple[Site, ...]
    sizes: tuple[tuple[str, int], ...]
    aliases: tuple[tuple[str, str], ...] = ()
    attention: AttentionRule = AttentionRule()

    def size(self, axis: str) -> int:
        return dict(self.sizes)[axis]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    def n_pos(self, inputs: Any) -> int:
        """Positions of a run on these inputs, `[batch pos …]` unless the model has a number of its own."""
        sizes = dict(self.sizes)
        return sizes["pos"] if "pos" in sizes else inputs.shape[1]

    def resolve(self, name: str) -> tuple[Site, int | None]:
        """The site behind a name or a TransformerLens alias, and the layer that the alias names.

        Raises:
          SiteError: no such site, or the alias names a layer that the model does not have.
        """
        layer = None
        match = _BLOCK.fullmatch(name)
        if match:
            layer = int(match[1])
            name = (_ALIASES | dict(self.aliases)).get(match[2], name)
        else:
            name = dict(self.aliases).get(name, name)
        for site in self.sites:
            if site.name == name:
                if layer is not None:
                    self.check_index(site, LAYER, layer)
                return site, layer
        raise SiteError(f"{self.model} has no site {name!r}; it has {', '.join(self.names)}")

    def check_index(self, site: Site, axis: str, index: int) -> None:
        """Raises SiteError unless `-n <= index < n` on that axis (layers: `0 <= layer < n`)."""
        n = self.size(axis)
        if not (0 if axis == LAYER else -n) <= index < n:
            raise SiteError(f"site {site.name!r} of {self.model} has {n} {axis}s (0–{n - 1}); got {axis}={index}")

    def normalise(self, specs: str | At | Sequence[str | At]) -> tuple[At, ...]:
        """Checks what is to be captured and returns it with canonical site names.

        Raises:
          SiteError: unknown site, layer out of range, no layer, layers of a site that has none, as many layers as the
            model has in another order, or one site twice.
        """
        out: list[At] = []
        specs = (specs,) if isinstance(specs, str | At) else specs
        for spec in specs:
            spec = at(spec) if isinstance(spec, str) else spec
            site, layer = self.resolve(spec.site)
            layers = layer if layer is not None else spec.layers
            if layers == ():
                raise SiteError(f"site {site.name!r} is asked for at no layer; leave layers=… out for all of them")
            if layers is not None and not site.layered:
                raise SiteError(f"site {site.name!r} of {self.model} exists once, not per layer; got layers={layers}")
            for one in (layers,) if isinstance(layers, int) else layers or ():
                self.check_index(site, LAYER, one)
            # patched back, each row would go to another layer than it came from
            n_layers = self.size(LAYER) if site.layered else 0
            if isinstance(layers, tuple) and len(layers) == n_layers and layers != tuple(range(n_layers)):
                raise SiteError(
                    f"site {site.name!r} is asked for at layers={layers}, which would look like all {n_layers} layers "
                    f"in order: leave layers=… out and take them as acts[{site.name!r}][np.array({list(layers)})]"
                )
            wanted = At(site.name, layers)
            if any(o.site == site.name and o != wanted for o in out):
                raise SiteError(
                    f"site {site.name!r} is asked for twice with different layers; ask once for all of them, such as "
                    f"mi.at({site.name!r}, layers=(0, 2))"
                )
            if wanted not in out:
                out.append(wanted)
        return tuple(out)
