"""Real text, cut into contexts of equal length, with whole documents held out."""

import ast
import dataclasses
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mi_jax.core.errors import InputError
from mi_jax.data.documents import TextError
from mi_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Tokens `[context pos]`, in training and held out, from different documents."""

    train: Int[np.ndarray, "context pos"]
    held_out: Int[np.ndarray, "held_out_context pos"]


def python_topics() -> list[str]:
    """The documents of `pydoc_data.topics`: English prose about Python, in every Python installation."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def python_docstrings() -> list[str]:
    """The docstrings of the standard library, a document a module: 1.6 million characters of prose and examples."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
    documents = []
    for file in sorted(root.rglob("*.py")):
        if left_out.intersection(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # templates and files for other versions
            continue
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [text for node in ast.walk(tree) if isinstance(node, holders) and (text := ast.get_docstring(node))]
        if found:
            documents.append("\n\n".join(found))
    return documents


def contexts(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    held_out_fraction: float,
    seed: int,
    special_tokens: bool = True,
) -> Contexts:
    """Tokenises, holds out random whole documents of about that fraction of the tokens, and packs the rest.

    A document is followed by the next one. Where the model was trained with special tokens around a text
    (`Tokenizer.before`, `Tokenizer.after`), every document has them, and every context begins as a text does;
    `Tokenizer.special_ids` are the tokens whose activations are not the text's.

    Args:
      special_tokens: False leaves these out.

    Raises:
      InputError: one text instead of a list, a length that leaves no room for text, or a fraction that is none.
      TextError: too little text for one context on either side.
    """
    if isinstance(documents, str):
        raise InputError("contexts takes a list of texts, got one text: read_documents(path) reads a file into a list")
    first = list(tokenizer.before) if special_tokens else []
    if length <= len(first):
        raise InputError(f"a context of length={length} has no room for text; it has {len(first) + 1} tokens at least")
    if not 0 < held_out_fraction < 1:
        raise InputError(f"held_out_fraction={held_out_fraction:g}; it is above 0 and below 1")
    rows = [tokenizer.encode(document, special_tokens=False) for document in documents]
    if special_tokens:
        rows = [tokenizer.framed(row) if row else row for row in rows]
    wanted = held_out_fraction * sum(map(len, rows))
    held: list[int] = []
    n_held = 0
    for i in np.random.default_rng(seed).permutation(len(rows)):
        # a document that would overshoot is skipped, so that a few long ones do not take the training text
        if n_held + len(rows[i]) <= wanted:
            held.append(int(i))
            n_held += len(rows[i])

    training = set(range(len(rows))) - set(held)
    split = Contexts(*(_packed([rows[i] for i in sorted(side)], first, length) for side in (training, held)))
    if not len(split.train) or not len(split.held_out):
        raise TextError(
            f"the text has {sum(map(len, rows))} tokens in {len(rows)} documents: too little for contexts of {length} "
            f"with a fraction of {held_out_fraction} held out"
        )
    return split


def _packed(rows: Sequence[Sequence[int]], first: list[int], length: int) -> Int[np.ndarray, "context pos"]:
    """One document after the other, cut into contexts that all begin with the first tokens."""
    flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])
    start, out = 0, []
    while True:
        # where a document begins, it brings the first tokens itself
        lead = [] if flat[start : start + len(first)].tolist() == first else first
        piece = flat[start : start + length - len(lead)]
        if len(lead) + len(piece) < length:
            return np.asarray(out, np.int32).reshape(-1, length)
        out.append(np.concatenate([np.asarray(lead, np.int32), piece]))
        start += len(piece)
