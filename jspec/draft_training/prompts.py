"""What the policy answers: prompts of the configured sources, and instructions that it writes
itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

import jspec
from jspec.answering import batch_on_mesh, decoded
from jspec.draft_config import DraftTrainingConfig
from jspec.errors import InputError
from jspec.learning_sections import DataSection
from jspec.model import Policy
from jspec.prepare import rollout_layout
from jspec.purposes import INSTRUCTIONS_KEY, purpose_key
from jspec.rl.chat import has_template, render
from jspec.rl.encode import encode_prompt
from jspec.rl.records import load_records, read_jsonl

log = logging.getLogger(__name__)

SELF = "self"
HELD_OUT = 16
"""Each HELD_OUT-th prompt of a source is kept from training, for the report where that has no file
of its own."""
INSTRUCTION_TOKENS, INSTRUCTION_ROWS = 64, 64
# stands for the user's turn in a rendered chat; of the private use area, so in no template
TURN = "\ue000"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts to learn from, `samples.count` of them, and of those to measure
    on."""

    training: list[list[int]]
    held_out: list[list[int]]


def gather(config: DraftTrainingConfig, policy: Policy, tokenizer: Any, directory: Path) -> Prompts:
    """The prompts of every source in turn, those longer than `samples.max_prompt_tokens` left out.

    Raises InputError for a source that cannot be read or has no prompt that is short enough.
    """
    sources = config.samples.sources
    training, held_out = {}, {}
    for source in dict.fromkeys(sources):
        times = sources.count(source)
        texts = source_texts(config, source, times, policy, tokenizer, directory)
        prompts = [encode(config, tokenizer, text) for text in texts]
        prompts = [tokens for tokens in prompts if len(tokens) <= config.samples.max_prompt_tokens]
        if len(prompts) < 2:
            raise InputError(f"samples.sources: {source} has {len(prompts)} prompts of at most "
                             f"samples.max_prompt_tokens={config.samples.max_prompt_tokens} "
                             "tokens; two are needed")
        held_out[source] = prompts[::HELD_OUT]
        training[source] = [tokens for i, tokens in enumerate(prompts) if i % HELD_OUT]
    if config.report.prompts is not None:
        records = read_jsonl(Path(config.report.prompts), columns=("prompt",),
                             setting="report.prompts")
        held_out = {config.report.prompts: [encode(config, tokenizer, record["prompt"])
                                            for record in records]}
    held_out = unseen(held_out, training)
    if not held_out:
        raise InputError("every prompt that could be held out is trained on too; name others with "
                         "report.prompts")
    distinct = sum(map(len, held_out.values()))
    return Prompts(in_turn(sources, training, config.samples.count),
                   in_turn(held_out, held_out, min(config.report.count, distinct)))


def unseen(held_out: dict[str, list[list[int]]],
           training: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Of each source the prompts that no source trains on; sources without any left out."""
    seen = {tuple(tokens) for prompts in training.values() for tokens in prompts}
    left = {name: [tokens for tokens in prompts if tuple(tokens) not in seen]
            for name, prompts in held_out.items()}
    return {name: prompts for name, prompts in left.items() if prompts}


def in_turn(turns: Iterable[str], items: dict[str, list[Any]], count: int) -> list[Any]:
    """`count` items by name, one at each of the turns, which go round; a list that is at its end
    begins again."""
    lists = {name: itertools.cycle(values) for name, values in items.items()}
    return [next(lists[name]) for name in itertools.islice(itertools.cycle(turns), count)]


def encode(config: DraftTrainingConfig, tokenizer: Any, text: str) -> list[int]:
    """A prompt's token ids. Raises InputError for a text that the tokenizer refuses."""
    return encode_prompt(tokenizer, text, config.samples.system_prompt,
                         config.samples.chat_template)


def source_texts(config: DraftTrainingConfig, source: str, times: int, policy: Policy,
                 tokenizer: Any, directory: Path) -> list[str]:
    """A source's prompts as text, as many as its `times` shares of the samples need, or all that it
    has."""
    share = (math.ceil(config.samples.count * times / len(config.samples.sources)) * HELD_OUT
             // (HELD_OUT - 1) + 1)
    if source == SELF:
        return instructions(config, policy, tokenizer, share, directory / "instructions.json")
    options = {"size": share} if source.startswith("reasoning_gym:") else {}
    records = load_records(DataSection(source=source, options=options), config.seed,
                           "samples.sources")
    return [records[i]["prompt"] for i in range(min(share, len(records)))]


def instructions(config: DraftTrainingConfig, policy: Policy, tokenizer: Any, count: int,
                 path: Path) -> list[str]:
    """Instructions that the policy writes when it is given the opening of a user's turn and nothing
    else.

    https://arxiv.org/abs/2406.08464. Kept in `path`. Raises InputError for a tokenizer without a
    chat template.
    """
    if path.exists():
        return json.loads(path.read_text())
    opening = turn_opening(config, tokenizer)
    layout = rollout_layout(config)
    weights, texts = jspec.reshard(policy, layout), []
    sampling = jspec.Sampling(max_new_tokens=INSTRUCTION_TOKENS)
    key = purpose_key(config.seed, INSTRUCTIONS_KEY)
    for call in itertools.count():
        batch = batch_on_mesh([opening], layout, group_size=INSTRUCTION_ROWS,
                              buckets=(len(opening),), seed=jax.random.fold_in(key, call))
        out = decoded(weights, None, batch, INSTRUCTION_ROWS, sampling=sampling)
        ended = [tokenizer.decode(tokens[:length - 1]).strip() for tokens, length, finished in
                 zip(out.tokens, out.lengths, out.finished, strict=True) if finished]
        texts = list(dict.fromkeys([*texts, *(text for text in ended if len(text) > 8)]))
        log.info("%d of %d instructions", min(len(texts), count), count)
        if len(texts) >= count:
            break
        if call == 20 and len(texts) < INSTRUCTION_ROWS:
            raise InputError("samples.sources: this policy writes hardly any instructions that end "
                             "by themselves; name prompts of your own instead of 'self'")
    path.write_text(json.dumps(texts[:count], indent=0))
    return texts[:count]


def turn_opening(config: DraftTrainingConfig, tokenizer: Any) -> list[int]:
    """The rendered chat up to where the user's message begins."""
    if not (config.samples.chat_template and has_template(tokenizer)):
        raise InputError("samples.sources: 'self' needs a tokenizer with a chat template; name "
                         "prompts of your own")
    rendered = render(tokenizer, TURN, config.samples.system_prompt, add_generation_prompt=False)
    return list(tokenizer.encode(rendered.split(TURN)[0], add_special_tokens=False))
