"""A model run on from one of its activations: what end-to-end training differentiates.

A decoder goes on from the stream after the spliced layer, so the layers before it run once and have no backward pass;
any other model, and any other site, runs as a whole with the activation patched in.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.edits import patch
from mi_jax.core.sites import SiteError, at
from mi_jax.core.taps import Tap
from mi_jax.core.transforms import capture, intervene
from mi_jax.models import Decoder
from mi_jax.models.block import block
from mi_jax.models.layout import Prompts

STREAM = "resid_post"


class Continuation(eqx.Module):
    """The rest of a model's run, as a function of its activation at a site.

    Attributes:
      model: a model with sites whose leaves are all arrays.
      site: which activation.
      layer: of the site; None where the site exists once.
      later: layers whose streams are wanted beside the logits.
    """

    model: Any
    site: str = eqx.field(static=True)
    layer: int | None = eqx.field(static=True)
    later: tuple[int, ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        if wrong := [leaf for leaf in jax.tree.leaves(self.model) if not eqx.is_array(leaf)]:
            raise SiteError(
                f"a dictionary is trained end to end in a model whose leaves are arrays; this one has {wrong[0]!r}"
            )
        table = self.model.site_table
        places = [at(self.site, self.layer), *((at(STREAM, self.later),) if self.later and self.site != STREAM else ())]
        table.normalise(places)
        if self.layer is None and table.resolve(self.site)[0].layered:
            raise SiteError(f"site {self.site!r} exists in every layer; say which with layer=…")
        if bad := [number for number in self.later if number <= (-1 if self.layer is None else self.layer)]:
            raise SiteError(f"layers={self.later} are to come after layer={self.layer}, but {bad} do not")

    def capture(
        self, tokens: Int[Array, "context pos"], mask: Bool[Array, "context pos"], sites: Sequence[str]
    ) -> dict[str, Float[Array, "context pos _"]]:
        """Activations at the layer, from a run that ends there."""
        wanted = [at(name, self.layer) for name in dict.fromkeys(sites)]
        return capture(self.model, *wanted)(tokens, mask, output=False)[1]

    def __call__(
        self,
        value: Float[Array, "context pos d_model"],
        tokens: Int[Array, "context pos"],
        mask: Bool[Array, "context pos"],
    ) -> tuple[Float[Array, "context pos d_vocab"], Float[Array, "later context pos d_stream"] | None]:
        """Logits with `value` at the site, and the streams after the later layers."""
        start = self._start()
        if start is not None:
            return self._resumed(value, start, mask)
        edited = intervene(self.model, patch(self.site, value, layer=self.layer))
        if not self.later:
            return edited(tokens, mask), None
        logits, acts = capture(edited, at(STREAM, self.later))(tokens, mask)
        return logits, acts[STREAM]

    def _start(self) -> int | None:
        """The layer that reads the site as its stream; None where the run cannot go on from there."""
        if not isinstance(self.model, Decoder) or self.model.config.norms == "post" or self.layer is None:
            return None
        return {"resid_pre": self.layer, STREAM: self.layer + 1}.get(self.model.site_table.resolve(self.site)[0].name)

    def _resumed(self, x: Array, start: int, mask: Array) -> tuple[Array, Array | None]:
        # not `Decoder.resume`, whose loop of traced length has no reverse mode
        model, table = self.model, self.model.site_table

        def body(x, row):
            number, params = row
            tap = Tap(table, {}, (), {}, number, mask)
            x = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
            return x, x if self.later else None

        numbers = jnp.arange(start, model.config.n_layers, dtype=jnp.int32)
        x, streams = jax.lax.scan(body, x, (numbers, jax.tree.map(lambda a: a[start:], model.blocks)))
        logits = model.head(x, Tap(table, {}, (), {}, None, mask))
        return logits, None if streams is None else streams[jnp.asarray(self.later) - start]
