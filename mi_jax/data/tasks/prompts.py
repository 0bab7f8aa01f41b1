"""From text to tasks: clean and counterfactual prompts have to align token by token, and answers to be one token.

Whether they do depends on the tokenizer. `from_text` insists on it; `draw_task` draws until it has enough pairs that
align, and says in `Task.dropped` how many did not and why.
"""

import collections
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mi_jax.core.errors import InputError
from mi_jax.data.task import Measure, Task
from mi_jax.data.tokenizer import Tokenizer

_PATIENCE = 20


class Filled(NamedTuple):
    """A text made from a template, and where in it each field ends: the index of its last character."""

    text: str
    ends: Mapping[str, int]


class Pair(NamedTuple):
    """A clean and a counterfactual prompt from one template.

    Attributes:
      answers, distractors: texts that may follow the clean prompt, each to be one token there.
      roles: names for positions: the field whose last token it is, and how many tokens after.
      template: which wording.
    """

    clean: Filled
    corrupt: Filled
    answers: Sequence[str]
    distractors: Sequence[str]
    roles: Mapping[str, tuple[str, int]] = {}
    template: int = 0


def fill(template: str, **words: str) -> Filled:
    """Fills a template with fields as in `str.format`; a field is used once."""
    text, ends = "", {}
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal
        if field is not None:
            text += words[field]
            ends[field] = len(text) - 1
    return Filled(text, ends)


