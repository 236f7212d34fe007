"""Which part of a response is its answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jspec.rl.math_reading import Answer, Equation, Number, Numeral, read
from jspec.rl.math_spelling import CLOSING, OPENING, clean, plain_characters

TAIL = 1000
"""Characters at the end of a response among which its last stated value is looked for."""
BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
TAG = "<answer>"
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def declared(response: str) -> str | None:
    """What stands in the last \\boxed{}, else in the last <answer></answer>; "" where that is not
    closed, None where there is neither."""
    for start in (response.rfind(r"\boxed"), response.rfind(r"\fbox")):
        box = BOX.match(response, start) if start >= 0 else None
        if box:
            return within_braces(response, box.end())
    start = response.rfind(TAG)
    if start < 0:
        return None
    inside, closed, _ = response[start + len(TAG):].partition("</answer>")
    return inside if closed else ""


def within_braces(text: str, start: int) -> str:
    """From `start`, which is behind an opening brace, to its closing one; "" if there is none."""
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[start:match.start()]
    return ""


TOKEN = re.compile(r"""
    (?P<math> \\(?:text\w*|math\w+|mbox|begin|end|operatorname)\s*\{[^{}\n]*\} | \\[A-Za-z]+ | \\.
            | \d+(?:\.\d+)?(?:[eE][-+]?\d+(?!\w))? | \*{1,2} | [-+/^_=<>|!%&{}()\[\],.;:$€£¥₹'] )
  | (?P<word> [^\W\d_][\w'’]* )
  | (?P<gap> [ \t]+ )
  | (?P<other> . )""", re.VERBOSE | re.DOTALL)
LAYOUT: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in [
        (r"\\\[.*?\\\]|\$\$.*?\$\$|\\begin\{.*?\\end\{", lambda match: match[0].replace("\n", " ")),
        (r"\\f?box(?:ed)?[ \t]+(?=[-+]?\d)", ""),  # without braces
        (r"(?m)^[ \t]*[-*+•][ \t]+", ""),  # of a list
        (r"(?<![\w)}])\*\*|\*\*(?![\w({\\]|-\d)", ""),  # bold; 2**3 stays
        (r"(?i)(?<!\w)(?:(?:a )?negative|minus) +(?=[\d.])", "-"), (r"[-=]+>", "→"),
    ]]
STOPS = set(".:;")
"""What ends a stretch where a blank or a line's end follows, unless it stands in a bracket."""
OPERATORS = set("+-*/^=<>")
JOINING = {"+", "*", "**", "^"}
NAMES = {"pi", "sqrt", "infinity"} | {"sin", "cos", "tan", "log", "ln", "exp"}
CONNECTORS = {"and", "or"}
ARTICLES = {"a", "A", "I"}
NUMBERED = re.compile(r"[^\W\d_]\d*")


def last_value(response: str) -> Answer | None:
    """The last number or formula that the response states, with its unit; None if there is none.

    What counts is the last stretch of mathematics within words: "17 + 25 = 42 apples", and not the
    25 in "17 + 25 is". Values that "and", "or" or a comma joins are one list.
    """
    tail = response[-TAIL:]
    if len(response) > TAIL:
        tail = tail.partition(" ")[2]  # what is cut may be half of a number
    for pattern, replacement in LAYOUT:
        tail = pattern.sub(replacement, tail)
    whole = read(tail) if len(response) <= TAIL else None
    if isinstance(whole, Number | Numeral):  # signs that end a stretch within words may be its own
        return whole
    stretches = list(mathematics(plain_characters(tail)))
    if not stretches:
        return read(tail)
    stretch, following = stretches[-1]
    if stretch != tail.strip():
        stretch = stretch.rstrip("!")  # of the sentence; what stands alone is a factorial
    value = read(stretch)
    if following and unit_of(value) == "":
        with_unit = read(f"{stretch} {following}")
        return value if unit_of(with_unit) is None else with_unit
    return value


def unit_of(value: Answer | None) -> str | None:
    """Of a number, or of one that an equation ends in; "" where it has none, None for all else."""
    number = value.right if isinstance(value, Equation) else value
    return number.unit if isinstance(number, Number) else None


def mathematics(text: str) -> Iterator[tuple[str, str]]:
    """(stretch of mathematics, the word that follows it or "") of each stretch that says
    something."""
    tokens = [(match.lastgroup, match[0]) for match in TOKEN.finditer(text)] + [("other", "")]
    stretch, depth = "", 0
    for place, (kind, token) in enumerate(tokens):
        if kind == "word" and token.casefold() in CONNECTORS:
            kind, token = "math", ","
        elif kind == "word" and (is_symbol(token, tokens, place) or within_command(stretch)):
            kind = "math"
        step = (token in OPENING) - (token in CLOSING)
        stops = (depth + step < 0
                 or (depth == 0 and token in STOPS and tokens[place + 1][0] in ("gap", "other")))
        if kind == "gap" or (kind == "math" and not stops):
            stretch, depth = stretch + token, depth + step
            continue
        stretch = stretch.strip("([ ") if depth else stretch
        yield from trimmed(stretch, unit(tokens, place)
                           if kind == "word" and stretch.endswith((" ", "\t")) else "")
        stretch, depth = "", 0


def unit(tokens: list[tuple[str, str]], place: int) -> str:
    """The word at `place`, and what it is divided by: km/h."""
    (_, sign), (kind, below) = (tokens[place + 1:place + 3] + 2 * [("", "")])[:2]
    return tokens[place][1] + (f"/{below}" if sign == "/" and kind == "word" else "")


def is_symbol(word: str, tokens: list[tuple[str, str]], place: int) -> bool:
    """A word that is mathematics: a function's name, a letter, with an index too, what a formula
    consists of ($xy$), or what is written right behind a number (2k, 5cm)."""
    if word.partition("_")[0] in NAMES or (place and tokens[place - 1][1][-1].isdigit()):
        return True
    beside = [token for _, token in tokens[max(0, place - 2):place] + tokens[place + 1:place + 3]]
    if place and tokens[place - 1][1] == "$":
        return True
    if joined(tokens[place + 1:place + 5]) or joined(tokens[max(0, place - 4):place][::-1]):
        return True
    if len(word.partition("_")[0]) == 1 and word not in ARTICLES:
        return True
    return bool(NUMBERED.fullmatch(word)) and any(token in OPERATORS for token in beside)


def within_command(stretch: str) -> bool:
    """Does it end within the braces of a command, as \\frac{ does?"""
    return "\\" in stretch and stretch.count("{") > stretch.count("}")


def joined(beside: list[tuple[str, str]]) -> bool:
    """Is what stands beside a word, from it on, a sign and another operand, as in tax*42, tax * 42,
    ab+1 and ba^2?"""
    kinds = [kind for kind, _ in beside]
    sign, operand = ([token for kind, token in beside if kind != "gap"] + ["", ""])[:2]
    if not operand[-1:].isalnum():
        return False
    return (sign in JOINING and "gap" not in kinds[:2]
            or (sign == "*" and kinds[::2] == ["gap", "gap"]))


LEADING = re.compile(r"^(?:[ \t,;:*'_]|\.(?!\d)|(?<=\.)\.)*")  # the point of .5 is its own


def trimmed(stretch: str, following: str) -> Iterator[tuple[str, str]]:
    """The stretch without what belongs to the sentence around it, if anything is left that says
    something."""
    stretch = LEADING.sub("", stretch, count=1).rstrip(" \t.,;:*'_")
    if stretch.startswith("- ") or stretch.endswith(" -"):
        stretch = stretch.strip("- ")  # dashes between words: a minus stands at its number
    if (not re.fullmatch(r"/ ?[A-Za-z]+(?: ?\^ ?\{?[23]\}?|[23])?", stretch)
        and re.search(VALUE, stretch)):
        yield stretch, following


VALUE = re.compile(
    r"\d|\\[A-Za-z]|[A-Za-z].*[-+*/^=]|[-+*/^=].*[A-Za-z]"
    r"|^[A-Za-z]$|^-?(pi|infinity)$|\$[A-Za-z]+\$")


ANCHOR = re.compile(r"(?:(?:answer|option|choice)(?: is)?|=)\s*:?\s*([^.:=\n]+)$", re.IGNORECASE)


def last_words(response: str) -> Answer | None:
    """What the response says in words: what follows "answer is" or "answer:" at its end, else its
    last line."""
    line = clean(response[-TAIL:].strip().rpartition("\n")[2])
    anchored = ANCHOR.search(line)
    return read(anchored[1] if anchored else line)
