"""Generation: the prompts once, then token by token with the keys and values kept, in one program."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from mi_jax.core.apply import Taps, check_positions
from mi_jax.core.edits import AblateMean, AblateMeanPerPosition, AblateResample, Edit, Noise
from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, Site, SiteError
from mi_jax.core.taps import Slots, Tap
from mi_jax.core.transforms import Captured, Intervened, SiteModel, jit
from mi_jax.core.values import has_positions
from mi_jax.models.cache import FillLayout, Kept, StepLayout, empty
from mi_jax.models.decoder import Decoder
from mi_jax.models.embedding import check_tokens, known_values
from mi_jax.models.sampling import choose
from mi_jax.models.scan import scan_layers


class Generated(eqx.Module):
    """What a model wrote after its prompts.

    Attributes:
      tokens: after a stop token, that token again.
      mask: True up to the stop token, itself included.
      acts: the captured sites, with one position per token: that at which the model chose it. So the first is the
        prompt's last position. Where a site has an axis `key`, that one counts positions of the whole text.
      nan_step: the first token of each text that was chosen from NaN logits, −1 for none. There are others only where
        `generate` is itself traced, as under `jax.vmap`: elsewhere they are an error.
    """

    tokens: Int[Array, "batch new"]
    mask: Bool[Array, "batch new"]
    acts: dict[str, Array]
    nan_step: Int[Array, " batch"]


def generate(
    model: SiteModel,
    tokens: Int[Array, "batch pos"],
    mask: Bool[Array, "batch pos"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Sequence[int] | None = (),
    key: PRNGKeyArray | None = None,
) -> Generated:
    """Continues prompts of any lengths, all in one compiled program; other values of the same shapes use it again.

    Args:
      model: a decoder, also under `mi.intervene` and `mi.capture`. An edit with a `pos` is made in the prompt. One
        without is made there and at every generated token, where a function of `mi.transform` sees one position.
      tokens: padded on the right where the lengths differ, or on the left.
      mask: True at real tokens; None means all are.
      temperature: 0 takes the most likely token, everything else draws with `key`.
      top_k, top_p: draw from the k largest logits, or from the most likely tokens that together reach probability p;
        both need a temperature.
      stop: tokens that end a text.

    Raises:
      InputError: no decoder, no prompt, prompts that are empty, padded in between or not of the vocabulary, a text
        longer than the context, sampling without a key, or logits that became NaN, which is looked at once all is
        written.
      SiteError: an edit of a position that the prompts lack, or one of the generated tokens that has no meaning there:
        whose value depends on other positions, or on other texts where their positions can differ.

    Example:
      `mi.generate(mi.intervene(model, mi.add("resid_post", direction, layer=8)), tokens, max_new_tokens=32).tokens`
    """
    decoder, taps, wanted = _unwrapped(model)
    _check(decoder, tokens, mask, max_new_tokens, temperature, top_k, top_p, key)
    check_positions(taps, tokens.shape[1])
    stops = _stops(decoder, stop)
    aligned = not stops and _same_places(mask)
    step_taps = {}
    for name, edits in taps.items():
        site, n_pos = decoder.site_table.resolve(name)[0], tokens.shape[1]
        step_taps[name] = tuple(edit for edit in edits if _every_token(edit, site, n_pos, aligned=aligned))
    step_taps = {name: edits for name, edits in step_taps.items() if edits}
    sampling = {
        "temperature": jnp.asarray(temperature, jnp.float32) if temperature else None,
        "top_k": None if top_k is None else int(top_k),
        "top_p": None if top_p is None else jnp.asarray(top_p, jnp.float32),
    }
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    run = _Generation(decoder, taps, step_taps, sampling, wanted, int(max_new_tokens), stops)
    made = jit(run)(tokens, mask, key=key if temperature else None)
    _check_finite(decoder, made)
    return made


class _Generation(eqx.Module):
    """The compiled program."""

    model: Decoder
    prompt_taps: Taps
    step_taps: Taps
    sampling: dict[str, Any]
    wanted: tuple[At, ...] = eqx.field(static=True)
    n_new: int = eqx.field(static=True)
    stops: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, tokens: Array, mask: Array, *, key: PRNGKeyArray | None) -> Generated:
        batch, n_pos = tokens.shape
        first = jnp.argmax(mask, axis=1).astype(jnp.int32)
        end = first + mask.sum(1, dtype=jnp.int32)
        logits, kept, acts = self._prompt(tokens, mask, end, n_pos + self.n_new)

        def chosen(number, logits, done, last, nan_step):
            token = choose(logits, key=None if key is None else jax.random.fold_in(key, number), **self.sampling)
            token = jnp.where(done, last, token)
            is_nan = jnp.isnan(logits).any(-1) & ~done & (nan_step < 0)
            done = done | jnp.isin(token, jnp.asarray(self.stops, jnp.int32))
            return token, done, jnp.where(is_nan, number, nan_step)

        def body(state):
            number, token, done, nan_step, kept, tokens, real, acts = state
            real = real.at[:, number].set(~done)
            logits, kept, new = self._step(token, end + number - 1, first, kept)
            token, done, nan_step = chosen(number, logits, done, token, nan_step)
            return (
                number + 1,
                token,
                done,
                nan_step,
                kept,
                tokens.at[:, number].set(token),
                real,
                jax.tree.map(lambda rows, row: rows.at[number].set(row), acts, new),
            )

        zeros = jnp.zeros(batch, jnp.int32)
        token, done, nan_step = chosen(jnp.zeros((), jnp.int32), logits, jnp.zeros(batch, bool), zeros, zeros - 1)
        buffers = jax.tree.map(lambda x: jnp.zeros((self.n_new, *x.shape), x.dtype).at[0].set(x), acts)
        written = jnp.broadcast_to(token[:, None], (batch, self.n_new))
        real = jnp.zeros((batch, self.n_new), bool).at[:, 0].set(True)
        state = (jnp.ones((), jnp.int32), token, done, nan_step, kept, written, real, buffers)
        if self.stops:
            state = jax.lax.while_loop(lambda s: (s[0] < self.n_new) & ~s[2].all(), body, state)
        else:
            state = jax.lax.fori_loop(1, self.n_new, lambda _, s: body(s), state)
        number, token, _, nan_step, _, written, real, buffers = state
        # where all texts have ended early
        ended = jnp.arange(self.n_new, dtype=jnp.int32)[None, :] >= number
        written = jnp.where(ended, token[:, None], written)
        acts = {name: jnp.moveaxis(x, 0, self._pos_axis(name)) for name, x in buffers.items()}
        return Generated(written, real, acts, nan_step)

    def _prompt(self, tokens: Array, mask: Array, end: Array, n_max: int) -> tuple[Array, Kept, dict[str, Array]]:
        """Logits after every prompt, keys and values, and what was captured at the last position."""
        model = self.model
        layers, outer, dtype = self._opened(self.prompt_taps, tokens, mask)
        x, acts, kept = layers(
            enter=lambda number, kept: FillLayout(mask, dict(kept), number),
            state=empty(model.config, tokens.shape[0], n_max, dtype),
        )
        last = end - 1
        if outer.touches("final_norm") or outer.touches("logits"):
            logits = jnp.take_along_axis(model.head(x, outer), last[:, None, None], axis=1)
        else:
            logits = model.head(x, outer, last)
        seen = acts | outer.seen
        return logits[:, 0], kept, {name: self._at_last(name, value, last, n_max) for name, value in seen.items()}

    def _step(self, token: Array, place: Array, first: Array, kept: Kept) -> tuple[Array, Kept, dict[str, Array]]:
        """Logits after one more token, the keys and values with it, and what was captured."""
        layers, outer, _ = self._opened(self.step_taps, token[:, None], positions=(place - first)[:, None])
        x, acts, kept = layers(enter=lambda number, kept: StepLayout(dict(kept), number, place, first), state=kept)
        logits = self.model.head(x, outer)
        seen = acts | outer.seen
        return logits[:, 0], kept, {name: x.squeeze(self._pos_axis(name)) for name, x in seen.items()}

    def _opened(
        self, taps: Taps, tokens: Array, mask: Array | None = None, positions: Array | None = None
    ) -> tuple[Callable[..., Any], Tap, Any]:
        """The layers as a function of how they see the tokens, the tap outside of them, and the stream's dtype."""
        model, table = self.model, self.model.site_table
        slots = Slots(self.wanted, table)
        x, mask = model.embedded(tokens, mask, positions=positions)
        outer = Tap(table, taps, slots.single, {}, None, mask)
        x = outer("embed", x)
        layers = functools.partial(
            scan_layers, model, x, mask, taps, slots, model.config.n_layers, leave=lambda layout: layout.kept
        )
        return layers, outer, x.dtype

    def _axes(self, name: str) -> tuple[str, ...]:
        """Of the captured array: the layer axis is dropped where one layer was asked for."""
        site: Site = self.model.site_table.resolve(name)[0]
        one = any(at.site == name and isinstance(at.layers, int) for at in self.wanted)
        return site.slice_axes if one else site.axes

    def _pos_axis(self, name: str) -> int:
        axes = self._axes(name)
        return axes.index("pos" if "pos" in axes else "query")

    def _at_last(self, name: str, x: Array, last: Int[Array, " batch"], n_max: int) -> Array:
        """The last position of every prompt; keys that do not exist yet get the value that hides them."""
        axes, axis = self._axes(name), self._pos_axis(name)
        places = last.reshape([-1 if a == "batch" else 1 for a in axes])
        x = jnp.take_along_axis(x, places, axis=axis).squeeze(axis)
        if "key" not in axes:
            return x
        hidden = float(jnp.finfo(x.dtype).min) if name == "attn.scores" else 0.0
        room = [(0, n_max - x.shape[-1] if i == x.ndim - 1 else 0) for i in range(x.ndim)]
        return jnp.pad(x, room, constant_values=hidden)


