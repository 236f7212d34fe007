"""Records of {prompt, answer, ...}: from files and tasks, each with the place that it comes
from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jspec.errors import InputError, shortened
from jspec.hub.json_io import parse_json
from jspec.rl.tasks import PREFIX, ReasoningGym

ARITHMETIC = Path(__file__).parent / "data" / "arithmetic.jsonl"
LONGEST_LINE = 16 << 20
HELD_OUT = 2**63
"""Beside the seed where an order has its epoch: no epoch is that late."""
OF_THE_RESPONSE = {"response", "finished", "length", "max_new_tokens"}
"""What reward functions are told about a response: no record may say it."""


class Records(Protocol):
    """A sequence of records.

    Attributes:
        at_once: how many of them a start can afford to look at before anything else.
    """

    at_once: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Mapping[str, Any]: ...

    def where(self, number: int) -> str:
        """Where a record stands, for errors."""
        ...

    def digest(self, numbers: Sequence[int] | np.ndarray) -> str:
        """A digest of the records of these numbers: the same as long as they are."""
        ...


class JsonLines(Sequence):
    """The records of a file of JSON lines."""

    at_once = 20_000  # a second

    def __init__(self, path: Path, records: list[dict[str, Any]], lines: Iterable[int],
                 digests: Iterable[bytes]) -> None:
        """
        Args:
            path: the file.
            records: what its lines say.
            lines: the number of each record's line, from 1 on.
            digests: of each record's line, of one size.
        """
        self.path, self.records = path, records
        self.lines, self.digests = np.fromiter(lines, np.int64), np.array(list(digests))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.records[number]

    def where(self, number: int) -> str:
        return f"{self.path}:{self.lines[number]}"

    def digest(self, numbers: Sequence[int] | np.ndarray) -> str:
        return hashlib.sha256(self.digests[np.asarray(numbers, np.int64)]
                              .tobytes()).hexdigest()[:16]


class Selected(Sequence):
    """Some of the records of `records`, by their numbers."""

    def __init__(self, records: Records, numbers: Sequence[int]) -> None:
        self.records, self.numbers, self.at_once = records, np.asarray(numbers,
                                                                       np.int64), records.at_once

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self.records[int(self.numbers[number])]

    def where(self, number: int) -> str:
        return self.records.where(int(self.numbers[number]))

    def digest(self, numbers: Sequence[int] | np.ndarray) -> str:
        return self.records.digest(self.numbers[np.asarray(numbers, np.int64)])


def load_records(config, seed: int, setting: str = "data.source",
                 held_out: bool = False) -> Records:
    """The records that a `jspec.learning_sections.DataSection` trains on.

    Args:
        config: the section.
        seed: of the run; decides which prompts are held out, and a task's questions unless its
          options have a seed.
        setting: what named the source, for errors.
        held_out: the `config.held_out` records that are not trained on, instead.

    Raises:
        InputError: the source is missing or malformed, or has no more prompts than are to be held
          out.
    """
    if config.source.startswith(PREFIX):
        options = {"seed": task_seed(seed)} | dict(config.options)
        tasks = ReasoningGym(config.source.removeprefix(PREFIX), options, further=config.held_out)
        return tasks if not config.held_out else split_task(tasks, config.held_out, held_out)
    if config.options:
        raise InputError(f"data.options are for reasoning_gym tasks; data.source={config.source!r} "
                         "takes none")
    if config.source != "arithmetic" and not config.source.endswith(".jsonl"):
        raise InputError(
            f"{setting}={config.source!r} is none of 'arithmetic', a .jsonl file, "
            "'reasoning_gym:TASK'"
        )
    records = read_jsonl(ARITHMETIC if config.source == "arithmetic" else Path(config.source),
                         setting=setting)
    return records if not config.held_out else split_file(records, config.held_out, seed, held_out)


def split_file(records: JsonLines, count: int, seed: int, held_out: bool) -> Selected:
    """The records to train on, or those of the `count` prompts that are held out. No prompt is on
    both sides, however often the file has it."""
    first = {}
    for number, record in enumerate(records):
        first.setdefault(record["prompt"], number)
    if count >= len(first):
        raise InputError(f"data.held_out={count} leaves nothing to train on: {records.path} has "
                         f"{len(first)} different prompts")
    drawn = np.random.default_rng([seed, HELD_OUT]).permutation(len(first))[:count]
    numbers = np.fromiter(first.values(), np.int64)[np.sort(drawn)]
    if held_out:
        return Selected(records, numbers)
    kept = {records[number]["prompt"] for number in numbers}
    return Selected(records, [number for number, record in enumerate(records)
                              if record["prompt"] not in kept])


def split_task(tasks: ReasoningGym, count: int, held_out: bool) -> Selected:
    """The questions to train on, or those of the `count` numbers behind them that are none of
    these."""
    size = len(tasks) - count
    if not held_out:
        return Selected(tasks, range(size))
    trained = {tasks[number]["prompt"] for number in range(size)}
    left = [number for number in range(size, len(tasks)) if tasks[number]["prompt"] not in trained]
    if not left:
        raise InputError(f"data.held_out: {PREFIX}{tasks.task} repeats itself, and training has "
                         "all of its questions; lower data.options.size")
    return Selected(tasks, left)


def task_seed(seed: int) -> int:
    """A seed that tasks take: NumPy's, which some use, have 32 bits, and the question's number is
    added."""
    return seed if seed < 2**31 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:3])


def read_jsonl(path: Path, keys: Sequence[str] = ("prompt", "answer"),
               setting: str = "data.source") -> JsonLines:
    """Reads a file of one {"prompt": ..., "answer": ...} a line; further keys are kept, blank lines
    are skipped.

    Args:
        path: the file.
        keys: what every line must have.
        setting: what named the file, for errors.

    Raises:
        InputError: naming file and line, and what is wrong there.
    """
    records, lines, digests = [], [], []
    for number, line in read_lines(path, setting):
        if line.strip():
            records.append(parse_line(line, f"{path}:{number}", keys))
            lines.append(number)
            digests.append(hashlib.sha256(line.encode()).digest()[:8])
    if not records:
        raise InputError(f"{path} holds no prompts; it needs lines of {shape_of(keys)}")
    return JsonLines(path, records, lines, digests)


def read_lines(path: Path, setting: str) -> Iterable[tuple[int, str]]:
    """The lines of a text file, with their numbers. Only \\n ends one: a JSON string may hold other
    line ends."""
    number = 0
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise InputError(f"cannot read the prompts {path}: it is not a file; check {setting}")
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{path}:{number}: longer than {LONGEST_LINE} bytes; end "
                                     "every record with a line end")
                yield number, line.decode("utf-8").rstrip("\r\n")
    except OSError as error:
        raise InputError(f"cannot read the prompts {path}: {error.strerror}; check "
                         f"{setting}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the prompts {path}:{number}: it is not UTF-8 text; check "
                         f"{setting}") from error


def shape_of(keys: Sequence[str]) -> str:
    return json.dumps(dict.fromkeys(keys, "..."))


def parse_line(line: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """The record that a line says; `where` begins every message. Raises InputError for one that is
    none."""
    record = parse_json(line, where)
    for key in keys:
        if key not in record:
            raise InputError(f"{where}: no {key!r} (it has "
                             f"{shortened(', '.join(map(repr, record))) or 'no keys'})")
    for key in OF_THE_RESPONSE & record.keys():
        raise InputError(f"{where}: the key {key!r} is taken: reward functions are told the "
                         "response's own by it; rename it")
    if isinstance(record.get("answer"), float):
        # as it is written, no digit lost
        record["answer"] = json.loads(line, parse_float=str)["answer"]
    elif isinstance(record.get("answer"), int) and not isinstance(record["answer"], bool):
        record["answer"] = str(record["answer"])
    for key in keys:
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key!r} is not a string, but {type(record[key]).__name__}")
    if not record["prompt"].strip():
        raise InputError(f"{where}: the prompt is empty")
    return record
