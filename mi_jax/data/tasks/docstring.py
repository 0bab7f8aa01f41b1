"""Docstring completion (Heimersheim & Janiak 2023): the third argument of a function after two are documented.

After `def port(self, load, size, files, last, root):` and a docstring that has ":param load: …", ":param size: …" and
":param", the answer is " files", against the four other arguments. The counterfactual has other arguments, and
documents others still, so that nothing of the answer is in it.
"""

from collections.abc import Iterator

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task
from mi_jax.data.tasks.prompts import Pair, draw_task, fill, one_token
from mi_jax.data.tokenizer import Tokenizer

ARGUMENTS = (
    "data name file value test result line user key request path output node item model response text version log "
    "string field start number sub index error image message size event state row parent end files form query label "
    "run action target code table source first options module status group content results last base color order match "
    "tag title call session token server host date mode page header task shape load port resource root"
).split()
DESCRIPTIONS = (
    "oil column piece crime population unit dark water street letter paper garden market summer winter money music "
    "north south road stone horse river window doctor teacher animal church bridge energy season weather"
).split()
FUNCTIONS = "port make open send build check find draw read write move split".split()
TEMPLATES = (
    "def {function}(self, {A_def}, {B_def}, {C_def}, {D_def}, {E_def}):\n"
    '    """{d0} {d1} {d2}\n\n'
    "    :param {A_doc}: {d3} {d4}\n"
    "    :param {B_doc}: {d5} {d6}\n"
    "    :param",
    "def {function}(self, {A_def}, {B_def}, {C_def}, {D_def}, {E_def}):\n"
    '    """{d0} {d1}.\n\n'
    "    @param {A_doc}: {d2} {d3} {d4}\n"
    "    @param {B_doc}: {d5} {d6}\n"
    "    @param",
)
_FIELDS = ("A_def", "B_def", "C_def", "D_def", "E_def")
_COMMA_AFTER_B = {",_B": ("B_def", 1)}
DIFFICULTY = (
    "SmolLM2-135M (120 pairs, seed 0): the third argument above the four others in 0.950 [0.895, 0.977], and the top "
    "token in as many; chance 0.2, the counterfactual 0.17."
)


def docstring(tokenizer: Tokenizer, n: int, *, seed: int, special_tokens: bool = True) -> Task:
    """The argument that comes next in the definition against the others of it.

    Raises:
      InputError: fewer than twelve of the names are one token with this tokenizer.
    """
    names, words = one_token(tokenizer, ARGUMENTS), one_token(tokenizer, DESCRIPTIONS)
    if len(names) < 12 or len(words) < 7:
        raise InputError(
            f"docstring: {len(names)} argument names and {len(words)} words are one token with this tokenizer; the "
            "task needs 12 and 7"
        )
    return draw_task(
        "docstring",
        tokenizer,
        _pairs(np.random.default_rng(seed), names, words),
        n,
        difficulty=DIFFICULTY,
        special_tokens=special_tokens,
    )


def _pairs(rng: np.random.Generator, names: list[str], words: list[str]) -> Iterator[Pair]:
    i = 0
    while True:
        drawn = [str(name) for name in rng.choice(names, 12, replace=False)]
        arguments, others, documented = drawn[:5], drawn[5:10], drawn[10:]
        shared = {f"d{j}": str(word) for j, word in enumerate(rng.choice(words, 7, replace=False))}
        shared["function"] = str(rng.choice(FUNCTIONS))
        template = i % len(TEMPLATES)
        clean, corrupt = (
            fill(TEMPLATES[template], **dict(zip(_FIELDS, five, strict=True)), A_doc=two[0], B_doc=two[1], **shared)
            for five, two in ((arguments, arguments[:2]), (others, documented))
        )
        wrong = [f" {name}" for j, name in enumerate(arguments) if j != 2]
        roles = {field: (field, 0) for field in ("A_def", "B_def", "C_def", "A_doc", "B_doc")} | _COMMA_AFTER_B
        yield Pair(clean, corrupt, [f" {arguments[2]}"], wrong, roles, template)
        i += 1