def _unwrapped(model: Any) -> tuple[Decoder, dict[str, tuple[Edit, ...]], tuple[At, ...]]:
    """The decoder, the edits around it in order, and the captures."""
    taps: dict[str, tuple[Edit, ...]] = {}
    wanted: list[At] = []
    while isinstance(model, Intervened | Captured):
        if isinstance(model, Captured):
            wanted = [*model.wanted, *wanted]
        else:
            taps = {name: (*model.edits.get(name, ()), *taps.get(name, ())) for name in (*model.edits, *taps)}
        model = model.model
    if not isinstance(model, Decoder):
        raise InputError(f"{type(model).__name__} is not a native decoder: it has no cache to generate with")
    if not model.config.causal or model.config.head == "none":
        raise InputError(f"{model.config.name} is an encoder: it predicts no next token")
    return model, taps, model.site_table.normalise(tuple(wanted))


def _stops(decoder: Decoder, stop: Any) -> tuple[int, ...]:
    if stop is None:
        return ()
    stops = tuple(map(int, (stop,) if isinstance(stop, int | np.integer) else stop))
    if outside := [token for token in stops if not 0 <= token < decoder.config.d_vocab]:
        raise InputError(
            f"stop={outside[0]} is no token of {decoder.config.name}, which has {decoder.config.d_vocab} of them, so "
            "no text would end there"
        )
    return stops


