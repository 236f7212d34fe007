"""Prompts: where they come from, how they become tokens, and the order in which steps see them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jspec.errors import InputError
from jspec.rl.tasks import PREFIX, ReasoningGym

OF_THE_RESPONSE = {"response", "finished", "length"}
"""What reward functions are told about a response: no record may say it."""
ARITHMETIC = Path(__file__).parent / "data" / "arithmetic.jsonl"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a step.

    Attributes:
        text: the prompt as its source has it; this is what a reward function is shown.
        tokens: what the policy reads: the text within system prompt and chat template.
        answer: what the response is graded against.
        meta: everything else the source says about it; handed to the reward function as keyword arguments.
    """

    text: str
    tokens: tuple[int, ...]
    answer: str
    meta: Mapping[str, Any]


class PromptData:
    """An endless, deterministic stream of the prompts of each step, one process's share of them.

    The order is that of a grain pipeline: all prompts, shuffled anew at every epoch, in steps of `prompts_per_step`. Of
    each step process i of n gets the i-th n-th, in order: n processes together see what one would.

        data = PromptData(config.data, tokenizer, seed=config.seed)
        prompts = next(data)                         # list[Prompt]
        checkpoint["data"] = data.state()            # a dict that JSON can hold
        data.restore(checkpoint["data"])             # the next step is the one after that
    """

    def __init__(self, config, tokenizer, seed: int, process_index: int = 0, process_count: int = 1):
        """
        Args:
            config: `jspec.config.DataSection`.
            tokenizer: of `jspec.load_tokenizer`.
            seed: of the run; decides the order, and reasoning_gym's questions unless `config.options` has a seed.
            process_index: of this process, as `jax.process_index()` says.
            process_count: of all, as `jax.process_count()` says.

        Raises:
            InputError: the source is missing or malformed, its longest prompt is over `config.max_prompt_tokens`, or
                `config.prompts_per_step` cannot be shared among the processes.
        """
        if config.prompts_per_step % process_count:
            raise InputError(
                f"data.prompts_per_step={config.prompts_per_step} cannot be shared by {process_count} processes; "
                f"make it a multiple of {process_count}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.share = config.prompts_per_step // process_count
        self.first = process_index * self.share
        self.records, identity = load_records(config, seed)
        self.fingerprint = fingerprint(config, seed, identity)
        if isinstance(self.records, list):
            # The rest is checked as it is drawn: to tokenize a large file here would hold up every start.
            self.prompt(max(self.records, key=lambda record: len(record["prompt"])))
        self.iterator = iter(self.pipeline(seed))

    def pipeline(self, seed: int) -> grain.IterDataset:
        """Steps as lists of record numbers, this process's share."""
        count = len(self.records)
        steps = grain.MapDataset.range(count).repeat()
        if self.config.shuffle:
            # Not grain's shuffle: for small data sets it takes milliseconds a prompt, and its epoch e of seed s is
            # epoch e - 1 of seed s + 1.
            order = functools.lru_cache(maxsize=2)(functools.partial(shuffled, count, seed))
            steps = steps.map_with_index(lambda index, _: int(order(index // count)[index % count]))
        steps = steps.batch(self.config.prompts_per_step, batch_fn=list)
        steps = steps.map(lambda numbers: numbers[self.first : self.first + self.share])
        return steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def __iter__(self) -> "PromptData":
        return self

    def __next__(self) -> list[Prompt]:
        """The next step's prompts of this process, `prompts_per_step / process_count` of them.

        Raises:
            InputError: one of them is over `max_prompt_tokens`, or the tokenizer refuses it.
        """
        return [self.prompt(self.records[number]) for number in next(self.iterator)]

    def prompt(self, record: Mapping[str, Any]) -> Prompt:
        text = record["prompt"]
        shown = text if len(text) <= 60 else text[:57] + "..."
        try:
            tokens = encode_prompt(self.tokenizer, text, self.config.system_prompt, self.config.chat_template)
        except Exception as error:  # a character without a token, a role that the chat template refuses
            raise InputError(f"the tokenizer cannot encode the prompt {shown!r}: {error}") from error
        limit = self.config.max_prompt_tokens
        if len(tokens) > limit:
            raise InputError(
                f"the prompt {shown!r} has {len(tokens)} tokens, over data.max_prompt_tokens={limit}; "
                f"shorten it or raise the limit"
            )
        meta = {key: value for key, value in record.items() if key not in ("prompt", "answer")}
        return Prompt(text, tuple(tokens), record["answer"], meta)

    def sequence_ids(self, group_size: int) -> np.ndarray:
        """int32 [share x group_size]: a step's numbers of this process's answers, unique over all processes."""
        return np.arange(self.first * group_size, (self.first + self.share) * group_size, dtype=np.int32)

    def state(self) -> dict:
        """Where the stream stands, the same on every process: a dict that JSON can hold."""
        return {"fingerprint": self.fingerprint, "iterator": self.iterator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            InputError: it was taken from other prompts, another order or another number of prompts a step.
        """
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                "the checkpoint's data position belongs to other prompts (data.source, its content, data.options, "
                "data.prompts_per_step, data.shuffle or seed has changed); undo the change or choose another output_dir"
            )
        self.iterator.set_state(state["iterator"])


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [count]: an epoch's order."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def encode_prompt(tokenizer, text: str, system_prompt: str | None = None, chat_template: bool = True) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template where it has one, as plain text otherwise."""
    if not (chat_template and getattr(tokenizer, "chat_template", None)):
        return list(tokenizer.encode(text if system_prompt is None else f"{system_prompt}\n\n{text}"))
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages.append({"role": "user", "content": text})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def load_records(config, seed: int, setting: str = "data.source") -> tuple[Sequence[Mapping[str, Any]], str]:
    """The source's records of {prompt, answer, ...}, and a string that changes when they do. `setting` is what named
    the source, for errors."""
    if config.source.startswith(PREFIX):
        tasks = ReasoningGym(config.source.removeprefix(PREFIX), {"seed": seed} | dict(config.options))
        return tasks, json.dumps([tasks.task, tasks.options], sort_keys=True, default=str)
    if config.options:
        raise InputError(f"data.options are for reasoning_gym tasks; data.source={config.source!r} takes none")
    if config.source != "arithmetic" and not config.source.endswith(".jsonl"):
        raise InputError(
            f"{setting}={config.source!r} is none of 'arithmetic', a .jsonl file, 'reasoning_gym:TASK'"
        )
    records = read_jsonl(ARITHMETIC if config.source == "arithmetic" else Path(config.source), setting=setting)
    return records, hashlib.sha256(json.dumps(records).encode()).hexdigest()


def fingerprint(config, seed: int, identity: str) -> str:
    """Hexadecimal digest of all that decides which prompts a step gets; how many processes share them does not."""
    parts = [identity, config.shuffle, seed, config.prompts_per_step]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_jsonl(path: Path, keys: Sequence[str] = ("prompt", "answer"),
               setting: str = "data.source") -> list[dict[str, Any]]:
    """Reads a file of one {"prompt": ..., "answer": ...} a line; further keys are kept, blank lines are skipped.

    Args:
        path: the file.
        keys: what every line must have.
        setting: what named the file, for errors.

    Raises:
        InputError: naming file and line, and what is wrong there.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a JSON string may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the prompts {path}: {reason}; check {setting}") from error
    records = [parse_line(line, f"{path}:{number}", keys) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise InputError(f"{path} holds no prompts; it needs lines of {shape_of(keys)}")
    return records


def shape_of(keys: Sequence[str]) -> str:
    return json.dumps(dict.fromkeys(keys, "..."))


def parse_line(line: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not an object of {shape_of(keys)}, but {type(record).__name__}")
    for key in keys:
        if key not in record:
            raise InputError(f"{where}: no {key!r} (it has {', '.join(map(repr, record)) or 'no keys'})")
    for key in OF_THE_RESPONSE & record.keys():
        raise InputError(f"{where}: the key {key!r} is taken: reward functions are told the response's own by it; "
                         "rename it")
    if isinstance(record.get("answer"), int | float) and not isinstance(record["answer"], bool):
        record["answer"] = str(record["answer"])
    for key in keys:
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key!r} is not a string, but {type(record[key]).__name__}")
    if not record["prompt"].strip():
        raise InputError(f"{where}: the prompt is empty")
    return record
