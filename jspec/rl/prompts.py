"""Prompts: their order, each step's share of them, and the search for those that cannot be used."""

import dataclasses
import hashlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jspec.errors import InputError
from jspec.rl.curriculum import ByDifficulty, Curriculum
from jspec.rl.encode import encode_prompt, encode_prompts, shown
from jspec.rl.messages import conversation, text_of
from jspec.rl.mixture import CHUNK, load_mixture
from jspec.rl.order import Epochs, Order, Turns
from jspec.source_parts import SourcePart


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a step.

    Attributes:
        text: the prompt as its source has it, of messages the last one's text; this is what a
            reward function is shown.
        tokens: what the policy reads: the text within system prompt and chat template.
        answer: what the response is graded against.
        meta: everything else the source says about it; handed to the reward function as keyword
          arguments.
        expected_length: tokens of an answer to it, as `PromptData.answered` was told last; None:
          never.
        messages: what a chat template writes out: each {role, content}.
        is_chat: its source has it as messages.
        source: the name of its source, of several.
    """

    text: str
    tokens: tuple[int, ...]
    answer: str
    meta: Mapping[str, Any]
    expected_length: int | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    is_chat: bool = False
    source: str = ""


class PromptData:
    """An endless, deterministic stream of the prompts of each step, one process's share of them.

    The order is that of `jspec.rl.order`, in steps of `prompts_drawn`. Of each step process i of
    n gets the i-th n-th, in order: n processes together see what one would.

        data = PromptData(config.data, tokenizer, seed=config.seed)
        prompts = next(data)                         # list[Prompt]
        checkpoint["data"] = data.state()            # a dict that JSON can hold
        data.restore(checkpoint["data"])             # the next step is the one after that

    Every prompt is looked at, the first ones here and the rest in the background. `trouble` is an
    InputError as soon as one is found that cannot be used, at the latest when the step before its
    own is drawn; until then it is None.
    """

    def __init__(self, config, tokenizer, seed: int, process_index: int = 0, process_count: int = 1,
                 held_out: bool = False,
                 answer_check: Callable[[SourcePart], Callable[[str], None] | None] | None = None,
                 setting: str = "data.source") -> None:
        """
        Args:
            config: `jspec.learning_sections.DataSection`.
            tokenizer: of `jspec.load_tokenizer`.
            seed: of the run; decides the order, which prompts are held out, and reasoning_gym's
                questions unless `config.options` has a seed.
            process_index: of this process, as `jax.process_index()` says.
            process_count: of all, as `jax.process_count()` says.
            held_out: the `config.held_out` prompts that are kept from training, instead of all
              others.
            answer_check: of a source, what raises ValueError for an answer that the reward cannot
              grade against (`rewards.answer_check`).
            setting: what named the source, for errors.

        Raises:
            InputError: a source is missing or malformed, has fewer prompts than a step or
                `config.held_out` wants of it, or one that cannot be encoded or is over
                `config.max_prompt_tokens`; or `config.prompts_drawn` cannot be shared among the
                processes.
        """
        if config.prompts_drawn % process_count:
            raise InputError(f"{config.drawing} cannot be shared by {process_count} processes; "
                             f"make it a multiple of {process_count}")
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.share = config.prompts_drawn // process_count
        self.first = process_index * self.share
        self.records = load_mixture(config, tokenizer, seed, setting, held_out)
        parts = self.records.parts
        checks = [answer_check and answer_check(part) for part in parts]
        self.checks = [check or (lambda answer: None) for check in checks]
        self.check_count(held_out)
        turns = Turns([part.weight for part in parts])
        epochs = [Epochs(len(source), seed, part.number, config.shuffle)
                  for part, source in zip(parts, self.records.sources, strict=True)]
        self.curriculum = ByDifficulty(turns, [Curriculum(each, config.curriculum_rest)
                                               for each in epochs]) if config.curriculum else None
        self.order = self.curriculum or Order(turns, epochs)
        self.steps, self.latest = 0, []
        self.coming: list[int] | None = self.step_numbers()
        self.expected: dict[int, int] = {}
        self.trouble: InputError | None = None
        now, later = self.records.at_once()
        self.check([*itertools.chain(*now), *self.mine(self.coming)])
        self.look_on(later)

    @property
    def left_out(self) -> int:
        """How many prompts were too long."""
        return sum(self.records.left_out)

    def firsts(self) -> list[tuple[SourcePart, Mapping[str, Any]]]:
        """Each source, and its first record."""
        return [(part, self.records[start]) for part, start in
                zip(self.records.parts, self.records.starts, strict=False)]

    def check_count(self, held_out: bool) -> None:
        """Raises InputError where a source has fewer prompts than its share of a step."""
        config, parts = self.config, self.records.parts
        total = sum(part.weight for part in parts)
        for part, source in zip(parts, self.records.sources, strict=True):
            share = math.ceil(config.prompts_drawn * part.weight / total)
            if share <= len(source):
                continue
            kept = (f" beside the {config.held_out} of data.held_out"
                    if config.held_out and not held_out else "")
            some = f", of which its share is {share}," if len(parts) > 1 else ""
            raise InputError(f"{config.drawing}{some} is more than {part.label} has: "
                             f"{len(source)}{kept}; lower it, or give more prompts")

    def step_numbers(self) -> list[int]:
        """The records of the next step, of all processes."""
        size = self.config.prompts_drawn
        return self.order.take(self.steps * size, size)

    def mine(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's share of a step's records."""
        return numbers[self.first:self.first + self.share]

    def __iter__(self) -> "PromptData":
        return self

    def __next__(self) -> list[Prompt]:
        """The next step's prompts of this process, `prompts_drawn / process_count` of them.

        Raises:
            InputError: one of them cannot be used.
        """
        coming = self.step_numbers() if self.coming is None else self.coming
        prompts = [self.prompt(number) for number in self.mine(coming)]
        self.steps, self.latest, self.coming = self.steps + 1, coming, None
        if self.curriculum:
            self.curriculum.drew(coming)  # what comes next, its answers decide
        else:
            self.look_ahead()
        return prompts

    def look_ahead(self) -> None:
        """Looks at the step that comes, so that a run can end between two steps."""
        self.coming = self.step_numbers()
        self.look(self.mine(self.coming))

    def solved(self, which: Sequence[int], success: np.ndarray) -> None:
        """Of the latest step: how often each of these of its prompts, of all processes, was solved,
        float64 in [0, 1], NaN where that is not known. A curriculum goes by it."""
        if self.curriculum:
            of_all = np.full(len(self.latest), np.nan)
            of_all[which] = success
            self.curriculum.told(self.latest, of_all)
            self.look_ahead()

    def answered(self, which: Sequence[int], lengths: Sequence[float]) -> None:
        """Remembers, until the prompts come again, how many tokens an answer to each of these
        prompts of the latest step had."""
        mine = self.mine(self.latest)
        self.expected |= {mine[i]: round(float(length))
                          for i, length in zip(which, lengths, strict=True)}

    def prompt(self, number: int) -> Prompt:
        """The prompt of a record. Raises InputError, naming where it stands, for one that cannot be
        used."""
        record, where = self.records[number], self.records.where(number)
        said, config = record["prompt"], self.config
        text = text_of(said)
        try:
            tokens = encode_prompt(self.tokenizer, said, config.system_prompt, config.chat_template)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not tokens:
            raise InputError(f"{where}: the prompt {shown(text)!r} has no tokens")
        if len(tokens) > config.max_prompt_tokens:
            raise InputError(
                f"{where}: the prompt {shown(text)!r} has {len(tokens)} tokens, over "
                f"data.max_prompt_tokens={config.max_prompt_tokens}; shorten it or raise the limit"
            )
        try:
            self.check_answer(number, record)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        meta = {key: value for key, value in record.items() if key not in ("prompt", "answer")}
        return Prompt(text, tuple(tokens), record.get("answer", ""), meta,
                      self.expected.get(number), conversation(said, config.system_prompt),
                      not isinstance(said, str),
                      self.records.parts[self.records.part(number)].name)

    def check_answer(self, number: int, record: Mapping[str, Any]) -> None:
        """Raises ValueError for an answer that the reward cannot grade against."""
        self.checks[self.records.part(number)](record.get("answer", ""))

    def check(self, numbers: Sequence[int]) -> None:
        """Looks at the records of these numbers. Raises InputError, naming where it stands, for the
        first that cannot be used."""
        for begin in range(0, len(numbers), CHUNK):
            if not self.fit(numbers[begin : begin + CHUNK]):
                for number in numbers[begin : begin + CHUNK]:
                    self.prompt(number)

    def fit(self, numbers: Sequence[int]) -> bool:
        """Whether all of these records can be used, at a fraction of what `prompt` costs for
        each."""
        config = self.config
        try:
            records = [self.records[number] for number in numbers]
            encoded = encode_prompts(self.tokenizer, [record["prompt"] for record in records],
                                     config.system_prompt, config.chat_template)
            for number, record in zip(numbers, records, strict=True):
                self.check_answer(number, record)
        except Exception:  # whatever it is, it is said of the one that it is the matter with
            return False
        return all(0 < len(tokens) <= config.max_prompt_tokens for tokens in encoded)

    def look(self, numbers: Sequence[int]) -> None:
        """Checks these records. What is wrong becomes `trouble`."""
        try:
            self.check(numbers)
        except InputError as error:
            self.trouble = self.trouble or error

    def look_on(self, later: Sequence[range]) -> None:
        """The same in the background."""
        def look() -> None:
            for numbers in later:
                self.look(numbers)

        if any(later):
            threading.Thread(target=look, name="prompts", daemon=True).start()

    def sequence_ids(self, group_size: int) -> np.ndarray:
        """int32 [share x group_size]: a step's numbers of this process's answers, unique over all
        processes."""
        return np.arange(self.first * group_size, (self.first + self.share) * group_size,
                         dtype=np.int32)

    def state(self) -> dict:
        """Where the stream stands, the same on every process: a dict that JSON can hold."""
        state = self.state_after(self.steps)
        if self.expected:
            state["expected"] = {str(n): length for n, length in self.expected.items()}
        if self.curriculum:
            state["curriculum"] = self.curriculum.saved()
        return state

    def state_after(self, steps: int) -> dict:
        drawn = self.order.drawn(steps * self.config.prompts_drawn)
        return {"order": hashlib.sha256(json.dumps(self.order_said()).encode()).hexdigest()[:16],
                "drawn": self.records.digest(drawn), "steps": steps}

    def order_said(self) -> list:
        """What decides the order of the records; how many processes share them does not."""
        config, parts = self.config, self.records.parts
        said = [len(self.records), config.shuffle, self.seed, config.prompts_drawn,
                config.held_out]
        mixed = [[part.name, str(part.weight), len(source)] for part, source in
                 zip(parts, self.records.sources, strict=True) if part.name]
        rest = [["curriculum", config.curriculum_rest]] if config.curriculum else []
        return [*said, *([mixed] if mixed else []), *rest]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken. Records that no step had until then may have changed
        since.

        Raises:
            InputError: it was taken from other prompts, another order or another number of prompts
                a step, or it is no state at all.
        """
        state = dict(state) if isinstance(state, Mapping) else {}
        steps, expected = state.get("steps"), state.pop("expected", {})
        places = state.pop("curriculum", {})
        if (not isinstance(steps, int) or not 0 <= steps < 2**40 or not is_lengths(expected)
                or (self.curriculum and not self.curriculum.restore(places))):
            raise InputError("the checkpoint's data position is none; move that checkpoint away, "
                             "and the one before it is taken")
        if state != self.state_after(steps):
            raise InputError(
                "the checkpoint's data position belongs to other prompts (data.source, its "
                "content, data.options, data.prompts_per_step, data.over_sampling, data.held_out, "
                "data.shuffle, data.curriculum or seed has changed, or the version of "
                "reasoning_gym); undo the change or choose another output_dir"
            )
        self.steps, self.latest = steps, []
        self.expected = {int(number): length for number, length in expected.items()}
        self.look_ahead()


def is_lengths(expected: Any) -> bool:
    """Whether these are lengths by the number of a record, as JSON has them."""
    return (isinstance(expected, Mapping) and all(
        isinstance(number, str) and number.isdecimal() and type(length) is int
        for number, length in expected.items()))