def _every_token(edit: Edit, site: Site, n_pos: int, *, aligned: bool) -> bool:
    """Whether an edit is made at generated tokens too.

    Args:
      n_pos: of the prompts.
      aligned: the texts have the same length at every step.
    """
    if edit.index.pos is not None:
        return False
    if isinstance(edit, Noise) or (isinstance(edit, AblateMean) and not isinstance(edit, AblateMeanPerPosition)):
        raise SiteError(
            f"{type(edit).__name__} of site {edit.site!r} has no meaning at a single generated token; give it pos=… to "
            "make it in the prompt, or use an edit with a fixed value, such as a mean over a data set"
        )
    if edit.reading.captured:
        raise SiteError(
            f"the captured value for site {edit.site!r} is of a prompt and has none for generated tokens; give it "
            "pos=…, such as pos=range(n) for all n positions of a prompt, or pass an array that is the same everywhere"
        )
    if eqx.is_array(edit.value) and has_positions(edit.value, edit.reading, site, n_pos):
        raise SiteError(
            f"the value for site {edit.site!r} has shape {edit.value.shape}, so it is of the {n_pos} positions of the "
            "prompt and not of generated tokens; give it pos=…, such as pos=range(n) for all n positions of a prompt, "
            f"or name the axes that it has at every token, as in mi.named(value, 'batch {site.axes[-1]}')"
        )
    if isinstance(edit, AblateMeanPerPosition | AblateResample) and not aligned:
        raise SiteError(
            f"{type(edit).__name__} of site {edit.site!r} takes values of other texts at the same position, which "
            "generated tokens have only in prompts of one length without stop tokens; give it pos=… to make it in the "
            "prompt, or generate from prompts of one length at a time"
        )
    return True


