"""Records of {prompt, answer, ...}: from files and tasks, each with the place that it comes
from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jspec.errors import InputError
from jspec.hub.json_io import parse_json
from jspec.learning_sections import DataSection
from jspec.rl import tables
from jspec.rl.columns import KEYS, record_of, section_of
from jspec.rl.messages import identity
from jspec.rl.tasks import PREFIX, ReasoningGym

ARITHMETIC = Path(__file__).parent / "data" / "arithmetic.jsonl"
LONGEST_LINE = 16 << 20
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB = ("; a data set of the hub is downloaded first (`hf download --repo-type dataset NAME "
       "--local-dir FOLDER`), and goes by that folder")
HELD_OUT = 2**63
"""Beside the seed where an order has its epoch: no epoch is that late."""


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


class Held(Sequence):
    """Records that are held in memory, of one file or of several."""

    at_once = 20_000  # a second
    line = ":{}"

    def __init__(self, path: Path,
                 rows: Iterable[tuple[dict[str, Any], Path, int, str]]) -> None:
        """
        Args:
            path: of all, for errors.
            rows: each record, its file, its line there from 1 on, and what decides its digest.

        Raises:
            InputError: some prompts are texts and others messages.
        """
        self.path, self.records, self.files = path, [], []
        lines, digests = [], []
        for record, file, line, content in rows:
            self.records.append(record)
            self.files.append(file)
            lines.append(line)
            digests.append(hashlib.sha256(content.encode()).digest()[:8])
        self.lines, self.digests = np.array(lines, np.int64), np.array(digests)
        texts = [isinstance(record["prompt"], str) for record in self.records]
        if len(set(texts)) > 1:
            other = texts.index(not texts[0])
            first, then = ("a text", "messages") if texts[0] else ("messages", "a text")
            raise InputError(f"{self.where(other)}: the prompt is {then}, and {self.where(0)} has "
                             f"{first}; write all of a source in one of the two ways")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.records[number]

    def where(self, number: int) -> str:
        return f"{self.files[number]}{self.line.format(self.lines[number])}"

    def digest(self, numbers: Sequence[int] | np.ndarray) -> str:
        return hashlib.sha256(self.digests[np.asarray(numbers, np.int64)]
                              .tobytes()).hexdigest()[:16]


class JsonLines(Held):
    """The records of a file of JSON lines."""


class TableRows(Held):
    """The records of parquet files or of a saved data set."""

    line = ": row {}"


Source = Held | ReasoningGym
"""All records of one source."""


class Selected(Sequence):
    """Some of the records of `records`, by their numbers."""

    def __init__(self, records: Records, numbers: Sequence[int] | np.ndarray) -> None:
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


def load_records(config: DataSection, seed: int, setting: str = "data.source",
                 held_out: bool = False) -> Records:
    """The records that a section with one source trains on.

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
    return divided([read_records(config, seed, setting)], config.held_out, seed, held_out)[0]


def read_records(config: DataSection, seed: int, setting: str = "data.source") -> Source:
    """All records of a section's one source; arguments and errors are those of `load_records`."""
    source: Any = config.source
    if source.startswith(PREFIX):
        options = {"seed": task_seed(seed)} | dict(config.options)
        return ReasoningGym(source.removeprefix(PREFIX), options, further=config.held_out)
    if config.options:
        raise InputError(f"{section_of(setting)}.options are for reasoning_gym tasks; "
                         f"{setting}={source!r} takes none")
    return read_source(config, setting)


def divided(sources: Sequence[Source], count: int, seed: int, held_out: bool) -> list[Records]:
    """Of each of a run's sources the records to train on, or the `count` prompts that are held
    out. A prompt that a file holds out is trained on from none. Raises InputError where that leaves
    a source nothing."""
    if not count:
        return list(sources)
    files = [source for source in sources if isinstance(source, Held)]
    kept = {id(file): drawn_from(file, count, seed) for file in files}
    if held_out:
        return [Selected(source, kept[id(source)]) if isinstance(source, Held)
                else split_task(source, count, held_out) for source in sources]
    unseen = {identity(file[int(number)]["prompt"]) for file in files for number in kept[id(file)]}
    return [without(source, unseen) if isinstance(source, Held)
            else split_task(source, count, held_out) for source in sources]


