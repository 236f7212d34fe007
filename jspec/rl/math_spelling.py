"""The many spellings of LaTeX and Unicode brought to one, and texts cut where their brackets allow
it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "‑": "-", "⁄": "/", "∕": "/", "＝": "=", "≈": r"\approx ",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "√": r"\sqrt ", "°": r"^{\circ}", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "θ": r"\theta ", "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4",
    "¾": " 3/4", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
})
PARTS = {"a": 1, "one": 1, "two": 2, "three": 3, "half": 2, "third": 3, "quarter": 4}
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
EXPONENT = re.compile(f"[{RAISED}]+")
LOWERED = str.maketrans(RAISED, "0123456789+-")
REWRITES: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement) for pattern, replacement in [
        (r"\\\[|\\\]|\\\(|\\\)|\$\$", " "),
        (r"\\\$", "$ "),  # money, now that a $ around a formula is told from it by the blank
        (r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\{,\}|(?<=\d)\\[,!] ?(?=\d{3}(?!\d))", ","),  # thousands
        (r"(?<!\\)\\!", ""), (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\\thinspace", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac ?(\d) ?(?=\{)", r"\\frac{\1}"), (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal)|math(?:rm|bf|it|sf)|mbox|emph|bf|rm)\s*(?=\{)",
         r"\\text"), (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1 "),
        (r"\\(?:le|ge)slant(?![A-Za-z])", lambda match: match[0][:3] + " "),
        (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty "),
        (r"(?<![\\A-Za-z])(pi|sqrt)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp)(?= ?[_({\\\d]| [a-z](?![A-Za-z]))", r"\\\1 "),
        (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt ?(\d+|[a-z](?![A-Za-z]))", r"\\sqrt{\1}"),
        (r"\\(langle|rangle)(?![A-Za-z])", lambda match: "⟨" if match[1] == "langle" else "⟩"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "), (r"\s+", " "),
        (r"(?<=\d) and (a|one|two|three) (half|third|quarter)s?(?![A-Za-z])",
         lambda match: f" {PARTS[match[1]]}/{PARTS[match[2]]}"), (r"\^ ?(-\d+)", r"^{\1}"),
        (r"(?<=[\w)}]) ?\*\* ?(?:\((-?\w+)\)|(-?\w+))",
         lambda match: f"^{{{match[1] or match[2]}}}"),
    ]]
QUOTED = re.compile(r"(\*{1,3}|_{2}|`{1,3}|[\"“”'‘])(.+?)(\*{1,3}|_{2}|`{1,3}|[\"“”'’])", re.DOTALL)
BRACKETS = re.compile(r"\\[{}]|\\(begin|end)(?![A-Za-z])|\\.|[()\[\]{}⟨⟩]")
OPENING = {"(", "[", "{", r"\{", r"\begin", "⟨"}
CLOSING = {")", "]", "}", r"\}", r"\end", "⟩"}


def clean(text: str) -> str:
    """`text` in one spelling, without markdown, quotes, math mode or a box around it and without a
    full stop."""
    text = text.strip()
    while (quoted := QUOTED.fullmatch(text)) and len(quoted[2]) < len(text):
        text = quoted[2].strip()
    text = spell(text)
    boxed = re.fullmatch(r"\\f?box(?:ed)? ?\{(.*)\}", text)
    if boxed:
        return clean(boxed[1])
    return text.strip().rstrip(".,;:").strip()


def spell(text: str) -> str:
    """`text` in one spelling, nothing stripped from its ends."""
    text = plain_characters(text)
    # pairs of them are math mode, a lone one is money
    if text.replace(r"\$", "").count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text


def plain_characters(text: str) -> str:
    """`text` without the characters that LaTeX has commands for."""
    return EXPONENT.sub(lambda raised: f"^{{{raised[0].translate(LOWERED)}}}",
                        text).translate(CHARACTERS)


def squeeze(text: str) -> str:
    return text.replace(" ", "")


def split(text: str, separators: str) -> Iterator[str]:
    """The parts of `text` between `separators` (characters) that stand in no bracket; any bracket
    closes any."""
    depth = start = 0
    inside = [(match.start(), match[0]) for match in BRACKETS.finditer(text)]
    steps = {place: (sign in OPENING) - (sign in CLOSING) for place, sign in inside}
    for place, character in enumerate(text):
        depth += steps.get(place, 0)
        if depth == 0 and character in separators:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def nesting(text: str) -> int:
    """How deep brackets stand in brackets."""
    deepest = depth = 0
    for match in BRACKETS.finditer(text):
        depth += (match[0] in OPENING) - (match[0] in CLOSING)
        deepest = max(deepest, depth)
    return deepest


def enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening bracket, what is inside, closing bracket) of a text that one pair of brackets
    encloses."""
    depth = 0
    for match in BRACKETS.finditer(text):
        depth += (match[0] in OPENING) - (match[0] in CLOSING)
        if match.start() == 0:
            opening = match
        elif depth == 0:
            if match.end() == len(text) and text.startswith(("(", "[", "{", r"\{", "⟨")):
                return opening[0], text[opening.end():match.start()], match[0]
            return None
    return None
