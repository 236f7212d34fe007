"""Answers with the cycles that made them, as vLLM and jspec count them: what `served.py` compares.

vLLM takes an answer's first token from the prefill, counts a cycle where there was a draft, and
counts what it accepted behind an end token or the cap. An `Answer` has cycles behind the first
token alone, passes without a draft included, and nothing behind the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NGRAM = 3
"""The longest suffix that is looked up."""
Pass = tuple[int, int]
"""Drafted tokens of a pass over the weights, and those of them that the answer has."""


class Answer(NamedTuple):
    """tokens: of one prompt. cycles: those behind the first token. positions [k]: how many drafts
    of each position are among the tokens. behind: how many were accepted and are not."""

    tokens: list[int]
    cycles: int
    positions: list[int]
    behind: int = 0


def answer_of(tokens: Sequence[int], kept: Sequence[int], k: int, behind: int = 0) -> Answer:
    """kept: of each cycle, how many of its drafts are among the tokens."""
    return Answer(list(tokens), len(kept), [sum(n > j for n in kept) for j in range(k)], behind)


class Impossible(Exception):
    """What vLLM counted does not make its answer."""


def theirs(line: Mapping[str, Any], k: int, passes: Sequence[Pass] | None = None) -> Answer:
    """A line of vLLM's, without what was accepted behind the end.

    passes: what is to have happened, where there may be passes without a draft: vLLM counts none.
    Raises Impossible if the cycles do not make the tokens, or are not those."""
    tokens, drafted, accepted = line["tokens"], line["drafted"], line["accepted"]
    wrong = passes is not None and [n for n, _ in passes if n] != drafted
    if passes is None:
        passes, left = [], len(tokens) - 1
        for width, n in zip(drafted, accepted, strict=True):
            wrong = wrong or left <= 0
            passes.append((width, min(n, left)))
            left -= n + 1
        wrong = wrong or left > 0
    expected = [n for width, n in passes if width]
    if wrong or expected[:-1] != accepted[:-1] or expected[-1:] > accepted[-1:]:
        raise Impossible(f"vLLM's cycles do not make its answer: {line}, {passes}")
    return answer_of(tokens, [n for _, n in passes], k, sum(accepted) - sum(expected))


def look_up(text: Sequence[int], k: int, first: bool) -> list[int]:
    """What follows the longest match of the text's end, at most NGRAM tokens, in the text: of the
    first one up to the text's end, as vLLM has it, or of the last one, again and again."""
    for n in range(min(NGRAM, len(text) - 1), 0, -1):
        starts = range(len(text) - n)
        for start in starts if first else reversed(starts):
            if text[start:start + n] == text[-n:]:
                after = text[start + n:]
                return list(after[:k]) if first else [after[i % len(after)] for i in range(k)]
    return [] if first else [text[-1]] * k


def replay(prompt: Sequence[int], tokens: Sequence[int], k: int, first: bool) -> list[Pass]:
    """The passes behind the first token of an answer that `look_up` drafted for."""
    text, at, passes = [*prompt, *tokens], len(prompt) + 1, []
    while at < len(text):
        draft, ahead = look_up(text[:at], k, first), text[at:at + k]
        agreed = [x == y for x, y in zip(draft, ahead, strict=False)] + [False]
        passes.append((len(draft), agreed.index(False)))
        at += agreed.index(False) + 1
    return passes


def counts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Over all answers. The standard error of tokens a cycle is that of a ratio over the rows."""
    cycles = np.array([answer.cycles for answer in answers])
    tokens = np.array([len(answer.tokens) - 1 for answer in answers])
    length = tokens.sum() / cycles.sum()
    error = np.sqrt(((tokens - length * cycles) ** 2).sum()) / cycles.sum()
    accepted = np.sum([answer.positions for answer in answers], axis=0)
    return {"tokens": int(tokens.sum()), "cycles": int(cycles.sum()),
            "acceptance_length": float(length), "standard_error": float(error),
            "acceptance_by_position": (accepted / cycles.sum()).tolist(),
            "behind": sum(answer.behind for answer in answers)}


def same_cycles(one: Sequence[Answer], other: Sequence[Answer]) -> int:
    """In how many rows all that is compared is the same."""
    return sum(a._replace(behind=0) == b._replace(behind=0)
               for a, b in zip(one, other, strict=True))
