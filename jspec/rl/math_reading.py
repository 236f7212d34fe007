"""What a written answer says: numbers, numerals, words, equations, lists, sets, intervals, and
formulas for all else.

Text in, values out; nothing is calculated. Reward processes import this module, so it imports
nothing heavy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction

from jspec.rl.math_spelling import clean, enclosed, nesting, split, squeeze

MAX_CHARACTERS = 1000
"""Of an answer; longer ones are not read."""
MAX_NESTING = 20
"""Of its brackets."""
MAX_EXPONENT = 1000
"""Of ten in a plain number."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was read: `text` in one spelling. The subclasses say what it is."""

    text: str


class Formula(Answer):
    """What only computer algebra understands, expressions that are still to be worked out
    included."""


class Words(Answer):
    """Tuesday; no solution; the letter of a choice."""


@dataclasses.dataclass(frozen=True)
class Number(Answer):
    """A plain number. `unit` is "" where there is none; `reduced` is false for a fraction such as
    2/4 or 3 / 4, which may be a division that the prompt asks for."""

    value: Fraction
    unit: str = ""
    reduced: bool = True


@dataclasses.dataclass(frozen=True)
class Numeral(Answer):
    """Digits that equal only themselves: a ratio 3:4, a time 12:30, 213_4 to the base 4. `parts`
    has them in turn."""

    parts: tuple[str, ...]
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Equation(Answer):
    """left = ... = right; `named` where the left side is no more than a name, such as x or f(x)."""

    left: str
    right: Answer
    named: bool


@dataclasses.dataclass(frozen=True)
class Group(Answer):
    """Several answers within brackets: a tuple, an interval, a set; "" for the brackets of a list,
    "∪" of a union, ":" of a ratio."""

    opening: str
    items: tuple[Answer, ...]
    closing: str


PLAIN = re.compile(r"-?[0-9]{1,99}(?:\.[0-9]{1,99})?")


def read(text: str) -> Answer | None:
    """What `text` says, or None where it says nothing. Never raises; a Formula may turn out to be
    none."""
    if PLAIN.fullmatch(text):  # most answers: a file may have a hundred thousand
        return Number(text, Fraction(text))
    if len(text) > MAX_CHARACTERS or nesting(text) > MAX_NESTING:
        return None
    return read_clean(clean(text))


def read_clean(text: str) -> Answer | None:
    """`read` of what is in one spelling already."""
    text = text.strip()
    if not text:
        return None
    return read_numeral(text) or read_number(text) or read_words(text) or read_structure(text)


def leaves(answer: Answer) -> Iterator[Answer]:
    """The answers that `answer` is made of, down to those that are made of nothing else."""
    parts = (answer.items if isinstance(answer, Group) else (answer.right,)
             if isinstance(answer, Equation) else ())
    for part in parts:
        yield from leaves(part)
    if not parts:
        yield answer


# ---------------------------------------------------------------------------------------- structure

CONNECTOR = re.compile(r",? ?\\text ?\{ ?(?:and|or) ?\}|,? (?:and|or) ")
MEMBER = re.compile(r"[A-Za-z] ?\\in(?![A-Za-z]) ?")
NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+|\\text ?\{[^{}]*\}|[A-Za-z][a-z]+)(?: ?_ "
                  r"?(?:\w|\{\w+\}))?'*(?: ?\([a-z, ]+\))?")


def read_structure(text: str) -> Answer | None:
    """A list, a chain of equations, a union, a ratio of letters, what one pair of brackets
    encloses, or else a formula."""
    inside = unwrapped(text)
    if inside:
        return inside
    member = MEMBER.match(text)
    if member:
        return read_clean(text[member.end():])
    for opening, separators, whole in (("", ",;", CONNECTOR.sub(",", text)),
                                       ("∪", "∪", text.replace(r"\cup", "∪"))):
        items = list(split(whole, separators))
        if len(items) > 1:
            return group(text, opening, items, opening)
    sides = list(split(text.replace(r"\approx", "="), "="))
    if len(sides) > 1 and not re.search(r"[<>!]$", sides[0]):
        right, left = read_clean(sides[-1]), sides[0].strip()
        return (right and Equation(text, squeeze(left), right,
                                   not left or bool(NAME.fullmatch(left))))
    terms = list(split(text, ":"))
    if len(terms) > 1:
        return group(text, ":", terms, ":")
    if r"\pm" in text:
        signs = (("+", "-"), ("-", "+"))
        items = [text.replace(r"\pm", upper).replace(r"\mp", lower).removeprefix("+")
                 for upper, lower in signs]
        return group(text, "", items, "")
    within = enclosed(text)
    if within:
        opening, inside, closing = within
        items = list(split(CONNECTOR.sub(",", inside), ",;"))
        if len(items) > 1 or opening == r"\{":
            return group(text, opening, items, closing)
        if (opening, closing) == ("(", ")"):
            return read_clean(inside)
    return Formula(text)