def one_token(tokenizer: Tokenizer, words: Iterable[str]) -> list[str]:
    """The words that are one token within a sentence, after a space."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text, special_tokens=False))

    return [word for word in words if length(f"a {word}") == length("a") + 1]


def from_text(
    name: str,
    tokenizer: Tokenizer,
    clean: Sequence[str],
    corrupt: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    distractors: Sequence[str | Sequence[str]],
    *,
    measure: Measure = "logit-difference",
    special_tokens: bool = True,
) -> Task:
    """A task from your own prompts. Nothing is dropped: a pair that does not align is an error.

    Args:
      answers, distractors: for every prompt one text, or several, that may follow it, usually with the space before.
      special_tokens: begin every prompt with what the model was trained with, such as `<bos>`, if it was.

    Raises:
      InputError: no pair, one text instead of a list, a clean and a counterfactual prompt of different numbers of
        tokens, or an answer that is not one token after its prompt.

    Example:
      `from_text("capitals", tokenizer, ["Capital of France:"], ["Capital of Italy:"], [" Paris"], [" Rome"])`
    """
    for what, given in (("clean", clean), ("corrupt", corrupt), ("answers", answers), ("distractors", distractors)):
        if isinstance(given, str):
            raise InputError(f"task {name!r}: {what} has one entry for every pair; got one text: [{given[:30]!r}]")
    if not len(clean) == len(corrupt) == len(answers) == len(distractors):
        raise InputError(
            f"task {name!r}: {len(clean)} clean and {len(corrupt)} counterfactual prompts, {len(answers)} answers and "
            f"{len(distractors)} distractors; there has to be one of each for every pair"
        )
    rows = []
    for i, (text, other, right, wrong) in enumerate(zip(clean, corrupt, answers, distractors, strict=True)):
        right, wrong = ([one] if isinstance(one, str) else one for one in (right, wrong))
        row = _row(tokenizer, Pair(Filled(text, {}), Filled(other, {}), right, wrong), special_tokens)
        if isinstance(row, _Problem):
            raise InputError(f"task {name!r}, prompt {i}: {row.kind} ({row.detail})")
        rows.append(row)
    return _task(name, tokenizer, rows, measure=measure)


def draw_task(
    name: str,
    tokenizer: Tokenizer,
    pairs: Iterable[Pair],
    n: int,
    *,
    measure: Measure = "logit-difference",
    difficulty: str = "",
    special_tokens: bool = True,
) -> Task:
    """The first n pairs that align token by token, and answers of one token; the others are dropped and counted.

    Raises:
      InputError: n is below one, or so few pairs align that they do not make n; the message says why.
    """
    if n < 1:
        raise InputError(f"task {name!r}: n={n}; draw at least one pair")
    rows: list[_Row] = []
    problems: collections.Counter[str] = collections.Counter()
    example = ""
    for drawn, pair in enumerate(pairs):
        if len(rows) == n or drawn >= _PATIENCE * n + 100:
            break
        row = _row(tokenizer, pair, special_tokens)
        if isinstance(row, _Problem):
            example = example or f"; the first: {row.detail}"
            problems[row.kind] += 1
        else:
            rows.append(row)
    reasons = ", ".join(f"{count} × {kind}" for kind, count in problems.most_common())
    total = len(rows) + problems.total()
    dropped = f"{problems.total()} of {total} prompts dropped: {reasons}{example}" if problems else ""
    if len(rows) < n:
        raise InputError(
            f"task {name!r}: {len(rows)} prompts align with this tokenizer, {n} are wanted; "
            f"{dropped or f'there are no more than {total}'}"
        )
    return _task(name, tokenizer, rows, measure=measure, difficulty=difficulty, dropped=dropped)


class _Row(NamedTuple):
    clean: list[int]
    corrupt: list[int]
    answers: list[int]
    distractors: list[int]
    roles: dict[str, int]
    template: int


class _Problem(NamedTuple):
    kind: str
    detail: str


def _row(tokenizer: Tokenizer, pair: Pair, special_tokens: bool) -> _Row | _Problem:
    """The tokens of a pair, or why it cannot be used."""

    def tokens(text: str) -> list[int]:
        ids = tokenizer.encode(text, special_tokens=False)
        # a prompt goes on, so nothing that ends a text stands after it
        return tokenizer.framed(ids, after=False) if special_tokens else ids

    clean, corrupt = tokens(pair.clean.text), tokens(pair.corrupt.text)
    if len(clean) != len(corrupt):
        return _Problem(
            "clean and counterfactual prompt of different length",
            f"{pair.clean.text!r} is {len(clean)} tokens, {pair.corrupt.text!r} is {len(corrupt)}",
        )
    if not (pair.clean.text and clean):
        return _Problem("an empty prompt", repr(pair.clean.text))
    places = [
        {field: len(ids) - len(offsets) + _token_at(offsets, end) for field, end in filled.ends.items()}
        for ids, filled in ((clean, pair.clean), (corrupt, pair.corrupt))
        for offsets in (tokenizer.bpe.encode(filled.text, add_special_tokens=False).offsets,)
    ]
    for field in places[0].keys() & places[1].keys():
        if places[0][field] != places[1][field]:
            return _Problem(
                "a word at different positions in the clean and the counterfactual prompt",
                f"{field!r} of {pair.clean.text!r} ends at token {places[0][field]}, there at {places[1][field]}",
            )
    chosen: list[list[int]] = []
    for texts in (pair.answers, pair.distractors):
        chosen.append([])
        for text in texts:
            ids = tokens(pair.clean.text + text)
            if ids[:-1] != clean:
                return _Problem(
                    "an answer that is not one token after its prompt",
                    f"{text!r} after {pair.clean.text[-30:]!r} makes the end {tokenizer.strings(ids[-4:])}",
                )
            chosen[-1].append(ids[-1])
    if not all(chosen) or set(chosen[0]) & set(chosen[1]):
        return _Problem("answers and distractors share a token, or there are none", repr(pair.clean.text))
    roles = {role: places[0][field] + after for role, (field, after) in pair.roles.items()}
    return _Row(clean, corrupt, chosen[0], chosen[1], roles | {"END": len(clean) - 1}, pair.template)


def _token_at(offsets: Sequence[tuple[int, int]], character: int) -> int:
    return next(i for i, (start, end) in enumerate(offsets) if start <= character < end)


def _task(name: str, tokenizer: Tokenizer, rows: Sequence[_Row], *, measure: Measure, **notes: str) -> Task:
    if not rows:
        raise InputError(f"task {name!r} has no prompts; give at least one pair")
    n = max(len(row.clean) for row in rows)
    mask = np.arange(n)[None, :] < np.array([len(row.clean) for row in rows])[:, None]
    clean, corrupt = np.full((2, len(rows), n), tokenizer.pad_id, np.int32)
    clean[mask] = [token for row in rows for token in row.clean]
    corrupt[mask] = [token for row in rows for token in row.corrupt]
    answer, answer_weight = _set([row.answers for row in rows], measure)
    distractor, distractor_weight = _set([row.distractors for row in rows], measure)
    return Task(
        name,
        clean=jnp.asarray(clean),
        corrupt=jnp.asarray(corrupt),
        mask=jnp.asarray(mask),
        answer=answer,
        distractor=distractor,
        position=jnp.asarray(mask.sum(1) - 1, jnp.int32),
        answer_weight=answer_weight,
        distractor_weight=distractor_weight,
        roles={role: jnp.asarray([row.roles[role] for row in rows], jnp.int32) for role in rows[0].roles},
        templates=jnp.asarray([row.template for row in rows], jnp.int32),
        measure=measure,
        **notes,
    )


def _set(rows: Sequence[Sequence[int]], measure: Measure) -> tuple[Int[Array, "batch *choice"], Array | None]:
    """Sets as one array, and weights where they are of different sizes."""
    sizes = np.array([len(row) for row in rows])
    if (sizes == 1).all():
        return jnp.asarray([row[0] for row in rows], jnp.int32), None
    present = np.arange(sizes.max())[None, :] < sizes[:, None]
    tokens = np.zeros(present.shape, np.int32)
    tokens[present] = [token for row in rows for token in row]
    if present.all():
        return jnp.asarray(tokens), None
    weight = present.astype(np.float32)
    if measure == "logit-difference":
        weight /= sizes[:, None].astype(np.float32)
    return jnp.asarray(tokens), jnp.asarray(weight)