def _same_places(mask: Any) -> bool:
    """Whether all prompts are known to have their tokens at the same places."""
    if mask is None:
        return True
    return not isinstance(mask, jax.core.Tracer) and bool((np.asarray(mask) == np.asarray(mask)[:1]).all())


def _check_finite(decoder: Decoder, made: Generated) -> None:
    """Raises InputError where a text was written from NaN logits, unless the result is traced."""
    steps = known_values(made.nan_step)
    if steps is not None and (steps >= 0).any():
        row = int(np.where(steps < 0, made.tokens.shape[1], steps).argmin())
        when = f"from generated token {steps[row]} on" if steps[row] else "after the prompt already"
        raise InputError(
            f"the logits of {decoder.config.name} are NaN in {(steps >= 0).sum()} of {len(steps)} texts, first in text "
            f"{row} {when}: check the weights and the edits, or compute in float32"
        )


def _check(decoder: Decoder, tokens, mask, n_new: int, temperature, top_k, top_p, key) -> None:
    config = decoder.config
    for name, number in (("max_new_tokens", n_new), ("top_k", top_k)):
        if not (name == "top_k" and number is None) and not isinstance(number, int | np.integer):
            raise InputError(f"{name} is a whole number, got {number!r}")
    if n_new < 1:
        raise InputError(f"max_new_tokens is at least 1, got {n_new}")
    if not hasattr(tokens, "shape"):
        raise InputError(f"tokens are an array [batch pos], such as jnp.asarray([[5, 9]]); got {type(tokens).__name__}")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise InputError(
            f"prompts have shape [batch pos], with at least one prompt of at least one token; got {tokens.shape}"
        )
    if tokens.shape[1] + n_new > config.n_ctx:
        raise InputError(
            f"{tokens.shape[1]} tokens and {n_new} new ones are more than the context of {config.name}, {config.n_ctx}"
        )
    check_tokens(config, tokens)
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: it is 0 for the most likely token, or a positive number")
    if temperature and not hasattr(key, "dtype"):
        raise InputError(f"temperature={temperature} draws tokens: pass key=jax.random.key(…), got key={key!r}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k is at least 1 and top_p in (0, 1]; got top_k={top_k}, top_p={top_p}")
    if not temperature and not (top_k is None and top_p is None):
        raise InputError("top_k and top_p choose among drawn tokens: pass a temperature, such as 1.0, and a key")
    if mask is None or isinstance(mask, jax.core.Tracer):
        return
    real = np.asarray(mask, bool)
    begins = np.diff(real.astype(int), axis=1, prepend=0) > 0
    if real.shape != tokens.shape or (begins.sum(1) != 1).any():
        raise InputError(
            "the mask has the shape of the tokens and is True at the real ones, at least one in every prompt, with no "
            "gap between them: pad on the right, or on the left"
        )