def unwrapped(text: str) -> Answer | None:
    """What stands in braces or in a font that enclose all of `text`; None for what is not enclosed.

    LaTeX does not show the braces; as text {1, 2} is a set, and no set but a list is read: they are
    the same. As text H2O and 2020-01-02 are no formulas, but words.
    """
    within = enclosed(text.removeprefix(r"\text").lstrip())
    if not within or within[::2] != ("{", "}"):
        return None
    inside = read_clean(within[1])
    read_as = inside.opening if isinstance(inside, Group) else type(inside)
    if read_as not in (Formula, ":") or not text.startswith(r"\text"):
        return inside
    words = (re.search(r"(?<![\\A-Za-z])[A-Za-z]{2}|'", inside.text)
             or not re.search(ALGEBRA, inside.text))
    return Words(inside.text.casefold().strip(" .")) if words else inside


ALGEBRA = r"\\|[A-Za-z].*[-+*/^=<>(]|[-+*/^=<>(].*[A-Za-z]"
"""Letters that an operator joins."""


def group(text: str, opening: str, items: list[str], closing: str) -> Group | None:
    answers = [read_clean(item) for item in items if item.strip()]
    return (Group(text, opening, tuple(answers), closing) if answers and None not in answers
            else None)


# ---------------------------------------------------------------------------------- words, numerals

TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
WORDS = re.compile(r"[^\W\d_]+(?:(?:[ '’-]|, )[^\W\d_]+)*")
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "min", "gcd", "lcm",
             "mod"}


def read_words(text: str) -> Words | None:
    """What stands in \\text{}, one capital letter with or without parentheses, or bare words of
    three letters or more ("no" too): shorter ones are products of letters."""
    words = TEXT.sub(r"\1", text).strip(" .")
    wrapped = not TEXT.sub("", text).strip(" .")
    choice = re.fullmatch(r"\(([A-Z])\)" if not wrapped else r"\(?([A-Za-z])\)?", words)
    if choice:
        return Words(choice[1].casefold())
    if not WORDS.fullmatch(words):
        return None
    longest = max(re.split(r"[^\w]+", words), key=len)
    said = (wrapped or re.fullmatch("[A-Z]|[Nn]o|NO", words)
            or (len(longest) > 2 and longest not in FUNCTIONS))
    return Words(" ".join(words.casefold().split())) if said else None


def read_numeral(text: str) -> Numeral | None:
    based = re.fullmatch(r"([0-9][0-9A-Fa-f]*) ?_ ?\{? ?([0-9]{1,2}) ?\}?", text)
    if based:
        return Numeral(text, (based[1].upper(), "_", based[2]))
    match = re.match(r"[0-9]+(?: ?: ?[0-9]+)+", text)
    tail = match and scale_and_unit(text[match.end():])
    if not tail or tail[0] != 1:
        return None
    return Numeral(text, tuple(part.strip().lstrip("0") for part in match[0].split(":")), tail[1])


# ------------------------------------------------------------------------------------------ numbers

MONEY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
SIGN = re.compile(rf"(?P<sign>-|\+(?! ))? ?(?:(?P<money>[{''.join(MONEY)}]) ?(?P<inner>[-+]?))? ?")
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
POWER = r"10 ?\^ ?(?:\{ ?(?P<power>[-+]?\d+) ?\}|(?P<digits>[-+]?\d+))"
FORMS = [re.compile(form) for form in (
    rf"(?:(?P<whole>{WHOLE}) ?)?\\frac ?\{{ ?(?P<top>-?\d+) ?\}} ?\{{ ?(?P<bottom>-?\d+) ?\}}",
    rf"(?:(?P<whole>{WHOLE}) )?(?P<top>\d+) ?/ ?(?P<bottom>\d+)",
    POWER,
    r"(?P<decimal>\d*\.\d*) ?\\(?:overline|bar) ?\{ ?(?P<period>\d+) ?\}",
    rf"(?P<decimal>{WHOLE}(?:\.\d+)?|\.\d+)(?:[eE](?P<e>[-+]?\d+)(?!\w)|(?: ?(?:\\times|\\cdot|\*) "
    rf"?| x |x){POWER})?",
)]


