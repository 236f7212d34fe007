"""Makes arithmetic.jsonl, the quickstart's task: sums and differences of one-digit numbers, asked
for in a few ways.

    python jspec/rl/data/make_arithmetic.py > jspec/rl/data/arithmetic.jsonl

It is as hard as SmolLM2-135M-Instruct needs it: groups of answers of which some are right and some
are wrong are what GRPO learns from. README.md beside this file says how often that model is right.
"""

import itertools
import json

WAYS = (
    "What is {}? Answer with just the number.",
    "What is {}? Reply with one number.",
    "Compute {}. Answer with just the number.",
)


def examples() -> list[dict]:
    """Every sum of two numbers from 1 to 9 asked for in each way, every positive difference in the
    first."""
    pairs = list(itertools.product(range(1, 10), repeat=2))
    sums = [(way.format(f"{a} + {b}"), a + b) for way in WAYS for a, b in pairs]
    differences = [(WAYS[0].format(f"{a} - {b}"), a - b) for a, b in pairs if a > b]
    return [{"prompt": prompt, "answer": str(answer)} for prompt, answer in sums + differences]


if __name__ == "__main__":
    for example in examples():
        print(json.dumps(example))
