"""What a response votes for, where the answers to a prompt are compared with each other (maj@k)."""

from __future__ import annotations

from collections.abc import Hashable

from jspec.rl.math_grading import read_gold, stated_answer
from jspec.rl.math_reading import Answer, Equation, Group, Number, Numeral, Words
from jspec.rl.math_response import declared
from jspec.rl.math_spelling import squeeze


def vote_of(response: str, answer: str, finished: bool = True, *,
            math: bool) -> Hashable | None:
    """The vote of a response: equal for responses that say the same. None: it casts no vote.

    Args:
      answer: what is right; only whether it is in words is looked at.
      finished: the policy ended the response itself.
      math: it is read as `math_verify` reads it: numbers are the same by their value, units left
        out, words by their letters, lists by what is in them, formulas as they are written. Else
        it votes for the text of its last \\boxed{} or <answer></answer>, and without one for all of
        its text, blanks around it left out.
    """
    if not math:
        marked = declared(response)
        return (response if marked is None else marked).strip() or None
    try:
        words = isinstance(read_gold(answer), Words)
    except ValueError:  # `math_verify` says so of the prompt
        words = False
    said = stated_answer(response, finished, words)
    return None if said is None else _vote(said)


def _vote(said: Answer) -> Hashable:
    if isinstance(said, Equation):
        return _vote(said.right) if said.named else squeeze(said.text)
    if isinstance(said, Number):
        return said.value
    if isinstance(said, Numeral):
        return said.parts
    if isinstance(said, Words):
        return said.text.casefold()
    if isinstance(said, Group):
        items = tuple(map(_vote, said.items))
        if said.opening in ("", r"\{"):  # in any order
            return "{", tuple(sorted(items, key=repr))
        return said.opening, items, said.closing
    return squeeze(said.text)