def read_number(text: str) -> Number | None:
    """A plain number, exactly: 1,234, 1e-7, 2.5 \\times 10^{3}, 3/4, 1 \\frac{1}{2},
    0.\\overline{3}, 50%, $5, 5 cm."""
    start = SIGN.match(text)
    form = next(filter(None, (form.match(text, start.end()) for form in FORMS)), None)
    if not form or (start["sign"] and start["inner"]):
        return None
    tail = scale_and_unit(text[form.end():])
    found = form.groupdict()
    size = fraction(found) if "top" in found else decimal(found)
    if tail is None or size is None:
        return None
    scale, unit = tail
    negative = "-" in (start["sign"], start["inner"])
    divided = " /" in form[0] or "/ " in form[0]
    reduced = "top" not in found or (size.denominator == int(found["bottom"]) and not divided)
    return Number(text, (-size if negative else size) * scale,
                  unit or MONEY.get(start["money"], ""), reduced)


def fraction(found: dict[str, str | None]) -> Fraction | None:
    """None for a division that is still to be done (84/2 is an expression, not 42) and for 1
    3/2."""
    whole, top, bottom = (int((found[part] or "0").replace(",", ""))
                          for part in ("whole", "top", "bottom"))
    if bottom == 0 or top % bottom == 0 or (found["whole"] and not 0 < top < bottom):
        return None
    return whole + Fraction(top, bottom)


def decimal(found: dict[str, str | None]) -> Fraction | None:
    exponent = int(found.get("power") or found.get("digits") or found.get("e") or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    shown, period = found.get("decimal", "1").replace(",", ""), found.get("period")
    places = len(shown.partition(".")[2])
    repeating = Fraction(int(period), 10**places * (10 ** len(period) - 1)) if period else 0
    return (Fraction(f"0{shown}0" if period else shown) + repeating) * Fraction(10) ** exponent


SCALES = {"": 1, "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6,
          "billion": 10**9, "trillion": 10**12}
PERCENT = re.compile(r"\\?%|percent|pct|per cent|\\text ?\{ ?(?:percent|\\?%) ?\}")
DEGREE = re.compile(r"(?:\^ ?\{? ?\\circ ?\}?|\\degree|degrees?)(?: ?(?:\\text ?\{ ?)?([CF])\}?)?")
UNIT = re.compile(r"(?P<word>[^\W\d_][^\W\d_.]*)(?:[ ./-]+[^\W\d_]+)*\.?(?: ?\^ ?\{?[23]\}?|[23])?")
SHORT = set("mm cm m km in ft yd mi mg g kg lb oz ms s h hr ml mL l L am pm AM PM J kJ W kW V N Pa "
            "Hz K sq cu".split())


def scale_and_unit(rest: str) -> tuple[Fraction, str] | None:
    """What the text after a number makes of it: (factor, unit), or None where it is neither."""
    words = rest.strip()
    if PERCENT.fullmatch(words):
        return Fraction(1, 100), ""
    if words in MONEY:
        return Fraction(1), MONEY[words]
    degree = DEGREE.fullmatch(words)
    if degree:
        return Fraction(1), "degree" + (degree[1] or "").lower()
    texts = TEXT.sub(r" \1", words).strip()
    unit = UNIT.fullmatch(texts)
    if words and not unit:
        return None
    if words and texts == words:  # bare words: what could be a product of letters is none
        spaced = rest.startswith(" ")
        size = len(unit["word"])
        if not (size > (2 if spaced else 3) or (unit["word"] in SHORT and (spaced or size > 1))):
            return None
    first, _, others = texts.partition(" ")
    if first in SCALES:
        return Fraction(SCALES[first]), unit_name(others)
    return Fraction(1), unit_name(texts)


def unit_name(words: str) -> str:
    """One name for a unit's singular and plural; a mere key for comparison."""
    return " ".join(word.rstrip("es") if len(word) > 3 else word
                    for word in words.casefold().strip(" .").split())
