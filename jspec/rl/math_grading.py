"""The reward `math_verify`: is what a response states as its answer the right one?

Reward processes import this module, so neither it nor what it imports may import jax; math-verify,
which takes seconds, is imported when the first formula is met.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

from jspec.errors import shortened
from jspec.rl import math_response
from jspec.rl.math_reading import (
    Answer,
    Equation,
    Formula,
    Group,
    Number,
    Numeral,
    Words,
    leaves,
    read,
)
from jspec.rl.math_spelling import spell, squeeze


def math_verify(prompt: str, response: str, answer: str, finished: bool = True, **meta) -> float:
    """1 if what the response states as its answer is `answer`, else 0.

    What counts is the last \\boxed{}, else the last <answer></answer> (nothing counts if that one
    is not closed), else the last number or formula that the response states: 42 in "42", "**42**",
    "x = 42", "17 + 25 = 42", "Answer:42", "The answer is 42.", and "42 or 43" is a list. Of a
    response that was cut off (`finished` false) only a box or a tag counts: its last number may be
    half of one, or of a thought.

    An expression is not an answer: where `answer` is a plain number, only a plain number is right,
    so neither "17 + 25" nor "84/2" is 42. Numbers are compared exactly, by these rules and not by
    math-verify's:

    - 1,234 is 1234 ("1, 234" is two numbers), 1e3, 10^{3} and 1.0 \\times 10^{3} are 1000, 0.50,
      1/2, 1 / 2, ½, \\frac{1}{2} and 2/4 are 0.5, 1 1/2, 1\\frac{1}{2} and "1 and a half" are 1.5,
      0.\\overline{3} is 1/3 and 0.333333 is not. A comma is never a decimal point. A division is an
      expression where the prompt has it (10/4, 3 / 4), or a ÷.
    - A percent is a hundredth: 50% is 0.5, not 50.
    - A unit after the number or a currency beside it may be left out, not exchanged: where `answer`
      is 5 cm, 5 and 5 cm are right, 5 m and 5 apples are not; where it is 5, any unit is.
    - 12:30, 3:4 and 213_4 equal only themselves: 3:4 is neither 3/4 nor 6:8.

    Of several answers the number must be right and each of them. A tuple (2, 3) and an interval [2,
    3) have their order and their brackets; a set \\{1, 2\\} or {1, 2} and a list "1, 2" or "1 and
    2" are the same, in any order (but where `answer` is x = 2, y = 3 it is not 3, 2); neither is
    the tuple. x = 3 is right for 3, and 3 for x = 3; y = 3 for x = 3 is not. Words
    (\\text{Tuesday}, blue, the letter of a choice as A or (A)) are compared as words, in capitals
    or not; without box or tag they count where they are the response's last line, or its end behind
    "answer is" or "answer:" (or option, or choice).

    All else is a formula, which math-verify compares (a decimal with six places of it): 1 + x is x
    + 1, and 1.5\\pi is \\frac{3}{2}\\pi. R and r are two letters, and within a sine degrees count.
    One copied from the prompt, in another form than `answer`, is the question and not the answer.

    Args:
        prompt: the prompt's text.
        response: what the policy wrote.
        answer: what is right; `check_gold` says whether it can be read.
        finished: the policy ended the response itself.

    Raises:
        ValueError: `answer` cannot be read.
    """
    try:
        gold = read_gold(answer)
    except ValueError as error:
        raise ValueError(f"math_verify cannot read the answer {answer!r} of the prompt {prompt!r}: "
                         f"{error}") from None
    stated = stated_answer(response, finished, words=isinstance(gold, Words))
    if stated is None:
        return 0.0
    if alike(gold, stated):
        return 1.0
    if not worked_out(stated) and squeeze(stated.text) in squeeze(spell(prompt)):
        return 0.0
    return float(same(gold, stated))


def stated_answer(response: str, finished: bool = True, words: bool = False) -> Answer | None:
    """What `response` states as its answer, by the rule of `math_verify`; `words` where the answer
    is in words."""
    declared = math_response.declared(response)
    if declared is not None:
        return read(declared)
    if not finished:
        return None
    return math_response.last_words(response) if words else math_response.last_value(response)


def check_gold(answer: str) -> None:
    """Refuses an answer that no response could be compared with.

    Raises:
        ValueError: it says nothing, is not a formula, is one that computer algebra takes for
            another or cannot bound, or is a sum that is still to be worked out.
    """
    try:
        read_gold(answer)
    except ValueError as error:
        raise ValueError(f"math_verify cannot read the answer {shortened(repr(answer))}: {error}; "
                         "write the value, or "
                         "words as \\text{...}") from None


@functools.lru_cache(maxsize=4096)
def read_gold(answer: str) -> Answer:
    """What the right answer says; raises ValueError, saying why, where `check_gold` does."""
    gold = read(answer)
    if gold is None:
        raise ValueError("it is empty or too long")
    for leaf in leaves(gold):
        if isinstance(leaf, Formula):
            check_formula(leaf.text)
    if isinstance(gold, Equation) and not gold.named:
        check_formula(gold.text)
    return gold


def worked_out(answer: Answer) -> bool:
    """Is `answer` made of nothing but plain numbers in lowest terms, numerals and words?"""
    return all(leaf.reduced if isinstance(leaf, Number) else not isinstance(leaf, Formula)
               for leaf in leaves(answer))


# --------------------------------------------------------------------------------------- comparison


def same(gold: Answer, said: Answer) -> bool:
    """Is what was said the right answer? Not symmetric: a unit, or the x of x = 3, may be left out
    of `said` only."""
    if alike(gold, said):
        return True
    if isinstance(gold, Equation):
        if not isinstance(said, Equation):
            return gold.named and same(gold.right, said)
        if gold.named and gold.left == said.left:
            return same(gold.right, said.right)
        return equal_formulas(gold.text, said.text)
    if isinstance(said, Equation):
        return same(gold, said.right)
    if isinstance(gold, Number):
        return (isinstance(said, Number) and gold.value
                == said.value and same_unit(gold.unit, said.unit))
    if isinstance(gold, Numeral):
        return (isinstance(said, Numeral) and gold.parts
                == said.parts and same_unit(gold.unit, said.unit))
    if isinstance(gold, Words):
        return gold.text == said.text.casefold()
    if isinstance(gold, Group) and isinstance(said, Group):
        return same_groups(gold, said)
    inequality = any(isinstance(side, Formula) and INEQUALITY.search(side.text)
                     for side in (gold, said))
    return (isinstance(gold, Formula) or inequality) and equal_formulas(gold.text, said.text)


def alike(gold: Answer, said: Answer) -> bool:
    return type(gold) is type(said) and re.sub(BLANK, "", gold.text) == re.sub(BLANK, "", said.text)


BLANK = r" (?!(?<=[\d.,] )\d)"
"""One that says nothing: 3 1/2 is not 31/2, nor 1, 234 the number 1,234."""


INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|ne)(?![A-Za-z])")


def same_unit(gold: str, said: str) -> bool:
    return gold == "" or said in ("", gold)


def same_groups(gold: Group, said: Group) -> bool:
    brackets = [("", "") if group.opening == r"\{" else (group.opening, group.closing)
                for group in (gold, said)]
    if brackets[0] != brackets[1] or len(gold.items) != len(said.items):
        return False
    names = {item.left for item in gold.items if isinstance(item, Equation) and item.named}
    nameless = len(names) > 1 and not all(isinstance(item, Equation) for item in said.items)
    # of x = 2, y = 3 the order says which is x
    if nameless or gold.opening not in ("", r"\{", "∪"):
        return all(map(same, gold.items, said.items))
    left = list(said.items)
    for item in gold.items:
        found = next((place for place, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def equal_formulas(gold: str, said: str) -> bool:
    try:
        return verified(parse_formula(gold), parse_formula(said))
    except ValueError:
        return False


# --------------------------------------------------------------------------------- computer algebra

COMMANDS = set((
    "frac sqrt pi infty cdot times div pm mp circ text in cup cap setminus emptyset varnothing "
    "mathbb overline bar le ge ne lt gt approx sin cos tan cot sec csc arcsin arccos arctan sinh "
    "cosh tanh log ln exp binom lfloor rfloor lceil rceil begin end vert lvert rvert mid alpha "
    "beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
).split())
"""Of LaTeX, which a formula may hold: those of algebra. Others, such as sums, could calculate
without end."""
MAX_FORMULA, MAX_POWERS = 400, 30
"""Characters and powers of a formula: the parser's time grows faster than they do."""
MAX_DIGITS = 1000
"""Of a number that comparing a formula may calculate."""
MAX_EXPANDED = 20
"""The largest exponent of a sum of symbols."""