def read_source(config: DataSection, setting: str) -> Held:
    """The records of a source that is no task; arguments and errors are those of
    `load_records`."""
    source: Any = config.source
    columns = [column for column in (config.prompt_column, config.answer_column)
               if column is not None]
    path = ARITHMETIC if source == "arithmetic" else Path(source)
    if source == "arithmetic" or source.endswith(".jsonl"):
        if config.split:
            raise InputError(f"{section_of(setting)}.split={config.split!r} is for folders; "
                             f"{setting}={source!r} has no splits")
        return read_jsonl(path, columns, setting)
    if source.endswith(".parquet") or path.is_dir():
        return read_table(path, config.split, columns, setting)
    raise InputError(f"{setting}={source!r} is none of 'arithmetic', a .jsonl file, "
                     "'reasoning_gym:TASK', a .parquet file, a folder of those, a saved data set"
                     + HUB * bool(HUB_ID.fullmatch(source)))


def drawn_from(records: Held, count: int, seed: int) -> np.ndarray:
    """int64: the records, one for each, of `count` prompts that the seed chooses."""
    first: dict[str, int] = {}
    for number, record in enumerate(records):
        first.setdefault(identity(record["prompt"]), number)
    if count >= len(first):
        raise InputError(f"data.held_out={count} leaves nothing to train on: {records.path} has "
                         f"{len(first)} different prompts")
    drawn = np.random.default_rng([seed, HELD_OUT]).permutation(len(first))[:count]
    return np.fromiter(first.values(), np.int64)[np.sort(drawn)]


def without(records: Held, prompts: Set[str]) -> Selected:
    """The records of other prompts than these, however often a file has them."""
    left = [number for number, record in enumerate(records)
            if identity(record["prompt"]) not in prompts]
    if not left:
        raise InputError(f"data.held_out leaves nothing of {records.path} to train on: other "
                         "sources hold out every prompt that it has")
    return Selected(records, left)


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


def read_jsonl(path: Path, columns: Sequence[str] = KEYS,
               setting: str = "data.source") -> JsonLines:
    """Reads a file of one {"prompt": ..., "answer": ...} a line; further keys are kept, blank lines
    are skipped.

    Args:
        path: the file.
        columns: the keys of the prompt and, where there is to be one, of the answer.
        setting: what named the file, for errors.

    Raises:
        InputError: naming file and line, and what is wrong there.
    """
    def records() -> Iterable[tuple[dict[str, Any], Path, int, str]]:
        for number, line in read_lines(path, setting):
            if line.strip():
                record = parse_line(line, f"{path}:{number}", columns, setting)
                yield record, path, number, line

    return some(JsonLines(path, records()), f"lines of {json.dumps(dict.fromkeys(columns, '...'))}")


def read_table(path: Path, split: str | None, columns: Sequence[str],
               setting: str = "data.source") -> TableRows:
    """Reads parquet files or a saved data set; `split` is that of `tables.rows`, all else that of
    `read_jsonl`."""
    def records() -> Iterable[tuple[dict[str, Any], Path, int, str]]:
        for row, file, number in tables.rows(path, split, setting):
            record = record_of(row, f"{file}: row {number}", columns, setting)
            yield record, file, number, json.dumps(row, sort_keys=True, default=str)

    return some(TableRows(path, records()), "rows")


def some(records: Any, what: str) -> Any:
    if not records:
        raise InputError(f"{records.path} holds no prompts; it needs {what}")
    return records


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


def parse_line(line: str, where: str, columns: Sequence[str] = KEYS,
               setting: str = "") -> dict[str, Any]:
    """The record that a line says; `where` begins every message. Raises InputError for one that is
    none."""
    row = parse_json(line, where)
    return record_of(row, where, columns, setting,
                     lambda: json.loads(line, parse_float=str))
