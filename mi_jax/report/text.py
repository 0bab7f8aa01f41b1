"""How numbers and tokens are written in a report."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from markupsafe import Markup, escape

Real = int | float  # a Python number; what is drawn may be None or NaN, which is_number tells apart

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_CONTROL = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_VISIBLE = _CONTROL | {ord("\n"): "⏎", ord("\r"): "␍", ord("\t"): "⇥", 0xA0: "⍽"}
_IN_DOCUMENT = {code: mark for code, mark in _CONTROL.items() if chr(code) not in "\n\t"}


def number(value: Any) -> str:
    """A figure to three significant digits, with a true minus sign; what is not finite is `n/a`.

    Example:
      >>> number(0.97215), number(-12.34), number(134515008), number(True), number(None)
      ('0.972', '−12.3', '134,515,008', 'yes', 'n/a')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if value is None or not is_number(value):
        return "n/a"
    size = abs(value)
    if isinstance(value, int):
        text = f"{size:,}"
    elif size == 0:
        text = "0"
    elif size < 0.001 or size >= 1e7:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}×{power_of_ten(int(exponent))}"
    else:
        digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
        text = f"{size:,.{digits}f}"
    return f"−{text}" if value < 0 else text


def power_of_ten(exponent: int) -> str:
    """`10⁻⁴`."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def interval(low: Any, high: Any) -> str:
    """A confidence interval in brackets, or nothing where an end is missing."""
    return f"[{number(low)}, {number(high)}]" if is_number(low) and is_number(high) else ""


def is_number(value: Any) -> TypeGuard[Real]:
    """Whether the value is a finite number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def visible(token: Any) -> str:
    r"""A token as text in which nothing is invisible: `·` for a space at either end, `⏎` for a newline.

    Example:
      >>> visible(" Mary"), visible("\n\n"), visible("")
      ('·Mary', '⏎⏎', '∅')
    """
    text = str(token)
    if not text:
        return "∅"
    core = text.strip(" ")
    if not core:
        return "·" * len(text)
    left = len(text) - len(text.lstrip(" "))
    right = len(text) - len(text.rstrip(" "))
    return ("·" * left + core + "·" * right).translate(_VISIBLE)


def running_text(tokens: Sequence[Any], activations: Sequence[Any], top: Any, focus: Any = None) -> Markup:
    """Tokens as running text, each active one highlighted and underlined by its share of `top`.

    Tokens that are not active are joined without markup and keep their spaces, which keeps a long report small.
    """
    top = top if is_number(top) and top > 0 else max([a for a in activations if is_number(a)], default=0.0) or 1.0
    parts: list[Markup] = []
    for index, token in enumerate(tokens):
        activation = activations[index] if index < len(activations) else 0.0
        share = min(activation / top, 1.0) if is_number(activation) and activation > 0 else 0.0
        if share == 0 and index != focus:
            parts.append(escape(str(token).translate(_VISIBLE)))
            continue
        kind = Markup(' class="focus"') if index == focus else Markup("")
        parts.append(
            Markup('<wbr><b{} style="--a:{:.2f}" data-tip="{}">{}</b>').format(
                kind, share, f"activation {number(activation)}", visible(token)
            )
        )
    return Markup("").join(parts)


def crop(context: dict, before: int = 46, after: int = 24) -> dict:
    """The part of a context that fits on one line around its focus token, about `before` + `after` characters."""
    tokens, focus = [str(t) for t in context.get("tokens", [])], context.get("focus")
    activations = list(context.get("activations", []))
    if not tokens:
        return {"tokens": [], "activations": [], "focus": None}
    focus = focus if isinstance(focus, int) and 0 <= focus < len(tokens) else 0
    start, room = focus, before
    while start > 0 and room >= len(tokens[start - 1]):
        start -= 1
        room -= len(tokens[start])
    stop, room = focus + 1, after + room
    while stop < len(tokens) and room >= len(tokens[stop]):
        room -= len(tokens[stop])
        stop += 1
    return {"tokens": tokens[start:stop], "activations": activations[start:stop], "focus": focus - start}


def printable(document: str) -> str:
    """The document without what a browser or an encoder rejects: control characters and lone surrogates."""
    return document.translate(_IN_DOCUMENT).encode("utf-8", "replace").decode("utf-8")