@functools.cache
def library() -> tuple[Callable[..., bool], Callable[[str], Any]]:
    """math-verify's `verify`, and its parser as it is asked here: it takes the whole of a formula
    or nothing, strips no units, as which it takes letters too (2h for 2), and does not take R for
    r."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex

    # Its own time-outs are alarm signals, off here: the pool has one. It warns of that at every
    # call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True,
                                   nits=True, boxed="none")

    def parse(text: str) -> Any:
        return latex2sympy(text, is_real=not should_treat_as_complex(text),
                           convert_degrees=bool(SINE.search(text)), normalization_config=spelling,
                           conversion_config=ConversionConfig(lowercase_symbols=False))

    return verify, parse


SINE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
"""Of 30^\\circ within one the degrees count; else they are a unit, which may be left out."""


def check_formula(text: str) -> None:
    """Raises ValueError where math-verify reads `text` as nothing, or as something else."""
    if re.fullmatch(SUM, text):
        raise ValueError("it is to be worked out")
    bare = re.sub(r"\\text ?\{[^{}]*\}", "", text)
    if re.search(BESIDE, bare):
        raise ValueError("what stands side by side in it would be multiplied")
    parsed = parse_formula(text)
    bare = re.sub(r"\\mathbb ?\{.\}|\\[A-Za-z]+", " ", text).lower()
    letters = set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", bare))
    lost = letters - set(str(parsed).lower())
    if lost or not verified(parsed, parsed):
        raise ValueError(f"it would be taken for {parsed}")


BESIDE = r"(?<![\w.^\\])(?:\d[\d.,]* +\d|[A-Za-z]{2,} +[A-Za-z]{2}|[A-Za-z]{3,} +\d)"
"""Numbers or words that computer algebra takes for a product: 1 000 000 is 0 to it, and words are
letters."""
SUM = r"[-+]?[\d., ]*\d(?: ?[-+] ?\d[\d.,]*)+"


@functools.lru_cache(maxsize=4096)
def parse_formula(text: str) -> Any:
    """The sympy object that `text` is; raises ValueError where there is none, or none that is
    bounded."""
    unknown = {name for name in re.findall(r"\\([A-Za-z]+)", text)} - COMMANDS
    if unknown:
        raise ValueError(f"\\{min(unknown)} is not known here")
    if len(text) > MAX_FORMULA or text.count("^") > MAX_POWERS:
        raise ValueError("it is too long for a formula")
    if ("$" in text or ":" in text
        or re.search(r"\\binom(?! ?\{ ?\w{1,3} ?\} ?\{ ?\w{1,3} ?\})", text)):
        raise ValueError("it is no formula")
    if "'" in text:
        raise ValueError("what is primed would lose its prime")
    _, parse = library()
    try:
        parsed = parse(text)
    except Exception:  # the parser has no class of its own for what it cannot read
        raise ValueError("it is no formula") from None
    if not digits(parsed) <= MAX_DIGITS:
        raise ValueError("its value is too large to compare")
    return parsed


def digits(expression) -> float:
    """A bound on the digits of the numbers that evaluating a sympy object makes; infinite where
    expanding it could not end."""
    parts = expression.flat() if hasattr(expression, "flat") else expression.args
    sizes = [digits(part) for part in parts]
    kind = type(expression).__name__
    if getattr(expression, "is_Rational", False):
        return math.log10(max(abs(int(expression.p)), int(expression.q)))
    if getattr(expression, "is_Float", False):
        return math.log10(abs(int(expression)) + 1)
    if kind == "Pow":
        exponent = 10 ** min(sizes[1], 9)
        expands = parts[0].is_Add and parts[0].free_symbols
        return math.inf if expands and exponent > MAX_EXPANDED else sizes[0] * exponent
    if kind in ("factorial", "exp", "sinh", "cosh", "tanh"):
        return (sizes[0] + 1) * 10 ** min(sizes[0], 9)
    return (max(sizes, default=0) if kind == "Add" else sum(sizes)) + math.log10(len(sizes) + 1)


def verified(gold, said) -> bool:
    verify, _ = library()
    if getattr(gold, "is_Symbol", False) and getattr(said, "is_Symbol", False):
        return gold.name == said.name  # it would take \\Delta for \\delta
    return verify(gold, said, timeout_seconds=None, allow_set_relation_comp=True)
