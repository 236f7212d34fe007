"""A task of one's own: this grades the answers to the prompts of own_reward.jsonl, beside it.

    jspec train configs/quickstart.yaml data.source=examples/own_reward.jsonl \\
        reward.function=examples/own_reward.py:short_and_right output_dir=runs/mine

Reward processes import this file once, and need no JAX. `answer` and the keys in `meta` are those
of the prompt's line, but for `meta["finished"]` (the answer ended before the cap) and
`meta["length"]` (its tokens), which are told of the response.
"""


def short_and_right(prompt: str, response: str, answer: str, **meta) -> float:
    right = answer.lower() in response.lower()
    return float(right) - 0.5 * (meta["length"] > meta["limit"])
