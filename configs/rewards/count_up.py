"""A task that a tiny policy learns from random initialisation: go on counting, digit by digit,
modulo ten.

The prompt is one to three digits that count up ("5", "45", "345"); every further digit shall be the
one before it plus one. The reward is the share of the eight positions where it is, so a random
policy gets about a tenth, and each position pays by itself: a slip is not punished for the rest of
the sequence.

The prompts beside it are made by this file:

    python configs/rewards/count_up.py > configs/data/count_up.jsonl
"""

import json

LENGTH = 8


def count_up(prompt: str, response: str, answer: str, **meta) -> float:
    """Share of `len(answer)` positions of `response` that are the digit before plus one (modulo
    ten), in [0, 1]."""
    chain = prompt[-1:] + response[: len(answer)]
    right = sum(pair in "01234567890" for pair in map("".join, zip(chain, chain[1:], strict=False)))
    return right / len(answer)


def examples() -> list[dict]:
    """All prompts: each start, one to three digits long, with the next `LENGTH` digits as the
    answer."""
    digits = "0123456789" * 3
    return [
        {"prompt": digits[start : start + length],
         "answer": digits[start + length : start + length + LENGTH]} for length in (1, 2, 3)
        for start in range(10)
    ]


if __name__ == "__main__":
    for example in examples():
        print(json.dumps(example))
